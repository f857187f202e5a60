"""Training runs against real SGLang servers: each way that weights can take, and wrong answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.server import ServerPool
from apo_megatron.rollout.sglang_client import DrawRequest, SGLangClient, open_session
from tests.countdown_base import CountdownBase
from tests.distributed import run_distributed
from tests.fault_proxy import FaultProxy
from tests.sglang_runs import WORKER, assert_agreement, assert_trained_as_asked, metrics_of
from tests.sglang_servers import sglang_servers

FP32_GAP = 1e-4  # measured: 2e-6


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
