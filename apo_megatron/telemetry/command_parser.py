"""The argument parser of every command line: wrong words become a ConfigError that says what to write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from apo_megatron import __version__
from apo_megatron.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """Knows ``--version``, takes no abbreviated options, and keeps the lines of its description."""

    def __init__(self, prog: str, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, allow_abbrev=False, **settings)
        self.add_argument("--version", action="version", version=f"apo_megatron {__version__}")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}   (or --help)")

    @property
    def options(self) -> list[str]:
        """All option words, such as --config."""
        return [word for action in self._actions for word in action.option_strings]

    def refuse_unknown_options(self, words: Sequence[str], others: Sequence[str] = ()) -> None:
        """Raise ConfigError for an option that neither this parser nor ``others`` has; names the nearest."""
        known = [*self.options, *others]
        for word in words:
            name = word.partition("=")[0]
            if name == "--":
                return
            if name.startswith("--") and name not in known:
                near = get_close_matches(name, known, n=1)
                self.error(
                    f"{name}: unknown option, " + (f"did you mean {near[0]}?" if near else "see --help")
                )

    # argparse looks at what is required before it complains of what it does not know: the cause of a missing
    # --config is often a --confg.
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.refuse_unknown_options(args or ())
        return super().parse_args(args, namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.refuse_unknown_options(args or ())
        return super().parse_intermixed_args(args, namespace)
