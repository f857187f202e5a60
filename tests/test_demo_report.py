"""The Countdown demo: its stages, and the tables made of finished runs."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from apo_megatron.config.loader import load_config
from apo_megatron.config.schema import RLConfig, SFTConfig
from apo_megatron.errors import DataError

NUM_SAMPLES, KS = 32, (1, 2, 8, 32)


@pytest.fixture(scope="module")
def report(example_module: Callable[[str], ModuleType]) -> ModuleType:
    return example_module("report")


@pytest.fixture(scope="module")
def demo(example_module: Callable[[str], ModuleType]) -> ModuleType:
    return example_module("demo")


def chance(num_correct: int, k: int) -> float:
    """Pass@K from binomial coefficients: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(NUM_SAMPLES - num_correct, k) / math.comb(NUM_SAMPLES, k)


def mean_chance(num_correct: Sequence[int], k: int) -> float:
    return statistics.fmean(chance(c, k) for c in num_correct)


def write_run(folder: Path, final: Sequence[int], start: Sequence[int] | None = None, seed: int = 0) -> None:
    """What a training run leaves, with these numbers of right answers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, counts in (("final", final), ("start", start)):
        if counts is not None:
            values = {str(k): mean_chance(counts, k) for k in KS}
            content = {"pass_at_k": values, "num_samples": NUM_SAMPLES, "num_correct": list(counts)}
            (folder / f"evaluation_{name}.json").write_text(json.dumps(content))
    lines = [{"step": step, "reward": step / 10, "entropy": 1 - step / 10} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "train": {"num_steps": 3, "seed": seed},
        "optimizer": {"lr": 1e-4},
        "objective": {"apo_topk": 8},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def counts() -> dict[tuple[str, int], list[int]]:
    """(method, seed) -> right answers of 40 problems: base wide, GRPO narrow, APO between."""
    rng = np.random.default_rng(0)
    share = {"base": (1.0, 6.0), "grpo": (0.2, 0.6), "apo": (0.6, 1.5)}
    return {
        (method, seed): rng.binomial(NUM_SAMPLES, rng.beta(*share[method], 40)).tolist()
        for method in share
        for seed in (0, 1, 2)
    }


@pytest.fixture
def three_seeds(tmp_path: Path, counts: dict[tuple[str, int], list[int]]) -> Path:
    for seed in (0, 1, 2):
        folder = tmp_path / f"seed{seed}"
        write_run(folder / "grpo", counts["grpo", seed], counts["base", seed], seed)
        write_run(folder / "apo", counts["apo", seed], None, seed)
    return tmp_path


def test_one_seed(
    report: ModuleType,
    tmp_path: Path,
    counts: dict[tuple[str, int], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "grpo", counts["grpo", 0], counts["base", 0], seed=4)
    write_run(tmp_path / "apo", counts["apo", 0])
    assert report.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["base", "grpo", "apo"]
    assert results["settings"]["seeds"] == [4] and list(results["seeds"]) == ["4"]
    assert results["settings"]["methods"]["apo"]["num_steps"] == 3
    for method, summary in results["methods"].items():
        for k in KS:
            expected = mean_chance(counts[method, 0], k)
            low, high = summary["ci95"][str(k)]
            assert summary["pass_at_k"][str(k)] == pytest.approx(expected, abs=1e-12)
            assert low < expected < high
            if k != 2:  # not a column
                assert f"{100 * expected:.1f}" in shown
        assert (summary["num_problems"], summary["num_samples"], "std" in summary) == (40, 32, False)
    assert "40 held-out problems, 32 samples each; seed 4" in shown
    assert f"wrote {tmp_path / 'comparison.png'}" in shown
    assert (tmp_path / "comparison.png").stat().st_size > 50_000


def test_interval_is_the_spread_of_problems(report: ModuleType, tmp_path: Path) -> None:
    """Percentile bootstrap of a mean of many values: 1.96 standard errors on either side."""
    rng = np.random.default_rng(1)
    num_correct = rng.integers(0, NUM_SAMPLES + 1, 400).tolist()
    write_run(tmp_path / "apo", num_correct, num_correct)
    report.main([str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    low, high = results["methods"]["apo"]["ci95"]["1"]
    error = statistics.pstdev(c / NUM_SAMPLES for c in num_correct) / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert results["differences"]["apo - base"]["8"] == {"difference": 0.0, "ci95": [0.0, 0.0]}


def test_several_seeds(
    report: ModuleType,
    three_seeds: Path,
    counts: dict[tuple[str, int], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report.main([str(three_seeds)]) == 0
    results = json.loads((three_seeds / "results.json").read_text())
    table = (three_seeds / "table.md").read_text()
    for method, label in (("base", "base"), ("grpo", "GRPO"), ("apo", "APO")):
        cells = []
        for k in KS:
            by_seed = [mean_chance(counts[method, seed], k) for seed in (0, 1, 2)]
            mean, std = statistics.fmean(by_seed), statistics.stdev(by_seed)
            assert results["methods"][method]["pass_at_k"][str(k)] == pytest.approx(mean, abs=1e-12)
            assert results["methods"][method]["std"][str(k)] == pytest.approx(std, abs=1e-12)
            assert results["seeds"]["1"][method]["pass_at_k"][str(k)] == pytest.approx(by_seed[1], abs=1e-12)
            if k != 2:
                cells.append(f"{100 * mean:.1f} ± {100 * std:.1f}")
        assert f"| {label} | {' | '.join(cells)} |" in table
    assert "mean ± standard deviation over 3 seeds (0, 1, 2)" in capsys.readouterr().out


def test_differences_are_paired_by_problem(
    report: ModuleType, three_seeds: Path, counts: dict[tuple[str, int], list[int]]
) -> None:
    report.main([str(three_seeds)])
    results = json.loads((three_seeds / "results.json").read_text())
    assert list(results["differences"]) == ["grpo - base", "apo - base", "apo - grpo"]
    for k in KS:
        by_problem = [
            statistics.fmean(
                chance(counts["apo", seed][i], k) - chance(counts["grpo", seed][i], k) for seed in (0, 1, 2)
            )
            for i in range(40)
        ]
        found = results["differences"]["apo - grpo"][str(k)]
        assert found["difference"] == pytest.approx(statistics.fmean(by_problem), abs=1e-12)
        low, high = found["ci95"]
        half_width = 1.96 * statistics.pstdev(by_problem) / math.sqrt(40)
        assert (high - low) / 2 == pytest.approx(half_width, rel=0.1)


def test_evaluations_that_do_not_fit_are_refused(report: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "grpo", [1, 2, 3], [0, 1, 2])
    write_run(tmp_path / "apo", [1, 2])
    with pytest.raises(DataError, match="differ in problems, samples or K"):
        report.collect([tmp_path], ["grpo", "apo"])
    (tmp_path / "apo" / "evaluation_final.json").write_text('{"num_samples": 32}')
    with pytest.raises(DataError, match=r"apo/evaluation_final.json: not an evaluation \(KeyError"):
        report.collect([tmp_path], ["apo"])
    (tmp_path / "grpo" / "evaluation_start.json").unlink()
    with pytest.raises(FileNotFoundError):
        report.collect([tmp_path], ["grpo"])


def test_report_without_finished_runs(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "no method has finished" in capsys.readouterr().err


# --- the driver, with commands that only pretend ---------------------------------------------------


class FakeCommands:
    """Stands in for running a stage: keeps its command and writes what the stage would write."""

    def __init__(self, demo: ModuleType) -> None:
        self.root = Path(demo.ROOT)
        self.commands: list[tuple[str, ...]] = []
        self.exit_codes: dict[str, int] = {}

    def __call__(self, command: tuple[str, ...]) -> int:
        self.commands.append(command)
        settings = dict(part.split("=", 1) for part in command if "=" in part)
        name = Path(settings["train.run_dir"]).name if settings else "data"
        if name in self.exit_codes:
            return self.exit_codes[name]
        if name == "data":
            folder = self.root / command[command.index("--out") + 1]
            (folder / "init").mkdir(parents=True)
            (folder / "heldout.jsonl").touch()
            (folder / "init" / "config.json").touch()
        elif name == "base":
            folder = self.root / settings["train.run_dir"]
            (folder / "hf").mkdir(parents=True)
            (folder / "hf" / "config.json").touch()
        else:
            seed = int(settings["train.seed"])
            start = [0, 1, 2] if settings["evaluation.at_start"] == "true" else None
            write_run(self.root / settings["train.run_dir"], [1, 2, 3 + seed], start, seed)
        return 0

    def names(self) -> list[str]:
        """What ran since the last call."""
        found = []
        for command in self.commands:
            settings = dict(part.split("=", 1) for part in command if "=" in part)
            found.append(Path(settings["train.run_dir"]).name if settings else "data")
        self.commands.clear()
        return found


@pytest.fixture
def fake(demo: ModuleType, report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fake = FakeCommands(demo)
    monkeypatch.setattr(report, "comparison_picture", lambda results, histories, path, title: path)  # slow
    monkeypatch.setattr(demo, "_run", fake)
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    return fake


def test_demo_runs_all_stages_and_repeats_only_what_is_out_of_date(
    demo: ModuleType, fake: FakeCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert demo.main(out) == 0
    base_flags = [part for command in fake.commands for part in command if "at_start" in part]
    assert base_flags == ["evaluation.at_start=true", "evaluation.at_start=false"]
    assert fake.names() == ["data", "base", "grpo", "apo"]
    shown = capsys.readouterr().out
    assert "=== stage 2/4: cold start (seed 0) | elapsed 0:00 | expected about" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["methods"]) == {"base", "grpo", "apo"}

    assert demo.main(out) == 0 and fake.names() == []
    assert demo.main([*out, "--methods", "apo", "grpo", "grpo_kl"]) == 0 and fake.names() == ["grpo_kl"]
    assert demo.main([*out, "--steps", "9"]) == 0 and fake.names() == ["grpo", "apo"]
    assert (tmp_path / "grpo" / "evaluation_start.json").exists()  # its folder was made anew, with the base
    assert demo.main([*out, "--fresh"]) == 0 and fake.names() == ["data", "base", "grpo", "apo"]
    (tmp_path / "base" / "hf" / "config.json").unlink()
    assert demo.main(out) == 0 and fake.names() == ["base", "grpo", "apo"]


def test_an_edited_yaml_is_another_run(
    demo: ModuleType,
    fake: FakeCommands,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "countdown"
    shutil.copytree(demo.HERE, here)
    for module in (demo, sys.modules["stages"]):
        monkeypatch.setattr(module, "HERE", here)
    out = ["--out", str(tmp_path / "out")]
    assert demo.main(out) == 0 and len(fake.names()) == 4
    (here / "apo.yaml").write_text((here / "apo.yaml").read_text() + "optimizer: {lr: 2.0e-4}\n")
    assert demo.main(out) == 0 and fake.names() == ["apo"]
    with (here / "sft.yaml").open("a") as file:
        file.write("# a comment\n")
    assert demo.main(out) == 0 and fake.names() == []
    (here / "sft.yaml").write_text("train: [\n")
    assert demo.main(out) == 2 and fake.names() == []
    assert "sft.yaml" in capsys.readouterr().err


def test_demo_over_seeds(demo: ModuleType, fake: FakeCommands, tmp_path: Path) -> None:
    assert demo.main(["--out", str(tmp_path), "--seeds", "0", "5", "0"]) == 0
    assert fake.names() == ["data", "base", "grpo", "apo"] * 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["seeds"]) == ["0", "5"] and results["settings"]["seeds"] == [0, 5]
    assert results["methods"]["apo"]["num_problems"] == 3
    assert "demo.py --out" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("code", "passed_on", "how"), [(3, 3, "failed with exit code 3"), (-9, 137, "was killed by SIGKILL")]
)
def test_failing_stage_passes_its_code_on(
    demo: ModuleType,
    fake: FakeCommands,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    passed_on: int,
    how: str,
) -> None:
    fake.exit_codes["grpo"] = code
    assert demo.main(["--out", str(tmp_path)]) == passed_on
    shown = capsys.readouterr().err
    assert f"error: GRPO (seed 0) {how}" in shown and "-m apo_megatron.train" in shown
    fake.names()
    fake.exit_codes.clear()
    assert demo.main(["--out", str(tmp_path)]) == 0 and fake.names() == ["grpo", "apo"]


def test_stage_without_its_results_is_a_failure(
    demo: ModuleType, fake: FakeCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.exit_codes["base"] = 0
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "ended without writing" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--quick"], ["--quick", "--steps", "3", "--nproc", "1"]])
def test_every_command_is_a_valid_configuration(
    demo: ModuleType, fake: FakeCommands, tmp_path: Path, extra: list[str]
) -> None:
    methods = ["grpo", "grpo_kl", "kl_on_wrong", "apo"]
    assert demo.main(["--out", str(tmp_path), "--methods", *methods, *extra]) == 0
    for command in fake.commands[1:]:
        module, path = command[command.index("-m") + 1], command[command.index("--config") + 1]
        overrides = [part for part in command if "=" in part]
        config: Any = load_config(
            SFTConfig if module.endswith("sft") else RLConfig, demo.ROOT / path, overrides
        )
        assert config.parallel.tensor_parallel_size == (1 if "1" in extra else 2)
        assert config.model.hf_path.startswith(str(tmp_path))
    assert fake.commands[-1][-1] == overrides[-1]  # all of them were looked at
    if "--steps" in extra:
        assert config.train.num_steps == 3


def test_printed_commands_can_be_pasted(
    demo: ModuleType, fake: FakeCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--out", str(tmp_path / "with space"), "--quick"]) == 0
    text = capsys.readouterr().out.replace("\\\n", " ")
    printed = [shlex.split(line.removeprefix("$ ")) for line in text.splitlines() if line.startswith("$ ")]
    assert [line[0] for line in printed] == ["OMP_NUM_THREADS=1"] * 4
    assert [sorted(line[1:]) for line in printed] == [sorted(command) for command in fake.commands]


def test_real_command_runs_and_reports_its_code(demo: ModuleType) -> None:
    assert demo._run([sys.executable, "-c", "import os; assert os.environ['OMP_NUM_THREADS'] == '1'"]) == 0
    assert demo._run([sys.executable, "-c", "raise SystemExit(7)"]) == 7
