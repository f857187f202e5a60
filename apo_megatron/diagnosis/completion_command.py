"""``apo-doctor completion bash|zsh``: a script that completes options, commands, fields and their choices.

It is written from the parsers and the schema once, so that completing a word starts no Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import apo_megatron.doctor as doctor
from apo_megatron.config import EvalConfig, RLConfig, SFTConfig
from apo_megatron.config.describe import section_of
from apo_megatron.diagnosis import check_command, plan_command, selftest_command
from apo_megatron.launch.command import launch_parser
from apo_megatron.telemetry.command import config_parser
from apo_megatron.telemetry.command_parser import CommandParser
from checkpoints_convert import command as convert
from checkpoints_convert import hf_to_megatron, megatron_to_hf, verify

SHELLS = ("bash", "zsh")
_CONFIGS: dict[str, type[BaseModel]] = {
    "apo-train": RLConfig,
    "apo-sft": SFTConfig,
    "apo-eval": EvalConfig,
    "apo-ray": RLConfig,
}
# zsh runs bash's completions; its words do not end at "=".
_START_OF_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
_SCRIPT = r"""_apo_words() {
    case "$1" in
%(words)s
    esac
}
_apo_values() {
    case "$1" in
%(values)s
    esac
}
_apo_complete() {
    local current=${COMP_WORDS[COMP_CWORD]} program=${COMP_WORDS[0]##*/} field= words
    if [ "$current" = "=" ]; then
        current= field=${COMP_WORDS[COMP_CWORD-1]}
    elif [ "${COMP_WORDS[COMP_CWORD-1]}" = "=" ]; then
        field=${COMP_WORDS[COMP_CWORD-2]}
    fi
    if [ -n "$field" ]; then
        words=$(_apo_values "$field")
    elif [ "$COMP_CWORD" -gt 1 ]; then
        words=$(_apo_words "$program ${COMP_WORDS[1]}")
    fi
    if [ -z "$field" ] && [ -z "$words" ]; then
        words=$(_apo_words "$program")
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    case "${COMPREPLY[0]}" in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _apo_complete %(programs)s
"""


def completion(words: Sequence[str]) -> int:
    """Print the script. Raises ConfigError for wrong words."""
    options = command_parser().parse_args(words)
    print(completion_script(options.shell), end="")
    return 0


def completion_script(shell: str) -> str:
    """For ``shell``, one of SHELLS, to be sourced."""
    words = dict(_words())
    script = _SCRIPT % {
        "words": "\n".join(f'        "{name}") echo "{" ".join(found)}" ;;' for name, found in words.items()),
        "values": "\n".join(f'        {name}) echo "{" ".join(found)}" ;;' for name, found in _choices()),
        "programs": " ".join(dict.fromkeys(name.split()[0] for name in words)),
    }
    return (_START_OF_ZSH if shell == "zsh" else "") + script


def _words() -> Iterator[tuple[str, list[str]]]:
    """A program, or a program and its command -> what may follow."""
    for program, config in _CONFIGS.items():
        own = launch_parser().options if program == "apo-ray" else []
        yield program, list(dict.fromkeys([*config_parser(config, program).options, *own, *_names(config)]))
    yield "apo-doctor", [*doctor.COMMANDS, *doctor.command_parser().options]
    run = [*config_parser(RLConfig, "").options, *_names(RLConfig)]
    yield "apo-doctor check", [*check_command.command_parser().options, *_names(RLConfig)]
    yield "apo-doctor plan", list(dict.fromkeys([*plan_command.command_parser().options, *run]))
    yield "apo-doctor selftest", selftest_command.command_parser().options
    yield "apo-doctor completion", [*SHELLS, *command_parser().options]
    yield "apo-convert", [*convert.COMMANDS, "--help", "--version"]
    yield "apo-convert hf-to-megatron", hf_to_megatron.command_parser().options
    yield "apo-convert megatron-to-hf", megatron_to_hf.command_parser().options
    yield "apo-convert verify", verify.command_parser().options


def _names(config: type[BaseModel]) -> list[str]:
    return [f"{name}=" for name, _ in _fields(config)]


def _choices() -> Iterator[tuple[str, list[str]]]:
    """Fields with few values -> those. A field of two configurations has the same in both."""
    seen: dict[str, FieldInfo] = {}
    for config in _CONFIGS.values():
        seen |= dict(_fields(config))
    for name, info in seen.items():
        if get_origin(info.annotation) is Literal:
            yield name, [str(value) for value in get_args(info.annotation)]
        elif info.annotation is bool:
            yield name, ["true", "false"]


def _fields(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in config.model_fields.items():
        section = section_of(info)
        if section is None:
            yield prefix + name, info
        else:
            yield from _fields(section, f"{prefix}{name}.")


def command_parser() -> CommandParser:
    """Of this command line."""
    parser = CommandParser(
        prog="apo-doctor completion",
        description="Prints a script that completes the options of all commands, and section.field=value.",
        epilog="example, in .bashrc:\n  source <(apo-doctor completion bash)   # or save it, and source that",
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser
