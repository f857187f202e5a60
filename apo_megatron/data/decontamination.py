"""Finds training prompts that hold a piece of an evaluation prompt, by word n-grams."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W_]+")
# An n-gram of more evaluation prompts than this (and than two) is an instruction, not a problem.
_BOILERPLATE_SHARE = 0.1


@dataclass(frozen=True)
class Overlap:
    """What a training prompt shares with an evaluation prompt."""

    place: str  # of the evaluation prompt
    words: str  # the first shared n-gram, as compared


def split_words(text: str) -> list[str]:
    """The words of a text as they are compared: case, punctuation and forms of characters do not count."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class NgramIndex:
    """The word n-grams of one evaluation set.

    A training prompt overlaps where it holds ``n`` words in a row of an evaluation prompt. An evaluation
    prompt of fewer words has no n-gram: there all words must be equal. Instructions that many prompts of the
    evaluation set share are no overlap: words that lie in an n-gram of more than a tenth of its prompts (and
    of more than two) are left out before n-grams are taken.
    """

    def __init__(self, texts: Iterable[str], places: Iterable[str], n: int) -> None:
        self._n = n
        words: dict[tuple[str, ...], str] = {}  # of each different prompt, and where it stands first
        for text, place in zip(texts, places, strict=True):
            words.setdefault(tuple(split_words(text)), place)
        self.num_prompts = len(words)
        num_prompts_of: Counter[str] = Counter()
        for prompt in words:
            num_prompts_of.update(set(self._ngrams(prompt)))
        limit = max(2, _BOILERPLATE_SHARE * len(words))
        self._boilerplate = {ngram for ngram, count in num_prompts_of.items() if count > limit}
        self._place_of_ngram: dict[str, str] = {}
        self._place_of_short: dict[str, str] = {}
        for prompt, place in words.items():
            pieces = self._without_boilerplate(prompt)
            for piece in pieces:
                for ngram in self._ngrams(piece):
                    self._place_of_ngram.setdefault(ngram, place)
            if pieces and all(len(piece) < n for piece in pieces):
                self._place_of_short.setdefault(_joined(pieces), place)

    def overlap(self, text: str) -> Overlap | None:
        """The first overlap of a training prompt with the evaluation set, if there is one."""
        words = split_words(text)
        for ngram in self._ngrams(words):
            if ngram in self._place_of_ngram:
                return Overlap(self._place_of_ngram[ngram], ngram)
        whole = _joined(self._without_boilerplate(words))
        if whole in self._place_of_short:
            return Overlap(self._place_of_short[whole], whole)
        return None

    def _ngrams(self, words: Sequence[str]) -> Iterable[str]:
        return (" ".join(words[i : i + self._n]) for i in range(len(words) - self._n + 1))

    def _without_boilerplate(self, words: Sequence[str]) -> list[list[str]]:
        """The pieces of ``words`` that lie in no n-gram of the instructions."""
        is_kept = [True] * len(words)
        for i, ngram in enumerate(self._ngrams(words)):
            if ngram in self._boilerplate:
                is_kept[i : i + self._n] = [False] * self._n
        pieces: list[list[str]] = []
        for i, word in enumerate(words):
            if not is_kept[i]:
                continue
            if i == 0 or not is_kept[i - 1]:
                pieces.append([])
            pieces[-1].append(word)
        return pieces


def _joined(pieces: Iterable[Sequence[str]]) -> str:
    return " ".join(" ".join(piece) for piece in pieces)
