"""The evaluation command on real SGLang servers, which keep the weights that they have."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from apo_megatron.evaluation.sample_store import read_samples
from tests.distributed import run_distributed
from tests.sglang_models import other_model, served_model
from tests.sglang_servers import sglang_servers
from tests.test_evaluate import write_config

COMMAND = "tests.workers.evaluation:run_command_line"


def post(url: str, body: dict[str, object]) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


def test_servers_say_what_the_embedded_engine_says_and_must_agree(tmp_path: Path) -> None:
    pool = sglang_servers(served_model(), num_servers=2, fresh=True)
    urls = [address.url for address in pool.addresses()]
    words = ["--config", str(write_config(tmp_path, served_model(), num_problems=6)), "label=tiny"]
    words.append("evaluation.temperature=0.001")  # all but greedy: engines draw with other random numbers
    remote = [*words, "rollout.engine=sglang", f"rollout.sglang.urls={urls}"]
    run_distributed(1, COMMAND, {"argv": [*words, f"output_dir={tmp_path / 'embedded'}"]})
    run_distributed(1, COMMAND, {"argv": [*remote, f"output_dir={tmp_path / 'servers'}"]})

    for name in ("results.json", "problems/words.jsonl"):
        assert (tmp_path / "embedded" / name).read_bytes() == (tmp_path / "servers" / name).read_bytes()
    samples = [
        set(read_samples(tmp_path / name / "generations" / "words")) for name in ("embedded", "servers")
    ]
    assert samples[0] == samples[1] and len(samples[0]) == 6 * 8

    post(f"{urls[1]}/update_weights_from_disk", {"model_path": str(other_model())})
    with pytest.raises(AssertionError, match="checksums of servers' weights differ"):
        run_distributed(1, COMMAND, {"argv": [*remote, f"output_dir={tmp_path / 'mixed'}"]})
