"""Configuration: what is read, what is refused and how it is said, what is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from apo_megatron.config import (
    EvalConfig,
    EvaluationConfig,
    OptimizerConfig,
    RLConfig,
    dump_config,
    load_config,
)
from tests.config_problems import MINIMAL, MINIMAL_EVAL, problem, problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


# --- what is read ---------------------------------------------------------------------------------


def test_defaults_then_file_then_overrides(file: Path) -> None:
    file.write_text(MINIMAL + "objective: {clip_low: 0.1, clip_high: 0.3}\n")
    cfg = load_config(RLConfig, file, ["objective.clip_high=0.4", "train.num_steps=7", "train.num_steps=8"])
    assert (cfg.objective.apo_topk, cfg.objective.clip_low, cfg.objective.clip_high) == (8, 0.1, 0.4)
    assert cfg.train.num_steps == 8  # of two overrides the last one counts


def test_overrides_reach_sections_that_the_file_lacks_and_plain_fields(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(MINIMAL_EVAL)
    cfg = load_config(EvalConfig, path, ["rollout.top_p=0.9", "output_dir=a=b.json", "evaluation.ks=[1, 8]"])
    assert cfg.rollout.top_p == 0.9
    assert cfg.output_dir == "a=b.json"
    assert cfg.evaluation.ks == (1, 8)


def test_overrides_reach_a_section_inside_a_section(file: Path) -> None:
    file.write_text(MINIMAL + "rollout: {sglang: {host: 0.0.0.0}}\n")
    cfg = load_config(RLConfig, file, ["rollout.sglang.num_servers=2", "rollout.sglang.urls=[http://a:1]"])
    sglang = cfg.rollout.sglang
    assert (sglang.host, sglang.num_servers, sglang.urls) == ("0.0.0.0", 2, ("http://a:1",))


def test_yaml_1_1_does_not_surprise(file: Path) -> None:
    """YAML 1.1 reads 1e-6 as text and 2026-01-31 as a date."""
    assert yaml.safe_load("1e-6") == "1e-6"
    file.write_text(
        MINIMAL.replace("run_dir: run", "run_dir: 2026-01-31") + "optimizer: {lr: 2e-6, adam_eps: 1E-9}"
    )
    cfg = load_config(RLConfig, file, ["optimizer.min_lr=1e-7", "optimizer.clip_grad=1"])
    assert (cfg.optimizer.lr, cfg.optimizer.adam_eps, cfg.optimizer.min_lr) == (2e-6, 1e-9, 1e-7)
    assert isinstance(cfg.optimizer.clip_grad, float)
    assert cfg.train.run_dir == "2026-01-31"


@pytest.mark.parametrize("empty", ["", "null"])
def test_an_override_can_take_a_value_back(file: Path, empty: str) -> None:
    file.write_text(MINIMAL + "objective: {dual_clip: 3}\n")
    assert load_config(RLConfig, file, [f"objective.dual_clip={empty}"]).objective.dual_clip is None


def test_a_configuration_is_frozen(file: Path) -> None:
    cfg = load_config(RLConfig, file)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.train.num_steps = 3  # type: ignore[misc]
    hash(cfg)  # lists would make it mutable inside


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("optimiser: {lr: 1.0}", "run.yaml:4: optimiser: unknown field, did you mean optimizer?"),
        (
            "objective:\n  apo_top_k: 8",
            "run.yaml:5: objective.apo_top_k: unknown field, did you mean objective.apo_topk?",
        ),
        ("rollout: {lr: 1.0}", "run.yaml:4: rollout.lr: unknown field, did you mean optimizer.lr?"),
        ("reward: {zzzzz: 1}", "run.yaml:4: reward.zzzzz: unknown field, known in reward: num_workers"),
        ("1: x", "run.yaml:4: 1: unknown field, known in the file: model, data, train, parallel, "),
        (
            "rollout: {group_size: '8'}",
            "run.yaml:4: rollout.group_size: found '8', expected whole number >= 1",
        ),
        (
            "rollout: {group_size: 8.0}",
            "run.yaml:4: rollout.group_size: found 8.0, expected whole number >= 1",
        ),
        ("rollout: {top_p: 0}", "run.yaml:4: rollout.top_p: found 0, expected number > 0 and <= 1"),
        ("optimizer: {lr: true}", "run.yaml:4: optimizer.lr: found true, expected number > 0"),
        ("optimizer: {lr: .inf}", "run.yaml:4: optimizer.lr: found inf, expected number > 0"),
        ("optimizer: {lr: .nan}", "run.yaml:4: optimizer.lr: found nan, expected number > 0"),
        ("checkpoint: {export_hf: 1}", "run.yaml:4: checkpoint.export_hf: found 1, expected true or false"),
        (
            "logging: {wandb_project: no}",
            "run.yaml:4: logging.wandb_project: found false, expected text or null",
        ),
        (
            "objective: {dual_clip: [1]}",
            "run.yaml:4: objective.dual_clip: found [1], expected number > 1 or null",
        ),
        (
            "objective: {kl_estimator: k4}",
            "run.yaml:4: objective.kl_estimator: found 'k4', expected one of k1, k2, k3",
        ),
        (
            "objective: {mismatch_correction: icpop}",
            "run.yaml:4: objective.mismatch_correction: found 'icpop', expected one of none, tis, icepop, "
            "seq_mask_tis; did you mean icepop?",
        ),
        (
            "objective:\n  cispo: {clip_hihg: 4}",
            "run.yaml:5: objective.cispo.clip_hihg: unknown field, did you mean objective.cispo.clip_high?",
        ),
        (
            "evaluation: {ks: 8}",
            "run.yaml:4: evaluation.ks: found 8, expected list, each a whole number >= 1",
        ),
        (
            "rollout: {sglang: {server_args: [1]}}",
            "run.yaml:4: rollout.sglang.server_args.0: found 1, expected list, each text",
        ),
        ("evaluation: {ks: [1, 0]}", "run.yaml:4: evaluation.ks.1: found 0, expected list, each a whole "),
        (
            "reward: countdown",
            "run.yaml:4: reward: found 'countdown', expected a section with the fields num_workers",
        ),
        (
            "rollout:\n  sglang:\n    num_servers: two",
            "run.yaml:6: rollout.sglang.num_servers: found 'two', expected whole number >= 1",
        ),
        (
            "rollout:\n  sglang: {num_server: 2}",
            "run.yaml:5: rollout.sglang.num_server: unknown field, did you mean rollout.sglang.num_servers?",
        ),
        (
            "rollout: {sglang: [http://host:1]}",
            "run.yaml:4: rollout.sglang: found ['http://host:1'], expected a section with the fields urls, ",
        ),
        (
            "evaluation: {fields: {answer: 5}}",
            "run.yaml:4: evaluation.fields.0.1: found 5, expected mapping of text to text",
        ),
        (
            "evaluation: {fields: [answer]}",
            "run.yaml:4: evaluation.fields: found ['answer'], expected mapping of text to text",
        ),
        ("reward:", "run.yaml:4: reward: found null, expected a section with the fields num_workers"),
        ("train: {run_dir: r}", "run.yaml:4: train: given twice, first on line 3: keep one"),
        (
            "optimizer:\n  lr: 1.0\n  lr: 2.0",
            "run.yaml:6: optimizer.lr: given twice, first on line 5: keep one",
        ),
    ],
)
def test_a_bad_line_is_named(file: Path, extra: str, expected: str) -> None:
    file.write_text(MINIMAL + extra + "\n")
    assert problems(file)[0].startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.num_steps", "override train.num_steps: expected section.field=value"),
        ("=3", "override =3: : unknown field, known in the file: model, data"),
        (
            "train.num_step=3",
            "override train.num_step=3: train.num_step: unknown field, did you mean train.num_steps?",
        ),
        ("num_steps=3", "override num_steps=3: num_steps: unknown field, did you mean train.num_steps?"),
        ("trian.seed=3", "override trian.seed=3: trian.seed: unknown field, did you mean train.seed"),
        ("train.seed.x=3", "override train.seed.x=3: train.seed.x: unknown field, did you mean train.seed?"),
        ("train=3", "override train=3: train is a section: name one of its fields, as in train.run_dir=..."),
        (
            "rollout.sglang=3",
            "override rollout.sglang=3: rollout.sglang is a section: name one of its fields, as in "
            "rollout.sglang.urls=...",
        ),
        (
            "rollout.sglang.num_server=2",
            "override rollout.sglang.num_server=2: rollout.sglang.num_server: unknown field, did you mean "
            "rollout.sglang.num_servers?",
        ),
        (
            "rollout.num_servers=2",
            "override rollout.num_servers=2: rollout.num_servers: unknown field, did you mean "
            "rollout.sglang.num_servers?",
        ),
        (
            "sglang.num_servers=2",
            "override sglang.num_servers=2: sglang.num_servers: unknown field, did you mean "
            "rollout.sglang.num_servers?",
        ),
        (
            "rollout.sglang.num_servers=0",
            "override rollout.sglang.num_servers=0: rollout.sglang.num_servers: found 0, expected whole",
        ),
        ("train.seed=[1", "override train.seed=[1: the value is not YAML: "),
        ("train.seed=x", "override train.seed=x: train.seed: found 'x', expected whole number >= 0"),
        ("train.seed=", "override train.seed=: train.seed: found null, expected whole number >= 0"),
    ],
)
def test_a_bad_override_is_named(file: Path, override: str, expected: str) -> None:
    assert problem(file, [override]).startswith(expected)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "path: a, wieght: 2",
            "run.yaml:4: data.sources.1.wieght: unknown field, did you mean data.sources.1.weight?",
        ),
        ("path: a, weight: 0", "run.yaml:4: data.sources.1.weight: found 0, expected number > 0"),
        ("name: a", "run.yaml:3: data.sources.1.path: missing, expected text (JSONL or"),
        ("path: a, path: b", "run.yaml:4: data.sources.1.path: given twice, first on line 4"),
    ],
)
def test_a_bad_source_is_named(file: Path, source: str, expected: str) -> None:
    file.write_text(
        "model: {hf_path: model}\ndata:\n  sources: [{path: x},\n    {" + source + "}]\n"
        "train: {run_dir: run, num_steps: 10}\n"
    )
    assert problem(file).startswith(expected)


def test_an_override_of_a_section_that_is_none_reports_the_section(file: Path) -> None:
    file.write_text(MINIMAL + "reward: 3\n")
    assert problem(file, ["reward.name=countdown"]).startswith(
        "run.yaml:4: reward: found 3, expected a section"
    )


def test_a_missing_field_says_what_it_is(file: Path) -> None:
    file.write_text("model: {hf_path: model}\ntrain: {run_dir: run}\n")
    section, field = problems(file)
    assert section.startswith("run.yaml: data: missing, expected a section with the fields subset, ")
    assert (
        field == "run.yaml:2: train.num_steps: missing, expected whole number >= 1 (Rollout-and-train steps.)"
    )


def test_all_problems_are_reported_at_once(file: Path) -> None:
    file.write_text(
        MINIMAL + "parallel: {sequence_parallel: 1}\nrollout: {temprature: 1}\nrollout: {top_p: 2}\n"
    )
    found = problems(file, ["objective.apo_topk=0", "nothing=1"])
    assert len(found) == 5
    named = (
        "rollout: given twice",
        "nothing",
        "parallel.sequence_parallel",
        "rollout.top_p",
        "objective.apo_topk",
    )
    assert all(any(name in line for line in found) for name in named)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"train: {a: 1\nmodel: 2\n", "run.yaml:2: not YAML: "),
        (b"a: 1\n\tb: 2\n", "run.yaml:2: not YAML: "),
        (b"a: 1\n--- \nb: 2\n", "run.yaml:2: not YAML: "),
        (
            b"a: !!python/object/apply:os.getcwd []\n",
            "run.yaml:1: not YAML: could not determine a constructor",
        ),
        (b"a: !!int x\n", "run.yaml: not YAML: "),
        (b"a: \x07\n", "run.yaml: not YAML: "),
        (b"a: \xff\n", "run.yaml: not UTF-8 text (byte 3)"),
        (b"- 1\n- 2\n", "run.yaml: found [1, 2], expected sections"),
        (b"", "run.yaml: found null, expected sections"),
    ],
)
def test_a_file_that_is_no_configuration(file: Path, content: bytes, expected: str) -> None:
    file.write_bytes(content)
    assert problem(file).startswith(expected)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in problem(tmp_path / "missing.yaml")
    assert "Is a directory" in problem(tmp_path)


def test_aliases_that_point_back_end(file: Path) -> None:
    file.write_text(MINIMAL + "rollout: &a\n  b: *a\n")
    assert "rollout.b: unknown field" in problem(file)


# --- a file on top of another ---------------------------------------------------------------------


def test_a_file_lies_over_its_base(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "below"
    folder.mkdir()
    (folder / "first.yaml").write_text(
        "rollout: {top_p: 0.5, temperature: 0.7, sglang: {host: a, num_servers: 2}}\n"
    )
    (folder / "second.yaml").write_text(
        "base: first.yaml\nrollout: {top_p: 0.6}\nobjective: {dual_clip: 3}\n"
        "evaluation: {ks: [1, 2, 4], fields: {answer: a}}\n"
    )
    file.write_text(
        "base: below/second.yaml\n" + MINIMAL + "rollout: {sglang: {host: b}}\nobjective: {dual_clip: null}\n"
        "evaluation: {ks: [8], fields: {id: b}}\n"
    )
    cfg = load_config(RLConfig, file, ["rollout.temperature=0.8"])
    assert (cfg.rollout.top_p, cfg.rollout.temperature) == (0.6, 0.8)
    assert (cfg.rollout.sglang.host, cfg.rollout.sglang.num_servers) == ("b", 2)
    assert cfg.objective.dual_clip is None  # taken back
    assert cfg.evaluation.ks == (8,)  # a list replaces
    assert dict(cfg.evaluation.fields) == {"answer": "a", "id": "b"}
    resolved = tmp_path / "resolved.yaml"
    dump_config(cfg, resolved)
    assert "base" not in yaml.safe_load(resolved.read_text())
    assert load_config(RLConfig, resolved) == cfg


def test_a_problem_is_reported_where_it_stands(file: Path) -> None:
    (file.parent / "base.yaml").write_text(
        "train: {seed: x}\nrollout:\n  top_q: 1\n  group_size: 0\nrollout: {top_p: 1}\n"
        "data:\n  sources:\n    - {path: a, weight: 2}\n"
    )
    file.write_text(
        "base: base.yaml\nmodel: {hf_path: m}\ntrain:\n  run_dir: r\n"
        "rollout: {group_size: -1}\ndata:\n  sources:\n    - name: b\n"
    )
    found = problems(file)
    expected = [
        "base.yaml:5: rollout: given twice, first on line 2: keep one",
        "base.yaml:1: train.seed: found 'x'",
        "run.yaml:3: train.num_steps: missing",
        "run.yaml:7: data.sources.0.path: missing",  # not line 8 of the base, whose list is replaced
        "run.yaml:5: rollout.group_size: found -1",  # not the base's, which is replaced
    ]
    assert [[line.startswith(start) for line in found].count(True) for start in expected] == [1] * 5
    assert len(found) == 5


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("base: 3", "run.yaml:1: base: found 3, expected another YAML file"),
        ("base:", "run.yaml:1: base: found null, expected another YAML file"),
        ("base: none.yaml", "run.yaml:1: base: found no file none.yaml: expected a path relative to "),
        ("base: run.yaml", "run.yaml:1: base: files build on each other in a circle (run.yaml -> run.yaml)"),
        ("base: list.yaml", "list.yaml: found [1], expected sections"),
        (
            "base: other.yaml",
            "other.yaml:2: base: files build on each other in a circle (run.yaml -> other.yaml -> run.yaml)",
        ),
    ],
)
def test_a_base_that_cannot_be_is_named(file: Path, base: str, expected: str) -> None:
    (file.parent / "other.yaml").write_text("train: {seed: 1}\nbase: run.yaml\n")
    (file.parent / "list.yaml").write_text("[1]\n")
    file.write_text(f"{base}\n{MINIMAL}")
    assert problem(file).startswith(expected)


# --- writing --------------------------------------------------------------------------------------


def test_a_dumped_configuration_loads_equal(file: Path, tmp_path: Path) -> None:
    overrides = [
        "rollout.stop_token_ids=[3, 5]",
        "rollout.sglang.urls=[http://host:1, http://host:2]",
        "optimizer.lr=1e-6",
        "model.hf_path=Modèle",
        "evaluation.ks=[1]",
        "evaluation.fields={answer: a.b}",
        "data.train_path=null",
        "data.sources=[{path: a, weight: 2, fields: {answer: c}}, {path: b}]",
    ]
    cfg = load_config(RLConfig, file, overrides)
    written = tmp_path / "resolved.yaml"
    written.write_text("what was there before")
    dump_config(cfg, written)
    assert load_config(RLConfig, written) == cfg
    assert "Modèle" in written.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "resolved.yaml",
        "run.yaml",
    ]  # nothing left over


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("disk full")

    cfg = load_config(RLConfig, file)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        dump_config(cfg, file)
    assert file.read_text() == MINIMAL


def test_sections_can_be_built_in_code() -> None:
    assert EvaluationConfig(ks=(1, 2)).ks == (1, 2)
    with pytest.raises(ValidationError):
        OptimizerConfig(lr="1e-6")  # type: ignore[arg-type]
