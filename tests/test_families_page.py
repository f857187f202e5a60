"""docs/families.md shows the code as it is, and every family."""

from __future__ import annotations

import re
from pathlib import Path

from apo_megatron.weights.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "families.md").read_text()


def test_code_of_the_recipe_is_in_the_files_that_it_names() -> None:
    parts = re.split(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    path, num_blocks = "", 0
    for text, block in zip(parts[::2], parts[1::2], strict=False):
        named = re.findall(r"`((?:apo_megatron|tests)/[\w/]+\.py)`:", text)
        path = named[-1] if named else path  # a block may follow another one of the same file
        assert block in (ROOT / path).read_text(), f"{path} does not hold:\n{block}"
        num_blocks += 1
    assert num_blocks >= 6


def test_every_family_has_its_line() -> None:
    table = re.findall(r"^\|[^|]+\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(table) == sorted(["model_type", *FAMILIES])  # the first is the header
