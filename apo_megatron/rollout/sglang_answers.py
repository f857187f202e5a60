"""What SGLang servers answer, checked in every detail before anything is made of it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apo_megatron.types import FinishReason

MAX_LOG_PROB = 1e-3  # a log-softmax may end above 0 by rounding


class AnswerError(ValueError):
    """An answer that is not what the protocol says."""


@dataclass(frozen=True)
class DrawnTokens:
    """One completion as a server drew it. R tokens, the stop token included where one was drawn."""

    token_ids: np.ndarray  # [R] int32
    log_probs: np.ndarray  # [R] float32, of softmax(logits / T), before top-p / top-k filtering
    finish_reason: FinishReason
    weight_labels: tuple[tuple[str, int], ...]  # (label of the weights, tokens drawn with them), in order


@dataclass(frozen=True)
class Scores:
    """Log-probs of given tokens, as a server sees them."""

    log_probs: tuple[np.ndarray, ...]  # each [L - 1] float32: of tokens 1..L-1 given those before, T = 1
    weight_labels: frozenset[str]  # of the weights that said so


def parse_completions(
    answer: object, num_samples: int, vocab_size: int, max_new_tokens: int, stop_token_ids: Collection[int]
) -> list[DrawnTokens]:
    """The ``num_samples`` completions of an answer to /generate. Raises AnswerError."""
    items = _list_of(answer, num_samples, "completions")
    return [_parse_completion(item, vocab_size, max_new_tokens, stop_token_ids) for item in items]


def parse_scores(answer: object, sequences: Sequence[np.ndarray]) -> Scores:
    """The log-probs of ``sequences`` in an answer to /generate. Raises AnswerError."""
    log_probs, labels = [], set()
    for item, tokens in zip(_list_of(answer, len(sequences), "scores"), sequences, strict=True):
        meta = _field(item, "meta_info", dict)
        rows = _field(meta, "input_token_logprobs", list)
        ids, values = _columns(rows[1:])  # the first token has no log-prob
        if len(rows) != len(tokens) or not np.array_equal(ids, tokens[1:]):
            raise AnswerError(f"log-probs of other tokens than the {len(tokens)} that were sent")
        log_probs.append(_checked_log_probs(values))
        labels.add(_field(meta, "weight_version", str))
    return Scores(tuple(log_probs), frozenset(labels))


def _parse_completion(
    item: object, vocab_size: int, max_new_tokens: int, stop_token_ids: Collection[int]
) -> DrawnTokens:
    meta = _field(item, "meta_info", dict)
    ids, values = _columns(_field(meta, "output_token_logprobs", list))
    num_tokens = len(ids)
    if _field(item, "output_ids", list) != ids.tolist():
        raise AnswerError("output_ids are not the tokens of output_token_logprobs")
    if num_tokens > max_new_tokens:
        raise AnswerError(f"{num_tokens} tokens where {max_new_tokens} were asked for")
    if num_tokens and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise AnswerError(f"token ids from {ids.min()} to {ids.max()}, the vocabulary has {vocab_size}")
    if np.isin(ids[:-1], list(stop_token_ids)).any():
        raise AnswerError("tokens after a stop token")
    return DrawnTokens(
        token_ids=ids.astype(np.int32),
        log_probs=_checked_log_probs(values),
        finish_reason=_finish_reason(_field(meta, "finish_reason", dict), ids.tolist(), stop_token_ids),
        weight_labels=_weight_labels(meta, num_tokens),
    )


def _finish_reason(
    reason: Mapping[str, Any], ids: list[int], stop_token_ids: Collection[int]
) -> FinishReason:
    kind = reason.get("type")
    last = ids[-1] if ids else None
    if last in stop_token_ids:  # also where an abort arrived at the same moment
        return "stop"
    if kind == "abort":
        return "abort"
    # "stop" at an EOS of the model's own config.json, which the server knows too; never at the text that
    # tells of broken logits.
    if kind == "stop" and last is not None and reason.get("matched") == last:
        return "stop"
    if kind == "length" and ids:
        return "length"
    raise AnswerError(f"finish_reason {str(reason)[:100]} after {len(ids)} tokens, the last one {last}")


def _weight_labels(meta: Mapping[str, Any], num_tokens: int) -> tuple[tuple[str, int], ...]:
    """Older servers name one label for all tokens."""
    spans = meta.get("weight_versions")
    if spans is None:
        return ((_field(meta, "weight_version", str), num_tokens),)
    labels, end = [], 0
    for span in _list_of(spans, None, "weight_versions"):
        if _field(span, "start", int) != end or _field(span, "end", int) < end:
            raise AnswerError(f"weight_versions {str(spans)[:100]} do not follow each other")
        labels.append((_field(span, "version", str), span["end"] - end))
        end = span["end"]
    if not labels or end != num_tokens:
        raise AnswerError(f"weight_versions of {end} tokens, {num_tokens} were drawn")
    return tuple(labels)


def _columns(rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [R] int64 and log-probs [R] float64 of [[log-prob, token id, text], ...]."""
    if not all(isinstance(row, list) and len(row) >= 2 for row in rows):
        raise AnswerError("log-probs that are no list of [log-prob, token id, text]")
    try:
        ids = np.array([row[1] for row in rows])
        values = np.array([row[0] for row in rows], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise AnswerError(f"log-probs that are no numbers: {error}") from error
    if rows and (ids.dtype.kind != "i" or ids.ndim != 1):
        raise AnswerError("token ids that are no integers")
    return ids.astype(np.int64), values


def _checked_log_probs(values: np.ndarray) -> np.ndarray:
    """[R] float64 -> [R] float32, not above 0."""
    if not np.isfinite(values).all():
        raise AnswerError("log-probs that are not finite: the weights are broken, or overflow in its dtype")
    if (values > MAX_LOG_PROB).any():
        raise AnswerError(f"a log-prob of {values.max()}, above 0")
    return np.minimum(values, 0).astype(np.float32)


def _list_of(value: object, length: int | None, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise AnswerError(f"no list of {what} but {type(value).__name__} {str(value)[:100]}")
    if length is not None and len(value) != length:
        raise AnswerError(f"{len(value)} {what}, expected {length}")
    return value


def _field(item: object, name: str, kind: type) -> Any:
    if not isinstance(item, dict) or not isinstance(item.get(name), kind):
        raise AnswerError(f"no {name} of type {kind.__name__}")
    return item[name]
