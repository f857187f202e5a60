"""Model families: how each reads its ``config.json`` and names its tensors. Pure; docs/families.md says how
to add one."""

from apo_megatron.weights.families.registry import FAMILIES, Family, family_of

__all__ = ["FAMILIES", "Family", "family_of"]
