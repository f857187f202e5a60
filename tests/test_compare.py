"""examples/countdown/compare.py with commands that only pretend: what is chosen, resumed, refused, shown."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from apo_megatron import __version__
from apo_megatron.config import RLConfig, load_config
from apo_megatron.errors import DataError
from tests.countdown_base import COUNTDOWN
from tests.pretended_commands import NUM_SAMPLES, FakeExecutor, draw


@pytest.fixture(scope="module")
def compare(example_module: Callable[[str], ModuleType]) -> ModuleType:
    return example_module("compare")


@pytest.fixture(scope="module")
def compare_results(example_module: Callable[[str], ModuleType]) -> ModuleType:
    return example_module("compare_results")


def pass_at(num_correct: Sequence[int], k: int) -> float:
    """From binomial coefficients."""
    wrong = [math.comb(NUM_SAMPLES - c, k) / math.comb(NUM_SAMPLES, k) for c in num_correct]
    return 1 - statistics.fmean(wrong)


@pytest.fixture
def run(
    compare: ModuleType, compare_results: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """``run(fake, *words)`` -> exit code, results.json."""
    monkeypatch.setattr(compare_results, "frontier_picture", lambda *_: None)  # slow
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)

    def run(fake: FakeExecutor, *words: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(compare, "make_executor", lambda num_slots: nullcontext(fake))
        code = compare.main(["--out", str(tmp_path), *words])
        path = tmp_path / "results.json"
        return code, json.loads(path.read_text()) if path.exists() else {}

    return run


def test_tuning_takes_the_best_trial_and_tests_it_on_every_seed_on_other_problems(run: Any) -> None:
    def counts(settings: dict[str, str]) -> list[int]:
        is_best = (settings.get("optimizer.lr"), settings.get("objective.cispo.clip_high")) == ("0.0002", "2")
        is_tuning = settings.get("evaluation.data_path", "").endswith("validation.jsonl")
        if is_tuning and "objective.cispo.clip_high" in settings:
            # @1 and @32 of the best 0.4 and 0.8; of others 0.5 and 0.5, or 0.03 and 1.
            other = [32, 0] if settings["optimizer.lr"] == "0.0001" else [1, 1]
            return [16, 16, 16, 16, 0] * 2 if is_best else other * 5
        return [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]

    fake = FakeExecutor(counts)
    code, results = run(fake, "--tune", "--methods", "grpo", "cispo", "--seeds", "0", "1")
    assert code == 0
    trained = fake.runs()
    tuning = [r for r in trained if r["evaluation.data_path"].endswith("validation.jsonl")]
    final = [r for r in trained if r["evaluation.data_path"].endswith("test.jsonl")]
    assert len(tuning) == 12 and len(final) == 4 and len(trained) == 16
    assert {r["train.seed"] for r in tuning} == {"3"}
    assert sorted(r["train.seed"] for r in final) == ["0", "0", "1", "1"]
    chosen = results["methods"]["cispo"]["chosen"]
    assert chosen == {"learning_rate": 2e-4, "coefficient": 2}
    of_cispo = [r for r in final if "objective.cispo.clip_high" in r]
    assert {r["optimizer.lr"] for r in of_cispo} == {"0.0002"} and len(of_cispo) == 2
    scores = [trial["score"] for trial in results["methods"]["cispo"]["tuning"]]
    expected = math.sqrt(0.4 * 0.8)
    assert len(scores) == 6 and max(scores) == pytest.approx(expected)
    first = {"learning_rate": 1e-4, "coefficient": 0.2}
    assert results["methods"]["grpo"]["chosen"] == first  # of equals
    assert run(fake, "--tune", "--methods", "grpo", "cispo", "--seeds", "0", "1")[0] == 0
    assert fake.commands == []


def test_numbers_are_means_over_seeds_and_differences_are_paired(
    compare_results: ModuleType, run: Any, tmp_path: Path
) -> None:
    fake = FakeExecutor(draw)
    _, results = run(fake, "--methods", "grpo", "cispo", "--seeds", "0", "1", "2")
    by_run = {(r.get("objective.loss_mode", "vanilla"), r["train.seed"]): draw(r) for r in fake.runs()}
    for name, loss in (("grpo", "vanilla"), ("cispo", "cispo")):
        for k in (1, 8, 32):
            values = [pass_at(by_run[loss, seed], k) for seed in "012"]
            found = results["methods"][name]
            assert found["pass_at_k"][str(k)] == pytest.approx(statistics.fmean(values), abs=1e-12)
            assert found["std"][str(k)] == pytest.approx(statistics.stdev(values), abs=1e-12)
            assert found["seeds"]["1"]["pass_at_k"][str(k)] == pytest.approx(values[1], abs=1e-12)
    for k in (1, 8, 32):
        against = results["methods"]["cispo"]["against_grpo"][str(k)]
        means = [results["methods"][name]["pass_at_k"][str(k)] for name in ("cispo", "grpo")]
        assert against["difference"] == pytest.approx(means[0] - means[1], abs=1e-12)
        low, high = against["ci95"]
        assert low < against["difference"] < high
    assert "against_grpo" not in results["methods"]["grpo"]
    base, *methods = compare_results.points(results)
    assert base.mean == pytest.approx([100 * results["base"]["pass_at_k"][k] for k in ("1", "32")])
    for point, (name, loss) in zip(methods, (("grpo", "vanilla"), ("cispo", "cispo")), strict=True):
        found = results["methods"][name]["pass_at_k"]
        assert point.mean == pytest.approx((100 * found["1"], 100 * found["32"]))
        for seed, (x, y) in zip("012", point.seeds, strict=True):
            for k, shown in ((1, x), (32, y)):
                difference = pass_at(by_run[loss, seed], k) - pass_at(by_run["vanilla", seed], k)
                of_grpo = results["methods"]["grpo"]["pass_at_k"][str(k)]
                assert shown == pytest.approx(100 * (of_grpo + difference))
    table = (tmp_path / "table.md").read_text()
    found = results["methods"]["cispo"]
    mean, std, against = found["pass_at_k"]["8"], found["std"]["8"], found["against_grpo"]["8"]
    low, high = against["ci95"]
    row = next(line for line in table.splitlines() if line.startswith("| CISPO |"))
    assert f"| {100 * mean:.1f} ± {100 * std:.1f} |" in row
    assert f"| {100 * against['difference']:+.1f} [{100 * low:.1f}, {100 * high:.1f}] |" in row
    assert "over the seeds 0, 1, 2" in table and "over problems and seeds" in table


def test_failures_are_shown_and_tried_again(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def counts(settings: dict[str, str]) -> list[int] | None:
        is_rloo = settings.get("objective.advantage_estimator") == "rloo"
        high_rate = is_rloo and float(settings.get("optimizer.lr", 0)) > 1e-4
        fails = settings.get("objective.loss_mode") == "sapo" or high_rate
        return None if fails else draw(settings)

    fake = FakeExecutor(counts)
    words = ("--tune", "--methods", "grpo", "sapo", "rloo", "--seeds", "0")
    code, results = run(fake, *words)
    assert code == 0
    sapo, rloo = results["methods"]["sapo"], results["methods"]["rloo"]
    assert sapo["failed"].startswith("every trial failed, the last: the loss is not finite (see ")
    assert sapo["chosen"] is None and "pass_at_k" not in sapo and len(sapo["tuning"]) == 6
    assert rloo["failed"] is None and rloo["chosen"]["learning_rate"] <= 1e-4
    assert sum("the loss is not finite" in (trial["failed"] or "") for trial in rloo["tuning"]) == 3
    shown = capsys.readouterr().out
    assert "FAILED, 0:00 | the loss is not finite" in shown and "| SAPO | **failed** |" in shown
    fake.commands.clear()
    assert run(fake, *words)[0] == 0
    assert len(fake.runs()) == 9


def test_a_base_that_fails_ends_it(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeExecutor(lambda settings: None)
    assert run(fake, "--methods", "grpo", "--seeds", "0")[0] == 1
    assert "nothing can be compared: the loss is not finite" in capsys.readouterr().err
    assert fake.runs() == []


def test_fresh_repeats_the_named_runs_alone(run: Any, tmp_path: Path) -> None:
    fake = FakeExecutor(draw)
    words = ("--tune", "--seeds", "0", "1", "--methods")
    run(fake, *words, "grpo", "cispo")
    fake.commands.clear()
    assert run(fake, *words, "cispo", "--fresh")[0] == 0
    assert len(fake.commands) == 8  # six trials, two seeds; no data, no base
    assert all("objective.loss_mode=cispo" in command for command in fake.commands)
    assert (tmp_path / "seed1" / "tuned" / "grpo" / "stage.json").exists()
    run(fake, "--seeds", "0", "1", "--methods", "cispo")  # not tuned: beside the tuned ones
    fake.commands.clear()
    assert run(fake, *words, "grpo", "cispo")[0] == 0 and fake.commands == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda of_seed: ("--quick",),
            r"seed0/data was made by\n.*--num-test 400\nand now .*--num-test 8\ndelete",
        ),
        (
            lambda of_seed: (of_seed / "base" / "hf" / "config.json").unlink(),
            "base is gone or not complete, and 2",
        ),
        (lambda of_seed: shutil.rmtree(of_seed / "data"), "data is gone or not complete, and 3"),
    ],
)
def test_data_and_bases_that_are_built_on_are_never_made_anew(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    fake = FakeExecutor(draw)
    words = ("--methods", "grpo", "--seeds", "0")
    run(fake, *words)
    fake.commands.clear()
    more = change(tmp_path / "seed0") or ()
    assert run(fake, *words, *more)[0] == 2
    assert fake.commands == [] and (tmp_path / "seed0" / "grpo" / "stage.json").exists()
    shown = capsys.readouterr().err
    assert re.search(said, shown, re.DOTALL), shown
    assert f"delete {tmp_path / 'seed0'}, or choose another --out" in shown


def test_another_interpreter_is_no_other_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeExecutor(draw)
    words = ("--methods", "grpo", "--seeds", "0")
    run(fake, *words)
    fake.commands.clear()
    monkeypatch.setattr(sys, "executable", "/elsewhere/bin/python")
    assert run(fake, *words)[0] == 0 and fake.commands == []


def test_an_edited_file_is_another_run(
    run: Any,
    compare: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import stages

    here = tmp_path_factory.mktemp("countdown")
    for path in (*COUNTDOWN.glob("*.yaml"), COUNTDOWN / "prepare.py"):
        shutil.copy(path, here)
    for module in (compare, stages):
        monkeypatch.setattr(module, "HERE", here)

    def edit(name: str, old: str, new: str) -> None:
        text = (here / name).read_text()
        assert old in text
        (here / name).write_text(text.replace(old, new))

    fake = FakeExecutor(draw)
    words = ("--methods", "grpo", "--seeds", "0")
    assert run(fake, *words)[0] == 0 and len(fake.commands) == 4
    fake.commands.clear()
    edit("compare.yaml", "  num_steps: 100", "  num_steps: 100  # not many")
    assert run(fake, *words)[0] == 0 and fake.commands == []
    edit("base.yaml", "clip_low: 0.2", "clip_low: 0.1")
    assert run(fake, *words)[0] == 0
    assert len(fake.commands) == 1 and len(fake.runs()) == 1
    edit("evaluate.yaml", "max_batch_size: 4096", "max_batch_size: 2048")
    assert run(fake, *words)[0] == 0
    assert len(fake.commands) == 1 and fake.runs() == []
    for name, old, new in (
        ("sft.yaml", "lr: 2.0e-3", "lr: 3.0e-3"),
        ("prepare.py", "LARGEST_TARGET = 100", "LARGEST_TARGET = 90"),
    ):
        edit(name, old, new)
        assert run(fake, *words)[0] == 2 and fake.commands == []
        assert "was made before the script or YAML file changed" in capsys.readouterr().err
        edit(name, new, old)
    (here / "sft.yaml").write_text("train: [\n")
    assert run(fake, *words)[0] == 2 and "sft.yaml" in capsys.readouterr().err


def test_what_a_caption_says(run: Any, tmp_path: Path) -> None:
    def counts(settings: dict[str, str]) -> list[int] | None:
        is_d3s, rate = settings.get("rollout.sample_filter") == "d3s", settings.get("optimizer.lr")
        fails = is_d3s and rate == "0.0002" and settings["rollout.d3s.first_share"] == "0.25"
        return None if fails else draw(settings)

    fake = FakeExecutor(counts)
    _, results = run(fake, "--tune", "--methods", "dapo", "p3o", "d3s", "--seeds", "0")
    table = (tmp_path / "table.md").read_text()
    assert "two learning rates x three values of one setting; P3O: six learning rates." in table
    assert "DAPO draws more prompts" in table and "D3S trains on a part of the samples." in table
    assert "Trials that failed: D3S (lr 0.0002, `first_share` 0.25)." in table
    assert results["settings"]["version"] == __version__
    run(fake, "--methods", "grpo", "--seeds", "0")
    table = (tmp_path / "table.md").read_text()
    assert not any(word in table for word in ("DAPO", "D3S", "P3O", "Trials"))


def test_what_cannot_be_read_ends_it(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeExecutor(draw)
    words = ("--methods", "grpo", "--seeds", "0")
    run(fake, *words)
    (tmp_path / "results.json").unlink()
    (tmp_path / "seed0" / "grpo" / "evaluation_final.json").write_text("{}")
    assert run(fake, *words) == (2, {})
    assert "not an evaluation" in capsys.readouterr().err


def test_a_page_without_a_place_ends_it_before_anything_runs(
    run: Any,
    compare: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "page.md").write_text("# A page\n")
    monkeypatch.setattr(compare, "PAGE", tmp_path / "page.md")
    fake = FakeExecutor(draw)
    assert run(fake, "--tune", "--update-docs") == (2, {})
    assert "lacks the lines" in capsys.readouterr().err and fake.commands == []


def test_a_worker_that_dies_ends_it(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert compare.main(["--out", str(tmp_path), "--methods", "grpo", "--seeds", "0", "--jobs", "1"]) == 1
    assert "error: worker 0 has ended" in capsys.readouterr().err


def test_a_run_that_hangs_is_killed_and_shown(run: Any, compare: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(60)\n")
    command, log = [sys.executable, str(script)], str(tmp_path / "hangs.log")
    code = f"import side_by_side; side_by_side._become({command!r}, {log!r}, 1)"
    path = {"PYTHONPATH": f"{COUNTDOWN}:{COUNTDOWN.parents[1]}"}
    killed = subprocess.run([sys.executable, "-c", code], env=path, timeout=50, check=False)
    assert killed.returncode == -signal.SIGALRM

    class Hanging(FakeExecutor):
        def start(self, slot: int, command: Sequence[str], log: Path, limit: int) -> None:
            super().start(slot, command, log, limit)
            if "objective.loss_mode=cispo" in command:
                assert limit == 1000  # 20 times as long as expected
                self._ended[-1] = (slot, -signal.SIGALRM)

    _, results = run(Hanging(draw), "--methods", "grpo", "cispo", "--seeds", "0")
    assert "had not ended after 16:40, its limit" in results["methods"]["cispo"]["failed"]
    assert results["methods"]["grpo"]["failed"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tune", "--seeds", "2", "3"], "--tuning-seed 3 is one of --seeds"),
        (["--update-docs"], "--update-docs needs --tune"),
        (["--update-docs", "--tune", "--methods", "grpo"], "all methods"),
        (["--update-docs", "--tune", "--seeds", "0", "1", "1"], "3 seeds or more"),
        (["--update-docs", "--tune", "--quick"], "no --quick"),
    ],
)
def test_what_does_not_go_together_is_refused(
    compare: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.main(words)
    assert said in capsys.readouterr().err


def test_quick_runs_have_a_folder_of_their_own(compare: ModuleType) -> None:
    assert compare._parse([]).out != compare._parse(["--quick"]).out
    assert compare._parse(["--quick", "--out", "here"]).out == "here"


def test_commands_of_a_real_comparison_are_valid(run: Any) -> None:
    fake = FakeExecutor(draw)
    run(fake, "--tune", "--seeds", "0")
    trained = [c for c in fake.commands if "apo_megatron.train" in c]
    for command in trained:
        overrides = [part for part in command if "=" in part]
        config = load_config(RLConfig, COUNTDOWN / "compare.yaml", overrides)
        assert config.train.num_steps == 100 and config.parallel.tensor_parallel_size == 1
        assert not (config.logging.report or config.objective.support_telemetry or config.evaluation.interval)


# --- what is written --------------------------------------------------------------------------------


def test_section_of_the_page_is_replaced(compare_results: ModuleType) -> None:
    page = compare_results.PAGE.read_text()
    once = compare_results.with_section(page, "a table", "picture.png")
    again = compare_results.with_section(once, "another", "picture.png")
    assert "a table" in once and "a table" not in again and "another" in again
    for text in (once, again):
        assert text.partition(compare_results.BEGIN)[0] == page.partition(compare_results.BEGIN)[0]
        assert text.partition(compare_results.END)[2] == page.partition(compare_results.END)[2]
    with pytest.raises(DataError, match="lacks the lines"):
        compare_results.with_section("# A page", "a table", "picture.png")


def test_labels_of_many_methods_do_not_overlap(compare: ModuleType, tmp_path: Path) -> None:
    import frontier

    rng = np.random.default_rng(0)
    families = list(frontier.STYLES)[1:]
    points = [frontier.Point("base", frontier.BASE_POINT, [(10.7, 99.3), (10.2, 99.0), (11.5, 99.5)])]
    for i in range(36):
        center = rng.normal((22.5, 91.5), (0.9, 2.0))
        seeds = [tuple(center + rng.normal(0, (1.5, 0.8))) for _ in range(3)]
        points.append(frontier.Point(f"METHOD-{i} ({'x' * (i % 9)})", families[i % 3], seeds))
    assert "base" not in {point.label for point in frontier._crowd(points)}
    assert len(frontier._crowd(points)) > 30 and not frontier._crowd(points[:12])
    boxes = frontier.frontier_picture(points, tmp_path / "frontier.png", 256)
    assert len(boxes) == 37
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            assert frontier._common_area(box, other) < 1.0


def test_labels_stand_where_they_were_placed(
    example_module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the lines to them reach beyond all points, which are at one place."""
    frontier = example_module("frontier")
    drawn: list[Any] = []
    monkeypatch.setattr(frontier.plt, "close", drawn.append)
    points = [frontier.Point(f"method {i}", frontier.BASELINE, [(20.0, 90.0)]) for i in range(30)]
    boxes = frontier.frontier_picture(points, tmp_path / "frontier.png", 256)
    (figure,) = drawn
    found = [text.get_window_extent() for text in figure.axes[0].texts]
    for box, extent in zip(boxes, found, strict=True):
        assert (extent.x0, extent.y0) == pytest.approx((box.x0, box.y0), abs=0.5)
