"""Python and packages: versions against the ranges that the installed distributions declare."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from apo_megatron.diagnosis import installed
from apo_megatron.diagnosis.finding import Finding, Section
from apo_megatron.diagnosis.installed import requirements_of, unmet_requirements, version_of

OURS = "apo_megatron"
DEVELOPMENT = "dev"  # the extra that no run needs
SECTION = Section("Packages")
_SECONDS_FOR_OTHER_PYTHON = 10.0


def check_packages(sglang_python: str | None = None) -> list[Finding]:
    """All of this module; ``sglang_python`` is the interpreter of SGLang's own environment."""
    if version_of(OURS) is None:
        return [
            SECTION.warning(
                OURS,
                "runs from a folder and is not installed: the ranges of its requirements are unknown",
                'install it, with: pip install -c constraints.txt -e "."',
            )
        ]
    return [
        check_python(),
        *check_required(),
        *check_optional(skip={"sglang"} if sglang_python else set()),
        check_apex(),
        *([check_other_python(sglang_python)] if sglang_python else []),
    ]


def check_python() -> Finding:
    """The interpreter against Requires-Python."""
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = str(metadata.metadata(OURS)["Requires-Python"] or "")
    if not SpecifierSet(wanted).contains(found):
        return SECTION.problem(
            "Python", f"{found}, expected {wanted}", "make an environment with a newer Python"
        )
    return SECTION.ok("Python", f"{found} (expected {wanted}), {sys.executable}")


def check_required() -> Iterator[Finding]:
    """What we ask for, each with its range, and then what those ask for."""
    missing = unmet_requirements(OURS)
    ours = [unmet for unmet in missing if unmet.owner == OURS]
    for requirement in requirements_of(OURS, set()):
        if not any(Requirement(unmet.requirement).name == requirement.name for unmet in ours):
            yield SECTION.ok(requirement.name, _with_range(str(version_of(requirement.name)), requirement))
    for unmet in missing:
        yield _unmet(unmet)


def check_optional(skip: set[str]) -> Iterator[Finding]:
    """What our extras name, except for development: it may be missing, but not be of a wrong version."""
    for line in metadata.requires(OURS) or ():
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
        name = requirement.name
        if extra is None or extra[1] == DEVELOPMENT or name in skip:
            continue
        version = version_of(name)
        if version is None:
            yield SECTION.ok(name, f"not installed (optional, extra {extra[1]})")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield _unmet(installed.Unmet(OURS, f"{name}{requirement.specifier}", version))
        else:
            yield SECTION.ok(name, _with_range(version, requirement))
            for unmet in unmet_requirements(name, set(requirement.extras)):
                yield _unmet(unmet)


def check_apex() -> Finding:
    """NVIDIA Apex, where an ``apex`` can be imported; the project of that name on the index is another."""
    spec = find_spec("apex")
    if spec is None:
        return SECTION.ok(
            "apex", "not installed (optional: NVIDIA's fused optimizer kernels, built from source)"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return SECTION.problem(
            "apex",
            f"{folders[0] if folders else spec.origin} is not NVIDIA Apex, but a project that has the name",
            "pip uninstall apex; nothing needs it. NVIDIA's is built from source: docs/installation.md",
        )
    if find_spec("amp_C") is None:
        return SECTION.warning(
            "apex",
            "NVIDIA Apex without its compiled kernels (no module amp_C): Megatron does not use it",
            "build it with --cpp_ext and --cuda_ext: docs/installation.md",
        )
    return SECTION.ok("apex", f"NVIDIA Apex {version_of('apex') or ''} with its kernels".replace("  ", " "))


def check_other_python(python: str) -> Finding:
    """The environment of SGLang servers: that it is one, and that its packages fit each other."""
    subject = "sglang (own Python)"
    command = [python, "-I", installed.__file__, "sglang", "torch", "transformers"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_FOR_OTHER_PYTHON)
    except (OSError, subprocess.TimeoutExpired) as error:
        return SECTION.problem(
            subject, f"{python} cannot be run: {error}", "name the environment's bin/python"
        )
    if result.returncode != 0:
        why = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return SECTION.problem(subject, f"{python} failed: {why}", "install sglang into that environment")
    found = json.loads(result.stdout)
    versions = {name: version for name, version in found["versions"].items() if version is not None}
    if "sglang" not in versions:
        return SECTION.problem(subject, f"{python} has no sglang", f"{python} -m pip install sglang")
    described = ", ".join(f"{name} {version}" for name, version in versions.items())
    if unmet := [installed.Unmet(*values) for values in found["unmet"]]:
        return SECTION.warning(
            subject,
            f"{described}; {'; '.join(map(_describe, unmet[:3]))}{' ...' if len(unmet) > 3 else ''}",
            "let pip mend it: install sglang again in that environment, and nothing beside it",
        )
    return SECTION.ok(subject, described)


def _unmet(unmet: installed.Unmet) -> Finding:
    return SECTION.problem(
        Requirement(unmet.requirement).name,
        _describe(unmet),
        f'pip install "{unmet.requirement}"'
        + ("" if unmet.owner == OURS else f", or another version of {unmet.owner}"),
    )


def _describe(unmet: installed.Unmet) -> str:
    return f"{unmet.found or 'not installed'}, {unmet.owner} wants {unmet.requirement}"


def _with_range(version: str, requirement: Requirement) -> str:
    wanted = str(requirement.specifier)
    return f"{version} (expected {wanted})" if wanted else version
