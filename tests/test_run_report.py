"""The report of runs: what it warns of, what it makes of broken directories, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from apo_megatron.errors import DataError, RunInterrupted
from apo_megatron.report import main
from apo_megatron.telemetry.outcome import OUTCOME_FILE, forget_outcome, write_outcome
from apo_megatron.telemetry.run_report import page as run_page
from apo_megatron.telemetry.run_report import write_run_report
from apo_megatron.telemetry.run_report.findings import find
from apo_megatron.telemetry.run_report.folders import PassAtK, RunRecord, read_runs
from apo_megatron.telemetry.run_report.page import CHECKS
from apo_megatron.telemetry.run_report.phases import phase_contents
from apo_megatron.telemetry.run_report.status import Signs, Status, status_of
from apo_megatron.telemetry.series import smooth, thinned
from tests.headless_browser import open_page

NUM_STEPS = 200
HOSTILE = "</script ></script><script>document.documentElement.dataset.hacked = 1</script><img src=x>"
Line = dict[str, Any]


def healthy_lines(num_steps: int = NUM_STEPS) -> list[Line]:
    """Metrics of a run that learns, with noise."""
    noise = np.random.default_rng(0).normal(0, 1, num_steps)
    return [
        {
            "step": step + 1,
            "reward": 0.2 + 0.3 * step / num_steps + 0.02 * noise[step],
            "mixed_group_share": 0.7,
            "skipped_step": 0.0,
            "entropy": 0.8 - 0.3 * step / num_steps,
            "support_coverage": 0.99 - 0.05 * step / num_steps,
            "clip_fraction_low": 0.1,
            "clip_fraction_high": 0.01,
            "truncation_rate": 0.02,
            "unjudged_share": 0.0,
            "mismatch/log_prob_gap_mean": 0.011,
            "grad_norm": 1.0 + 0.1 * noise[step],
            "skipped_update": 0.0,
            "response_tokens": 6000.0,
            "num_servers": 2.0,
            "memory/host_gib": 4.0,
            "time/rollout": 2.0,
            "time/update": 2.0,
            "time/weight_sync": 0.3,
            "time/step": 5.0,
            "step_seconds": 5.0,
        }
        for step in range(num_steps)
    ]


CONFIG: Line = {
    "model": {"hf_path": "base", "megatron_path": None},
    "data": {"prompts_per_step": 8},
    "train": {"run_dir": "somewhere", "num_steps": NUM_STEPS, "num_mini_batches": 4},
    "parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 1},
    "rollout": {"engine": "embedded", "group_size": 4, "max_new_tokens": 6},
    "reward": {"name": "math"},
    "objective": {"loss_mode": "vanilla"},
    "optimizer": {"lr": 1e-4},
    "evaluation": {"data_path": "held-out.jsonl", "ks": [1, 8], "at_start": True},
}


def record(change: Callable[[int, Line], None] | None = None, **fields: Any) -> RunRecord:
    """A healthy run, with ``change`` done to its lines (place from 0, line)."""
    lines = healthy_lines()
    for place, line in enumerate(lines):
        if change is not None:
            change(place, line)
    fields = {"config": CONFIG, "status": Status("finished", "finished"), **fields}
    return RunRecord("run", Path("run"), history=lines, **fields)


def found_in(run: RunRecord) -> list[tuple[str, str]]:
    return [(f.severity, f.text) for f in find(run, CHECKS)]


def setting(name: str, value: Callable[[int], float]) -> Callable[[int, Line], None]:
    return lambda place, line: line.update({name: value(place)})


def pass_at_k(one: float, many: float, half_width: float = 0.02) -> PassAtK:
    values = {k: (v, v - half_width, v + half_width) for k, v in ((1, one), (8, many))}
    return PassAtK(values, num_problems=30, num_samples=16)


def test_a_healthy_run_has_no_findings() -> None:
    assert found_in(record(start=pass_at_k(0.1, 0.9), final=pass_at_k(0.3, 0.88))) == []


@pytest.mark.parametrize(
    ("change", "severity", "text"),
    [
        (setting("support_coverage", lambda i: 0.9 - 0.5 * i / NUM_STEPS), "problem", "Coverage .* by 4. %"),
        (setting("entropy", lambda i: 0.8 * 0.98**i), "problem", "Entropy collapsed"),
        (setting("reward", lambda i: 0.3 + 0.01 * (i % 3)), "problem", "reward did not rise in 200 steps"),
        (setting("skipped_step", lambda i: float(i % 10 == 0)), "problem", "20 of 200 steps had no group"),
        (setting("mixed_group_share", lambda i: 0.2), "note", "Only 20.0 % of the groups .*not solved"),
        (setting("clip_fraction_low", lambda i: 0.3), "problem", "31.0 % of the tokens are clipped"),
        (setting("truncation_rate", lambda i: 0.001 * i), "problem", "More and more answers are cut"),
        (setting("truncation_rate", lambda i: 0.2), "note", "20.0 % of the answers are cut"),
        (setting("unjudged_share", lambda i: 0.05), "problem", "5.0 % of the samples could not be judged"),
        (setting("mismatch/log_prob_gap_mean", lambda i: 0.002 + 0.0001 * i), "problem", "grew from 0.004"),
        (setting("mismatch/log_prob_gap_mean", lambda i: 0.06), "problem", "gap .* is 0.06 nats"),
        (setting("grad_norm", lambda i: 30.0 if i % 50 == 40 else 1.0), "problem", "in 4 steps.* in step 41"),
        (setting("skipped_update", lambda i: float(i == 3)), "note", "^1 of 800 updates"),
        (setting("skipped_update", lambda i: float(i % 20 == 3)), "problem", "^10 of 800 updates"),
        (setting("time/rollout", lambda i: 4.0), "note", "80.0 % of the time goes into rollouts"),
        (setting("time/weight_sync", lambda i: 1.25), "note", "25.0 % of the time goes into sending weights"),
        (setting("num_servers", lambda i: 1.0 + (i != 7)), "note", "In 1 of 200 steps fewer than 2 servers"),
        (setting("memory/host_gib", lambda i: 4.0 + i / 20), "problem", "grew from 5.0 to 13.0 GiB"),
    ],
)  # fmt: skip
def test_each_problem_is_found_alone(change: Callable[[int, Line], None], severity: str, text: str) -> None:
    ((found_severity, found_text),) = found_in(record(change))
    assert found_severity == severity and re.search(text, found_text), found_text


@pytest.mark.parametrize(
    "change",
    [
        setting("support_coverage", lambda i: 0.9 - 0.28 * i / NUM_STEPS),
        setting("entropy", lambda i: 0.8 * 0.992**i),
        setting("reward", lambda i: 0.2 + 0.02 * i / NUM_STEPS),  # little, but without noise
        setting("clip_fraction_low", lambda i: 0.28),
        setting("truncation_rate", lambda i: 0.09),
        setting("mismatch/log_prob_gap_mean", lambda i: 1e-6 * (1 + i)),  # grows, and is nothing
        setting("grad_norm", lambda i: 30.0 if i in (5, 9) else 1.0),
        setting("time/rollout", lambda i: 3.2),
        setting("memory/host_gib", lambda i: 4.0 + i / 100),
        setting("memory/host_gib", lambda i: 1.0 + i / 100),
    ],
)  # fmt: skip
def test_what_is_below_a_threshold_is_no_finding(change: Callable[[int, Line], None]) -> None:
    assert found_in(record(change)) == []


@pytest.mark.parametrize(
    ("start", "final", "severity"),
    [
        (pass_at_k(0.1, 0.9), pass_at_k(0.3, 0.78), "problem"),
        (pass_at_k(0.1, 0.9), pass_at_k(0.3, 0.83), "note"),
        (pass_at_k(0.1, 0.9, 0.1), pass_at_k(0.3, 0.78, 0.1), None),  # the intervals overlap
        (pass_at_k(0.1, 0.9), pass_at_k(0.11, 0.78), None),  # worse at everything is another matter
        (pass_at_k(0.1, 0.9), pass_at_k(0.3, 0.95), None),
    ],
)
def test_contraction_is_a_fall_of_pass_at_k_while_pass_at_1_rises(
    start: PassAtK, final: PassAtK, severity: str | None
) -> None:
    found = found_in(record(start=start, final=final))
    assert [name for name, _ in found] == ([] if severity is None else [severity])
    assert all(text.startswith("Pass@8 fell from 90.0 % to ") for _, text in found)


@pytest.mark.parametrize(("num_problems", "severities"), [(300, ["problem"]), (20, []), (None, ["note"])])
def test_without_an_end_the_evaluations_on_the_way_show_contraction(
    num_problems: int | None, severities: list[str]
) -> None:
    """On few problems such a fall may be chance; where their number is not known, it is a note."""

    def evaluate(place: int, line: Line) -> None:
        if place % 50 == 49:
            line |= {"eval/pass_at_1": 0.1 + place / 1000, "eval/pass_at_8": 0.9 - place / 1000}

    start = None if num_problems is None else replace(pass_at_k(0.1, 0.9), num_problems=num_problems)
    found = found_in(record(evaluate, start=start))
    assert [severity for severity, _ in found] == severities
    assert all("evaluations after steps 50 and 200" in text for _, text in found)


def test_what_a_directory_tells_is_found() -> None:
    run = record(num_server_starts={"server-0.log": 3, "server-1.log": 1}, unreadable=["x.json is torn"])
    run = replace(run, config={**CONFIG, "evaluation": {"data_path": None}})
    texts = [text for _, text in found_in(replace(run, status=Status("silent", "no sign for 3 h")))]
    assert len(texts) == 4 and texts[0] == "No sign for 3 h." and texts[1] == "x.json is torn."
    assert "server-0.log 3 times. Once" in texts[2] and "Nothing is evaluated" in texts[3]


def test_supervised_runs_are_not_asked_for_rewards() -> None:
    lines = [
        {"step": i, "loss": 2 / i, "entropy": 3 / i, "grad_norm": 1.0, "time/step": 1.0}
        for i in range(1, 201)
    ]
    assert found_in(replace(record(), history=lines, config={"train": {"num_steps": 200}})) == []


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({}, "running", "step 100 of 200, about 3 min left; last sign 10 s before"),
        ({"last_step": 0, "step_seconds": np.array([])}, "starting", "no step is finished yet"),
        ({"last_step": 0, "step_seconds": np.array([]), "seconds_since_sign": 4000.0}, "silent", "before"),
        ({"seconds_since_sign": 310.0}, "silent", "no sign for 5 min, after step 100 of 200"),
        ({"seconds_since_sign": 310.0, "step_seconds": np.full(100, 60.0)}, "running", "step 100"),
        ({"last_step": 200, "seconds_since_sign": 9e5}, "finished", "step 200 of 200, 3 min in steps"),
        ({"last_step": 200, "is_evaluated": False}, "running", "step 200"),
        ({"outcome": {"outcome": "failed", "message": "OSError"}}, "failed", "after step 100 of 200: O"),
        ({"outcome": {"outcome": "interrupted", "message": ""}}, "interrupted", "stopped by a signal"),
        ({"outcome": {"outcome": "finished"}, "num_steps": None}, "finished", "finished: step 100,"),
        ({"outcome": {"outcome": "failed"}, "has_hung": True}, "hung", "stalled at step 100 of 200"),
    ],
)  # fmt: skip
def test_status_in_words(changes: dict[str, Any], kind: str, text: str) -> None:
    signs = Signs(100, 200, np.full(100, 2.0), None, False, True, 10.0)
    status = status_of(replace(signs, **changes))
    assert status.kind == kind and text in status.text


def write_run(folder: Path, lines: list[Line], config: Line | None = CONFIG, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def evaluation_json(one: float, many: float) -> str:
    values = {"1": one, "8": many}
    intervals = {k: [v - 0.02, v + 0.02] for k, v in values.items()}
    return json.dumps({"pass_at_k": values, "ci95": intervals, "num_correct": [1] * 30, "num_samples": 16})


def test_a_torn_and_repeated_history_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 2, "reward": 0.5, "grad_norm": null, "note": "text"}\n[]\nnot JSON\n{"step": 3, "rew'
        )
    (run,) = read_runs([folder])
    steps, rewards = run.values("reward")
    assert steps.tolist() == [1, 2] and rewards.tolist() == [0.1, 0.5]
    assert not len(run.values("grad_norm")[0]) and not len(run.values("note")[0])
    assert run.unreadable == ["metrics.jsonl: 2 of 5 lines are no metrics and left out"]


def test_broken_files_are_named_and_the_page_is_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], None, evaluation_start="{", evaluation_final='{"pass_at_k": 3}')
    (folder / "config.yaml").write_text("a: [")
    (folder / "outcome.json").write_text("7")
    (run,) = read_runs([folder])
    assert [text.split(".")[0] for text in run.unreadable] == [
        "config",
        "evaluation_start",
        "evaluation_final",
    ]
    found = write_run_report([folder], tmp_path / "out" / "report.html")
    assert len(found) == 3 and (tmp_path / "out" / "report.html").exists()


def test_odd_evaluations_do_not_cost_the_page(tmp_path: Path) -> None:
    """A metric that only looks like a Pass@K, and an evaluation of no problems."""
    lines = [
        {"step": 1, "eval/pass_at_1": 0.1, "eval/pass_at_8": 0.9, "eval/pass_at_all": 1.0},
        {"step": 2, "eval/pass_at_1": 0.3, "eval/pass_at_8": 0.7},
    ]
    none = json.loads(evaluation_json(0.1, 0.9)) | {"num_correct": []}
    folder = write_run(tmp_path / "run", lines, evaluation_start=json.dumps(none))
    texts = [finding.text for _, finding in write_run_report([folder], tmp_path / "report.html")]
    assert any("Pass@8 fell from 90.0 % to 70.0 %" in text for text in texts)


def test_folders_without_a_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "one", [])
    with pytest.raises(DataError, match="holds no run.*there is a run in .*one"):
        read_runs([tmp_path / "runs"])
    with pytest.raises(DataError, match="named twice"):
        read_runs([tmp_path / "runs" / "one"] * 2)
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "page.html")]) == 2
    assert "no such directory" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_runs_of_one_name_are_told_apart_and_share_their_start(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run", [], evaluation_start=evaluation_json(0.1, 0.9))
    other = {**CONFIG, "evaluation": {**CONFIG["evaluation"], "at_start": False}}
    write_run(tmp_path / "b" / "run", [], other)
    write_run(tmp_path / "c" / "run", [], {**other, "model": {"hf_path": "another"}})
    first, second, third = read_runs([tmp_path / name / "run" for name in "abc"])
    assert [run.label for run in (first, second, third)] == ["a/run", "b/run", "c/run"]
    assert first.start is not None and first.start.borrowed_from is None
    assert second.start == replace(first.start, borrowed_from="a/run") and third.start is None


def test_a_hang_counts_until_the_run_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", healthy_lines(5))
    (folder / "hang").mkdir()
    (folder / "hang" / "summary.txt").write_text("rank 1 is behind")
    os.utime(folder / "config.yaml", (1, 1))
    (run,) = read_runs([folder])
    assert run.status.kind == "hung" and run.hang_summary == "rank 1 is behind"
    os.utime(folder / "config.yaml")
    os.utime(folder / "hang" / "summary.txt", (1, 1))
    (run,) = read_runs([folder])
    assert run.status.kind == "running" and run.hang_summary is None


def test_outcomes_are_written_and_forgotten(tmp_path: Path) -> None:
    for error, kind in (
        (None, "finished"),
        (RunInterrupted("SIGTERM"), "interrupted"),
        (OSError("full"), "failed"),
    ):
        write_outcome(tmp_path, error)
        assert json.loads((tmp_path / OUTCOME_FILE).read_text())["outcome"] == kind
    assert "OSError: full" in (tmp_path / OUTCOME_FILE).read_text()
    forget_outcome(tmp_path)
    forget_outcome(tmp_path)
    assert not list(tmp_path.iterdir())
    write_outcome(tmp_path / "missing", OSError("what really happened"))  # must not raise another error
    with pytest.raises(FileNotFoundError):
        write_outcome(tmp_path / "missing", None)


def test_thinning_keeps_spikes_and_the_mean_stays() -> None:
    steps, values = np.arange(5000.0), np.zeros(5000)
    values[1234], values[4321] = 9.0, -9.0
    kept_steps, kept = thinned(steps, values, 400)
    assert len(kept) <= 400 and {1234.0, 4321.0} <= set(kept_steps) and (np.diff(kept_steps) > 0).all()
    assert thinned(steps[:400], values[:400], 400)[0].tolist() == steps[:400].tolist()
    np.testing.assert_allclose(smooth(np.full(200, 0.3)), 0.3, rtol=1e-12)


def test_phases_add_up() -> None:
    run = record(setting("time/evaluation", lambda i: 10.0 if i == 0 else 0.0))
    run.history[0]["time/step"] += 10.0  # type: ignore[index]
    contents = phase_contents(run)
    assert contents is not None
    table = {name: (total, share) for name, total, _, share in contents["table"]}
    assert table["update"] == (400.0, pytest.approx(400 / 1010, rel=1e-4))
    assert table["other"][0] == pytest.approx(140) and table["evaluation"][0] == 10
    assert sum(share for _, share in table.values()) == pytest.approx(1, abs=1e-4)
    assert "evaluation" not in contents["names"] and contents["ranges"][-1][1] == NUM_STEPS
    assert np.sum(contents["bars"], axis=0) == pytest.approx(5.0)


def data_of(page: Path) -> Any:
    (found,) = re.findall(
        r'<script type="application/json" id="report">(.*?)</script>', page.read_text(), re.DOTALL
    )
    return json.loads(found)


def test_long_runs_make_a_page_of_two_megabytes_at_most(tmp_path: Path) -> None:
    lines = healthy_lines(4000)
    folders = [write_run(tmp_path / f"run{i}", lines) for i in range(4)]
    began = time.perf_counter()
    write_run_report(folders, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2e6 and time.perf_counter() - began < 20
    assert data_of(tmp_path / "report.html")["is_thinned"]


# A pointer over the first curve and over the first bars, at their right ends.
PROBE = """
const point = (catcher) => {
  const { right, top } = catcher.getBoundingClientRect();
  catcher.dispatchEvent(new PointerEvent("pointermove", { clientX: right - 1, clientY: top + 9 }));
  return tip.textContent;
};
const shown = [".span4 .catcher", ".phases .catcher"].map((place) => point(document.querySelector(place)));
document.documentElement.dataset.probe = JSON.stringify(shown);
"""


def test_a_browser_shows_runs_and_obeys_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = run_page._packaged
    monkeypatch.setattr(run_page, "_packaged", lambda n: packaged(n) + (PROBE if n == "run_page.js" else ""))
    lines = healthy_lines(60)
    for line in lines[9::10]:
        line |= {"eval/pass_at_1": 0.1 + line["step"] / 1000, "eval/pass_at_8": 0.9}
    lines[30]["grad_norm"], lines[31]["grad_norm"] = None, 1e30
    files: Line = {
        "evaluation_start": evaluation_json(0.1, 0.9),
        "evaluation_final": evaluation_json(0.3, 0.7),
    }
    first = write_run(tmp_path / "one", lines, **files)
    half = json.dumps({"outcome": "failed", "message": "half \ud800 a character"})
    hostile = {**CONFIG, "model": {"hf_path": HOSTILE}, "objective": {"loss_mode": HOSTILE}}
    second = write_run(tmp_path / "<img src=x onerror=alert(1)>", lines[:20], hostile, outcome=half)
    third = write_run(tmp_path / "empty", [], None)
    page = tmp_path / "report.html"
    write_run_report([third, first, second], page)
    dom = open_page(page, tmp_path / "profile")
    ((root, _),) = dom.find("html")
    assert root.get("data-state") == "drawn" and not {"data-failure", "data-hacked"} & set(root), root
    assert not dom.find("img") and len(dom.find("script")) == 2

    data = data_of(page)
    ends = [attributes["class"] for attributes, text in dom.find("span.chip") if text == "one"]
    assert set(ends) == {"chip c2"}  # one colour everywhere, though the first run has no evaluation
    reward, step = json.loads(root["data-probe"])
    assert reward.startswith("Reward, step 60") and f"this step {lines[-1]['reward']:.3g}" in reward
    assert step.startswith("step 60: 5 s each") and "update2 s" in step
    num_curves = sum(curve is not None for panel in data["panels"] for curve in panel["series"])
    assert len(dom.find("path.line")) == num_curves + 2 and len(dom.find("path.band")) == 2
    paths = [attributes["d"] for attributes, _ in dom.find("path.line")]
    assert all(path.startswith("M") and "NaN" not in path for path in paths)
    (_, numbers), (_, passes) = dom.find("table#numbers")[0], dom.find("table#pass-at-k")[0]
    assert f"{np.mean([line['reward'] for line in lines[-6:]]):.3g}" in numbers
    assert all(text in passes for text in ("10.0", "90.0", "30.0", "70.0", "68.0 \u2013 72.0"))
    findings = dom.find("ul#findings")[0][1]
    assert "the space is contracting" in findings
    assert HOSTILE in dom.find("main")[0][1] and "half ? a character" in findings
    links = [attributes["href"] for attributes, _ in dom.find("a")]
    assert "./one/metrics.jsonl" in links and all(link.startswith("./") for link in links)
