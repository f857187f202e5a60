"""The Triton kernels: their results under Triton's interpreter, and that they compile for a GPU.

The interpreter runs the Python of a kernel with numpy, so it shows what is computed, not that it compiles (it
allows more than the compiler does), nor how fast anything is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from apo_megatron.parallel import _vocab_kernels, _vocab_rows, _vocab_rows_by_device
from apo_megatron.parallel._vocab_rows_by_device import row_functions
from tests.lm_head_cases import head_case
from tests.test_lm_head import check_case as check_head_case
from tests.test_vocab_ops import CASES, INF, check_case, make_case, underflow_case

ROOT = Path(__file__).resolve().parent.parent
FP32, BF16 = torch.float32, torch.bfloat16


def first_rows(case: dict[str, Any], num_rows: int) -> dict[str, Any]:
    """The interpreter needs some milliseconds for each row and for each id of a Top-K."""
    whole = {name: case[name][:num_rows] for name in ("logits", "targets", "support_ids", "extra_ids")}
    return {**case, **whole, "grads": [grad[:num_rows] for grad in case["grads"]]}


def rising(case: dict[str, Any]) -> dict[str, Any]:
    """Higher logits in later columns: every tile raises the maximum."""
    ramp = torch.linspace(0.0, 12.0, case["logits"].shape[1])
    return {**case, "logits": case["logits"] + ramp.to(case["logits"].dtype)}


# The tiles of the kernels are 4096 and 2048 columns, the blocks of the Top-K search 128.
OPS: dict[str, dict[str, Any]] = {
    "plain": make_case(5, dtype=FP32, k=4),
    "cool": make_case(3, dtype=FP32, k=2, temperature=0.5, padding=INF, seed=1),
    "warm": make_case(3, dtype=FP32, k=2, temperature=2.0, padding=-INF, seed=2),
    "no padding": make_case(3, vocab_size=48, dtype=FP32, k=2, seed=3),
    "k beyond the vocabulary": make_case(4, 6, 16, 2, k=8, dtype=FP32, padding=INF, seed=4),
    "no support": make_case(3, num_ids=0, k=1, dtype=FP32, seed=5),
    "no rows": make_case(num_rows=0, dtype=FP32, seed=7),
    "peaked": make_case(4, spread=60.0, k=2, dtype=FP32, seed=8),
    "rows that are no whole vectors": make_case(3, 300, 301, dtype=FP32, k=2, padding=INF, seed=9),
    "padding in the last vector": make_case(3, 4201, 4208, 8, dtype=FP32, k=9, temperature=0.7, seed=10),
    "rising": rising(make_case(3, 4501, 4504, dtype=FP32, k=2, seed=13)),
    "bf16": make_case(4, 301, 304, dtype=BF16, k=3, seed=11),
    "bf16 wide": make_case(3, 6001, 6004, 8, dtype=BF16, k=3, temperature=0.7, seed=12),
    "underflow": {**underflow_case(), "k": 2},
    "ties": first_rows({**CASES["ties fp32"], "k": 12}, 3),
    "ties wide": first_rows(CASES["ties wide bf16"], 3),
    "all equal": first_rows(CASES["all equal"], 2),
}
HEAD: dict[str, dict[str, Any]] = {
    "fp32": head_case(5, dtype=FP32, k=2, tile=(3, 32), seed=1),
    "bf16": head_case(4, dtype=BF16, k=2, tile=(4, 16), levels=4, padding=INF, seed=2),
    "ties": head_case(4, dtype=FP32, k=5, tile=(4, 20), levels=1, seed=3),
    "no rows": head_case(num_rows=0, dtype=FP32, seed=4),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of all cases, from a process of its own: triton is interpreted from its import on, or never."""
    folder = tmp_path_factory.mktemp("kernels")
    torch.save({"ops": OPS, "head": HEAD}, folder / "payload.pt")
    result = subprocess.run(
        [sys.executable, "-m", "tests.workers.vocab_kernels", str(folder)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize("name", OPS)
def test_ops_with_kernels(name: str, interpreted: dict[str, Any]) -> None:
    check_case(OPS[name], [interpreted["ops"][name]])


@pytest.mark.parametrize("name", HEAD)
def test_lm_head_with_kernels(name: str, interpreted: dict[str, Any]) -> None:
    result = interpreted["head"][name]
    check_head_case(HEAD[name], [result])
    assert torch.equal(result["reference"][2], result["terms"][0])  # ratio 1 at theta = reference


def test_all_kernels_were_used(interpreted: dict[str, Any]) -> None:
    """Once for each case with rows (the search twice: with and without the targets' log-probs), and for every
    tile of the LM head: two or three of them in each pass."""
    num_ops = sum(len(case["logits"]) > 0 for case in OPS.values())
    num_tiles = 2 * 2 + 3 + 3
    assert interpreted["calls"] == {
        "row_statistics": num_ops + num_tiles,
        "best_columns": 2 * num_ops + num_tiles,
        "overwrite_with_gradient": num_ops + num_tiles,
    }


def test_torch_computes_where_kernels_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(2, 3)
    assert row_functions(logits) is _vocab_rows
    monkeypatch.setattr(_vocab_rows_by_device, "_is_on_gpu", lambda logits: True)
    assert row_functions(logits) is _vocab_kernels
    assert row_functions(logits.bfloat16()) is _vocab_kernels
    assert row_functions(logits.double()) is _vocab_rows
    assert row_functions(logits[:0]) is _vocab_rows and row_functions(logits[:, :0]) is _vocab_rows
    monkeypatch.setattr(_vocab_rows_by_device, "_HAS_TRITON", False)
    assert row_functions(logits) is _vocab_rows


def test_columns_of_a_row_must_be_adjacent() -> None:
    with pytest.raises(AssertionError, match="must be adjacent"):
        _vocab_kernels.row_statistics(torch.zeros(3, 4).t(), 1.0)


@pytest.mark.parametrize(
    ("shape", "width", "expected"),
    [((3, 64), 50, 64), ((3, 64), 64, 64), ((3, 50), 50, 50), ((3, 60), 50, 50), ((3, 80), 50, 64)],
)
def test_padding_is_touched_in_whole_vectors_only(shape: tuple[int, int], width: int, expected: int) -> None:
    assert _vocab_kernels._num_readable(torch.zeros(shape)[:, :width]) == expected


def test_nothing_behind_the_storage_is_touched() -> None:
    logits = torch.zeros(3, 64)
    assert _vocab_kernels._num_readable(logits[:, 32:56]) == 32
    assert _vocab_kernels._num_readable(logits[:, 40:64]) == 24  # 8 more columns of the last row do not exist


class Recorder:
    """Stands for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append((arguments, options))


def compile_launch(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Compile a kernel for an H100 as a launch with these arguments would; its PTX. Needs no GPU."""
    names = {FP32: "*fp32", BF16: "*bf16", torch.int64: "*i64"}
    constants = {name: value for name, value in options.items() if name != "num_warps"}
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value  # the compiler treats both as literals
        elif isinstance(value, Tensor):
            signature[name] = names[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, ordered, constants, attributes)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": options["num_warps"]}).asm["ptx"]


@pytest.fixture
def compile_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, list[str]]]:
    """Calls every function, compiles what it launches and gives the PTX by kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ("_scan_row", "_pick_best", "_write_gradient")
    kernels = {name: getattr(_vocab_kernels, name) for name in names}
    recorders = {name: Recorder() for name in names}
    for name in names:
        monkeypatch.setattr(_vocab_kernels, name, recorders[name])

    def compile_all(logits: Tensor, num_slots: int, k: int) -> dict[str, list[str]]:
        of_rows, grads = torch.zeros(len(logits)), torch.zeros(len(logits), num_slots)
        _vocab_kernels.row_statistics(logits, 1.5)
        _vocab_kernels.best_columns(logits, k, 1.5)
        for weighted in (None, of_rows):
            _vocab_kernels.overwrite_with_gradient(
                logits, 1.5, of_rows, of_rows, weighted, grads.long(), grads
            )
        compiled = {
            name: [compile_launch(kernels[name], *launch) for launch in recorders[name].launches]
            for name in names
        }
        assert [len(compiled[name]) for name in names] == [2, 1, 2]
        return compiled

    return compile_all


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_kernels_compile_for_a_gpu(
    dtype: torch.dtype, compile_kernels: Callable[..., dict[str, list[str]]]
) -> None:
    """With loads and stores of whole vectors, though 16 does not divide the number of tokens."""
    compiled = compile_kernels(torch.zeros(2, 8192, dtype=dtype)[:, :8001], num_slots=9, k=8)
    for ptx in compiled["_scan_row"] + compiled["_write_gradient"]:
        assert "ld.global.v4.b32" in ptx
    for ptx in compiled["_write_gradient"]:
        assert "st.global.v4.b32" in ptx


def test_kernels_compile_for_sizes_of_one(compile_kernels: Callable[..., dict[str, list[str]]]) -> None:
    compile_kernels(torch.zeros(1, 1), num_slots=1, k=1)
