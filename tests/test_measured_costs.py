"""The benchmarks of tools/: what they count, the tables they print, and that memory does not grow with T."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tools import benchmark_training_step, memory_curve
from tools.benchmark_training_step import Measurement
from tools.memory_curve import SERIES, Point

MIB = 2**20


def rows_of(text: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    rows: list[list[str]] = []
    for line in (line for line in text.splitlines() if line.startswith("|")):
        if line.startswith("|---"):
            rows.pop()  # the head
        else:
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    return rows


def run_tool(module: str, num_ranks: int, path: Path, *arguments: str) -> str:
    payload = {"module": f"tools.{module}", "arguments": ["--quick", *arguments, "--output", str(path)]}
    run_distributed(num_ranks, "tests.workers.benchmarks:run_command", payload)
    return path.read_text()


def test_what_is_counted() -> None:
    costs = run_distributed(2, "tests.workers.benchmarks:known_costs", {})
    for rank, cost in enumerate(costs):
        assert (cost["memory"]["peak_bytes"], cost["memory"]["left_bytes"]) == (16_000, 4_000)
        assert cost["freeing"]["left_bytes"] == -4_000
        assert cost["memory"]["num_collectives"] == 0
        sent = 120 + 40 + 8 + (7 if rank == 0 else 0)  # who receives hands over nothing
        assert (cost["traffic"]["num_bytes"], cost["traffic"]["num_collectives"]) == (sent, 4 - rank)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_table_of_the_vocabulary_ops(tmp_path: Path, num_ranks: int) -> None:
    text = run_tool("benchmark_vocab_ops", num_ranks, tmp_path / "table.md", "--dtypes", "fp32")
    rows = {row[4].strip("*"): row for row in rows_of(text)}
    assert all(
        len(row) == 14 and row[:4] == ["64x32000", "fp32", str(num_ranks), "8"] for row in rows.values()
    )
    fused, unfused = rows["lm_head_policy_terms"], rows["projection + policy_terms"]
    assert float(fused[10]) < float(unfused[10]) / 2
    assert fused[10] == rows["lm_head_policy_terms, gradient in main_grad"][10]
    assert ("projection + plain torch" in rows) == (num_ranks == 1)
    names = ("lm_head_policy_terms", "lm_head_topk", "policy_terms", "topk, with log-probs")
    assert [rows[name][12] for name in names] == (["0"] * 4 if num_ranks == 1 else ["3", "1", "2", "1"])
    moved = 64 * 4 * (1 + 2 + 9 + 64) / MIB  # maxima; sums and chosen logits; gradient of the hidden states
    assert fused[13] == ("0.00" if num_ranks == 1 else f"{moved:.2f}")
    assert [name for name, row in rows.items() if row[4][0] == "*"] == [
        "policy_terms",
        "topk, with log-probs",
        "bare matrix products (1 forward, 3 backward)",
        "bare matrix product",
    ]


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2 sp packed": (2, ["--tp", "2", "--sp", "--packed", "96"]),
    "cp2 packed bf16": (2, ["--cp", "2", "--packed", "96", "--dtype", "bfloat16"]),
    "pp2": (2, ["--pp", "2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_table_of_a_training_step(tmp_path: Path, name: str) -> None:
    num_ranks, arguments = LAYOUTS[name]
    text = run_tool("benchmark_training_step", num_ranks, tmp_path / "table.md", *arguments)
    rows = {row[0]: row for row in rows_of(text)}
    assert list(rows) == [
        "update, cross-entropy",
        "update, GRPO",
        "update, APO",
        "old log-probs",
        "old log-probs where A < 0",
        "reference where A < 0",
    ]
    assert rows["update, cross-entropy"][3] == "1.000"
    assert len({row[5] for row in list(rows.values())[:3]}) == 1  # APO communicates as often as the others
    assert all(float(row[4]) > 0 and float(row[2]) > 0 for row in rows.values())


def test_report_of_a_training_step() -> None:
    seconds = {"update, cross-entropy": 1.0, "update, GRPO": 2.0, "update, APO": 2.05}
    seconds |= {"old log-probs": 0.8, "old log-probs where A < 0": 0.4, "reference where A < 0": 0.44}
    measurements = [Measurement(name, value, 100, MIB, 3, MIB) for name, value in seconds.items()]
    options = benchmark_training_step.parse(["--wrong-share", "0.25"])
    text = benchmark_training_step.report(measurements, options)
    assert "| update, APO | 2050 | 49 | 2.050 | 1.0 | 3 | 1.00 |" in text
    assert "APO over GRPO: 1.025 (goal" in text
    assert "25 % of the sequences" in text and "takes 1.100 of a forward pass over them" in text


def test_memory_of_a_whole_update_does_not_grow_with_the_sequence(tmp_path: Path) -> None:
    """Beyond the same update with a tiny vocabulary: a few numbers a token against a row of logits."""
    lengths, vocab_size, never = (1024, 2048), 32_768, 2**30
    models = [(128, 0), (vocab_size, 0), (vocab_size, never)]
    payload: dict[str, Any] = {"models": models, "lengths": lengths, "folder": str(tmp_path)}
    (peaks,) = run_distributed(1, "tests.workers.benchmarks:whole_updates", payload)
    growth = {
        max_logits_mib: [
            peaks[f"{vocab_size} {max_logits_mib}"][i] - peaks["128 0"][i] for i in range(len(lengths))
        ]
        for max_logits_mib in (0, never)
    }
    print(growth)
    added = lengths[1] - lengths[0]
    assert growth[0][1] - growth[0][0] < 256 * added
    assert growth[never][1] - growth[never][0] > 0.9 * 4 * vocab_size * added


def test_table_and_picture_of_the_curve(tmp_path: Path) -> None:
    points = [
        Point(1024, 600 * MIB, {series: 10 * (i + 1) * MIB for i, series in enumerate(SERIES)}),
        Point(2048, 1200 * MIB, {SERIES[0]: 11 * MIB, SERIES[2]: 31 * MIB, SERIES[3]: 41 * MIB}),
    ]
    assert rows_of(memory_curve.curve_table(points))[0:] == [
        ["1024", "600", "10.0", "20.0", "30.0", "40.0"],
        ["2048", "1200", "11.0", "does not fit", "31.0", "41.0"],
    ]
    memory_curve.draw_curve(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
