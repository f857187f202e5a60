"""What a Slurm template would start where, without Slurm: give it what you would give sbatch.

    python tools/slurm_dry_run.py --nodes=4 examples/slurm/train.sbatch --config run.yaml train.num_steps=100

The template itself runs, in bash, with the variables that Slurm would set for nodes node0, node1, ... Only
programs that start or write something are replaced: nothing is started, no file is written, all is printed.
From the root of the checkout; options of sbatch in the form --name=value.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

JOB_NUMBER = "1234"
# Each node of a step runs the step's command, one after the other; what they run is printed by _PYTHON.
_SRUN = """#!/bin/bash
words=() nodes=$SLURM_JOB_NUM_NODES first=0
while [[ $1 == --* ]]; do
    case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --relative=*) first=${1#*=} ;;
    esac
    words+=("$1")
    shift
done
started=$(for ((i = 0; i < nodes; i++)); do
    SLURM_NODEID=$i SLURMD_NODENAME=node$((first + i)) "$@"
done)
echo "srun ${words[*]}
$started"
case "$*" in
*/serve.sh*|*/ray_node.sh*) exec /bin/sleep infinity ;;  # servers do not end by themselves
esac
"""
_PYTHON = """#!/bin/bash
echo "  on ${SLURMD_NODENAME:-node0}: python$(printf ' %q' "$@")"
"""
_SCONTROL = """#!/bin/bash
case "$1" in
show) for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do echo "node$i"; done ;;
*) echo "scontrol $*" ;;
esac
"""
_GETENT = """#!/bin/bash
echo "address-of-$2"
"""
_NOTHING = "#!/bin/bash\n"
_REPLACED = {
    "srun": _SRUN,
    "scontrol": _SCONTROL,
    "getent": _GETENT,
    "python": _PYTHON,
    **dict.fromkeys(("mkdir", "rm", "touch", "tail", "sleep"), _NOTHING),
}


def sbatch_options(template: Path, words: Sequence[str]) -> dict[str, str]:
    """Options by name: those of the #SBATCH lines, under those on the command line ("" without a value)."""
    lines = re.findall(r"^#SBATCH\s+--(\S+)", template.read_text(encoding="utf-8"), re.MULTILINE)
    pairs = (word.partition("=") for word in (*lines, *(word.removeprefix("--") for word in words)))
    return {name: value for name, _, value in pairs}


def job_environment(options: Mapping[str, str]) -> dict[str, str]:
    """The variables of the caller, and those that Slurm sets for the batch script and the template reads."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {
        "SLURM_JOB_ID": JOB_NUMBER,
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_JOB_NODELIST": f"node[0-{int(options['nodes']) - 1}]",
        "SLURM_CPUS_ON_NODE": options["cpus-per-task"],
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_GPUS_PER_NODE": options.get("gpus-per-node", "0"),
    }
    if "array" in options:
        environment["SLURM_ARRAY_TASK_ID"] = re.split(r"\D", options["array"])[0]
    return environment


def describe(options: Mapping[str, str]) -> str:
    """What Slurm itself is asked for, in words."""
    lines = [
        f"job {options['job-name']}: {options['nodes']} node(s), each with "
        f"{options.get('gpus-per-node', '0')} GPU(s) and {options['cpus-per-task']} CPU(s), for "
        f"{options['time']}; prints into {options['output']} (%x: its name, %j: its number)"
    ]
    if "array" in options:
        lines.append(f"one job for each of {options['array']}; this is the first")
    if "signal" in options:
        name, seconds = options["signal"].removeprefix("B:").split("@")
        then = "saves, is requeued and goes on" if "requeue" in options else "ends"
        lines.append(f"{seconds} s before its time is up it gets SIG{name}, {then}")
    return "\n".join(lines)


def wait_for_servers(group: int) -> None:
    """Until what is left of a process group has printed all and only sleeps, as servers do here."""

    def names() -> list[str]:
        found = []
        for process in psutil.process_iter(["name"]):
            with suppress(ProcessLookupError):
                if os.getpgid(process.pid) == group:
                    found.append(process.info["name"])
        return found

    while (left := names()) and "sleep" not in left:
        time.sleep(0.05)


def main(words: Sequence[str]) -> int:
    """Run the template; its exit code."""
    num_options = next((i for i, word in enumerate(words) if not word.startswith("--")), len(words))
    if num_options == len(words):
        print(__doc__, file=sys.stderr)
        return 2
    template = Path(words[num_options])
    if not template.is_file():
        print(
            f"error: {template}: no such template; expected one of examples/slurm, after options of "
            "sbatch in the form --name=value",
            file=sys.stderr,
        )
        return 2
    options = sbatch_options(template, words[:num_options])
    environment = job_environment(options)
    print(describe(options), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in _REPLACED.items():
            program = Path(folder, name)
            program.write_text(text)
            program.chmod(0o755)
        environment["PYTHON"] = "python"
        environment["PATH"] = f"{folder}:{environment['PATH']}"
        process = subprocess.Popen(
            ["bash", str(template), *words[num_options + 1 :]], env=environment, start_new_session=True
        )
        try:
            code = process.wait()
            wait_for_servers(process.pid)
            return code
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # servers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
