"""The HTTP protocol of one SGLang server: token ids in and out, weights and caches, signs of life."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypeVar

import aiohttp
import numpy as np
import orjson

from apo_megatron.errors import RolloutError
from apo_megatron.rollout.sglang_answers import (
    AnswerError,
    DrawnTokens,
    Scores,
    parse_completions,
    parse_scores,
)

CONNECT_SECONDS = 10.0
# Below the 5 s after which the server closes an idle connection: a request must not meet that moment.
KEEP_ALIVE_SECONDS = 3.0
MAX_SHOWN_BYTES = 300  # of an answer, in an error message
# From so many repeated prompt tokens on, the server reads a prompt once before the samples are drawn.
MIN_SHARED_PREFIX_TOKENS = 512
_NOT_RETRYABLE = (401, 403, 404, 405)
ASLEEP = "asleep"  # label of a server without the memory for its weights

T = TypeVar("T")


class ServerError(RolloutError):
    """A server that did not answer, or not as it should.

    ``status`` is None where no whole answer came (then ``is_lost``) or where a good one held garbage.
    """

    def __init__(
        self, server: str, path: str, problem: str, status: int | None = None, is_lost: bool = False
    ) -> None:
        super().__init__(f"server {server}, {path}: {problem}")
        self.server, self.path, self.problem, self.status = server, path, problem, status
        self.is_lost = is_lost  # no answer at all, or half of one

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later, or at another server."""
        return self.status not in _NOT_RETRYABLE

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.server, self.path, self.problem, self.status, self.is_lost)


@dataclass(frozen=True)
class DrawRequest:
    """Completions to draw for one sequence of tokens."""

    request_id: str
    token_ids: np.ndarray  # [L] int32: the prompt, and what a continued completion began with
    num_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int  # 0 = all tokens
    stop_token_ids: tuple[int, ...]
    seeds: tuple[int, ...] | None  # one per sample, each below 2**63; None = the server's own

    def to_json(self) -> dict[str, Any]:
        """The body of /generate. The samples get the ids ``request_id``_0, _1, ...

        Copies of the prompt instead of the parameter n: those would get ids that nobody knows, so they
        could not be aborted, and one seed: on a deterministic server they would all be equal.
        """
        sampling: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or -1,
            "stop_token_ids": list(self.stop_token_ids),
        }
        return {
            "rid": self.request_id,
            "input_ids": [self.token_ids] * self.num_samples,
            "sampling_params": sampling
            if self.seeds is None
            else [{**sampling, "sampling_seed": seed} for seed in self.seeds],
            "return_logprob": True,
        }

    @property
    def sample_ids(self) -> list[str]:
        return [f"{self.request_id}_{i}" for i in range(self.num_samples)]


async def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """Pooled connections; close it in the same loop. The key travels in a header, and nowhere else."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
    return aiohttp.ClientSession(
        headers={"Content-Type": "application/json", **headers},
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
    )


class SGLangClient:
    """One server. Every method raises ServerError where it does not do what it should.

    Used inside the event loop that opened ``session``. Time-outs are in seconds: ``request_timeout`` for
    completions, ``update_timeout`` for what goes through all weights or through the model, and
    ``control_timeout`` for what a server that lives answers at once.
    """

    def __init__(
        self,
        name: str,
        url: str,
        session: aiohttp.ClientSession,
        vocab_size: int,
        request_timeout: float = 1800.0,
        update_timeout: float = 300.0,
        control_timeout: float = 30.0,
    ) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self._session = session
        self._vocab_size = vocab_size
        self._request_timeout = request_timeout
        self._update_timeout = update_timeout
        self._control_timeout = control_timeout

    def __repr__(self) -> str:
        return f"SGLangClient({self.name!r}, {self.url!r})"

    async def draw(self, request: DrawRequest) -> list[DrawnTokens]:
        """The completions of one request, checked. The prompt is read once for all of them."""
        repeated = (request.num_samples - 1) * len(request.token_ids)
        if repeated >= MIN_SHARED_PREFIX_TOKENS:
            body = {"input_ids": request.token_ids, "sampling_params": {"max_new_tokens": 0}}
            await self.post("/generate", body, timeout=self._request_timeout)
        answer = await self.post("/generate", request.to_json(), timeout=self._request_timeout)
        return self._checked(
            lambda: parse_completions(
                answer,
                request.num_samples,
                self._vocab_size,
                request.max_new_tokens,
                request.stop_token_ids,
            )
        )

    async def abort(self, request: DrawRequest, timeout: float) -> None:
        """Have the samples of ``request`` end with the tokens that they have. The server ignores what it
        does not know: samples that are done, and those that have not arrived there yet."""
        for sample_id in request.sample_ids:
            await self.post("/abort_request", {"rid": sample_id}, timeout=timeout)

    async def score(self, sequences: Sequence[np.ndarray]) -> Scores:
        """Log-probs of given tokens, each sequence [L] int32 with L >= 2, at temperature 1."""
        body = {
            "input_ids": list(sequences),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self.post("/generate", body, timeout=self._update_timeout)
        return self._checked(lambda: parse_scores(answer, sequences))

    async def pause(self) -> None:
        """End what runs with the tokens that it has, and hold back what comes. Safe to call twice."""
        await self.post("/pause_generation", {"mode": "abort"}, timeout=self._control_timeout)

    async def resume(self) -> None:
        """Go on after ``pause``."""
        await self.post("/continue_generation", {}, timeout=self._control_timeout)

    async def flush_cache(self) -> None:
        """Drop what was computed with older weights; nothing may run."""
        await self._exchange("POST", "/flush_cache", {}, self._control_timeout)

    async def check_health(self, timeout: float) -> None:
        """Returns when the server has drawn a token, or draws some already. It does neither while paused."""
        await self._exchange("GET", "/health", None, timeout)

    async def weight_label(self) -> str:
        """The label of the server's weights; "default" after a start. It may hang all the same."""
        info = self._parsed(
            "/model_info", await self._exchange("GET", "/model_info", None, self._control_timeout)
        )
        return self._text_field(info, "weight_version", "/model_info")

    async def set_weight_label(self, label: str, abort: bool = True) -> None:
        """Change the label alone. What runs is aborted, or (``abort`` False) ends under the new one."""
        body = {"new_version": label, "abort_all_requests": abort}
        await self.post("/update_weight_version", body, timeout=self._control_timeout)

    async def checksum(self) -> str | None:
        """A digest of all weights with the number of the server's ranks; None where it offers none."""
        try:
            answer = await self.post("/weights_checker", {"action": "checksum"}, timeout=self._update_timeout)
            digest = self._text_field(answer, "per_engine_checksum", "/weights_checker")
        except ServerError as error:
            if error.is_lost:
                raise
            return None
        ranks = answer.get("ranks")
        return f"{digest} ({len(ranks) if isinstance(ranks, list) else 1} ranks)"

    async def release_memory(self) -> None:
        """Give up the device memory of weights and KV cache; nothing may run."""
        await self.post(
            "/release_memory_occupation", {"tags": ["kv_cache", "weights"]}, timeout=self._update_timeout
        )

    async def resume_memory(self, tag: str) -> None:
        """Take back the memory of "weights" or "kv_cache". It ends a server that has not released it."""
        await self.post("/resume_memory_occupation", {"tags": [tag]}, timeout=self._update_timeout)

    async def post(self, path: str, body: Any, *, timeout: float) -> Any:
        """The parsed JSON of the answer to a JSON ``body`` (arrays of NumPy allowed); None for an empty one.

        Raises ServerError for every status but 200, for what is no JSON, and where it holds success: false.
        """
        return self._parsed(path, await self._exchange("POST", path, body, timeout))

    def _parsed(self, path: str, content: bytes) -> Any:
        if not content:
            return None
        try:
            answer = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise ServerError(self.name, path, f"no JSON: {_shown(content)}") from error
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(self.name, path, f"refused: {_shown(content)}", 200)
        return answer

    async def _exchange(self, method: str, path: str, body: Any, timeout: float) -> bytes:
        data = None if body is None else BytesIO(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=data,
                timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, CONNECT_SECONDS)),
                allow_redirects=False,  # the key would go along
            ) as response:
                content = await response.read()
                status = response.status
        except TimeoutError as error:
            raise ServerError(self.name, path, f"no answer within {timeout:g} s", is_lost=True) from error
        except (aiohttp.ClientError, OSError) as error:
            problem = f"{type(error).__name__}: {str(error)[:MAX_SHOWN_BYTES]}"
            raise ServerError(self.name, path, problem, is_lost=True) from error
        if status in (401, 403):
            problem = f"status {status}: the API key is missing or wrong, see sglang.api_key_variable"
            raise ServerError(self.name, path, problem, status)
        if status != 200:
            raise ServerError(self.name, path, f"status {status}: {_shown(content)}", status)
        return content

    def _checked(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except AnswerError as error:
            raise ServerError(self.name, "/generate", f"an answer that cannot be used: {error}") from error

    def _text_field(self, answer: object, name: str, path: str) -> str:
        value = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(value, str):
            raise ServerError(self.name, path, f"no text {name!r} in {str(answer)[:MAX_SHOWN_BYTES]}")
        return value


def _shown(content: bytes) -> str:
    return content[:MAX_SHOWN_BYTES].decode(errors="replace")
