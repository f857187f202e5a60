"""A page as a real browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
VOID = {"meta", "input", "link", "br", "hr", "img"}


class Dom(HTMLParser):
    """The document after its scripts ran: elements with their attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.elements.append((tag, {name: value or "" for name, value in attrs}, text))
        if tag not in VOID:
            self._open.append((tag, text))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, text in self._open:
            text.append(data)

    def find(self, selector: str) -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of elements by ``tag``, ``tag.class`` or ``tag#id``; an empty tag is any."""
        match = re.fullmatch(r"(\w*)(?:([.#])([\w-]+))?", selector)
        assert match is not None, selector
        wanted, kind, name = match.groups()
        return [
            (attributes, "".join(text))
            for tag, attributes, text in self.elements
            if wanted in ("", tag)
            and (kind != "." or name in attributes.get("class", "").split())
            and (kind != "#" or name == attributes.get("id"))
        ]


def open_page(page: Path, profile: Path, *options: str) -> Dom:
    """``page`` in headless Chromium, after its scripts; skips the test where there is no browser."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("no Chromium: make browser installs the Debian package")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={profile}",
        "--window-size=1400,1000",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    try:
        result = subprocess.run(command, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:  # now and then it hangs at its start, on a busy machine
        result = subprocess.run(command, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return Dom(result.stdout.decode())
