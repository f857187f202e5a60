r"""Finds the final answer in a completion: the last ``\boxed{...}``, or the end of the text."""

from __future__ import annotations

import re

MAX_TEXT = 20_000  # characters at the end of a completion that are looked at: the answer comes last
MAX_TAIL = 1_000  # of these, what is read where nothing is boxed

_BRACE = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\[\\{}]|[{}]")  # a box, an escaped brace, a brace
_LAST_TOKEN = re.compile(r"\$[^$]{1,200}\$|-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?%?")  # a formula, a number
_WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;: !]|,)(?=\d{3}(?!\d))")
_SMALL_FRACTION = re.compile(r"(?<=\\)[dt]frac")
_LOOK = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;: !]|\\?\$|[\s~]")
_PERCENT = re.compile(r"\s*\$?\s*\\?%")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every outermost ``\boxed{...}`` with balanced braces, in order."""
    found: list[tuple[int, int, str]] = []
    opened: list[re.Match[str]] = []
    for brace in _BRACE.finditer(text):
        if brace.group(1) or brace.group() == "{":
            opened.append(brace)
        elif brace.group() == "}" and opened:
            start = opened.pop()
            if start.group(1):
                while found and found[-1][0] > start.start():  # inside this one
                    found.pop()
                found.append((start.start(), brace.end(), text[start.end() : brace.start()]))
    return found


def boxed_answer(text: str) -> str | None:
    """The content of the last box in the last ``MAX_TEXT`` characters; None without a box."""
    found = boxes(text[-MAX_TEXT:])
    return found[-1][2].strip() if found else None


def final_answer(text: str) -> str:
    r"""The part of a completion that says its answer, for math-verify to read.

    The last box, as ``\boxed{...}`` with a percent sign that may follow it. Boxes that stand in one line with
    it belong to the answer, too: "$\boxed{1}$ or $\boxed{2}$" names two solutions. Without a box: the last
    ``MAX_TAIL`` characters, from the beginning of a line where there is one.
    """
    text = text[-MAX_TEXT:]
    found = boxes(text)
    if not found:
        tail = text[-MAX_TAIL:]
        is_cut = len(text) > MAX_TAIL and "\n" in tail.rstrip()
        return (tail.partition("\n")[2] if is_cut else tail).strip()
    first = len(found) - 1
    while first > 0 and "\n" not in text[found[first - 1][1] : found[first][0]]:
        first -= 1
    percent = _PERCENT.match(text, found[-1][1])
    parts = dict.fromkeys(content.strip() for _, _, content in found[first:])  # a repeated box is one answer
    answer = " and ".join(f"$\\boxed{{{content}}}$" for content in parts)
    return answer + ("\\%" if percent else "")


def plain_answer(text: str) -> str | None:
    r"""The final answer of a completion as short text, or None: for telling wrong answers apart.

    The contents of the boxes that ``final_answer`` reads; without a box the last formula or number. What
    changes the look and not the value goes: spaces, dollar signs, sizes of brackets and fractions, text
    commands, thousands separators. Nothing is calculated: 0.5 and 1/2 stay two answers.
    """
    answer = final_answer(text)
    contents = [content for _, _, content in boxes(answer)]
    if contents:
        found = ",".join(contents) + ("%" if answer.endswith("\\%") else "")
    else:
        tokens = _LAST_TOKEN.findall(answer)
        if not tokens:
            return None
        found = tokens[-1]
    found = _WRAPPING.sub(r"\1", _THOUSANDS.sub("", found))
    found = _LOOK.sub("", _SMALL_FRACTION.sub("frac", found)).replace("\u2212", "-")
    return found.rstrip(".,;:") or None
