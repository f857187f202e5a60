"""apo_megatron: RL with verifiable rewards on Megatron-Core, with Anchored Policy Optimization.

Importing the package is light: no torch.distributed, no megatron. Start reading at ``train.py``.
"""

__version__ = "0.1.0"
