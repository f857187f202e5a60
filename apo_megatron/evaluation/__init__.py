"""How good a policy is: Pass@K and its relatives.

``pass_at_k.py``, ``answers.py`` (majority@K), ``bootstrap.py`` and ``comparison.py`` are the mathematics
(NumPy only, docs/evaluation.md); ``harness.py`` samples and counts.
"""

from apo_megatron.evaluation.pass_at_k import pass_at_k

__all__ = ["pass_at_k"]
