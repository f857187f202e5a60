"""Pass@K: ``pass_at_k.py`` is the mathematics (NumPy only), ``harness.py`` samples and counts."""

from apo_megatron.evaluation.pass_at_k import pass_at_k

__all__ = ["pass_at_k"]
