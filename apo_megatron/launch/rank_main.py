"""The trainer as the child of a rank's actor: it is killed when the actor is gone, however that ended.

python -m apo_megatron.launch.rank_main PARENT_PID --config FILE [...]    (as apo_megatron.train)
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Tie this process to its parent, then be ``python -m apo_megatron.train``."""
    parent = int(sys.argv.pop(1))
    if sys.platform == "linux":  # before anything heavy is imported: that takes seconds
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before we asked
        sys.exit(f"process {parent}, which started this rank, is gone")
    runpy.run_module("apo_megatron.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
