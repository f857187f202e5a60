"""What a field accepts, in words: for error messages and for docs/configuration.md."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_TYPE_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}
_BOUNDS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))


def section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section class of a field that holds a section, or may hold one; None for a plain field."""
    kinds = [info.annotation]
    if get_origin(info.annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(info.annotation) if kind is not types.NoneType]
    kind = kinds[0] if len(kinds) == 1 else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def is_optional(info: FieldInfo) -> bool:
    """Whether null is a value of the field."""
    return types.NoneType in get_args(info.annotation)


def item_section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section class of a field that holds a list of sections, None for any other field."""
    item = get_args(info.annotation)[0] if get_origin(info.annotation) is tuple else None
    return item if isinstance(item, type) and issubclass(item, BaseModel) else None


def choices_of(info: FieldInfo) -> tuple[str, ...]:
    """The names that a field chooses from; () for a field that is no choice."""
    is_choice = get_origin(info.annotation) is Literal
    return tuple(map(str, get_args(info.annotation))) if is_choice else ()


def describe_default(info: FieldInfo) -> str:
    """The default of a plain field as one would write it into YAML, text without quotes."""
    if _is_mapping(info.annotation):
        return str(dict(info.default))
    return info.default if isinstance(info.default, str) else describe_value(info.default)


def describe_type(info: FieldInfo) -> str:
    """``whole number >= 1``, ``one of a, b``, ``number > 0 or null``, ``list, each a whole number``."""
    section = section_of(info)
    if section is not None:
        return f"a section with the fields {', '.join(section.model_fields)}"
    return _type_text(info.annotation, info.metadata)


def describe_value(value: Any) -> str:
    """A value as one would write it into YAML, text quoted: ``null``, ``true``, ``[1, 2]``, ``'text'``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe_value, value))}]"
    return repr(value) if isinstance(value, str) else str(value)


def _type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, parameters = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *extra = parameters
        constraints = [
            c for item in extra for c in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        return _type_text(inner, constraints)
    if origin is Literal:
        return f"one of {', '.join(map(str, parameters))}"
    if origin in (Union, types.UnionType):
        choices = [_type_text(p, metadata) for p in parameters if p is not type(None)]
        return " or ".join([*choices, "null"] if type(None) in parameters else choices)
    if _is_mapping(annotation):
        return "mapping of text to text"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"section with the fields {', '.join(annotation.model_fields)}"
    if origin is tuple:
        return f"list, each {'' if parameters[0] is str else 'a '}{_type_text(parameters[0])}"
    return " ".join([_TYPE_NAMES[annotation], " and ".join(_bounds(metadata))]).strip()


def _is_mapping(annotation: Any) -> bool:
    """Whether it is that of a ``FrozenMapping``: pairs of text."""
    return get_origin(annotation) is tuple and get_args(annotation)[0] == tuple[str, str]


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for constraint in metadata:
        for kind, attribute, sign in _BOUNDS:
            if isinstance(constraint, kind):
                yield f"{sign} {getattr(constraint, attribute):g}"
