"""Runs of ``train`` in which one rank stops in the middle of a micro-batch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apo_megatron.actor.forward_step import TokenTerms
from apo_megatron.config import RLConfig
from apo_megatron.health import activity
from apo_megatron.parallel import collective_log
from apo_megatron.train import train

real_loss = TokenTerms.loss


def sleep_for_ever() -> None:
    time.sleep(600)


def train_and_stop(payload: dict[str, Any]) -> None:
    """``victim`` is "frozen" or "sleeping" in the second micro-batch of the update of ``step``, or "slow"."""
    config, how = payload["config"], payload["how"]

    def loss(*arguments: Any) -> tuple[Tensor, Any]:
        place = activity.current
        is_there = (place.step, place.phase, place.micro_batch) == (payload["step"], "update", 2)
        if is_there and how == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif is_there and how == "sleeping":
            sleep_for_ever()
        elif how == "slow":
            time.sleep(payload["seconds"])
        return real_loss(*arguments)

    if int(os.environ["RANK"]) == payload["victim"]:
        TokenTerms.loss = loss  # type: ignore[method-assign,assignment]
    train(RLConfig.model_validate(config))


def count_collectives(payload: dict[str, Any]) -> dict[str, int]:
    """What each function of torch.distributed adds to the log."""
    collective_log.install()
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.new_group([0, 1], group_desc="SUB_GROUP")
    one, two = torch.zeros(2), torch.zeros(4)

    def exchange() -> None:
        messages = [dist.P2POp(dist.isend, one, 1 - rank), dist.P2POp(dist.irecv, two[:2], 1 - rank)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()

    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(one),
        "broadcast": lambda: dist.broadcast(one, 0),
        "all_gather": lambda: dist.all_gather([two[:2], two[2:]], one),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(two, one),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(one, two),
        "all_to_all_single": lambda: dist.all_to_all_single(two.clone(), two),
        "barrier": dist.barrier,
        "all_gather_object": lambda: dist.all_gather_object([None, None], rank),
        "broadcast_object_list": lambda: dist.broadcast_object_list([rank], 0),
        "batch_isend_irecv": exchange,
        "subgroup": lambda: dist.all_reduce(one, group=group),
    }
    counts = {}
    for name, call in calls.items():
        before = collective_log.log.num_issued
        call()
        counts[name] = collective_log.log.num_issued - before
    messages = "messages from rank {} to rank {} in world"
    expected = {"world (ranks 0, 1)", "sub (ranks 0, 1)", messages.format(0, 1), messages.format(1, 0)}
    assert {group.label for group in collective_log.log.groups.values()} == expected
    last = collective_log.log.last
    assert last is not None and (last[0], last[1].label, last[2]) == ("allreduce", "sub (ranks 0, 1)", 2)
    return counts
