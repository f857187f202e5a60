"""Writes docs/configuration.md from the schema; --check only says whether it is up to date.

python tools/document_config.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from apo_megatron.config import EvalConfig, RLConfig, SFTConfig
from apo_megatron.config.data import PrepareConfig
from apo_megatron.config.describe import describe_default, describe_type, item_section_of, section_of
from apo_megatron.config.section import Section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
COMMANDS: dict[str, type[Section]] = {
    "apo_megatron.train": RLConfig,
    "apo_megatron.sft": SFTConfig,
    "apo_megatron.evaluate": EvalConfig,
    "tools.prepare_data": PrepareConfig,
}
INTRODUCTION = """\
<!-- Written by tools/document_config.py (make docs): change apo_megatron/config/ instead. -->

# Configuration

    python -m COMMAND --config FILE [section.field=value ...]

Defaults come first, then the YAML file, then the overrides; the value of an override is read as YAML
(`evaluation.ks=[1, 8]`, `objective.dual_clip=null`), and of two for one field the last one counts. The
resolved configuration is written into the run directory and can be used as a FILE itself.

A configuration is checked as a whole before anything starts: unknown, repeated and missing fields, types,
bounds and the rules below. Every problem is reported, with file, line and the nearest known name. Types are
strict: `"8"` and `8.0` are no whole numbers and `yes` is no text; a whole number may stand for a number.

The least that `apo_megatron.train` needs:

```yaml
model:
  hf_path: runs/demo/seed0/sft/hf
data:
  train_path: runs/demo/seed0/data/train.jsonl
train:
  run_dir: runs/first
  num_steps: 10
```

A file may build on another one: `base: other.yaml` (a path relative to the file) puts the values of that
file, which may have a base itself, under its own. Sections and mappings are merged field by field; anything
else, lists too, replaces what the base has (`null` takes it back). The resolved configuration has no base.

```yaml
base: base.yaml
model: {hf_path: Qwen/Qwen2.5-7B}
train: {run_dir: runs/qwen2.5_7b}
```
"""


def render() -> str:
    """The page as Markdown."""
    return "\n".join([INTRODUCTION, *_commands(), *_sections()])


def _commands() -> Iterator[str]:
    yield "## Commands\n"
    for command, config in COMMANDS.items():
        yield f"### `{command}`\n"
        yield f"Sections: {', '.join(f'`{name}`' for name, _ in _sections_below(config))}.\n"
        yield from _table(config)
        yield from _rules(config)


def _sections() -> Iterator[str]:
    yield "## Sections\n"
    readers: dict[tuple[str, type[Section]], list[str]] = {}
    for command, config in COMMANDS.items():
        for name, section in _sections_below(config):
            readers.setdefault((name, section), []).append(command)
    names = [name for name, _ in readers]
    for (name, section), commands in readers.items():
        # Commands may give one name to different sections.
        title = f"`{name}`" if names.count(name) == 1 else f"`{name}` of `{', '.join(commands)}`"
        yield f"### {title}\n"
        read_by = ", ".join(f"`{command}`" for command in commands)
        yield f"{_one_line(section.__doc__)} Read by {read_by}.\n"
        yield from _table(section)
        yield from _rules(section)


def _sections_below(config: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted name, section) of every section in ``config``, each before those inside it."""
    for name, info in config.model_fields.items():
        section = section_of(info)
        if section is not None and issubclass(section, Section):
            yield f"{prefix}{name}", section
            yield from _sections_below(section, f"{prefix}{name}.")
        item = item_section_of(info)
        if item is not None and issubclass(item, Section):
            yield f"{prefix}{name}[]", item


def _table(section: type[Section]) -> Iterator[str]:
    fields = {name: info for name, info in section.model_fields.items() if not section_of(info)}
    if not fields:
        return
    yield "| Field | Type | Default | Meaning |"
    yield "|---|---|---|---|"
    for name, info in fields.items():
        default = "**required**" if info.is_required() else f"`{describe_default(info)}`"
        meaning = str(info.description).replace("|", r"\|")  # the table's own sign
        yield f"| `{name}` | {describe_type(info)} | {default} | {meaning} |"
    yield ""


def _rules(section: type[Section]) -> Iterator[str]:
    rules = list(section.rules())
    if rules:
        yield "Rules:\n"
        yield from (f"- {_one_line(getattr(section, name).__doc__)}" for name in rules)
        yield ""


def _one_line(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=_one_line(__doc__))
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if out of date")
    options = parser.parse_args(argv)
    text = render()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is out of date: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
