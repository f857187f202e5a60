"""Pickles that SGLang's unpickler takes, put together opcode by opcode.

A server loads tensors with an unpickler that knows a short list of globals, some of them in its own package.
Python's pickler writes a global only if it can import it, and the trainer has no SGLang: so a pickle is made
of fragments here. A fragment leaves one object on the unpickler's stack, and needs nothing that is there.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence

import torch

from apo_megatron.rollout.transports.flat_bucket import Place

_PROTOCOL = 3  # the last one without frames, which fragments could not be taken out of
_HEADER_BYTES = 2  # PROTO and the number of the protocol
_METADATA_CLASS = ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata")


def reference(module: str, name: str) -> bytes:
    """Fragment: a global, by name."""
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def value(item: object) -> bytes:
    """Fragment: a number, string, bytes, tuple of them, or tensor on the CPU (its bytes, below 4 GiB).

    A dtype or a class becomes a reference.
    """
    if isinstance(item, torch.dtype):
        return reference("torch", str(item).removeprefix("torch."))
    if isinstance(item, type):
        return reference(item.__module__, item.__qualname__)
    if isinstance(item, torch.Size):
        item = tuple(item)
    return pickle.dumps(item, _PROTOCOL)[_HEADER_BYTES:-1]  # without STOP


def call(function: bytes, *arguments: bytes) -> bytes:
    """Fragment: what a function gives for these arguments; all are fragments."""
    return b"".join([function, pickle.MARK, *arguments, pickle.TUPLE, pickle.REDUCE])


def bucket_payload(flat: bytes, places: Sequence[Place], start: int = 0) -> str:
    """An entry of serialized_named_tensors, for load_format flattened_bucket.

    ``flat`` is the fragment of a uint8 tensor, in which the bucket begins at ``start``.
    """
    metadata = []
    for place in places:
        begin, end = start + place.start, start + place.end
        fields = (place.name, place.shape, place.dtype, begin, end, end - begin)
        metadata.append(call(reference(*_METADATA_CLASS), *map(value, fields)))
    content = b"".join(
        [
            pickle.PROTO,
            bytes([_PROTOCOL]),
            *(pickle.MARK, value("flattened_tensor"), flat),
            *(value("metadata"), pickle.MARK, *metadata, pickle.LIST, pickle.DICT),
            pickle.STOP,
        ]
    )
    return base64.b64encode(content).decode("ascii")
