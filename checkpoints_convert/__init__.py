"""Command lines that convert checkpoints between Hugging Face and Megatron, and prove the result."""

import os

# Fresh memory costs more than reading or copying into it, four times as much in small pages as in huge ones.
# torch takes the setting when it is first imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
