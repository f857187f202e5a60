"""How the memory of the vocabulary end grows with the length of a sequence, fused and unfused.

Measured twice: the LM head and its loss alone, and a whole update of a tiny model on one packed sequence,
beyond what the same model takes with a tiny vocabulary.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from apo_megatron.data.collate import TrainingSequence, make_batch
from apo_megatron.objectives.objective import build_objective
from apo_megatron.parallel.state import ParallelContext, init_parallel
from apo_megatron.types import PaddedSequences
from tools.measurement import MIB, run_first, with_cost
from tools.random_model import write_random_model
from tools.vocab_operations import Case, LMHead

CURVE_LENGTHS = tuple(1024 * 2**power for power in range(6))
VOCAB_SIZE, TINY_VOCAB_SIZE, HIDDEN_SIZE = 151_936, 128, 64
DEFAULT_MIB = ModelConfig(hf_path="").max_logits_mib
HEAD_FUSED, HEAD_UNFUSED = "LM head and loss, fused", "LM head and loss, unfused"
UPDATE_FUSED = "whole update, max_logits_mib=0"
UPDATE_DEFAULT = f"whole update, max_logits_mib={DEFAULT_MIB} (default)"
SERIES = (HEAD_FUSED, HEAD_UNFUSED, UPDATE_FUSED, UPDATE_DEFAULT)


@dataclass(frozen=True)
class Point:
    """At one length; a series is missing where it would not fit."""

    num_tokens: int
    logit_bytes: int
    peak_bytes: dict[str, int]  # by series


class TinyModel:
    """One layer, fp32, and updates of it on one sequence whose tokens are all trained."""

    def __init__(self, folder: Path, vocab_size: int, max_logits_mib: int, parallel: ParallelContext) -> None:
        config = {
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 2 * HIDDEN_SIZE,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": vocab_size,
        }
        model = write_random_model(folder / str(vocab_size), config, torch.float32)
        self._vocab_size, self._parallel = vocab_size, parallel
        self._objective_cfg = ObjectiveConfig()
        self._actor = MegatronActor(
            ModelConfig(hf_path=str(model), dtype="float32", max_logits_mib=max_logits_mib),
            OptimizerConfig(),
            parallel,
            MicroBatchSize(max_tokens=max(CURVE_LENGTHS)),
            num_updates=1000,
        )
        self.peak_bytes(2)  # the first update makes the optimizer's state

    def peak_bytes(self, num_tokens: int) -> int:
        """The most that an APO update allocates at a time."""
        sequences, objective = self._sequences(num_tokens), build_objective(self._objective_cfg)
        return with_cost(lambda: self._actor.update(sequences, objective), self._parallel)[1].peak_bytes

    def _sequences(self, num_tokens: int) -> PaddedSequences:
        """One wrong sequence with what a reference pass would find."""
        tokens = np.random.default_rng(0).integers(self._vocab_size, size=num_tokens + 1)
        sequence = TrainingSequence(tokens, 1, advantage=-1.0, rollout_log_probs=np.zeros(num_tokens))
        batch = make_batch([sequence], self._objective_cfg, self._parallel, 1, (0, 0)).sequences
        support = torch.arange(self._objective_cfg.apo_topk, dtype=torch.int32, device=batch.tokens.device)
        return batch.with_fields(
            reference_support_ids=support.expand(*batch.tokens.shape, -1),
            reference_anchor_log_mass=torch.full_like(batch.advantages, -1.0),
        )


def measure_curve(lengths: Sequence[int]) -> list[Point]:
    """On one rank; lengths ascending."""
    parallel = init_parallel(ParallelConfig())
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = TinyModel(folder, TINY_VOCAB_SIZE, 0, parallel)
        models = {
            UPDATE_FUSED: TinyModel(folder, VOCAB_SIZE, 0, parallel),
            UPDATE_DEFAULT: TinyModel(folder, VOCAB_SIZE, DEFAULT_MIB, parallel),
        }
        for num_tokens in lengths:
            case = Case.make(num_tokens, VOCAB_SIZE, HIDDEN_SIZE, 8, torch.float32, parallel)
            peaks = {HEAD_FUSED: _head_bytes(case, fused=True)}
            if 1.5 * case.logit_bytes < _available_bytes(parallel.device):
                peaks[HEAD_UNFUSED] = _head_bytes(case, fused=False)
            rest = tiny.peak_bytes(num_tokens)
            peaks |= {series: model.peak_bytes(num_tokens) - rest for series, model in models.items()}
            points.append(Point(num_tokens, case.logit_bytes, peaks))
            print(f"measured {num_tokens} tokens", file=sys.stderr)
    return points


def _head_bytes(case: Case, fused: bool) -> int:
    head = LMHead(case)
    return run_first(head.operation("", head.fused if fused else head.unfused), case.parallel).extra_bytes


def _available_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return torch.get_device_module(device).mem_get_info()[0]


def curve_table(points: Sequence[Point]) -> str:
    """Markdown, in MiB."""
    lines = [f"| T | logits | {' | '.join(SERIES)} |", "|" + "---|" * (2 + len(SERIES))]
    for point in points:
        values = [point.peak_bytes.get(series) for series in SERIES]
        cells = ["does not fit" if value is None else f"{value / MIB:.1f}" for value in values]
        lines.append(f"| {point.num_tokens} | {point.logit_bytes / MIB:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curve(points: Sequence[Point], path: Path) -> None:
    """One line for each series, both axes logarithmic."""
    from apo_megatron.telemetry.plots import DPI, LOOK, plt  # matplotlib takes a second

    looks = ("#0072B2", "-"), ("#D55E00", "-"), ("#0072B2", "--"), ("#009E73", "--")
    with plt.rc_context(LOOK):
        figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        lengths = [point.num_tokens for point in points]
        for series, (color, style) in zip(SERIES, looks, strict=True):
            values = [point.peak_bytes.get(series, float("nan")) / MIB for point in points]
            axis.plot(lengths, values, style, color=color, label=series, lw=2, marker="o", ms=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_xlabel("tokens of the sequence, all trained")
        axis.set_title(f"Memory of the vocabulary end, V = {VOCAB_SIZE:,} (MiB)")
        axis.legend(fontsize=9, handlelength=2.8)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
