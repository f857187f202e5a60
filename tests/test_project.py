"""The frame around the program: packaging, pins, entry points, and what no file may contain."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folders of the machine where something was written, and hosts of package registries (who installs decides).
NOT_OURS = re.compile(
    r"(?<![\w.~/-])/(?:root|work|home|mnt|Users)/\w"
    r"|\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|pypi\.nvidia\.com|anaconda\.org)"
)


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def findings(text: str) -> list[str]:
    return [match.group() for match in NOT_OURS.finditer(text)]


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = {}
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content and (matches := findings(content.decode("utf-8"))):
            found[str(path.relative_to(ROOT))] = matches
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [f"see {'/'}home/me/x", f"'{'/'}root/model'", f"cd {'/'}work/main", f"https://{'pypi'}.org/simple"],
)
def test_a_machine_or_a_registry_would_be_found(text: str) -> None:
    assert findings(text)


@pytest.mark.parametrize("text", ["a/home/x", "runs/work/x", "./root/x", "the pypi folder", "/work of art"])
def test_ordinary_text_is_not_found(text: str) -> None:
    assert findings(text) == []


def metadata() -> dict[str, object]:
    """What setup.py passes to setup() and its constants, as far as they are literals."""
    values: dict[str, object] = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        pairs = []
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            pairs = [(node.targets[0].id, node.value)]
        elif isinstance(node, ast.keyword) and node.arg:
            pairs = [(node.arg, node.value)]
        for name, value in pairs:
            try:
                values[name] = ast.literal_eval(value)
            except ValueError:
                continue
    return values


def package_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ]", requirement)[0].lower().replace("_", "-")


def test_every_core_and_dev_dependency_is_pinned() -> None:
    values = metadata()
    required, extras = values["INSTALL_REQUIRES"], values["EXTRAS_REQUIRE"]
    assert isinstance(required, list) and isinstance(extras, dict)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)  # exact, and no local build
    assert {package_name(name) for name in [*required, *extras["dev"]]} <= {package_name(pin) for pin in pins}


def test_apex_is_never_required() -> None:
    """The project of that name on the package index has nothing to do with NVIDIA Apex."""
    values = metadata()
    extras = values["EXTRAS_REQUIRE"]
    assert isinstance(extras, dict)
    names = {package_name(name) for names in extras.values() for name in names}
    assert "apex" not in names | {package_name(name) for name in values["INSTALL_REQUIRES"]}  # type: ignore[attr-defined]


def entry_points() -> list[tuple[str, str, str]]:
    listed = metadata()["entry_points"]
    assert isinstance(listed, dict)
    found = []
    for line in listed["console_scripts"]:
        script, module, function = re.split(r" = |:", line)
        found.append((script, module, function))
    return found


@pytest.mark.parametrize(("script", "module", "function"), entry_points())
def test_entry_points_can_be_called_without_arguments(script: str, module: str, function: str) -> None:
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    (definition,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    num_required = len(definition.args.args) - len(definition.args.defaults)
    assert num_required == 0, f"{script} calls {module}:{function} without arguments"
