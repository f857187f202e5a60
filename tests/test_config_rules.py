"""Configuration: rules across fields, and that every shipped YAML and page is up to date."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from apo_megatron.config import EvalConfig, RLConfig, SFTConfig, load_config
from apo_megatron.config.data import DataSource, PrepareConfig
from apo_megatron.config.describe import describe_type, section_of
from apo_megatron.config.section import Section
from apo_megatron.telemetry.field_help import describe_fields
from tests.config_problems import MINIMAL, MINIMAL_EVAL, problem, problems
from tests.config_rule_cases import BROKEN_RULES
from tools import document_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


# --- rules across fields --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "overrides", "named"),
    [(cls, overrides, named) for cls, _, overrides, named in BROKEN_RULES],
    ids=[f"{cls.__name__}-{rule}-{len(overrides)}" for cls, rule, overrides, _ in BROKEN_RULES],
)
def test_a_broken_rule_names_its_fields(
    file: Path, cls: type[Section], overrides: list[str], named: list[str]
) -> None:
    if cls is EvalConfig:
        file.write_text(MINIMAL_EVAL)
    load_config(cls, file)  # kept before the overrides
    message = problem(file, overrides, cls)
    assert [part for part in named if part not in message] == []


def _sections_below(cls: type[BaseModel]) -> Iterator[type[Section]]:
    assert issubclass(cls, Section)
    yield cls
    for info in cls.model_fields.values():
        section = section_of(info)
        if section is not None:
            yield from _sections_below(section)


def test_every_rule_has_a_case_and_every_case_its_rule() -> None:
    rules = {
        (section.__name__, rule)
        for cls in (RLConfig, SFTConfig, EvalConfig)
        for section in _sections_below(cls)
        for rule in section.rules()
    }
    # Rules of a section are proved through RLConfig; those of a whole command through that command.
    proved = {
        (section.__name__, rule)
        for cls, rule, _, _ in BROKEN_RULES
        for section in _sections_below(cls)
        if rule in section.rules()
    }
    assert rules == proved
    assert {rule for _, rule in rules} == {rule for _, rule, _, _ in BROKEN_RULES}


def test_the_nearest_loss_is_named(file: Path) -> None:
    assert problem(file, ["objective.loss_mode=cipo"]).endswith("; did you mean cispo?")
    assert "did you mean" not in problem(file, ["objective.loss_mode=8"])
    for written, meant in {"grpo": "vanilla", "PPO": "vanilla", "apo": "apo_ratio"}.items():
        assert problem(file, [f"objective.loss_mode={written}"]).endswith(f"; did you mean {meant}?")


def test_rules_of_a_section_are_reported_together(file: Path) -> None:
    found = problems(
        file,
        ["objective.apo_push_coeff=2", "objective.use_kl_loss=true", "objective.use_kl_loss_on_wrong=true"],
    )
    assert ["apo_push_coeff" in found[0], "use_kl_loss" in found[1], len(found)] == [True, True, 2]


@pytest.mark.parametrize(
    ("push", "pull", "is_refused"),
    [
        (1.05, 0.1, False),
        (1.05, 0.25, True),  # 0.8, the boundary itself
        (1.38, 0.1, True),  # 1.28, which floats put just under 1 + clip_high
        (1.05, 0.24, False),
        (1.0, 0.0, False),
    ],
)
def test_push_minus_pull_lies_strictly_inside_the_clip_range(
    file: Path, push: float, pull: float, is_refused: bool
) -> None:
    overrides = [f"objective.apo_push_coeff={push}", f"objective.apo_pull_coeff={pull}"]
    if is_refused:
        assert "every wrong token would start clipped" in problem(file, overrides)
    else:
        load_config(RLConfig, file, overrides)
    load_config(RLConfig, file, [*overrides, "objective.loss_mode=vanilla"])  # which has neither


# --- what is shipped ------------------------------------------------------------------------------

SHIPPED = sorted(  # but for what others build on; recipes are in test_recipes.py
    path
    for path in (ROOT / "examples").rglob("*.yaml")
    if path.name != "base.yaml" and path.parent.name != "recipes"
)


def command_of(path: Path) -> type[BaseModel]:
    """The config class of a shipped YAML: its head says how it is run."""
    commands = set(
        re.findall(r"^#.* -m ((?:apo_megatron|tools)\.\w+) --config", path.read_text(), re.MULTILINE)
    )
    assert len(commands) == 1, (
        f"{path.name}: one comment must name its command (... -m apo_megatron.x --config ...)"
    )
    return document_config.COMMANDS[commands.pop()]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configurations_load(path: Path) -> None:
    load_config(command_of(path), path)


def test_something_is_shipped() -> None:
    assert SHIPPED


def test_the_reference_page_is_up_to_date() -> None:
    assert document_config.PAGE.read_text() == document_config.render(), "make docs"


def test_the_example_of_the_reference_page_loads(file: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", document_config.render(), re.DOTALL)
    assert example is not None
    file.write_text(example.group(1))
    load_config(RLConfig, file)


def test_a_section_inside_a_section_is_described() -> None:
    page, help_text = document_config.render(), describe_fields(RLConfig)
    assert "### `rollout.sglang`\n" in page and "Sections: `model`, " in page
    assert page.count("| `num_servers` |") == 1 and "| `sglang` |" not in page
    assert "`urls` must name each server once." in page
    assert r"mean \|log-prob difference\| (nats)" in page  # a bare | would end the cell
    assert "\nrollout.sglang: SGLang servers" in help_text
    assert "\n  rollout.sglang.num_servers=1\n" in help_text


@pytest.mark.parametrize("cls", [RLConfig, SFTConfig, EvalConfig, PrepareConfig, DataSource])
def test_every_field_is_documented_and_has_a_type_in_words(cls: type[BaseModel]) -> None:
    for section in _sections_below(cls):
        assert section.__doc__
        for name, info in section.model_fields.items():
            assert describe_type(info)
            assert section_of(info) or info.description, f"{section.__name__}.{name}"
        assert all(getattr(section, rule).__doc__ for rule in section.rules())
