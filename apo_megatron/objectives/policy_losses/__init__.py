"""The policy losses, each a function from per-token inputs to a loss per token; formulas in docs/.

``apo.py`` is APO; ``clipped.py`` has losses of the ratio r (GRPO / PPO, GPPO, DCPO, SAPO), ``weighted.py``
those of log pi with a detached weight (CISPO, DISPO, DPPO), ``sequence_level.py`` those of a weight that
tokens of an answer share (GSPO, CTPO, VESPO), ``batch_wide.py`` and ``matching.py`` those that must know the
whole mini-batch (Clip-Cov, KL-Cov, BAPO, P3O; DMPO), ``bounded_ratio.py`` one that draws the ratio to a
target (GBPO), ``top_tokens.py`` those that look at several tokens of the vocabulary (SimKO, forward KL),
``supervised.py`` the cold start's. Which name stands for which: ``objectives/registry.py``. A docstring
gives formula and source, and how the formula is known: [code] it was read in the authors' code or a
maintained framework, [second-hand] in what others wrote about the paper, which makes the method experimental
here.
"""
