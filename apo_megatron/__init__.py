"""apo_megatron: RL with verifiable rewards on Megatron-Core, with Anchored Policy Optimization.

Importing the package is light: no torch.distributed, no megatron. Start reading at ``train.py``.
"""

import warnings

__version__ = "0.1.0"

# What Megatron-Core makes torch and itself say on every rank, none of it news to a user: optional packages,
# functions that newer torch versions renamed, defaults of features that are off.
for _message in (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"`torch\.distributed\.\w+` is deprecated",
    r"full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
):
    warnings.filterwarnings("ignore", message=_message)
