"""The frame of a page, and the data in it as JSON that no text can break out of."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import Any, BinaryIO

import orjson

_DATA_MARK = "<!-- data -->"
_SCRIPTS = ("elements.js", "axes.js", "pass_curves.js")


def frame(title: str, styles: Sequence[str], scripts: Sequence[str]) -> tuple[bytes, bytes]:
    """The page before and after its data; ``styles`` and ``scripts`` (texts) follow those of all pages."""
    style = "\n".join([packaged(__package__, "page.css"), *styles])
    script = "\n".join([*(packaged(__package__, name) for name in _SCRIPTS), *scripts])
    page = Template(packaged(__package__, "page.html")).substitute(
        title=html.escape(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
    )
    head, tail = page.split(_DATA_MARK)
    return head.encode(errors="replace"), tail.encode()


def write_json(file: BinaryIO, name: str, value: object) -> int:
    """A script element with ``value``, which the scripts find by the id ``name``; the number of bytes."""
    return sum(
        file.write(part)
        for part in (
            f'<script type="application/json" id="{name}">'.encode(),
            embedded_json(value),
            b"</script>\n",
        )
    )


def embedded_json(value: Any) -> bytes:
    """JSON that can stand in a script element: no "<", so no tag or comment, and no line end but \\n."""
    try:
        text = orjson.dumps(value)
    except orjson.JSONEncodeError:  # half of a character, as the name of a file may hold
        text = json.dumps(value, allow_nan=False, ensure_ascii=False).encode(errors="replace")
    for character in "<>&\u2028\u2029":
        text = text.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return text


@cache
def packaged(package: str, name: str) -> str:
    """The text of a file that ``package`` brings along."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """As a Content-Security-Policy names the only style, or script, that may act."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
