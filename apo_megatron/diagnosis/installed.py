"""What is installed, and which requirement of it is not met, as the distributions themselves say.

    PYTHON -I apo_megatron/diagnosis/installed.py sglang torch      prints the same about another environment

Standard library and ``packaging`` only, and any Python from 3.8 on: it is run with the interpreter of
SGLang's environment, which has nothing of ours.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement


class Unmet(NamedTuple):
    """``owner`` asks for ``requirement``, and ``found`` is installed (None: nothing)."""

    owner: str
    requirement: str
    found: str | None


def version_of(distribution: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def requirements_of(distribution: str, extras: set[str]) -> list[Requirement]:
    """What the distribution asks for on this machine, with these extras of it.

    A line that cannot be read is left out: it is the distribution's own mistake.
    """
    found = []
    for line in metadata.requires(distribution) or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            found.append(requirement)
    return found


def unmet_requirements(root: str, extras: set[str] = frozenset()) -> list[Unmet]:  # type: ignore[assignment]
    """Of ``root`` and of everything that it needs, directly or not. ``root`` must be installed."""
    unmet: dict[Unmet, None] = {}
    asked: dict[str, set[str]] = {}  # distribution -> extras that were looked at
    waiting = [(root, set(extras))]
    while waiting:
        owner, wanted = waiting.pop()
        name = _normalized(owner)
        if name in asked and wanted <= asked[name]:
            continue
        asked[name] = asked.get(name, set()) | wanted
        for requirement in requirements_of(owner, wanted):
            version = version_of(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                text = requirement.name + str(requirement.specifier)
                unmet[Unmet(owner, text, version)] = None
            else:
                waiting.append((requirement.name, set(requirement.extras)))
    return list(unmet)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    root = sys.argv[1]
    is_there = version_of(root) is not None
    print(
        json.dumps(
            {
                "versions": {name: version_of(name) for name in sys.argv[1:]},
                "unmet": unmet_requirements(root) if is_there else [],
            }
        )
    )
