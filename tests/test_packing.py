"""Which sequences share a micro-batch: bins, balance and how full they are."""

from __future__ import annotations

import numpy as np
import pytest

from apo_megatron.data.packing import deal, pack, pack_into, spread

CAPACITY = 16_384


def draw_lengths(num: int, seed: int) -> list[int]:
    """Log-normal, with a median of 1,500 tokens, cut at the capacity as max_new_tokens does."""
    values = np.random.default_rng(seed).lognormal(np.log(1500), 0.9, num)
    return np.clip(values, 16, CAPACITY).astype(int).tolist()


def total(lengths: list[int], part: list[int]) -> int:
    return sum(lengths[i] for i in part)


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_bin_that_holds_it(seed: int) -> None:
    lengths = draw_lengths(300, seed)
    bins = pack(lengths, CAPACITY)
    assert sorted(i for part in bins for i in part) == list(range(300))
    assert all(total(lengths, part) <= CAPACITY for part in bins)
    assert bins == pack(lengths, CAPACITY)


def test_small_cases_are_packed_as_well_as_possible() -> None:
    assert pack([], 10) == []
    assert pack([10], 10) == [[0]]
    assert sorted(pack([6, 5, 4, 5], 10)) == [[0, 2], [1, 3]]
    assert sorted(pack([7, 3, 7, 3, 7, 3], 10)) == [[0, 1], [2, 3], [4, 5]]


def test_a_sequence_over_the_capacity_is_alone() -> None:
    assert sorted(pack([3, 25, 4, 11], 10)) == [[0, 2], [1], [3]]
    assert sorted(pack_into([3, 25, 4, 11], 10, 4)) == [[0], [1], [2], [3]]


def test_spread_and_deal_balance_tokens() -> None:
    lengths = draw_lengths(256, seed=7)
    loads = [total(lengths, part) for part in spread(lengths, 8)]
    assert (max(loads) - min(loads)) / max(loads) < 0.01
    dealt = deal(lengths, 8)
    assert [len(part) for part in dealt] == [32] * 8
    loads = [total(lengths, part) for part in dealt]
    assert (max(loads) - min(loads)) / max(loads) < 0.03
    in_order = [sum(lengths[i] for i in range(rank, 256, 8)) for rank in range(8)]
    assert max(loads) < max(in_order)


@pytest.mark.parametrize(("num", "num_ranks"), [(0, 3), (2, 3), (7, 3), (9, 3)])
def test_deal_gives_counts_that_differ_by_at_most_one(num: int, num_ranks: int) -> None:
    dealt = deal(draw_lengths(num, seed=1), num_ranks)
    counts = [len(part) for part in dealt]
    assert sorted(i for part in dealt for i in part) == list(range(num))
    assert max(counts) - min(counts) <= 1


def test_bins_are_balanced_only_where_they_still_fit() -> None:
    assert [total([6, 6, 2, 2, 2, 2], part) for part in pack_into([6, 6, 2, 2, 2, 2], 10, 2)] == [10, 10]
    # Balancing puts 5 + 5 and 4 + 3 + 3 together where it may, but 12 into one bin of 10 where it may not.
    lengths = [4, 4, 4, 3, 3, 2]
    assert max(total(lengths, part) for part in spread(lengths, 2)) == 10
    tight = [5, 5, 4, 3, 3]
    assert max(total(tight, part) for part in spread(tight, 2)) > 10
    assert sorted(total(tight, part) for part in pack_into(tight, 10, 2)) == [10, 10]
    assert pack_into([1], 10, 3) == [[0], [], []]
    with pytest.raises(AssertionError, match="2 bins are needed"):
        pack_into([9, 9], 10, 1)


@pytest.mark.parametrize("num_ranks", [1, 4, 8])
def test_micro_batches_of_a_log_normal_batch_are_95_percent_full(num_ranks: int) -> None:
    """512 prompts x 8 samples, as the ranks take them: the same number of micro-batches on each."""
    lengths = draw_lengths(4096, seed=3)
    shares = [[lengths[i] for i in part] for part in deal(lengths, num_ranks)]
    count = max(len(pack(share, CAPACITY)) for share in shares)
    for share in shares:
        assert all(total(share, part) <= CAPACITY for part in pack_into(share, CAPACITY, count))
    utilization = sum(lengths) / (num_ranks * count * CAPACITY)
    padded = sum(lengths) / (max(lengths) * len(lengths))
    print(f"{num_ranks} ranks: {utilization:.1%} of the token budget; padded to one length {padded:.1%}")
    assert utilization >= 0.95
