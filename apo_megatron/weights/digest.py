"""One number for all weights of a policy, whatever the layout that holds them."""

from __future__ import annotations

import xxhash

from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.weights.conversion.manifest import digest
from apo_megatron.weights.source import WeightSource


def weights_digest(source: WeightSource, parallel: ParallelContext) -> str:
    """xxh3-128, in hexadecimal, of names, dtypes, shapes and bytes of all Hugging Face tensors. Collective.

    The same on every rank and for every layout. Rank r reads the tensors r, r + world, ...: all of them
    reach every rank anyway. It tells models apart; it does not withstand forgery.
    """
    mine: dict[str, str] = {}
    count = 0
    for bucket in source.buckets():
        for name, tensor in bucket:
            if count % parallel.world == parallel.rank:
                mine[name] = f"{tensor.dtype} {list(tensor.shape)} {digest(tensor)}"
            count += 1
    found = {name: text for share in all_gather_objects(mine, parallel) for name, text in share.items()}
    lines = "".join(f"{name} {found[name]}\n" for name in sorted(found))
    return xxhash.xxh3_128_hexdigest(lines.encode())
