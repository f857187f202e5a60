"""Training runs against real SGLang servers: each way that weights can take, and servers that fail."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.server import ServerPool
from apo_megatron.rollout.sglang_client import DrawRequest, SGLangClient, open_session
from tests.countdown_base import CountdownBase
from tests.distributed import DistributedRun, run_distributed
from tests.fault_proxy import FaultProxy
from tests.sglang_servers import sglang_python, sglang_servers, stop_sglang_servers

GROUPS, SAMPLES_PER_STEP = 16, 16 * 16
FP32_GAP = 1e-4  # measured: 2e-6
BF16_GAP = 0.05  # mean over tokens; measured: docs/rollouts.md
WORKER = "tests.workers.sglang_training:run"
SECONDS_UNTIL_EVERYTHING_IS_GONE = 60


def metrics_of(base: CountdownBase, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (base.folder / run / "metrics.jsonl").read_text().splitlines()]


def assert_trained_as_asked(result: dict[str, Any], num_steps: int) -> None:
    """Every step has all its samples, all drawn with the weights of that step."""
    assert result["ended"] == ""
    assert [step["num_samples"] for step in result["steps"]] == [SAMPLES_PER_STEP] * num_steps
    assert [len(set(step["prompts"])) for step in result["steps"]] == [GROUPS] * num_steps
    newest = 0  # a step without a mixed group leaves the weights as they are
    for number, step in enumerate(result["steps"]):
        assert len(step["versions"]) == 1
        assert newest <= step["versions"][0] <= number
        newest = step["versions"][0]


def assert_agreement(rows: list[dict[str, Any]], bound: float) -> None:
    """Engine and actor, at every update and on every trained token. A step may have no mixed group."""
    for name in ("canary_gap", "mismatch/log_prob_gap_mean"):
        gaps = [row[name] for row in rows if name in row]
        assert len(gaps) >= 2 and max(gaps) < bound, name


class Looks:
    """What each server of ``pool`` says, asked directly."""

    def __init__(self, pool: ServerPool) -> None:
        self._loop = EventLoopThread("looks")
        self._session = self._loop.run(open_session(None))
        self._clients = [SGLangClient(a.name, a.url, self._session, 107) for a in pool.addresses()]

    def pause(self) -> None:
        for client in self._clients:
            self._loop.run(client.pause())

    def checksums(self) -> list[str | None]:
        return [self._loop.run(client.checksum()) for client in self._clients]

    def greedy(self, prompt: list[int]) -> list[list[int]]:
        request = DrawRequest("", np.array(prompt, np.int32), 1, 6, 1.0, 1.0, 1, (), None)
        return [self._loop.run(client.draw(request))[0].token_ids.tolist() for client in self._clients]

    def close(self) -> None:
        self._loop.run(self._session.close())
        self._loop.close()


def greedy_of_transformers(folder: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("transport", ["tensors", "broadcast", "disk"])
def test_countdown_trains_and_every_update_arrives(base: CountdownBase, transport: str) -> None:
    pool = sglang_servers(base.model, 2)
    looks = Looks(pool)
    before = looks.checksums()
    if transport == "disk":
        looks.pause()  # as a trainer leaves them that dies in a push
    urls = [address.url for address in pool.addresses()]
    config = base.config(
        transport,
        rollout={
            "engine": "sglang",
            "sglang": {"urls": urls, "weight_transport": transport, "health_timeout": 10.0},
        },
        checkpoint={"export_hf": False, "export_hf_interval": 2},
    )
    results = run_distributed(2, WORKER, {"config": config})
    assert results[0]["steps"] == results[1]["steps"]
    assert_trained_as_asked(results[0], 3)
    rows = metrics_of(base, transport)
    assert_agreement(rows, FP32_GAP)
    assert rows[0]["num_servers"] == 2
    assert not any(row.get("num_servers_unchanged") for row in rows)
    after = looks.checksums()
    assert after[0] == after[1] is not None and after[0] != before[0]
    # The servers have the weights that the last step was drawn with: those after two steps.
    prompt = [4, 4, 15, 2, 13, 104, 58, 105]
    expected = greedy_of_transformers(base.folder / transport / "hf_step_000002", prompt)
    assert looks.greedy(prompt) == [expected, expected]
    looks.close()


def test_wrong_answers_of_a_server_cost_no_sample(base: CountdownBase) -> None:
    num_steps = 20  # while the server is left out, steps pass without a fault
    pool = sglang_servers(base.model, 2)
    addresses = pool.addresses()
    proxy = FaultProxy(addresses[0].url)
    proxy.faults.extend(["500", "400", "garbage", "half a body", "no answer", "other json"])
    urls = [proxy.url, addresses[1].url]
    config = base.config(
        "wrong_answers",
        train={"num_steps": num_steps},
        # A server whose canary fails is left out, and tried again this soon.
        rollout={"engine": "sglang", "sglang": {"urls": urls, "health_interval": 0.5}},
        checkpoint={"export_hf": False},
    )
    try:
        result = run_distributed(2, WORKER, {"config": config})[0]
    finally:
        proxy.close()
    assert not proxy.faults, "every fault was met"
    assert_trained_as_asked(result, num_steps)


def test_servers_that_die_and_hang_cost_no_sample(base: CountdownBase) -> None:
    stop_sglang_servers()
    faults = [
        {"step": 2, "when": "generate", "signal": "SIGKILL", "servers": [0]},
        {"step": 3, "when": "push", "signal": "SIGKILL", "servers": [0]},
        {"step": 4, "when": "between", "signal": "SIGKILL", "servers": [1]},
        {"step": 5, "when": "generate", "signal": "SIGSTOP", "servers": [0]},
        {"step": 6, "when": "generate", "signal": "SIGKILL", "servers": [0, 1]},
    ]
    config = base.config(
        "faults",
        model={"dtype": "bfloat16"},
        train={"num_steps": 7},
        rollout={
            "engine": "sglang",
            "sglang": {
                "python": sglang_python(),
                "num_servers": 2,
                "health_interval": 2.0,
                "health_timeout": 10.0,
                "update_timeout": 30.0,
            },
        },
        checkpoint={"export_hf": False},
    )
    result = run_distributed(2, WORKER, {"config": config, "faults": faults}, timeout=1200)[0]
    assert len(result["faults"]) == len(faults)
    assert_trained_as_asked(result, 7)
    assert_agreement(metrics_of(base, "faults"), BF16_GAP)
    assert not _processes_in(base.folder), "servers end with the run"


def test_a_killed_rank_ends_everything_and_the_run_goes_on_from_its_checkpoint(base: CountdownBase) -> None:
    stop_sglang_servers()
    servers = {"python": sglang_python(), "num_servers": 1}
    config = base.config(
        "killed",
        train={"num_steps": 200},
        rollout={"engine": "sglang", "sglang": servers},
        checkpoint={"export_hf": False, "interval": 1, "async_save": False},
    )
    latest = base.folder / "killed" / "checkpoints" / "latest"
    with DistributedRun(2, WORKER, {"config": config}) as run:
        _wait_for(latest.exists, 300, lambda: run.log(0)[-2000:])
        run.kill(1)
        killed_at = time.monotonic()
        codes = run.exit_codes(SECONDS_UNTIL_EVERYTHING_IS_GONE)
        assert any(codes)
        _wait_for(lambda: None not in run.exit_codes(0.1), SECONDS_UNTIL_EVERYTHING_IS_GONE, lambda: "ranks")
        _wait_for(lambda: not _processes_in(base.folder), SECONDS_UNTIL_EVERYTHING_IS_GONE, lambda: "servers")
        assert time.monotonic() - killed_at < SECONDS_UNTIL_EVERYTHING_IS_GONE
    num_done = int(latest.read_text().strip().removeprefix("step_"))
    config["train"]["num_steps"] = num_done + 1
    config["checkpoint"]["resume"] = "auto"
    result = run_distributed(2, WORKER, {"config": config})[0]
    assert result["ended"] == "" and len(result["steps"]) == 1
    assert result["steps"][0]["versions"] == [num_done]


def _processes_in(folder: Path) -> list[psutil.Process]:
    """Servers that were started with a model below ``folder``."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        is_server = any("sglang" in word for word in words) and any(str(folder) in word for word in words)
        if is_server and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def _wait_for(condition: Any, seconds: float, describe: Any) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)
