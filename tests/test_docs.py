"""What the documentation names exists: links and anchors, files, settings, programs, messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import BaseModel

from apo_megatron.config.describe import item_section_of, section_of
from tests.test_project import entry_points, tracked_files
from tools.document_config import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for top in ("docs", "examples", "tools") for p in (ROOT / top).rglob("*.md"))]
)
# What is named without being here: written by a run or by a user, or an example of a name.
OUTSIDE = (
    "runs/",
    "run_dir/",
    "data/",
    "checkpoints/",
    "generations/",
    "problems/",
    "servers/",
    "logs/",
    "hang/",
    "hf/",
)
FILE = re.compile(
    r"(?:[\w.-]+/)*[\w-]+\.(?:py|sh|sbatch|yaml|toml|txt|md)|(?:apo_megatron|tests|tools|examples)/[\w./-]*"
)
SUFFIXES = (".py", ".sh", ".sbatch", ".yaml", ".toml", ".md")
Check = Callable[[Path], Iterator[str]]
PROGRAMS_OF_OTHERS = ("pytest", "pip", "venv", "sglang.launch_server")
CODE = ("parallel.device",)  # looks like a setting


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def spans_of(page: Path) -> list[str]:
    """What stands in backticks, one line each."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", prose_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = found[anchor] = found.get(anchor, -1) + 1
        if number:
            found[f"{anchor}-{number}"] = 0
    return set(found)


def broken_links(page: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"https?://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors_of(target):
            yield f"{link}: no such heading"


def missing_files(page: Path) -> Iterator[str]:
    """Paths in backticks that look like files of ours: from the top, or the end of a longer path."""
    ours = {f"/{name(path)}" for path in tracked_files()}
    for span in spans_of(page):
        if not FILE.fullmatch(span) or span.startswith(OUTSIDE) or (ROOT / span).exists():
            continue
        is_of_users = "/" not in span and not span.endswith(".py")  # run.yaml, evaluate.yaml, ...
        if not is_of_users and not any(path.endswith(f"/{span}") for path in ours):
            yield span


def sections() -> dict[str, set[str]]:
    """Every field by its section, over all commands: {"rollout.sglang": {"urls", ...}}."""
    found: dict[str, set[str]] = {}

    def collect(prefix: str, cls: type[BaseModel]) -> None:
        for field, info in cls.model_fields.items():
            found.setdefault(prefix, set()).add(field)
            section = section_of(info) or item_section_of(info)
            if section is not None:
                collect(f"{prefix}.{field}".lstrip("."), section)

    for cls in COMMANDS.values():
        collect("", cls)
    return found


SECTIONS = sections()


def unknown_fields(page: Path) -> Iterator[str]:
    for span in spans_of(page):
        for words in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)(?=$|[=: ,])", span):
            *section, field = words.split(".")
            prefix = ".".join(section)
            is_section = section[0] in SECTIONS and words not in CODE
            if is_section and f".{field}" not in SUFFIXES and field not in SECTIONS.get(prefix, ()):
                yield words


def unknown_programs(page: Path) -> Iterator[str]:
    scripts = {script for script, _, _ in entry_points()}
    text = text_of(page)
    for script in re.findall(r"(?:^|[`\s])(apo-[a-z-]+)(?=[`\s]|$)", text):
        if script not in scripts:
            yield script
    for module in re.findall(r"(?:python|torchrun)\S*(?: --?\S+(?: \d+)?)*? -m ([\w.]+)", text):
        if not module.isupper() and module not in PROGRAMS_OF_OTHERS and find_spec(module) is None:
            yield module
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE):
        if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
            yield f"make {target}"


@pytest.mark.parametrize(
    "check", [broken_links, missing_files, unknown_fields, unknown_programs], ids=lambda check: check.__name__
)
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_names_exists(page: Path, check: Check) -> None:
    assert list(check(page)) == []


def test_every_page_is_in_the_index() -> None:
    index = text_of(ROOT / "docs" / "README.md")
    pages = [path.name for path in PAGES if path.parent == ROOT / "docs" and path.name != "README.md"]
    assert len(pages) > 10
    assert [page for page in pages if f"]({page})" not in index] == []


def said_by_the_program() -> set[str]:
    """Every constant part of every text in the code."""
    return {
        node.value
        for path in tracked_files()
        if path.suffix == ".py" and path.parts[len(ROOT.parts)] in ("apo_megatron", "checkpoints_convert")
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_messages_of_troubleshooting_are_those_of_the_program() -> None:
    page = text_of(ROOT / "docs" / "troubleshooting.md")
    symptoms = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    quoted = [text for symptom in symptoms for text in re.findall(r'"([^"]+)"', symptom)]
    said = said_by_the_program()
    others = {"Failed to connect"}  # of Ray
    assert len(quoted) > 30
    assert [text for text in quoted if text not in others and not any(text in part for part in said)] == []


@pytest.mark.parametrize(
    ("check", "text", "found"),
    [
        (broken_links, "[a](none.md) [b](#here)\n# Here", ["none.md: no such file"]),
        (broken_links, "[a](#there)\n# Here", ["#there: no such heading"]),
        (missing_files, "`tests/none.py`, `runs/x.yaml`, `setup.py`", ["tests/none.py"]),
        (missing_files, "`apo_megatron/none/`, `apo_megatron/actor/`", ["apo_megatron/none/"]),
        (unknown_fields, "`rollout.group_sizes`, `rollout.sglang.urls: []`", ["rollout.group_sizes"]),
        (unknown_programs, "`apo-none --config x`, `apo-train`", ["apo-none"]),
        (unknown_programs, "    python -m apo_megatron.none --config x", ["apo_megatron.none"]),
        (unknown_programs, "    make nothing", ["make nothing"]),
    ],
)
def test_what_does_not_exist_would_be_found(
    check: Check, text: str, found: list[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert list(check(page)) == found
