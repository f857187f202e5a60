"""The templates of examples/slurm on a real Slurm of two nodes, unchanged but for their sizes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import yaml

from tests.countdown_base import COUNTDOWN, CountdownBase, run_example
from tests.run_metrics import repeatable_metrics
from tests.sglang_servers import sglang_python
from tests.slurm_cluster import Job, SlurmCluster

TRAIN = "examples/slurm/train.sbatch"
ON_CPUS = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=1G")
NUM_STEPS = 8
STOP_AFTER = 2  # steps
FREED_WITHIN = 60.0  # seconds from the death of a rank until its job has left the queue


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def base(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> CountdownBase:
    """A model that solves some problems, cold-started as a job on both nodes."""
    folder = tmp_path_factory.mktemp("countdown")
    sizes = ("--num-demonstrations", "25600", "--num-train", "500", "--num-heldout", "8")
    run_example(str(COUNTDOWN / "prepare.py"), "--out", str(folder / "data"), *sizes)
    job = cluster.submit(
        TRAIN, "--config", str(COUNTDOWN / "sft.yaml"), f"model.hf_path={folder / 'data' / 'init'}",
        f"data.train_path={folder / 'data' / 'sft.jsonl'}", "parallel.tensor_parallel_size=1",
        "train.num_steps=100", "optimizer.lr=4e-3", "optimizer.lr_warmup_steps=10",
        options=ON_CPUS, RUN_DIR=str(folder / "base"), MODULE="apo_megatron.sft",
    )  # fmt: skip
    assert job.wait() == "COMPLETED", job.text
    return CountdownBase(folder)


def _write_config(base: CountdownBase, run: str, num_steps: int = 100_000, **sections: Any) -> str:
    """One rank a node, as many nodes as there are."""
    config = base.config(run, train={"num_steps": num_steps}, data={"prompts_per_step": 8}, **sections)
    config["parallel"] = {}
    path = base.folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def _submit(
    cluster: SlurmCluster,
    base: CountdownBase,
    run: str,
    num_steps: int = 100_000,
    options: Sequence[str] = (),
) -> Job:
    config = _write_config(base, run, num_steps)
    return cluster.submit(
        TRAIN, "--config", config, options=(*ON_CPUS, *options), RUN_DIR=str(base.folder / run)
    )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Also without what is measured when a run starts again."""
    return repeatable_metrics(folder, "canary_gap") if (folder / "metrics.jsonl").exists() else []


def test_a_run_that_is_stopped_and_requeued_ends_like_one_that_is_not(
    cluster: SlurmCluster, base: CountdownBase
) -> None:
    """Both at once: two runs share the nodes."""
    unbroken = _submit(cluster, base, "unbroken", NUM_STEPS)
    stopped = _submit(cluster, base, "stopped", NUM_STEPS)
    folder = base.folder / "stopped"

    stopped.wait_until(lambda: len(_metrics(folder)) >= STOP_AFTER)
    cluster.run("scancel", "--batch", "--signal=USR1", stopped.number)  # as --signal=B:USR1@900 does in time
    stopped.wait_until(lambda: stopped.shown("Restarts") == "1")
    num_steps_then = len(_metrics(folder))
    assert STOP_AFTER <= num_steps_then < NUM_STEPS, stopped.text
    stopped.start_now()

    assert stopped.wait() == "COMPLETED", stopped.text
    assert unbroken.wait() == "COMPLETED", unbroken.text
    assert f"going on after step {num_steps_then}" in stopped.text
    assert stopped.shown("Restarts") == "1"
    expected = _metrics(base.folder / "unbroken")
    assert len(expected) == NUM_STEPS
    assert any(not row["skipped_step"] for row in expected)
    assert _metrics(folder) == expected
    model = Path("hf", "model.safetensors")
    assert (folder / model).read_bytes() == (base.folder / "unbroken" / model).read_bytes()
    for start in (0, 1):
        logs = folder / "logs" / f"job_{stopped.number}.{start}"
        assert {path.name for path in logs.glob("rank_*")} == {"rank_00000.log", "rank_00001.log"}


def test_a_killed_rank_frees_the_nodes(cluster: SlurmCluster, base: CountdownBase) -> None:
    job = _submit(cluster, base, "killed")
    job.wait_until(lambda: len(_metrics(base.folder / "killed")) >= 1)
    ranks = cluster.processes("apo_megatron.train", "-u")
    assert len(ranks) == 2
    (last,) = [rank for rank in ranks if rank.environ()["RANK"] == "1"]
    killed_at = time.monotonic()
    last.kill()
    assert job.wait() == "FAILED", job.text
    assert time.monotonic() - killed_at < FREED_WITHIN
    assert job.shown("Restarts") == "0"
    assert not psutil.wait_procs(ranks, timeout=5)[1]


def test_one_task_of_an_array_is_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The last one, whose number is also that of the array: nothing is evaluated."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho evaluating\nexec sleep 60\n")
    python.chmod(0o755)
    (tmp_path / "checkpoints.txt").write_text("one\ntwo\n")
    array = cluster.submit(
        "examples/slurm/evaluate_array.sbatch", "--config", "none.yaml", options=("--array=1-2", *ON_CPUS),
        RUN_DIR=str(tmp_path), CHECKPOINTS=str(tmp_path / "checkpoints.txt"), PYTHON=str(python),
    )  # fmt: skip
    first, last = (Job(cluster, f"{array.number}_{task}") for task in (1, 2))
    for task in (first, last):
        task.wait_until(lambda task=task: "evaluating" in task.text)  # type: ignore[misc]
    assert last.shown("JobId") == array.number
    cluster.run("scancel", "--batch", "--signal=USR1", last.number)
    last.wait_until(lambda: last.shown("Restarts") == "1")
    assert (first.shown("JobState"), first.shown("Restarts")) == ("RUNNING", "0")
    cluster.run("scancel", array.number)


@pytest.mark.slow
def test_an_error_of_the_user_is_said_and_not_requeued(cluster: SlurmCluster, base: CountdownBase) -> None:
    job = cluster.submit(TRAIN, "--config", "no/such.yaml", options=ON_CPUS, RUN_DIR=str(base.folder / "no"))
    assert job.wait() == "FAILED"
    assert "no/such.yaml" in job.text
    assert job.shown("Restarts") == "0"


@pytest.mark.slow
def test_conversion_and_evaluations(cluster: SlurmCluster, base: CountdownBase) -> None:
    """Conversion on one node, and two checkpoints as an array."""
    checkpoints = base.folder / "checkpoints.txt"
    checkpoints.write_text(f"{base.model}\n{base.folder / 'data' / 'init'}\n")
    converted = base.folder / "megatron"
    conversion = cluster.submit(
        "examples/slurm/convert.sbatch", "hf_to_megatron", "--hf-path", str(base.model),
        "--megatron-path", str(converted),
        options=("--cpus-per-task=2", "--mem=1G"), RUN_DIR=str(base.folder / "convert"), RANKS_PER_NODE="2",
    )  # fmt: skip
    array = cluster.submit(
        "examples/slurm/evaluate_array.sbatch", "--config", str(COUNTDOWN / "evaluate.yaml"),
        f"benchmarks=[{{name: countdown, path: {base.folder / 'data' / 'heldout.jsonl'}}}]",
        "evaluation.num_samples=8", "evaluation.ks=[1, 8]",
        options=("--array=1-2", *ON_CPUS), RUN_DIR=str(base.folder / "evaluations"),
        CHECKPOINTS=str(checkpoints),
    )  # fmt: skip
    assert conversion.wait() == "COMPLETED", conversion.text
    assert (converted / ".metadata").exists()
    for task in (1, 2):
        job = Job(cluster, f"{array.number}_{task}")
        assert job.wait() == "COMPLETED", job.text
        results = json.loads((base.folder / "evaluations" / str(task) / "results.json").read_text())
        assert "countdown" in json.dumps(results)


@pytest.mark.slow
def test_the_time_limit_requeues_a_run(cluster: SlurmCluster, base: CountdownBase) -> None:
    """Slurm sends the signal up to 30 s early, so the run may still be starting: it is asked again."""
    job = _submit(cluster, base, "limited", options=("--time=4", "--signal=B:USR1@195"))
    job.wait_until(lambda: job.shown("Restarts") == "1")
    assert "SIGUSR1 received: stopped after step" in job.text
    cluster.run("scontrol", "update", f"jobid={job.number}", "TimeLimit=60")
    job.start_now()
    num_steps = len(_metrics(base.folder / "limited"))
    job.wait_until(lambda: len(_metrics(base.folder / "limited")) > num_steps)
    cluster.run("scancel", job.number)
    assert job.wait() == "CANCELLED"
    assert f"going on after step {num_steps}" in job.text


def _check_stop_and_resume(job: Job, folder: Path) -> None:
    """In the middle of a run without end."""
    job.wait_until(lambda: len(_metrics(folder)) >= STOP_AFTER)
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until(lambda: job.shown("Restarts") == "1")
    num_steps = len(_metrics(folder))
    job.start_now()
    job.wait_until(lambda: len(_metrics(folder)) > num_steps)
    job.cluster.run("scancel", job.number)
    assert job.wait() == "CANCELLED"
    assert f"going on after step {num_steps}" in job.text


@pytest.mark.slow
def test_training_under_ray(cluster: SlurmCluster, base: CountdownBase) -> None:
    config = _write_config(base, "ray")
    with TemporaryDirectory(prefix="ray_") as ray_folder:  # the path of a socket may have 107 characters
        job = cluster.submit(
            "examples/slurm/train_ray.sbatch", "--config", config, "--num-trainers", "2",
            options=ON_CPUS, RUN_DIR=str(base.folder / "ray"), RAY_TMPDIR=ray_folder,
        )  # fmt: skip
        _check_stop_and_resume(job, base.folder / "ray")


@pytest.mark.slow
def test_training_with_servers_on_another_node(cluster: SlurmCluster, base: CountdownBase) -> None:
    """A real SGLang on the first node, a trainer on the second."""
    config = _write_config(base, "servers", rollout={"sglang": {"python": sglang_python()}})
    job = cluster.submit(
        "examples/slurm/train_disaggregated.sbatch", "--config", config,
        options=(*ON_CPUS, "--mem=6G"), RUN_DIR=str(base.folder / "servers"),
    )  # fmt: skip
    _check_stop_and_resume(job, base.folder / "servers")
