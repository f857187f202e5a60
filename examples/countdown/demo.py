"""The whole story on two CPU cores: cold-start a tiny model, train it by GRPO and by APO, compare Pass@K.

    python examples/countdown/demo.py                                     # what `make demo` runs
    python examples/countdown/demo.py --seeds 0 1 2 --methods grpo grpo_kl kl_on_wrong apo --out runs/seeds

Every stage is a command of its own, printed before it runs, so that each can be repeated alone:

    OUT/data   problems, demonstrations, an untrained model     prepare.py
    OUT/base   the base: supervised cold start                  apo_megatron.sft
    OUT/grpo   RL from the base, one folder a method            apo_megatron.train
    OUT        results.json, table.md, comparison.png           report.py

With several seeds each has its folders under OUT/seed0, OUT/seed1, ...
With --rollout sglang a real SGLang server, on the CPU, draws the samples (make sglang-cpu installs it), which
takes five times as long: that server has no fast kernels there.

Run again, it goes on after the last stage that finished with the same command and YAML file
(--fresh: from the start).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from report import METHODS, write_report
from stages import (
    BASE,
    BASE_OVERRIDE,
    HERE,
    ROOT,
    Progress,
    Stage,
    StageFailed,
    data_stage,
    digest_of,
    program,
    sft_stage,
    shell,
    short,
)

from apo_megatron.errors import ConfigError
from apo_megatron.telemetry.progress import duration

SGLANG_PYTHON = ".venv-sglang/bin/python"
SGLANG = (
    "rollout.engine=sglang",
    f"rollout.sglang.python={SGLANG_PYTHON}",
    "rollout.sglang.server_args=[--max-running-requests, '256']",
)
QUICK_DATA = ("--num-demonstrations", "15360", "--num-train", "64", "--num-heldout", "8")
QUICK_SFT = ("train.num_steps=60", "optimizer.lr_warmup_steps=0")
QUICK_RL = (
    "train.num_steps=2",
    "data.prompts_per_step=16",
    "optimizer.lr_warmup_steps=0",
    "evaluation.num_samples=16",
    "evaluation.ks=[1, 2, 4, 8, 16]",
    "evaluation.interval=1",
    "evaluation.interval_num_samples=8",
    "evaluation.bootstrap_samples=100",
)


def rl_stage(
    folder: Path, seed: int, nproc: int, quick: bool, steps: int | None, with_base: bool, rollout: str
) -> Stage:
    """RL by the method that ``folder`` is named after; ``with_base`` evaluates the policy it starts from."""
    overrides = (
        f"model.hf_path={folder.parent / BASE / 'hf'}",
        f"data.train_path={folder.parent / 'data' / 'train.jsonl'}",
        f"evaluation.data_path={folder.parent / 'data' / 'heldout.jsonl'}",
        f"train.run_dir={folder}",
        f"train.seed={seed}",
        f"{BASE_OVERRIDE}{'true' if with_base else 'false'}",
        *(QUICK_RL if quick else ()),
        *(SGLANG if rollout == "sglang" else ()),
        *((f"train.num_steps={steps}",) if steps is not None else ()),
    )
    config = HERE / f"{folder.name}.yaml"
    command = program(nproc, "apo_megatron.train", config, overrides)
    return Stage(
        f"{METHODS[folder.name]} (seed {seed})",
        rollout,
        folder,
        command,
        (folder / "evaluation_final.json", *((folder / "evaluation_start.json",) if with_base else ())),
        digest_of(config),
    )


def run_stage(stage: Stage, progress: Progress, fresh: bool) -> bool:
    """Run ``stage`` unless it has finished before; whether it ran. Raises StageFailed."""
    print(progress.header(stage.title), flush=True)
    if stage.is_finished() and not fresh:
        print(f"already there: {short(stage.folder)} (--fresh repeats it)", flush=True)
        progress.finish(stage.kind, None)
        return False
    print(f"$ {shell(stage.command)}\n", flush=True)
    shutil.rmtree(stage.folder, ignore_errors=True)
    started = time.monotonic()
    code = _run(stage.command)
    seconds = time.monotonic() - started
    missing = stage.missing()
    if code == 0 and missing:
        raise StageFailed(f"{stage.title} ended without writing {', '.join(missing)}", 1)
    if code != 0:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise StageFailed(
            f"{stage.title} {how} after {duration(seconds)}; its messages are above. To repeat it alone:\n"
            f"{shell(stage.command)}",
            128 - code if code < 0 else code,
        )
    stage.write_stamp(seconds)
    print(f"\ndone in {duration(seconds)}", flush=True)
    progress.finish(stage.kind, seconds)
    return True


def run_seed(folder: Path, seed: int, options: argparse.Namespace, progress: Progress) -> None:
    """All stages of one seed. A stage that ran makes what was built on it out of date: that is removed."""
    data = data_stage(folder / "data", seed, QUICK_DATA if options.quick else ())
    sft = sft_stage(folder / BASE, seed, options.nproc, QUICK_SFT if options.quick else ())
    for stage, built_on_it in ((data, (BASE, *METHODS)), (sft, tuple(METHODS))):
        if run_stage(stage, progress, options.fresh):
            for name in built_on_it:
                shutil.rmtree(folder / name, ignore_errors=True)
    for method in options.methods:
        others = [name for name in METHODS if name != method]
        base_is_elsewhere = any((folder / name / "evaluation_start.json").exists() for name in others)
        stage = rl_stage(
            folder / method,
            seed,
            options.nproc,
            options.quick,
            options.steps,
            with_base=not base_is_elsewhere,
            rollout=options.rollout,
        )
        run_stage(stage, progress, options.fresh)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    if options.rollout == "sglang" and not (ROOT / SGLANG_PYTHON).exists():
        print(
            f"error: --rollout sglang needs {SGLANG_PYTHON}: build it with make sglang-cpu", file=sys.stderr
        )
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that stages end with us
    out = Path(options.out).resolve()
    several = len(options.seeds) > 1
    folders = {seed: out / f"seed{seed}" if several else out for seed in options.seeds}
    progress = Progress(["data", "sft", *[options.rollout] * len(options.methods)] * len(options.seeds))
    try:
        for seed, folder in folders.items():
            run_seed(folder, seed, options, progress)
    except StageFailed as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return error.code
    except ConfigError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr, flush=True)
        return 130
    given = sys.argv[1:] if argv is None else argv
    settings = {
        "command": shlex.join(["python", "examples/countdown/demo.py", *given]),
        "nproc": options.nproc,
    }
    print(f"\n=== results | elapsed {duration(progress.elapsed)}\n", flush=True)
    for path in write_report(out, folders, options.methods, settings):
        print(f"wrote {short(path)}")
    if options.quick:
        print("--quick: this shows that everything runs; the numbers mean nothing")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", default="runs/demo", help="where everything goes (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data, weights and sampling")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["grpo", "apo"])
    parser.add_argument("--steps", type=int, help="RL steps (default: as in the YAML files)")
    parser.add_argument("--nproc", type=int, default=2, help="Megatron ranks (default: %(default)s)")
    parser.add_argument("--rollout", choices=["embedded", "sglang"], default="embedded", help="engine")
    parser.add_argument("--quick", action="store_true", help="a few steps only: does it run? Not a result")
    parser.add_argument("--fresh", action="store_true", help="repeat stages that have finished before")
    options = parser.parse_args(argv)
    options.seeds, options.methods = list(dict.fromkeys(options.seeds)), list(dict.fromkeys(options.methods))
    return options


def _num_ranks(command: Sequence[str]) -> int:
    return int(command[command.index("--nproc-per-node") + 1]) if "--nproc-per-node" in command else 0


def _run(command: Sequence[str]) -> int:
    # One thread a rank: the ranks share the cores. Unbuffered: a log shows each line when it happens.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if torch.cuda.device_count() < _num_ranks(command):  # a rank needs a GPU of its own: then on the CPU
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait()
    finally:
        if process.poll() is None:  # we were interrupted: torchrun ends its ranks
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
