"""What the templates of examples/slurm would start, without Slurm."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apo_megatron.rollout.server_sources import FileServers

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))


def dry_run(*words: str, **variables: str) -> str:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **variables}
    result = subprocess.run(
        [sys.executable, "tools/slurm_dry_run.py", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def started(output: str, what: str) -> list[str]:
    """The lines that start ``what``."""
    return [line for line in output.splitlines() if f" {what} " in line and line.startswith("  on ")]


@pytest.mark.parametrize(
    "path", [*TEMPLATES, *(ROOT / "examples").glob("*/*.sh")], ids=lambda path: path.name
)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1091", "--shell=bash", str(path)], check=True)


def test_ranks_on_all_nodes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = dry_run(
        "--nodes=3", "--gpus-per-node=h100:4", "examples/slurm/train.sbatch", "--config", "a b.yaml",
        "train.num_steps=7", RUN_DIR=str(run), HF_TOKEN="a-secret", NCCL_DEBUG="INFO", INTERFACE="ib0",
    )  # fmt: skip
    lines = started(output, "torch.distributed.run")
    assert [line.split(":")[0] for line in lines] == [f"  on node{i}" for i in range(3)]
    (port,) = {re.search(r"--master-addr node0 --master-port (\d+)", line).group(1) for line in lines}  # type: ignore[union-attr]
    assert 20_000 <= int(port) < 30_000
    for rank, line in enumerate(lines):
        assert f"--nnodes 3 --node-rank {rank} --nproc-per-node 4" in line
        assert line.endswith(
            rf"apo_megatron.train --config a\ b.yaml train.num_steps=7 --resume auto train.run_dir={run}"
        )
    assert "srun --kill-on-bad-exit=1" in output
    assert "NCCL_DEBUG=INFO" in output and "GLOO_SOCKET_IFNAME=ib0" in output
    assert "900 s before its time is up it gets SIGUSR1" in output
    assert "a-secret" not in output
    assert not run.exists()


def test_other_jobs_have_other_ports() -> None:
    """Two jobs may share a node."""
    template = (ROOT / "examples" / "slurm" / "common.sh").read_text()
    function = re.search(r"^port_of_this_job\(\) \{.*?^\}", template, re.DOTALL | re.MULTILINE)
    assert function is not None

    def port(job: int) -> int:
        command = f"{function.group()}\nSLURM_JOB_ID={job}\nport_of_this_job"
        return int(subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout)

    assert len({port(job) for job in range(123_450, 123_460)}) == 10


def test_the_first_nodes_serve() -> None:
    output = dry_run(
        "--nodes=5", "examples/slurm/train_disaggregated.sbatch", "--config", "run.yaml", SERVER_NODES="2"
    )
    servers = started(output, "apo_megatron.rollout.server")
    trainers = started(output, "torch.distributed.run")
    assert [line.split(":")[0] for line in servers] == ["  on node0", "  on node1"]
    assert [line.split(":")[0] for line in trainers] == ["  on node2", "  on node3", "  on node4"]
    assert all("--nnodes 3" in line and "--master-addr node2" in line for line in trainers)
    files = [Path(line.split("rollout.sglang.servers_file=")[1]) for line in servers]
    (folder,) = {line.split("rollout.sglang.servers_file=")[1] for line in trainers}
    assert {str(file.parent) for file in files} == {folder}
    assert len(set(files)) == 2
    assert FileServers(folder).addresses() == {}  # not there yet
    assert "rollout.sglang.host=address-of-node1" in servers[1]


def test_too_few_nodes_to_serve_and_train() -> None:
    with pytest.raises(AssertionError, match="ask for more with --nodes"):
        dry_run("--nodes=2", "examples/slurm/train_disaggregated.sbatch", "--config", "c", SERVER_NODES="2")


def test_ray_on_all_nodes() -> None:
    output = dry_run("--nodes=3", "examples/slurm/train_ray.sbatch", "--config", "run.yaml")
    head, *workers = started(output, "start")
    assert head.startswith("  on node0:")
    assert [line.split(":")[0] for line in workers] == ["  on node1", "  on node2"]
    (launcher,) = started(output, "apo_megatron.launch.ray")
    (address,) = {re.search(r"--address=(\S+)", line).group(1) for line in workers}  # type: ignore[union-attr]
    assert f"--address {address} " in launcher
    assert f"--port={address.split(':')[1]} " in head


def test_an_array_evaluates_line_by_line(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints.txt"
    checkpoints.write_text("runs/a/hf\nruns/b/hf\n")
    words = ("examples/slurm/evaluate_array.sbatch", "--config", "e.yaml")
    output = dry_run("--array=2-2", *words, CHECKPOINTS=str(checkpoints), RUN_DIR="runs/all")
    (line,) = started(output, "torch.distributed.run")
    assert line.endswith("model.hf_path=runs/b/hf output_dir=runs/all/2")
    with pytest.raises(AssertionError, match="has no line 3"):
        dry_run("--array=3", *words, CHECKPOINTS=str(checkpoints))


def test_a_conversion_needs_no_gpu() -> None:
    output = dry_run(
        "examples/slurm/convert.sbatch", "hf_to_megatron", "--hf-path", "in", "--megatron-path", "out"
    )
    assert "0 GPU(s)" in output
    (line,) = started(output, "torch.distributed.run")
    assert line.endswith("checkpoints_convert.hf_to_megatron --hf-path in --megatron-path out")
