"""Shows the samples of a training run, with the tokens on which APO's pull acted marked.

    python -m tools.view_rollouts runs/demo/apo --step 12 --reward wrong --trained

On a terminal it pages (less, or $PAGER), into a pipe it prints plain text. docs/inspection.md says what is
shown and when a token is marked.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from apo_megatron.config import RLConfig, load_config
from apo_megatron.data.tokenizer import decode_each, load_tokenizer
from apo_megatron.errors import ConfigError, DataError
from apo_megatron.rollout.sample_records import ROLLOUTS_FOLDER, SampleRecord, read_step, step_paths
from apo_megatron.telemetry.command import run_command
from apo_megatron.telemetry.terminal import escaped, escaped_line, paged_console

VERDICT_STYLES = {"right": "bold green", "wrong": "bold red", "unjudged": "bold yellow"}
PULLED_STYLE = "cyan underline"
PULLED_SIGNS = ("⟦", "⟧")  # around marked tokens where there are no colours
FINISHES = {"stop": "stopped", "length": "cut", "abort": "aborted"}
LINE_END_SIGN = "↵"  # a line break that is marked
REASONS = {
    "equal_rewards": "not trained on (group of equal rewards)",
    "zero_advantage": "not trained on (advantage 0)",
    "dropped": "dropped (group that teaches nothing)",
    "unjudged": "not trained on (could not be judged)",
    "truncated": "not trained on (cut at the length limit)",
    "filtered_out": "not trained on (left out by rollout.sample_filter)",
}


@dataclass
class Summary:
    """Counts of the samples that were shown."""

    num_samples: int = 0
    num_tokens: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    not_trained: Counter[str] = field(default_factory=Counter)
    num_wrong_tokens: int = 0  # of trained samples with A < 0, where there is a pull
    num_pulled: int = 0

    def add(self, record: SampleRecord) -> None:
        self.num_samples += 1
        self.num_tokens += record.num_tokens
        self.verdicts[verdict_of(record)] += 1
        if record.not_trained is not None:
            self.not_trained[record.not_trained] += 1
        if record.pulled is not None and (record.advantage or 0) < 0:
            self.num_wrong_tokens += record.num_tokens
            self.num_pulled += record.pulled.count("1")

    def lines(self) -> list[str]:
        if not self.num_samples:
            return ["no sample is like that"]
        num_judged = self.num_samples - self.verdicts["unjudged"]
        right = f"{100 * self.verdicts['right'] / num_judged:.1f} % right" if num_judged else "none judged"
        counts = ", ".join(f"{self.verdicts[name]:,} {name}" for name in VERDICT_STYLES)
        lines = [
            f"{self.num_samples:,} samples, {right} ({counts}), "
            f"mean length {self.num_tokens / self.num_samples:,.1f} tokens"
        ]
        if self.num_wrong_tokens:
            share = 100 * self.num_pulled / self.num_wrong_tokens
            lines.append(
                f"the pull acted on {self.num_pulled:,} of {self.num_wrong_tokens:,} tokens with A < 0 "
                f"({share:.1f} %)"
            )
        lines += [f"{count:,} {REASONS[reason]}" for reason, count in self.not_trained.most_common()]
        return lines


def verdict_of(record: SampleRecord) -> str:
    if record.reward is None:
        return "unjudged"
    return "right" if record.reward >= 1 else "wrong"


class View:
    """Prints samples to ``console``; ``tokenizer`` is that of the run."""

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase) -> None:
        self._console, self._tokenizer = console, tokenizer
        self._has_colours = console.color_system is not None and not console.no_color
        self._prompt: tuple[int, str] | None = None  # step and problem whose prompt was shown last

    def legend(self) -> None:
        mark = Text("tokens", PULLED_STYLE) if self._has_colours else Text("tokens".join(PULLED_SIGNS))
        self._line(Text.assemble("marked: ", mark, " on which APO's pull acted in their update"))

    def sample(self, record: SampleRecord) -> None:
        """Header and text; before them the prompt, where it is another one."""
        if self._prompt != (record.step, record.problem):
            self._prompt = (record.step, record.problem)
            self._line(Text())
            self._block([(record.prompt, False)], "  > ")
        self._line(self._header(record))
        self._block(self._response(record), "  | ")

    def summary(self, summary: Summary) -> None:
        self._line(Text())
        for line in summary.lines():
            self._line(Text(line))

    def _header(self, record: SampleRecord) -> Text:
        verdict = verdict_of(record)
        versions = ", ".join(
            str(version) if len(record.versions) == 1 else f"{version} ({count} tokens)"
            for version, count in record.versions
        )
        parts = [
            f"reward {record.reward:g}" if record.reward is not None else "",
            f"A {record.advantage:+.3f}" if record.advantage is not None else "",
            f"{record.num_tokens} tokens",
            FINISHES[record.finish_reason],
            f"version {versions}",
            f"{record.pulled.count('1')} pulled" if record.pulled and (record.advantage or 0) < 0 else "",
            REASONS[record.not_trained] if record.not_trained else "",
        ]
        place = f"step {record.step}  {escaped_line(record.problem)} #{record.sample}  "
        rest = "  ".join(part for part in parts if part)
        return Text.assemble((place, "dim"), (verdict, VERDICT_STYLES[verdict]), f"  {rest}")

    def _response(self, record: SampleRecord) -> list[tuple[str, bool]]:
        """Pieces of the text, and whether they are marked."""
        if record.token_ids is None:
            return [(record.text, False)]
        if record.pulled is None or "1" not in record.pulled:
            whole = self._tokenizer.decode(record.token_ids, skip_special_tokens=False)
            return [(str(whole), False)]
        pieces = zip(decode_each(self._tokenizer, record.token_ids), record.pulled, strict=True)
        return [
            ("".join(text for text, _ in run), digit == "1")
            for digit, run in groupby(pieces, key=lambda piece: piece[1])
        ]

    def _block(self, pieces: Iterable[tuple[str, bool]], margin: str) -> None:
        """Pieces of a model's text behind a margin, so that none of its lines passes for one of ours."""
        whole = Text()
        for text, is_marked in pieces:
            for part in escaped(text).splitlines(keepends=True):
                line = part.rstrip("\n")
                if is_marked:
                    self._append_marked(whole, line + LINE_END_SIGN * (part != line))
                else:
                    whole.append(line)
                whole.append(part[len(line) :])
        width = self._console.width - len(margin)
        for whole_line in whole.split("\n", allow_blank=True):
            rows = whole_line.wrap(self._console, width) if self._console.is_terminal else [whole_line]
            for row in rows:
                self._line(Text.assemble((margin if row else margin.rstrip(), "dim"), row))

    def _append_marked(self, whole: Text, line: str) -> None:
        if self._has_colours:
            whole.append(line, PULLED_STYLE)
            return
        inner = line.strip() or line  # "a ⟦b⟧" is easier to read than "a⟦ b⟧"
        before, after = line.split(inner, 1)
        whole.append(before + inner.join(PULLED_SIGNS) + after)

    def _line(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


def selected(records: Iterable[SampleRecord], options: argparse.Namespace) -> Iterator[SampleRecord]:
    """Those that the options ask for."""
    for record in records:
        if (
            (options.reward is None or verdict_of(record) == options.reward)
            and record.num_tokens >= options.min_length
            and (options.max_length is None or record.num_tokens <= options.max_length)
            and (not options.problem or record.problem in options.problem)
            and (not options.trained or record.not_trained is None)
        ):
            yield record


def _files(run: Path, steps: Sequence[int]) -> list[Path]:
    folder = run / ROLLOUTS_FOLDER
    known = step_paths(folder)
    if not known:
        raise DataError(
            f"{folder}: no samples found, expected step_000001.jsonl.gz and so on: give the directory of a "
            "run (train.run_dir) that has finished a step and has train.save_rollouts above 0"
        )
    if unknown := [step for step in steps if step not in known]:
        raise DataError(
            f"{folder}: no samples of step {', '.join(map(str, unknown))}; there are {len(known)} steps "
            f"from {min(known)} to {max(known)}"
        )
    return [known[step] for step in steps or [max(known)]]


def _tokenizer(run: Path, path: str | None) -> PreTrainedTokenizerBase:
    if path is not None:
        return load_tokenizer(path, field="--tokenizer")
    try:
        return load_tokenizer(load_config(RLConfig, run / "config.yaml").model.hf_path)
    except ConfigError as error:
        raise ConfigError(f"{error}; or name the directory of the run's tokenizer: --tokenizer") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.view_rollouts",
        description="Shows the samples of a training run, with the tokens on which APO's pull acted marked.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of the run (train.run_dir)")
    parser.add_argument(
        "--step", type=int, nargs="+", default=[], metavar="N", help="steps, from 1; default: the newest"
    )
    parser.add_argument("--reward", choices=tuple(VERDICT_STYLES), help="only samples that were judged so")
    parser.add_argument("--min-length", type=int, default=0, metavar="N", help="tokens of the response")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of the response")
    parser.add_argument("--problem", nargs="+", default=[], metavar="ID", help="only of these problems")
    parser.add_argument("--trained", action="store_true", help="only samples that were trained on")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="of the run, where it is not at its model.hf_path any more"
    )
    return parser


def view(argv: Sequence[str]) -> None:
    """Read the command line and show. Raises ConfigError and DataError."""
    options = _parser().parse_args(argv)
    paths = _files(options.run, options.step)
    tokenizer = _tokenizer(options.run, options.tokenizer)
    with paged_console() as console:
        shown = View(console, tokenizer)
        shown.legend()
        summary = Summary()
        for path in paths:
            for record in selected(read_step(path), options):
                shown.sample(record)
                summary.add(record)
        shown.summary(summary)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""
    return run_command(view, argv)


if __name__ == "__main__":
    sys.exit(main())
