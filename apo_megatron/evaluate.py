"""Pass@K of a Hugging Face checkpoint on held-out problems.

    python -m apo_megatron.evaluate --config examples/countdown/evaluate.yaml model.hf_path=runs/demo/apo/hf
    torchrun --nproc-per-node 2 -m apo_megatron.evaluate --config examples/countdown/evaluate.yaml

Every rank holds the whole model and takes its share of the problems.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from apo_megatron.config import EvalConfig, ParallelConfig
from apo_megatron.data.prompts import load_prompts
from apo_megatron.data.tokenizer import load_tokenizer
from apo_megatron.evaluation.harness import PassAtKResult, evaluate_pass_at_k
from apo_megatron.files import write_atomically
from apo_megatron.parallel.state import init_parallel
from apo_megatron.rewards.registry import build_reward
from apo_megatron.rollout.build import load_engine
from apo_megatron.telemetry.command import parse_command_line, run_command
from apo_megatron.telemetry.progress import RunDisplay


def evaluate(cfg: EvalConfig) -> PassAtKResult:
    """Evaluate as ``cfg`` says; the main rank writes cfg.output_path and prints a table.

    Raises ConfigError, DataError and CheckpointError for what a user can mend.
    """
    assert cfg.evaluation.data_path is not None, "the config has a rule for this"
    reward = build_reward(cfg.reward)
    prompts = load_prompts(
        cfg.evaluation.data_path,
        load_tokenizer(cfg.model.hf_path),
        cfg.evaluation,
        required_fields=reward.required_fields,
        max_rows=cfg.evaluation.max_problems,
    )
    parallel = init_parallel(ParallelConfig(), cfg.evaluation.seed)
    engine = load_engine(cfg.rollout, cfg.model, parallel.device)
    with (
        RunDisplay(1, parallel.is_main, "evaluate") as display,
        display.phase("evaluation", total=len(prompts)) as advance,
    ):
        result = evaluate_pass_at_k(
            engine, prompts, reward, cfg.evaluation, cfg.rollout, parallel, progress=advance
        )
    if parallel.is_main:
        write_result(result, cfg)
        Console().print(result_table(result, cfg.model.hf_path))
        print(f"written to {cfg.output_path}")
    return result


def write_result(result: PassAtKResult, cfg: EvalConfig) -> None:
    """``result`` with the resolved config as JSON in cfg.output_path: whole or not at all."""
    path = Path(cfg.output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**result.to_json(), "config": cfg.model_dump(mode="json")}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def result_table(result: PassAtKResult, title: str) -> Table:
    """What a person reads, in percent."""
    table = Table(title=title, caption=_caption(result))
    table.add_column("K", justify="right")
    table.add_column("Pass@K (%)", justify="right")
    table.add_column("95 % interval")
    for k, value in result.pass_at_k.items():
        low, high = result.ci95[k]
        table.add_row(str(k), f"{100 * value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
    return table


def _caption(result: PassAtKResult) -> str:
    caption = (
        f"{len(result.num_correct)} problems x {result.num_samples} samples; "
        f"{result.mean_response_length:.1f} tokens a sample, {100 * result.truncation_rate:.1f} % truncated, "
        f"{result.distinct_correct:.1f} different right answers a problem"
    )
    if result.verifier_failures:
        caption += f"; {result.verifier_failures} samples could not be judged and count as wrong"
    return caption


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        evaluate(parse_command_line(words, EvalConfig, "python -m apo_megatron.evaluate"))

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
