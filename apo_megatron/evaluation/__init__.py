"""How good a policy is: Pass@K and its relatives.

``pass_at_k.py``, ``answers.py`` (majority@K), ``bootstrap.py`` and ``comparison.py`` are the mathematics
(NumPy only, docs/evaluation.md); ``benchmarks.py`` has the problems (``gold.py``: their gold answers),
``harness.py`` samples and counts.
"""

from apo_megatron.evaluation.pass_at_k import pass_at_k

__all__ = ["pass_at_k"]
