"""The wheel and the source distribution, built from what git knows and run where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

import apo_megatron
from tests.test_project import ROOT, entry_points, tracked_files

PACKAGES = ("apo_megatron", "checkpoints_convert")
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both, built without network from a copy of the tracked files."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    run([sys.executable, "-c", BUILD], source)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own, without its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run([*pip, "--target", str(folder), str(wheel)], folder)
    return folder


def run(command: Sequence[str], folder: Path, search: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if search is not None:
        environment["PYTHONPATH"] = str(search)
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    assert files == {name for name in tracked if name.startswith(tuple(f"{name}/" for name in PACKAGES))}
    assert any(name.endswith(".js") for name in files) and any(name.endswith(".css") for name in files)


def test_metadata_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = ConfigParser()
        scripts.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Version"] == apo_megatron.__version__
    assert "apo_megatron" in str(metadata.get_payload())  # the README
    assert dict(scripts["console_scripts"]) == {name: f"{at}:{what}" for name, at, what in entry_points()}


def test_the_source_distribution_can_be_tested_and_built(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "LICENSE",
        "CHANGELOG.md",
        "README.md",
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
    }
    assert needed < files
    tracked = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    kept = tuple(f"{name}/" for name in (*PACKAGES, "docs", "examples", "tests", "tools"))
    assert {name for name in tracked if name.startswith(kept)} <= files


def test_the_version_is_in_the_changelog() -> None:
    assert f"## [{apo_megatron.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# All in one process: most of the time goes into imports.
SHOW_HELP = """
import contextlib, io, json, sys
from importlib.metadata import distribution
shown = {}
for entry in distribution("apo_megatron").entry_points:
    main = entry.load()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(["--help"])
    shown[entry.name] = [sys.modules[main.__module__].__file__, out.getvalue()]
print(json.dumps(shown))
"""


def test_every_command_shows_its_help_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = json.loads(run([sys.executable, "-c", SHOW_HELP], tmp_path, installed))
    assert shown.keys() == {script for script, _, _ in entry_points()}
    for script, (file, text) in shown.items():
        assert Path(file).is_relative_to(installed), script
        assert text.startswith("usage:") and "--version" in text, script
    assert "train.num_steps=" in shown["apo-train"][1] and "example:" in shown["apo-train"][1]


def test_a_script_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(installed / "bin" / "apo-doctor"), "--version"]
    assert run(command, tmp_path, installed) == f"apo_megatron {apo_megatron.__version__}\n"
