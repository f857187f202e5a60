"""Text of others on a terminal: control characters shown, long outputs paged."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_PAGER = "less"
# As git does: colours, no paging of what fits on the screen, which then stays.
_LESS_OPTIONS = "FRX"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the process with an error


def escaped(text: str) -> str:
    r"""``text`` in which every character that prints nothing of its own is shown as an escape (\x1b).

    Line breaks and tabs stay. So no output of a model moves the cursor, changes colours or the direction of
    writing, or hides anything.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def escaped_line(text: str) -> str:
    """``escaped`` for what must stay on its line: line breaks and tabs, too."""
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


@contextmanager
def paged_console() -> Iterator[Console]:
    """A console to print to: through ``$PAGER`` (less) on a terminal, plain elsewhere.

    The pager shows what is there while more is printed. A reader who leaves early ends the block, silently.
    """
    # What the encoding of the output lacks must not stop it.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    console = _Console(highlight=False)
    pager = shlex.split(os.environ.get("PAGER") or _PAGER)
    try:
        if console.is_terminal and shutil.which(pager[0]):
            with _piped(pager, console) as paged:
                yield paged
        else:
            yield console
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would fail once more when it flushes its standard output at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _piped(pager: list[str], terminal: Console) -> Iterator[Console]:
    environment = {"LESS": _LESS_OPTIONS, **os.environ}
    with subprocess.Popen(
        pager,
        stdin=subprocess.PIPE,
        env=environment,
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
    ) as process:
        # Ctrl-C is the pager's own key: whoever ends here would leave it behind, with the shell's keyboard.
        before = signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            yield _Console(file=process.stdin, force_terminal=True, width=terminal.width, highlight=False)
            process.communicate()
        finally:
            signal.signal(signal.SIGINT, before)
