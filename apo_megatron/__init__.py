"""apo_megatron: RL with verifiable rewards on Megatron-Core, with Anchored Policy Optimization.

Importing the package is light: no torch.distributed, no megatron. Start reading at ``train.py``.
"""

import warnings

__version__ = "0.1.0"

# Megatron-Core says so once a module and rank while it is imported; both are optional here.
warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
# It also calls functions that newer torch versions have renamed.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
