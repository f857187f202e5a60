"""An evaluation that is killed again and again ends as one that nobody killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from tests.distributed import DistributedRun, run_distributed
from tests.test_evaluate import write_config
from tests.tiny_models import make_tiny_model

NUM_KILLS = 10
COMMAND = "tests.workers.evaluation:run_command_line"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.jsonl"))


def test_killed_ten_times_the_report_is_the_same(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_tiny_model(tmp_path / "model"), num_problems=30)
    words = ["--config", str(config), "label=tiny", "rollout.max_batch_size=2", "rollout.max_new_tokens=12"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_distributed(2, COMMAND, {"argv": [*words, f"output_dir={whole}"]})
    share = _size(whole / "generations") // (NUM_KILLS + 1)

    pick = random.Random(0)
    sizes = [0]
    payload = {"argv": [*words, f"output_dir={broken}"]}
    for number in range(NUM_KILLS):
        with DistributedRun(2, COMMAND, payload) as run:
            deadline = time.monotonic() + 60
            until = number * share + pick.randrange(1, share)  # somewhere in each part of the work
            while _size(broken / "generations") < until and time.monotonic() < deadline:
                time.sleep(0.002)
            for rank in (0, 1):
                run.kill(rank)
            assert -signal.SIGKILL in run.exit_codes(30), "it was done before it could be killed"
        sizes.append(_size(broken / "generations"))
        if number % 3 == 0:  # what a power failure leaves
            torn = broken / "generations" / "words" / "rank_00001.jsonl"
            with torn.open("ab") as file:
                file.write(b'{"problem": "q')
    assert sizes == sorted(sizes) and len(set(sizes)) > NUM_KILLS // 2
    run_distributed(2, COMMAND, payload)
    for name in ("results.json", "report.html", "problems/words.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
