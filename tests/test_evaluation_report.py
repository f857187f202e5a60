"""The report of evaluations: its numbers are those of results.json, and no output of a model breaks it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apo_megatron.errors import DataError
from apo_megatron.evaluation.comparison import compare
from apo_megatron.evaluation.pass_at_k import pass_at_k
from apo_megatron.evaluation.report import page as report_page
from apo_megatron.evaluation.report import write_report
from apo_megatron.evaluation.report.folders import BenchmarkResult, read_evaluations
from apo_megatron.evaluation.sample_store import claim_folder
from tests.evaluation_folders import benchmark_result, draw_counts, solve_chances, write_evaluation
from tests.headless_browser import open_page
from tools.compare_evaluations import main

ROOT = Path(__file__).resolve().parent.parent
KS, NUM_SAMPLES, NUM_PROBLEMS = (1, 4, 16), 20, 30
HOSTILE = (
    "</script><script>document.documentElement.dataset.hacked = 1</script>",
    "</script x='",
    "</SCRIPT\n",
    "<!--<script>",
    "<!-- <script ",
    "<img src=x onerror=\"document.documentElement.dataset.hacked='2'\">",
    "\x1b[2J\x1b]0;title\x07 NUL \x00 and \u2028 \u2029 \u202e reversed \ufeff",
    "lone \ud800 surrogate, ]]> &lt;b&gt; ${title} <!-- data -->",
    "x" * 1_000_000,
)


def counts_of(sharpening: float, forgotten: float, seed: int) -> list[int]:
    return draw_counts(solve_chances(NUM_PROBLEMS, sharpening, forgotten), NUM_SAMPLES, seed)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    result = benchmark_result(counts_of(1.0, 0.0, 1), NUM_SAMPLES, KS)
    return write_evaluation(tmp_path / "base", "base", {"math": result, "aime": result})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Knows fewer problems, and those better; one benchmark of its own."""
    result = benchmark_result(
        counts_of(1.9, 1.0, 2), NUM_SAMPLES, KS, truncation_rate=0.07, verifier_failures=3
    )
    benchmarks = {"aime": result, "math": result, "own": result}
    return write_evaluation(tmp_path / "trained", "trained", benchmarks)


def data_of(page: Path, name: str = "report") -> Any:
    found = re.findall(
        rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    assert len(found) == 1
    return json.loads(found[0])


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_numbers_are_those_of_the_results(base: Path, trained: Path, tmp_path: Path) -> None:
    write_report([base, trained], tmp_path / "report.html")
    data = data_of(tmp_path / "report.html")
    assert data["labels"] == ["base", "trained"]
    assert [benchmark["name"] for benchmark in data["benchmarks"]] == ["math", "aime"]
    results = [json.loads((folder / "results.json").read_text())["benchmarks"] for folder in (base, trained)]
    for benchmark in data["benchmarks"]:
        of_base, of_trained = (result[benchmark["name"]] for result in results)
        assert [problem["id"] for problem in benchmark["problems"]] == of_base["prompt_ids"]
        for shown, result in zip(benchmark["checkpoints"], (of_base, of_trained), strict=True):
            for name, interval in (("pass_at_k", "ci95"), ("majority_at_k", "majority_ci95")):
                assert shown[name] == {k: [value, *result[interval][k]] for k, value in result[name].items()}
            assert shown["correct"] == result["num_correct"]
            for name in ("truncation_rate", "verifier_failures", "distinct_correct", "mean_response_length"):
                assert shown[name] == result[name]
        expected = compare(
            BenchmarkResult.model_validate(of_trained), BenchmarkResult.model_validate(of_base), KS
        )
        for row in benchmark["comparisons"][0]:
            of_k = dataclasses.asdict(expected.differences[row["k"]])
            assert row == {"k": row["k"]} | {
                name: list(of_k[name]) if name == "ci95" else of_k[name] for name in row if name != "k"
            }
        assert benchmark["flip_p_values"][1][0] == expected.flips.p_value


def test_problems_in_another_order_are_matched(base: Path, trained: Path, tmp_path: Path) -> None:
    write_report([base, trained], tmp_path / "one.html")

    def reverse(values: Any) -> None:
        for result in values["benchmarks"].values():
            for name in ("prompt_ids", "num_correct", "num_distinct_correct"):
                result[name].reverse()

    rewrite(trained / "results.json", reverse)
    write_report([base, trained], tmp_path / "two.html")
    one, two = (data_of(tmp_path / name)["benchmarks"] for name in ("one.html", "two.html"))
    assert one == two
    assert data_of(tmp_path / "one.html", "samples-0-1") == data_of(tmp_path / "two.html", "samples-0-1")


def test_warnings_in_words(base: Path, trained: Path, tmp_path: Path) -> None:
    write_report([base, trained], tmp_path / "report.html")
    text = "\n".join(w["text"] for w in data_of(tmp_path / "report.html")["warnings"])
    assert re.search(r"Pass@1 rose by [\d.]+ points while Pass@16 fell by [\d.]+ points against base", text)
    assert "7.0 % of the samples were cut off" in text
    assert "3 of 600 samples (0.5 %) could not be judged" in text
    assert "own left out" in text and "no width" not in text and "rests on all" not in text


SETTINGS = {
    "evaluation.temperature": 1.0,
    "evaluation.seed": 1,
    "model.dtype": "bfloat16",
    "rollout.max_new_tokens": 512,
    "files of the model (names, sizes, times)": "0f",
    "reward": "MathReward",
    "problems": "ab",
}


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """As the evaluation command does before the first sample."""
    for generations in (folder / "generations").iterdir():
        claimed = folder / "claimed" / generations.name
        claim_folder(claimed, settings, NUM_SAMPLES)
        shutil.copytree(claimed, generations, dirs_exist_ok=True)


def warnings_of(*folders: Path, out: Path) -> list[str]:
    return [warning.text for warning in write_report(folders, out / "report.html")]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"evaluation.temperature": 0.6}, "evaluation.temperature: 1.0 there, 0.6 here, so differences are"),
        (
            {"evaluation.temperature": 0.6, "reward": "m:f"},
            "evaluation.temperature: 1.0 there, 0.6 here; reward: MathReward there, m:f here, so differences",
        ),
        ({"rollout.new": [7]}, "rollout.new: not recorded there, [7] here, so differences are not the"),
    ],
)
def test_other_settings_are_named_and_no_contraction_is_claimed(
    base: Path, trained: Path, tmp_path: Path, change: dict[str, Any], found: str
) -> None:
    write_settings(base, SETTINGS)
    write_settings(trained, SETTINGS | change)
    text = "\n".join(warnings_of(base, trained, out=tmp_path))
    assert f"trained: other settings than for base. {found}" in text
    assert "more than the checkpoint differs between the two" in text and "is contracting" not in text


def test_what_a_checkpoint_brings_along_is_no_other_setting(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    """Nor is a file that one of the two lacks, nor chance."""
    of_model = {
        "evaluation.seed": 2,
        "model.dtype": "float32",
        "files of the model (names, sizes, times)": "1e",
        "problems": "cd",
    }
    without = warnings_of(base, trained, out=tmp_path)
    write_settings(base, SETTINGS)
    assert warnings_of(base, trained, out=tmp_path) == without
    write_settings(trained, SETTINGS | of_model)
    assert warnings_of(base, trained, out=tmp_path) == without
    assert "is contracting" in "\n".join(without)


def test_broken_settings_are_an_error(base: Path, trained: Path, tmp_path: Path) -> None:
    path = base / "generations" / "aime" / "settings.json"
    path.write_text("[]")
    with pytest.raises(DataError, match=re.escape(str(path))):
        write_report([base, trained], tmp_path / "report.html")


def test_other_gold_answers_are_counted_and_no_contraction_is_claimed(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    for path in (trained / "problems").iterdir():
        path.write_text(path.read_text().replace('"42"', '"43"', 2))
    text = "\n".join(warnings_of(base, trained, out=tmp_path))
    assert f"2 of {NUM_PROBLEMS} problems have another gold answer than for base" in text
    assert "is contracting" not in text


def test_no_k_is_lost(tmp_path: Path) -> None:
    """A K that only one names, and 1, follow from the counts of the others."""
    counts = {name: counts_of(1.0, 0.0, seed) for seed, name in enumerate(("a", "b"))}
    own = {"a": (4, 16), "b": (8,)}
    folders = [
        write_evaluation(tmp_path / n, n, {"math": benchmark_result(counts[n], NUM_SAMPLES, own[n])})
        for n in counts
    ]
    write_report(folders, tmp_path / "report.html")
    (benchmark,) = data_of(tmp_path / "report.html")["benchmarks"]
    assert benchmark["ks"] == [row["k"] for row in benchmark["comparisons"][0]] == [1, 4, 8, 16]
    for name, checkpoint in zip(counts, benchmark["checkpoints"], strict=True):
        for k, (value, low, high) in checkpoint["pass_at_k"].items():
            assert value == pytest.approx(pass_at_k(NUM_SAMPLES, counts[name], int(k)).mean(), abs=1e-12)  # type: ignore[union-attr]
            assert 0 <= low < value < high <= 1
        assert list(checkpoint["majority_at_k"]) == [str(k) for k in own[name]]


def test_a_contraction_is_one_against_pass_at_1(tmp_path: Path) -> None:
    """Here Pass@2 rises and Pass@8 falls, the only K that are named; but Pass@1 falls, too."""
    folders = []
    for name, counts in (("a", [10] * 20 + [2] * 25), ("b", [6] * 20 + [5] * 20 + [0] * 5)):
        result = benchmark_result(counts, 10, (2, 8))
        folders.append(write_evaluation(tmp_path / name, name, {"math": result}))
    of_a, of_b = (e.benchmarks["math"].pass_at_k for e in read_evaluations(folders))
    assert of_a[1] > of_b[1] and of_a[2] < of_b[2] and of_a[8] > of_b[8]
    assert not [text for text in warnings_of(*folders, out=tmp_path) if "rose" in text]


def test_a_contraction_that_may_be_chance_is_not_claimed(tmp_path: Path) -> None:
    folders = []
    for name, counts in (("a", [10, 10, 10, 1]), ("b", [14, 14, 14, 0])):
        result = benchmark_result(counts, 20, (1, 20))
        folders.append(write_evaluation(tmp_path / name, name, {"math": result}))
    write_report(folders, tmp_path / "report.html")
    text = "\n".join(w["text"] for w in data_of(tmp_path / "report.html")["warnings"])
    assert "may have moved by chance" in text and "is contracting" not in text
    assert "Pass@20 rests on all 20 samples" in text


def test_an_interval_without_width_is_no_certainty(tmp_path: Path) -> None:
    result = benchmark_result([4, 4, 4], 8, (1, 2, 4))
    write_report([write_evaluation(tmp_path / "a", "a", {"math": result})], tmp_path / "report.html")
    (warning,) = data_of(tmp_path / "report.html")["warnings"]
    assert "the same Pass@1, Pass@2, Pass@4. The intervals have no width" in warning["text"]


def test_samples_are_few_and_cut_and_of_both_verdicts(base: Path, tmp_path: Path) -> None:
    path = base / "generations" / "math" / "rank_00000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["text"] = "x" * 5_000
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([base], tmp_path / "report.html")
    counts = json.loads((base / "results.json").read_text())["benchmarks"]["math"]["num_correct"]
    samples = data_of(tmp_path / "report.html", "samples-0-0")
    for num_correct, shown in zip(counts, samples, strict=True):
        num_right = sum(sample["verdict"] == "right" for sample in shown)
        assert len(shown) == 8 and num_right == min(num_correct, max(4, 8 - (NUM_SAMPLES - num_correct)))
        assert [s["index"] for s in shown] == sorted(s["index"] for s in shown)
    long = [sample for shown in samples for sample in shown if sample["text"].startswith("x")]
    assert long and all((len(s["text"]), s["num_left_out"]) == (4_000, 1_000) for s in long)


def test_the_order_of_lines_and_repeated_ones_change_nothing(base: Path, tmp_path: Path) -> None:
    write_report([base], tmp_path / "one.html")
    for path in (base / "generations").glob("*/rank_*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        random.Random(0).shuffle(lines)
        path.write_text("".join(lines + lines[:50]))
    write_report([base], tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


@pytest.mark.parametrize("room", [200_000, 40_000, 10])
def test_the_page_is_bounded(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(report_page, "MAX_SAMPLE_BYTES", room)
    write_report([base, trained], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    parts = re.findall(r'id="samples-[^"]*">(.*?)</script>', text)
    assert len(parts) == 4 and sum(map(len, parts)) < room + 4 * 5 * NUM_PROBLEMS
    shown = [
        c["num_shown"] for b in data_of(tmp_path / "report.html")["benchmarks"] for c in b["checkpoints"]
    ]
    assert max(shown) < 8 or room == 200_000
    assert max(shown) == (0 if room == 10 else max(shown))


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    def peak(num_samples: int) -> int:
        result = benchmark_result([3, 5], num_samples, (1, 4))
        folder = write_evaluation(
            tmp_path / str(num_samples), "x", {"math": result}, text=lambda *_: "y" * 4_000
        )
        tracemalloc.start()
        write_report([folder], tmp_path / "report.html")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(50)  # modules and templates are loaded once
    assert peak(2_000) < peak(51) + 1_000_000  # the samples have 16 MB


def test_a_torn_last_line_is_left_out(base: Path, tmp_path: Path) -> None:
    write_report([base], tmp_path / "one.html")
    with (base / "generations" / "math" / "rank_00001.jsonl").open("a") as file:
        file.write('{"problem": "problem-001", "sam')
    write_report([base], tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_missing_samples_are_said(base: Path, tmp_path: Path) -> None:
    path = base / "generations" / "math" / "rank_00000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    write_report([base], tmp_path / "report.html")
    (warning,) = data_of(tmp_path / "report.html")["warnings"]
    assert warning["benchmark"] == "math" and "the generations of 1 problems do not have" in warning["text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1, 2\n", "not JSON"),
        (b'{"problem": "problem-000", "sample": 1}\n', "text: Field required"),
        (b'{"problem": "other", "sample": 1', "problem 'other' is not in results.json"),
        (b"[" * 200_000 + b"\n", "not JSON"),
    ],
)
def test_a_broken_line_is_named(base: Path, tmp_path: Path, line: bytes, message: str) -> None:
    if not line.endswith(b"\n"):
        line += b', "text": "", "finish_reason": "stop", "num_tokens": 1, "reward": 0}\n'
    path = base / "generations" / "math" / "rank_00000.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + line + rest)
    with pytest.raises(DataError, match=re.escape(f"{path}, line 2: ") + ".*" + re.escape(message)):
        write_report([base], tmp_path / "report.html")
    assert not list(tmp_path.glob("*report.html*"))


def _other_n(result: dict[str, Any]) -> None:
    result["num_samples"] = NUM_SAMPLES + 1


def _other_problem(result: dict[str, Any]) -> None:
    result["prompt_ids"][3] = "problem-X"


def _too_many_right(result: dict[str, Any]) -> None:
    result["num_correct"][0] = NUM_SAMPLES + 1


def _no_interval(result: dict[str, Any]) -> None:
    del result["ci95"]["4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_n, "math has 21 samples per problem, .*base.*results.json 20"),
        (_other_problem, "it lacks 'problem-003' and adds 'problem-X'"),
        (_too_many_right, "benchmarks.math: .*num_correct of 21"),
        (_no_interval, "benchmarks.math: .*intervals at"),
        (lambda result: result.pop("num_correct"), "benchmarks.math.num_correct: Field required"),
    ],
)
def test_results_that_cannot_be_compared(base: Path, trained: Path, change: Any, message: str) -> None:
    rewrite(trained / "results.json", lambda values: change(values["benchmarks"]["math"]))
    with pytest.raises(DataError, match=f"{re.escape(str(trained))}.results.json: .*{message}"):
        read_evaluations([base, trained])


@pytest.mark.parametrize("name", ["../math", "..", "a/b", ""])
def test_a_benchmark_cannot_leave_the_folder(base: Path, name: str) -> None:
    def rename(values: Any) -> None:
        values["benchmarks"][name] = values["benchmarks"].pop("math")

    rewrite(base / "results.json", rename)
    with pytest.raises(DataError, match="cannot be the name of a benchmark"):
        read_evaluations([base])


def test_equal_labels_are_told_apart(base: Path) -> None:
    assert [e.label for e in read_evaluations([base, base])] == ["base #1", "base #2"]


def test_the_command(base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(trained / "results.json", lambda values: values.update(label="evil \x1b[31m[bold]\u202ex"))
    out = tmp_path / "new" / "report.html"
    assert main([str(base), str(trained), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and r"evil \x1b[31m[bold]" in shown
    assert "Holm" in shown and "is contracting" in shown and out.exists()
    before = out.read_bytes()
    (trained / "results.json").unlink()
    assert main([str(base), str(trained), "--out", str(out)]) == 2
    assert f"error: {trained / 'results.json'}: No such file" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_page_and_terminal_warn_of_the_same(
    base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = trained / "problems" / "math.jsonl"
    problems.write_text(problems.read_text().replace('"42"', '"43"'))
    path = base / "generations" / "math" / "rank_00000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    out = tmp_path / "report.html"
    assert main([str(base), str(trained), "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    warned = data_of(out)["warnings"]
    for words in ("another gold answer", "generations of 1 problems", "here 2, the likelier one is below"):
        assert any(words in warning["text"] for warning in warned), words
    for warning in warned:
        where = f"{warning['benchmark']}: " if warning["benchmark"] else ""
        assert f"note: {where}{warning['text']}" in shown
    write_report([base], out)
    assert not [w for w in data_of(out)["warnings"] if "Holm" in w["text"]]


# What a reader would do, and what he then sees.
PROBE = """
const probe = {};
const press = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const shownProblem = () => document.querySelector("#detail h3").textContent;
document.querySelectorAll('[role="tab"]')[1].click();
probe.tab = document.querySelector('[role="tab"][aria-selected="true"]').textContent;
press(document.getElementById("problems"), "ArrowDown");
probe.next = shownProblem();
document.querySelector(".flip").click();
probe.flip = [document.querySelector(".flip span").textContent, shownProblem()];
const search = document.querySelector('input[type="search"]');
search.value = "problem-007";
search.dispatchEvent(new Event("input"));
probe.found = [...document.querySelectorAll(".problem span")].map((item) => item.textContent);
search.value = "";
search.dispatchEvent(new Event("input"));
const group = document.querySelector(".tools select");
group.value = "only_a";
group.dispatchEvent(new Event("change"));
probe.lost = document.querySelectorAll(".problem").length;
document.documentElement.dataset.probe = JSON.stringify(probe);
chosen.benchmark = 0;
draw();
"""


def test_a_browser_shows_everything(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = report_page._packaged
    monkeypatch.setattr(
        report_page, "_packaged", lambda name: packaged(name) + (PROBE if name == "page.js" else "")
    )
    page = tmp_path / "report.html"
    write_report([base, trained], page)
    dom = open_page(page, tmp_path / "profile")
    ((root, _),) = dom.find("html")
    assert root.get("data-state") == "drawn" and "data-failure" not in root, root
    results = [json.loads((folder / "results.json").read_text())["benchmarks"] for folder in (base, trained)]
    base_counts, trained_counts = (result["aime"]["num_correct"] for result in results)
    num_lost = sum(a > 0 == b for a, b in zip(base_counts, trained_counts, strict=True))
    probe = json.loads(root["data-probe"])
    assert num_lost > 0 and probe["lost"] == num_lost
    assert probe["tab"] == "aime" and probe["next"] == "problem-001" and probe["found"] == ["problem-007"]
    assert probe["flip"][0] == probe["flip"][1]

    assert len(dom.find("path.line")) == 2 and len(dom.find("path.band")) == 2
    assert len(dom.find("circle.point")) == 2 * len(KS) + 2 + len(KS) + _num_round_points(results)
    assert len(dom.find("path.lost")) == num_lost
    assert len(dom.find("div.problem")) == NUM_PROBLEMS
    ((_, table),) = dom.find("table#numbers")
    for result in results:
        for value in result["math"]["pass_at_k"].values():
            assert f"{100 * value:.1f}" in table
    assert len(dom.find("article.sample")) == 16
    assert "is contracting" in dom.find("ul.warnings")[0][1]


def test_labels_of_the_frontier_cover_no_line(tmp_path: Path) -> None:
    """Of three checkpoints, the first of which solves nearly all, as a pretrained model does."""
    counts = {"base": [4] * 29 + [0], "grpo": [12] * 25 + [0] * 5, "apo": [11] * 26 + [0] * 4}
    folders = [
        write_evaluation(tmp_path / name, name, {"math": benchmark_result(of, NUM_SAMPLES, KS)})
        for name, of in counts.items()
    ]
    page = tmp_path / "report.html"
    write_report(folders, page)
    elements = open_page(page, tmp_path / "profile").elements
    charts = [i for i, (tag, _, _) in enumerate(elements) if tag == "svg"] + [len(elements)]
    place = next(
        i for i in charts if elements[i][1].get("aria-label", "").startswith("Pass@1 against Pass@16")
    )
    frontier = elements[place : charts[charts.index(place) + 1]]
    lines = [at for _, at, _ in frontier if at.get("class") in ("guide c0", "cross")]
    labels = [(at, "".join(text)) for _, at, text in frontier if at.get("class") == "label"]
    assert len(lines) == 2 + 2 * 3 and [name for _, name in labels] == list(counts)
    for at, name in labels:
        width, y = 8 * len(name), float(at["y"])
        left = float(at["x"]) - (width if at["text-anchor"] == "end" else 0)
        for line in lines:
            (x1, x2), (y1, y2) = (sorted(float(line[f"{axis}{end}"]) for end in "12") for axis in "xy")
            is_clear = x2 <= left or left + width <= x1 or y2 <= y - 11 or y + 3 <= y1
            assert is_clear, (name, at, line)


def _num_round_points(results: list[Any]) -> int:
    """Problems that are neither lost nor won, which the strip marks otherwise."""
    counts = zip(*(result["math"]["num_correct"] for result in results), strict=True)
    return sum((a > 0) == (b > 0) for a, b in counts)


def test_hostile_output_is_text(tmp_path: Path) -> None:
    result = benchmark_result([1] * len(HOSTILE), 2, (1, 2))
    folder = write_evaluation(
        tmp_path / "x", HOSTILE[0], {"math": result}, text=lambda problem, _: HOSTILE[problem]
    )
    problems = folder / "problems" / "math.jsonl"
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    for row, text in zip(rows, HOSTILE, strict=True):
        row.update(prompt=text, gold=text)
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "report.html"
    write_report([folder], page)
    samples = data_of(page, "samples-0-0")
    for shown, text in zip(samples, HOSTILE, strict=True):
        expected = text.replace("\ud800", "\ufffd")
        assert {(s["text"], s["num_left_out"]) for s in shown} == {
            (expected[:4_000], max(0, len(expected) - 4_000))
        }
    assert page.stat().st_size < 200_000
    dom = open_page(page, tmp_path / "profile")
    ((root, _),) = dom.find("html")
    assert root.get("data-state") == "drawn" and not {"data-failure", "data-hacked"} & set(root), root
    assert len(dom.find("script")) == 3 and not dom.find("img")
    assert HOSTILE[0] in dom.find("pre.prompt")[0][1] and HOSTILE[0] in dom.find("h1")[0][1]


def test_a_failing_script_is_not_an_empty_page(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = report_page._packaged
    monkeypatch.setattr(
        report_page, "_packaged", lambda name: packaged(name) + ("\nmissing();" if name == "page.js" else "")
    )
    write_report([base], tmp_path / "report.html")
    dom = open_page(tmp_path / "report.html", tmp_path / "profile")
    assert "missing" in dom.find("html")[0][0]["data-failure"]
    assert "could not be drawn" in dom.find("p.warnings")[0][1]
