"""Every field of a config class as text, from its schema: what ``--help`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from apo_megatron.config.describe import describe_default, describe_type, section_of

WIDTH = 100


def describe_fields(config_class: type[BaseModel]) -> str:
    """One entry a field, by section: name, default or ``(required)``, description, what it accepts."""
    return "\n".join(_section_lines(config_class, "")).strip("\n")


def _section_lines(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        inner = section_of(info)
        if inner is None:
            yield from _field_lines(prefix + name, info)
        else:
            yield ""
            yield from wrap(f"{prefix}{name}: {_first_paragraph(inner)}", WIDTH)
            yield from _section_lines(inner, f"{prefix}{name}.")


def _field_lines(name: str, info: FieldInfo) -> Iterator[str]:
    yield f"  {name}" + ("  (required)" if info.is_required() else f"={describe_default(info)}")
    indent = " " * 8
    text = f"{info.description or ''} [{describe_type(info)}]".strip()
    yield from wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _first_paragraph(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())
