"""Which server gets which prompt."""

from __future__ import annotations

import pytest

from apo_megatron.rollout import balance
from apo_megatron.rollout.balance import Balancer

SERVERS = ["a", "b", "c"]


def test_work_is_spread_evenly() -> None:
    balancer = Balancer()
    chosen = [balancer.choose(f"p{i}", 100, SERVERS) for i in range(30)]
    assert chosen[:3] == SERVERS  # of equals the first
    assert {name: chosen.count(name) for name in SERVERS} == dict.fromkeys(SERVERS, 10)


def test_tokens_count_not_requests() -> None:
    balancer = Balancer()
    assert balancer.choose("long", 1000, SERVERS) == "a"
    assert [balancer.choose(f"p{i}", 100, ["a", "b"]) for i in range(10)] == ["b"] * 10
    assert balancer.choose("next", 100, ["a", "b"]) == "a"


def test_answered_requests_are_no_work() -> None:
    balancer = Balancer()
    for _ in range(5):
        name = balancer.choose("p", 100, ["a"])
        balancer.release(name, 100)
    with pytest.raises(AssertionError, match="more tokens released"):
        balancer.release("a", 1)


def test_a_prompt_stays_with_the_server_that_knows_it() -> None:
    balancer = Balancer()
    assert balancer.choose("p", 100, ["b"]) == "b"
    assert balancer.choose("p", 100, SERVERS) == "b"  # though a and c are idle
    assert balancer.choose("p", 100, SERVERS) == "b"  # at the margin of two requests
    assert balancer.choose("p", 100, SERVERS) == "a"  # above it
    assert balancer.choose("p", 100, SERVERS) == "a"  # which knows it now


def test_a_prompt_moves_when_its_server_has_gone() -> None:
    balancer = Balancer()
    balancer.choose("p", 100, ["b"])
    assert balancer.choose("p", 100, ["a", "c"]) == "a"


def test_flushed_caches_know_nothing() -> None:
    balancer = Balancer()
    balancer.choose("p", 100, ["b"])
    balancer.forget_prompts()
    assert balancer.choose("p", 100, SERVERS) == "a"


def test_only_recent_prompts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "MAX_REMEMBERED_PROMPTS", 2)
    balancer = Balancer()
    for prompt_id in ("p0", "p1", "p0", "p2"):
        balancer.release(balancer.choose(prompt_id, 100, ["b"]), 100)
    assert balancer.choose("p0", 100, SERVERS) == "b"
    assert balancer.choose("p1", 100, ["a", "c"]) == "a"
