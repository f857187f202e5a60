"""The client of one SGLang server: what it refuses, and what the real server answers."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import aiohttp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_answers import AnswerError, DrawnTokens, parse_completions, parse_scores
from apo_megatron.rollout.sglang_client import DrawRequest, ServerError, SGLangClient, open_session
from tests.fault_proxy import Fault, FaultProxy
from tests.sglang_models import VOCAB_SIZE, other_model, served_model
from tests.sglang_servers import sglang_servers
from tests.tiny_models import EOS_TOKEN_ID

T = TypeVar("T")
STOP_IDS = (EOS_TOKEN_ID, 7)
PROMPT = np.array([4, 15, 2, 13, 103, 58], dtype=np.int32)
LOG_PROB_BOUND = 2e-5  # nats, float32 on both sides; 5e-6 measured


def drawn(ids: list[int], reason: dict[str, Any] | None = None, **meta: Any) -> dict[str, Any]:
    """One completion as the server writes it."""
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": "length", "length": len(ids)} if reason is None else reason,
            "output_token_logprobs": [[-0.5, i, None] for i in ids],
            "weight_version": "v1",
            "weight_versions": [{"version": "v1", "start": 0, "end": len(ids)}],
            **meta,
        },
    }


def parse(*items: object, max_new_tokens: int = 5) -> list[DrawnTokens]:
    return parse_completions(list(items), len(items), VOCAB_SIZE, max_new_tokens, STOP_IDS)


def test_a_good_answer() -> None:
    [found] = parse(drawn([4, 5, 7], {"type": "stop", "matched": 7}))
    assert found.token_ids.tolist() == [4, 5, 7] and found.token_ids.dtype == np.int32
    assert found.log_probs.tolist() == [-0.5] * 3 and found.log_probs.dtype == np.float32
    assert found.finish_reason == "stop"
    assert found.weight_labels == (("v1", 3),)


def test_finish_reasons_follow_the_tokens() -> None:
    abort = {"type": "abort", "message": "Aborted"}
    assert [x.finish_reason for x in parse(drawn([4], abort), drawn([4, 7], abort), drawn([], abort))] == [
        "abort",
        "stop",  # the stop token was drawn at the moment of the abort
        "abort",
    ]
    # An EOS of config.json that the run does not count as one: the server ends there all the same.
    assert parse(drawn([4, 9], {"type": "stop", "matched": 9}))[0].finish_reason == "stop"


def test_weight_labels_of_several_spans() -> None:
    spans = [{"version": "v1", "start": 0, "end": 1}, {"version": "v2", "start": 1, "end": 3}]
    assert parse(drawn([4, 5, 6], weight_versions=spans))[0].weight_labels == (("v1", 1), ("v2", 2))
    older = drawn([4, 5])
    del older["meta_info"]["weight_versions"]
    assert parse(older)[0].weight_labels == (("v1", 2),)


def test_rounding_above_zero_is_zero() -> None:
    rows = [[1e-6, 4, None]]
    assert parse(drawn([4], output_token_logprobs=rows))[0].log_probs.tolist() == [0.0]


BAD_ANSWERS: dict[str, object] = {
    "no dict": 3,
    "no meta": {"output_ids": [4]},
    "no log-probs": drawn([4], output_token_logprobs=None),
    "rows that are no lists": drawn([4], output_token_logprobs=[4]),
    "short rows": drawn([4], output_token_logprobs=[[-0.5]]),
    "another length": drawn([4], output_token_logprobs=[[-0.5, 4, None]] * 2),
    "other ids": drawn([4], output_token_logprobs=[[-0.5, 5, None]]),
    "ids as text": drawn([4], output_token_logprobs=[[-0.5, "4", None]]),
    "fractional ids": drawn([4], output_token_logprobs=[[-0.5, 4.5, None]]),
    "huge ids": drawn([2**64], output_token_logprobs=[[-0.5, 2**64, None]]),
    "log-prob as text": drawn([4], output_token_logprobs=[["x", 4, None]]),
    "log-prob null": drawn([4], output_token_logprobs=[[None, 4, None]]),
    "log-prob nested": drawn([4], output_token_logprobs=[[[1], 4, None]]),
    "log-prob infinite": drawn([4], output_token_logprobs=[[float("-inf"), 4, None]]),
    "log-prob positive": drawn([4], output_token_logprobs=[[0.1, 4, None]]),
    "outside the vocabulary": drawn([VOCAB_SIZE]),
    "negative id": drawn([-1]),
    "too many tokens": drawn([4] * 6),
    "goes on after a stop token": drawn([7, 4]),
    "no finish reason": drawn([4], finish_reason=None),
    "unknown finish reason": drawn([4], {"type": "tired"}),
    "broken logits": drawn([4], {"type": "stop", "matched": "NaN happened"}),
    "no tokens": drawn([], {"type": "length", "length": 0}),
    "span of other tokens": drawn([4], weight_versions=[{"version": "v1", "start": 0, "end": 2}]),
    "spans with a hole": drawn([4], weight_versions=[{"version": "v1", "start": 1, "end": 1}]),
    "span without a version": drawn([4], weight_versions=[{"version": None, "start": 0, "end": 1}]),
    "no spans": drawn([4], weight_versions=[]),
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_garbage_is_refused(answer: object) -> None:
    with pytest.raises(AnswerError):
        parse(answer)


def test_another_number_of_completions_is_refused() -> None:
    with pytest.raises(AnswerError, match="1 completions, expected 2"):
        parse_completions([drawn([4])], 2, VOCAB_SIZE, 5, STOP_IDS)
    with pytest.raises(AnswerError, match="no list"):
        parse_completions(drawn([4]), 1, VOCAB_SIZE, 5, STOP_IDS)


def test_scores_must_be_of_the_tokens_that_were_sent() -> None:
    rows = [[None, 4, None], [-0.5, 15, None]]
    item = {"meta_info": {"input_token_logprobs": rows, "weight_version": "v1"}}
    scores = parse_scores([item], [PROMPT[:2]])
    assert scores.log_probs[0].tolist() == [-0.5] and scores.weight_labels == {"v1"}
    for other in (PROMPT[:3], PROMPT[1:3]):
        with pytest.raises(AnswerError, match="other tokens"):
            parse_scores([item], [other])


def test_error_survives_the_way_to_another_rank() -> None:
    error = pickle.loads(pickle.dumps(ServerError("s", "/generate", "status 500: oops", 500)))
    assert str(error) == "server s, /generate: status 500: oops" and error.status == 500 and error.retryable
    assert not ServerError("s", "/generate", "no", 401).retryable


# The thread of the connections


def test_event_loop_runs_and_raises() -> None:
    loop = EventLoopThread()

    async def work(value: int) -> int:
        await asyncio.sleep(0)
        if value < 0:
            raise ValueError("negative")
        return value + 1

    assert loop.run(work(1)) == 2 and loop.submit(work(2)).result() == 3
    with pytest.raises(ValueError, match="negative"):
        loop.run(work(-1))
    loop.close()


def test_event_loop_gives_up_and_ends_quietly(caplog: pytest.LogCaptureFixture) -> None:
    loop = EventLoopThread()
    ended = []

    async def sleep_long() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        loop.run(sleep_long(), timeout=0.05)
    future = loop.submit(sleep_long())
    loop.run(asyncio.sleep(0))
    with caplog.at_level(logging.DEBUG, logger="asyncio"):
        loop.close()
        loop.close()
    assert ended == [True, True] and future.cancelled()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(RuntimeError, match="closed"):
        loop.submit(sleep_long())


# The real server


class Connection:
    """A client of the server behind ``url``, and the loop that it lives in."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.loop = EventLoopThread()
        self.session: aiohttp.ClientSession = self.loop.run(open_session(api_key))
        self.client = SGLangClient("server-0", url, self.session, VOCAB_SIZE, control_timeout=60)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(coroutine, timeout=120)

    def draw(self, **changes: Any) -> list[DrawnTokens]:
        return self.run(self.client.draw(draw_request(**changes)))

    def close(self) -> None:
        self.run(self.session.close())
        self.loop.close()


def draw_request(**changes: Any) -> DrawRequest:
    values: dict[str, Any] = {
        "request_id": "r1",
        "token_ids": PROMPT,
        "num_samples": 1,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop_token_ids": STOP_IDS,
        "seeds": None,
    }
    return DrawRequest(**{**values, **changes})


@pytest.fixture(scope="module")
def server() -> Iterator[Connection]:
    """With the weights of ``served_model``, whatever other tests have left there."""
    connection = Connection(sglang_servers(served_model(), num_servers=2).addresses()[0].url)
    body = {"model_path": str(served_model()), "weight_version": "served", "flush_cache": True}
    connection.run(connection.client.post("/update_weights_from_disk", body, timeout=60))
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(served_model(), dtype=torch.float32).eval()


@torch.inference_mode()
def model_log_probs(model: Any, token_ids: np.ndarray, temperature: float = 1.0) -> torch.Tensor:
    """[L, V]: after each token."""
    logits = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0]
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def gap(model: Any, prompt: np.ndarray, found: DrawnTokens, temperature: float) -> float:
    """Largest |difference| of the log-probs to the model's own."""
    whole = np.concatenate([prompt, found.token_ids])
    expected = model_log_probs(model, whole, temperature)[len(prompt) - 1 : -1]
    rows = torch.from_numpy(found.token_ids.astype(np.int64)).unsqueeze(-1)
    return float(np.abs(expected.gather(-1, rows).squeeze(-1).numpy() - found.log_probs).max())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_have_the_model_s_log_probs(server: Connection, model: Any, temperature: float) -> None:
    found = server.draw(num_samples=4, temperature=temperature, max_new_tokens=20)
    assert len({tuple(x.token_ids.tolist()) for x in found}) > 1
    for completion in found:
        assert gap(model, PROMPT, completion, temperature) < LOG_PROB_BOUND
        assert completion.weight_labels == (("served", len(completion.token_ids)),)


def test_likeliest_tokens_are_the_model_s(server: Connection, model: Any) -> None:
    [found] = server.draw(top_k=1, max_new_tokens=12, stop_token_ids=())
    ids = PROMPT
    for token in found.token_ids.tolist():
        assert token == int(model_log_probs(model, ids)[-1].argmax())
        ids = np.append(ids, np.int32(token))
    assert gap(model, PROMPT, found, 1.0) < LOG_PROB_BOUND


def test_scores_are_the_model_s(server: Connection, model: Any) -> None:
    sequences = [PROMPT, PROMPT[:2], np.arange(5, 60, dtype=np.int32)]
    scores = server.run(server.client.score(sequences))
    assert scores.weight_labels == {"served"}
    for tokens, log_probs in zip(sequences, scores.log_probs, strict=True):
        expected = model_log_probs(model, tokens)[:-1]
        rows = torch.from_numpy(tokens[1:].astype(np.int64)).unsqueeze(-1)
        assert np.abs(expected.gather(-1, rows).squeeze(-1).numpy() - log_probs).max() < LOG_PROB_BOUND


def test_stop_tokens_end_a_completion(server: Connection) -> None:
    everything = tuple(range(2, VOCAB_SIZE))
    for found in server.draw(num_samples=3, stop_token_ids=everything):
        assert len(found.token_ids) == 1 and found.finish_reason == "stop"
    [found] = server.draw(max_new_tokens=3, top_k=1, stop_token_ids=())
    assert len(found.token_ids) == 3 and found.finish_reason == "length"


def test_long_prompts_are_read_once(server: Connection) -> None:
    prompt = np.tile(PROMPT, 200)
    request = draw_request(token_ids=prompt, num_samples=4, request_id="prefix")

    async def draw_and_count() -> list[int]:
        await server.client.flush_cache()
        await server.client.draw(request)
        answer = await server.client.post("/generate", request.to_json(), timeout=60)
        return [item["meta_info"]["cached_tokens"] for item in answer]

    assert len(prompt) * 3 > 512
    assert min(server.run(draw_and_count())) >= len(prompt) - 1


def test_aborted_samples_keep_their_tokens_and_can_go_on(server: Connection, model: Any) -> None:
    request = draw_request(num_samples=3, max_new_tokens=20_000, stop_token_ids=(), request_id="long")

    async def draw_and_abort() -> list[DrawnTokens]:
        answer = asyncio.create_task(server.client.draw(request))
        while not answer.done():
            await asyncio.sleep(1)
            await server.client.abort(request, timeout=10)
        return answer.result()

    found = server.run(draw_and_abort())
    assert [x.finish_reason for x in found] == ["abort"] * 3
    begun = max(found, key=lambda x: len(x.token_ids))
    assert 0 < len(begun.token_ids) < 20_000
    whole = np.concatenate([PROMPT, begun.token_ids])
    [rest] = server.draw(token_ids=whole, max_new_tokens=5)
    assert gap(model, whole, rest, 1.0) < LOG_PROB_BOUND


def test_new_weights_have_a_new_label_and_another_checksum(server: Connection) -> None:
    before = server.run(server.client.checksum())
    assert before is not None and before == server.run(server.client.checksum())

    async def update(folder: str, label: str) -> str | None:
        await server.client.pause()
        body = {"model_path": folder, "weight_version": label, "flush_cache": False}
        await server.client.post("/update_weights_from_disk", body, timeout=60)
        await server.client.flush_cache()
        await server.client.resume()
        assert await server.client.weight_label() == label
        return await server.client.checksum()

    assert server.run(update(str(other_model()), "other")) != before
    assert server.draw()[0].weight_labels[0][0] == "other"
    assert server.run(update(str(served_model()), "served")) == before


def test_health(server: Connection) -> None:
    server.run(server.client.check_health(60))
    gone = SGLangClient("gone", "http://127.0.0.1:9", server.session, VOCAB_SIZE)
    with pytest.raises(ServerError, match="server gone, /health") as caught:
        server.run(gone.check_health(5))
    assert caught.value.is_lost and caught.value.retryable


def test_the_server_s_complaints_are_shown_in_part(server: Connection) -> None:
    body = {"input_ids": [4], "sampling_params": {"no_such_parameter" * 100: 1}}
    with pytest.raises(ServerError, match="status 400") as caught:
        server.run(server.client.post("/generate", body, timeout=30))
    assert caught.value.status == 400 and len(str(caught.value)) < 400


FAULTS: list[tuple[Fault, str, bool]] = [
    ("500", "status 500: oops", False),
    ("400", "status 400: oops", False),
    ("garbage", "no JSON", False),
    ("other json", "an answer that cannot be used: no output_token_logprobs", False),
    ("half a body", "ClientPayloadError", True),
    ("no answer", "ServerDisconnectedError", True),
    ("hang", "no answer within 1 s", True),
]


@pytest.mark.parametrize(("fault", "message", "is_lost"), FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_faults_are_server_errors(server: Connection, fault: Fault, message: str, is_lost: bool) -> None:
    with FaultProxy(server.client.url) as proxy:
        client = SGLangClient("server-0", proxy.url, server.session, VOCAB_SIZE, request_timeout=1.0)
        proxy.faults.append(fault)
        with pytest.raises(ServerError, match=message) as caught:
            server.run(client.draw(draw_request()))
        assert caught.value.is_lost == is_lost and caught.value.retryable


def test_api_key_is_sent_and_never_shown(server: Connection, caplog: pytest.LogCaptureFixture) -> None:
    key = "a-secret-key"
    calls: list[Callable[[SGLangClient], Coroutine[Any, Any, object]]] = [
        lambda client: client.draw(draw_request()),
        lambda client: client.weight_label(),
    ]
    with FaultProxy(server.client.url) as proxy, caplog.at_level(logging.DEBUG):
        keyed = Connection(proxy.url, key)
        for call in calls:
            keyed.run(call(keyed.client))
        proxy.faults.append("500")
        with pytest.raises(ServerError) as caught:
            keyed.draw()
        keyed.close()
        assert len(proxy.heads) == 3
        assert all(f"authorization: bearer {key}" in head.lower() for head in proxy.heads)
    assert key not in f"{caught.value} {keyed.client!r} {caplog.text}"
