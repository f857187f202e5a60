"""SGLangEngine: every fault ends in the full number of completions, all of the right version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apo_megatron.errors import RolloutError
from apo_megatron.rollout.engine import SamplingParams
from apo_megatron.rollout.model_limits import ModelLimits
from apo_megatron.rollout.server_sources import FileServers, ListedServers
from apo_megatron.rollout.sglang_generation import merge_versions
from apo_megatron.types import Prompt
from tests.distributed import run_distributed
from tests.sglang_models import other_model, served_model
from tests.sglang_servers import sglang_servers

CANARY_BOUND = 1e-5  # nats, float32 on both sides; 5e-8 measured


def run_scene(name: str, world_size: int = 2, **payload: Any) -> list[dict[str, Any]]:
    pool = sglang_servers(served_model(), num_servers=2)
    payload |= {
        "urls": [address.url for address in pool.addresses()],
        "served": str(served_model()),
        "other": str(other_model()),
    }
    return run_distributed(world_size, f"tests.workers.sglang_engine:{name}", payload)


@pytest.fixture(scope="module")
def requests() -> list[dict[str, Any]]:
    return run_scene("requests")


def test_nothing_is_drawn_before_the_first_update(requests: list[dict[str, Any]]) -> None:
    assert all("has no weights" in result["before"] for result in requests)


def test_update_goes_through_the_canary(requests: list[dict[str, Any]]) -> None:
    for result in requests:
        assert result["metrics"]["num_servers"] == 2
        assert result["metrics"]["canary_gap"] < CANARY_BOUND
        assert result["plain"] == []


def test_spoiled_answers_are_drawn_again(requests: list[dict[str, Any]]) -> None:
    assert requests[0]["faults left"] == 0
    assert [result["faults"] for result in requests] == [[], []]


def test_what_would_end_a_server_is_not_sent(requests: list[dict[str, Any]]) -> None:
    for result in requests:
        refused = result["refused"]
        assert "prompt 'p': token 107 lies outside" in refused["token"]
        assert "exceed the model's max_position_embeddings" in refused["length"]
        assert "stop tokens [-1]" in refused["stop"]
    assert requests[0]["refused"]["sent"] == 0


def test_stale_servers_are_left_out_until_they_are_updated(requests: list[dict[str, Any]]) -> None:
    for result in requests:
        stale = result["stale"]
        assert stale["generate"] == [] and stale["usable"] == 1 and stale["looks"]
        assert stale["recovered"] and stale["after"] == []
        assert stale["metrics"] == {"num_servers": 1, "num_servers_unchanged": 1} and stale["left out"] == []
        assert stale["taken in"]


def test_stopped_completions_keep_their_tokens_and_go_on(requests: list[dict[str, Any]]) -> None:
    for result in requests:
        stopped = result["stopped"]
        assert stopped["in time"] and stopped["seconds"] < 10 and stopped["cut"] == {"abort"}
        assert stopped["finished"] and stopped["goes on"]
        assert stopped["by update"] == ["abort"]


def test_colocated_servers_sleep_until_the_update(requests: list[dict[str, Any]]) -> None:
    for result in requests:
        assert "has no weights" in result["asleep"]["refused"]
        assert result["asleep"]["metrics"]["num_servers"] == 2
        assert result["asleep"]["generate"] == []


def test_wrong_weights_end_the_run_on_every_rank(requests: list[dict[str, Any]]) -> None:
    for result in requests:
        wrong = result["wrong weights"]
        for part in ("differ from the actor's by", "max_canary_gap=0.01", "means: actor -", "server -"):
            assert part in wrong["canary"]
        assert "has no weights" in wrong["generates"]
        assert "checksums of servers' weights differ" in wrong["checksum"]


@pytest.mark.slow  # four starts; what matters of it to a run is in test_sglang_failures.py, too
def test_killed_and_hung_servers() -> None:
    for rank, result in enumerate(run_scene("lost_servers", health_timeout=10.0)):
        assert result["metrics"]["num_servers"] == 2
        for phase in ("killed", "both killed", "hung", "at last"):
            assert result[phase] == [], phase
        assert result["back"] and result["both back"] and result["awake"]
        if rank == 0:
            assert result["restarted"]


def test_servers_of_a_file(tmp_path: Path) -> None:
    for result in run_scene("listed", file=str(tmp_path / "servers.json")):
        assert result["metrics"]["num_servers"] == 1
        assert result["both"]
        assert result["generate"] == result["with both"] == []
        assert "servers.json: expected a JSON list" in result["broken"]


def test_sources(tmp_path: Path) -> None:
    assert ListedServers(["http://a:1"]).addresses() == {"http://a:1": "http://a:1"}
    path = tmp_path / "servers.json"
    assert FileServers(str(path)).addresses() == {}
    for text in ("[", "3", '["http://a:1"]', '[{"name": "a"}]'):
        path.write_text(text)
        with pytest.raises(RolloutError, match="expected a JSON list"):
            FileServers(str(path)).addresses()


def test_servers_of_a_folder(tmp_path: Path) -> None:
    """A file for each machine; a name is unique on its machine only."""
    source = FileServers(str(tmp_path))
    assert source.addresses() == {}
    for node, port in (("b", 2), ("a", 1)):
        (tmp_path / f"{node}.json").write_text(
            json.dumps([{"name": "server-0", "url": f"http://{node}:{port}"}])
        )
    assert source.addresses() == {"a/server-0": "http://a:1", "b/server-0": "http://b:2"}
    (tmp_path / "a.json").write_text("[]")
    assert source.addresses() == {"b/server-0": "http://b:2"}


def test_limits_of_the_model() -> None:
    limits = ModelLimits(vocab_size=10, max_positions=8, eos_token_ids=frozenset([1]))
    sampling = SamplingParams(4, 1.0, 1.0, 0, max_new_tokens=5, stop_token_ids=(7, 1), seed=0)
    assert limits.stop_token_ids(sampling) == (1, 7)

    def check(tokens: list[int], sampling: SamplingParams = sampling) -> None:
        limits.check([Prompt("p", "", np.array(tokens, np.int32))], sampling)

    check([0, 9, 5])
    for tokens, message in {(3, 10): "token 10", (-1,): "token -1", (1, 2, 3, 4): "max_position"}.items():
        with pytest.raises(RolloutError, match=f"prompt 'p': .*{message}"):
            check(list(tokens))
    with pytest.raises(RolloutError, match=r"stop tokens \[10\]"):
        check([0], replace(sampling, stop_token_ids=(10,)))


def test_versions_are_merged() -> None:
    assert merge_versions([], 3, 5) == ((3, 5),)
    assert merge_versions([], 3, 0) == ((3, 0),)
    assert merge_versions([(2, 4)], 3, 5) == ((2, 4), (3, 5))
    assert merge_versions([(2, 4)], 2, 5) == ((2, 9),)
    assert merge_versions([(2, 4)], 3, 0) == ((2, 4),)
    assert merge_versions([(2, 0)], 3, 5) == ((3, 5),)
