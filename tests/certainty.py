"""How the docstring of a method says where its formula comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def assert_certainty_is_stated(name: str, function: Callable[..., Any]) -> None:
    """[code] or [second-hand] with the paper, or [ours]."""
    text = function.__doc__ or ""
    is_read = "arXiv" in text and ("[code]" in text or ("[second-hand]" in text and "Experimental" in text))
    assert is_read or "[ours]" in text, (
        f"{name}: its docstring must name the paper (arXiv ...) with [code], or with [second-hand] and the "
        "word Experimental; or say [ours], where there is no paper"
    )
