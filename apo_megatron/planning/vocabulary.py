"""Memory of the output layer and the vocabulary ops on the last stage."""

from __future__ import annotations

from dataclasses import dataclass

from apo_megatron.planning.activations import FP32, Numerics

# apo_megatron/parallel/lm_head.py: rows and columns of logits that exist at a time. On a CPU, on a GPU.
TILE = {True: (1024, 4096), False: (4096, 8192)}
# apo_megatron/parallel/_vocab_rows.py: the largest scratch; row statistics have two. On a CPU, a GPU.
_SCRATCH_BYTES = {True: 2**21, False: 2**25}


@dataclass(frozen=True)
class VocabularyEnd:
    """``rows`` trained tokens by ``columns`` of the padded vocabulary, of one rank and micro-batch. Bytes."""

    hidden_size: int
    rows: float
    columns: int
    numerics: Numerics
    max_logits_mib: int
    shares_embedding: bool  # the weight is the embedding of the same stage
    gradient_in_place: bool = True  # the fused LM head sums its weight's gradient in Megatron's buffer

    @property
    def logits(self) -> float:
        """Their size, whether they exist or not."""
        return self.rows * self.columns * self.numerics.itemsize

    @property
    def is_fused(self) -> bool:
        return self.logits > self.max_logits_mib * 2**20

    @property
    def weight_gradient(self) -> float:
        """The gradient of the weight as autograd makes it, before it is added to Megatron's buffer."""
        if self.is_fused and self.gradient_in_place:
            return 0.0
        return self.columns * self.hidden_size * self.numerics.itemsize

    @property
    def gradient_that_waits(self) -> float:
        """Where embedding and output layer are one, it waits for what the embedding adds."""
        return self.weight_gradient if self.shares_embedding else 0.0

    def forward(self) -> float:
        """The hidden states of the trained tokens, their logits and two scratches; fused: a tile of them."""
        return self._rows + self._logits_at_a_time + 2 * self._scratch

    def backward(self) -> float:
        """Rows and logits again, in whose place their gradient is written (apo_megatron/parallel/vocab.py);
        the gradients of the rows and of the weight. Fused: these are summed in fp32, the weight's in place
        or for the columns of a tile at a time."""
        total = 2 * self._rows + self._logits_at_a_time + self.weight_gradient
        if self.is_fused:
            summed = self.rows if self.gradient_in_place else self.rows + self._tile[1]
            total += summed * self.hidden_size * FP32 + self._scratch
        return total

    def accumulation(self) -> float:
        """The gradient of the weight, while it is added to the fp32 buffer."""
        return self.weight_gradient * (1 + self.numerics.copies_to_accumulate)

    @property
    def _rows(self) -> float:
        return self.rows * self.hidden_size * self.numerics.itemsize

    @property
    def _logits_at_a_time(self) -> float:
        return self._tile[0] * self._tile[1] * self.numerics.itemsize if self.is_fused else self.logits

    @property
    def _tile(self) -> tuple[float, float]:
        rows, columns = TILE[self.numerics.on_cpu]
        return min(rows, self.rows), min(columns, self.columns)

    @property
    def _scratch(self) -> float:
        """Some rows in fp32, at least one."""
        rows, columns = self._tile if self.is_fused else (self.rows, self.columns)
        return min(max(_SCRATCH_BYTES[self.numerics.on_cpu], FP32 * columns), FP32 * rows * columns)
