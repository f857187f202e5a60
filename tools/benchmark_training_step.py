"""A whole update of APO and GRPO beside plain cross-entropy, on the same model and the same sequences.

    python -m tools.benchmark_training_step --quick
    python -m tools.benchmark_training_step --tp 2 --sp --packed 4096 --dtype bfloat16 --output table.md

Makes a random model in a temporary folder. The updates are whole ones: forward, backward, reduction of the
gradients and optimizer. The passes before an update (old log-probs, and the reference where A < 0) stand
apart. All run in turn in every repetition; the least time counts, of several ranks that of the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from apo_megatron.data.collate import TrainingSequence, make_batch
from apo_megatron.models.transformer_config import TORCH_DTYPES
from apo_megatron.objectives.objective import build_objective, supervised_objective
from apo_megatron.parallel.collectives import broadcast_from_main
from apo_megatron.parallel.state import ParallelContext, init_parallel
from tools.measurement import CLOCKS, MIB, Operation, add_clock_option, measure_in_turn, run_ranks
from tools.random_model import write_random_model

CROSS_ENTROPY, GRPO, APO = "update, cross-entropy", "update, GRPO", "update, APO"
OLD, OLD_WRONG, REFERENCE = "old log-probs", "old log-probs where A < 0", "reference where A < 0"


@dataclass(frozen=True)
class Measurement:
    """One line of the table. Seconds of the slowest rank, memory and traffic of rank 0."""

    name: str
    seconds: float
    num_tokens: int  # of all sequences that it looks at, on all ranks
    extra_bytes: int  # peak beyond weights, gradients and optimizer state
    num_collectives: int
    num_bytes: int


def make_sequences(options: argparse.Namespace) -> list[TrainingSequence]:
    """Prompts of one length, responses of log-normal lengths, the first with a negative advantage."""
    draw = np.random.default_rng(0)
    lengths = (draw.lognormal(0.0, 0.5, options.num_sequences) * options.response_length).astype(int)
    num_wrong = round(options.wrong_share * options.num_sequences)
    sequences = []
    for number, length in enumerate(lengths.clip(1, 4 * options.response_length)):
        tokens = draw.integers(options.vocab_size, size=options.prompt_length + length)
        advantage = -1.0 if number < num_wrong else 1.0
        sequences.append(TrainingSequence(tokens, options.prompt_length, advantage, np.zeros(length)))
    return sequences


def make_actor(folder: Path, options: argparse.Namespace, parallel: ParallelContext) -> MegatronActor:
    """With a random model, which the main rank writes into ``folder``."""
    config = {
        "hidden_size": options.hidden_size,
        "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "vocab_size": options.vocab_size,
    }
    if parallel.is_main:
        write_random_model(folder, config, TORCH_DTYPES[options.dtype])
    torch.distributed.barrier()
    return MegatronActor(
        ModelConfig(
            hf_path=str(folder / "model"),
            dtype=options.dtype,
            recompute=options.recompute,
            max_logits_mib=options.max_logits_mib,
        ),
        OptimizerConfig(),
        parallel,
        MicroBatchSize(options.micro_batch_size, options.packed),
        num_updates=10_000,
    )


def operations(
    actor: MegatronActor, sequences: Sequence[TrainingSequence], parallel: ParallelContext
) -> list[Operation]:
    """What a step consists of, by objective. The reference has the weights that the policy begins with."""
    grpo_cfg = ObjectiveConfig(loss_mode="vanilla", support_telemetry=False)
    grpo, apo = build_objective(grpo_cfg), build_objective(ObjectiveConfig())
    batch = make_batch(sequences, grpo_cfg, parallel, num_mini_batches=1, seed=(0, 0)).sequences
    with_old = actor.attach_old_log_probs(batch)
    with_reference, _ = actor.attach_reference(with_old, apo)
    wrong = batch.select((batch.advantages < 0).any(dim=1).nonzero().squeeze(1))

    def operation(name: str, function: Callable[[], object], is_yardstick: bool = False) -> Operation:
        def forward() -> tuple[()]:
            function()
            return ()

        return Operation(name, forward, is_yardstick=is_yardstick)

    actor.update(with_old, grpo)  # the first one makes the optimizer's state
    return [
        operation(CROSS_ENTROPY, lambda: actor.update(batch, supervised_objective()), is_yardstick=True),
        operation(GRPO, lambda: actor.update(with_old, grpo)),
        operation(APO, lambda: actor.update(with_reference, apo)),
        operation(OLD, lambda: actor.attach_old_log_probs(batch)),
        operation(OLD_WRONG, lambda: actor.attach_old_log_probs(wrong)),
        operation(REFERENCE, lambda: actor.attach_reference(with_old, apo)),
    ]


def measure_this_world(options: argparse.Namespace) -> list[Measurement]:
    """The measurements of the world this process is a rank of."""
    parallel = init_parallel(layout(options))
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as own_folder:
        folder = Path(broadcast_from_main(own_folder, parallel))
        actor = make_actor(folder, options, parallel)
        sequences = make_sequences(options)
        chosen = operations(actor, sequences, parallel)
        results = measure_in_turn(chosen, options.repetitions, parallel, CLOCKS[options.clock])
        torch.distributed.barrier()  # the folder is the main rank's
    of_all = sum(len(sequence.token_ids) for sequence in sequences)
    of_wrong = sum(len(sequence.token_ids) for sequence in sequences if sequence.advantage < 0)
    return [
        Measurement(
            operation.name,
            result.seconds,
            of_wrong if operation.name in (OLD_WRONG, REFERENCE) else of_all,
            result.extra_bytes,
            result.num_collectives,
            result.num_bytes,
        )
        for operation, result in zip(chosen, results, strict=True)
    ]


def layout(options: argparse.Namespace) -> ParallelConfig:
    return ParallelConfig(
        tensor_parallel_size=options.tp,
        pipeline_parallel_size=options.pp,
        context_parallel_size=options.cp,
        sequence_parallel=options.sp,
        overlap_grad_reduce=options.overlap,
        overlap_param_gather=options.overlap,
    )


def report(measurements: Sequence[Measurement], options: argparse.Namespace) -> str:
    """The table in Markdown, what was measured above it, the goals below it."""
    by_name = {m.name: m for m in measurements}
    rows = (
        f"packed to {options.packed} tokens" if options.packed else f"{options.micro_batch_size} padded rows"
    )
    axes = ", ".join(f"{axis.upper()}={getattr(options, axis)}" for axis in ("tp", "pp", "cp", "dp"))
    lines = [
        f"{options.layers} layers, hidden size {options.hidden_size}, vocabulary {options.vocab_size}, "
        f"{options.dtype}; {axes}{', SP' if options.sp else ''}{', overlapped' if options.overlap else ''}; "
        f"recompute {options.recompute}; {options.num_sequences} sequences, "
        f"{by_name[OLD].num_tokens} tokens, {rows} a micro-batch.",
        "",
        "| operation | ms | tokens/s | ratio | peak MiB | collectives | MiB moved |",
        "|" + "---|" * 7,
    ]
    for m in measurements:
        lines.append(
            f"| {m.name} | {1e3 * m.seconds:.0f} | {m.num_tokens / m.seconds:.0f} "
            f"| {m.seconds / by_name[CROSS_ENTROPY].seconds:.3f} | {m.extra_bytes / MIB:.1f} "
            f"| {m.num_collectives} | {m.num_bytes / MIB:.2f} |"
        )
    reference = by_name[REFERENCE]
    lines += [
        "",
        f"- APO over GRPO: {by_name[APO].seconds / by_name[GRPO].seconds:.3f} (goal: at most 1.03).",
        f"- The reference pass looks at {100 * options.wrong_share:.0f} % of the sequences, those with "
        f"A < 0, and takes {reference.seconds / by_name[OLD_WRONG].seconds:.3f} of a forward pass over them "
        f"(goal: at most 1), {reference.seconds / by_name[OLD].seconds:.3f} of one over all.",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for axis in ("tp", "pp", "cp", "dp"):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"ranks of {axis.upper()}, default: 1")
    parser.add_argument("--sp", action="store_true", help="sequence parallelism")
    parser.add_argument("--packed", type=int, metavar="TOKENS", help="pack sequences up to so many")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows, where they are not packed")
    parser.add_argument("--dtype", default="float32", choices=list(TORCH_DTYPES))
    for name, default in (
        ("hidden-size", 256),
        ("layers", 4),
        ("heads", 4),
        ("vocab-size", 32000),
        ("max-logits-mib", ModelConfig(hf_path="").max_logits_mib),
        ("num-sequences", 16),
        ("prompt-length", 64),
        ("response-length", 192),
        ("repetitions", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    parser.add_argument(
        "--overlap", action="store_true", help="reduction and gathering overlap with computing"
    )
    add_clock_option(parser)
    parser.add_argument("--wrong-share", type=float, default=0.5, help="of the sequences, default: 0.5")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two repetitions")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)  # from run_ranks
    options = parser.parse_args(argv)
    if options.quick:
        options.hidden_size, options.layers, options.vocab_size, options.repetitions = 64, 2, 1000, 2
        options.num_sequences, options.prompt_length, options.response_length = 8, 8, 24
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "RANK" in os.environ:
        measurements = measure_this_world(options)
        if os.environ["RANK"] != "0":
            return
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(m) for m in measurements]))
            return
    else:
        num_ranks = options.tp * options.pp * options.cp * options.dp
        found = run_ranks("tools.benchmark_training_step", arguments, num_ranks, options.threads)
        measurements = [Measurement(**fields) for fields in found]
    text = report(measurements, options)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
