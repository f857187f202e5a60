"""What every part of a configuration has in common: frozen, strict, with named rules across fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

_Item = TypeVar("_Item")


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# YAML has lists, a frozen section wants tuples.
FrozenList = Annotated[tuple[_Item, ...], BeforeValidator(_list_to_tuple)]


def _mapping_to_pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else value


# A mapping of text to text; a frozen section keeps its pairs.
FrozenMapping = Annotated[
    tuple[tuple[str, str], ...], BeforeValidator(_mapping_to_pairs), PlainSerializer(dict)
]

Rule = Callable[[Any], str | None]


def rule(check: Rule) -> Rule:
    """Marks a method of a Section as a rule across fields: it returns what is wrong, or None.

    The message names the fields, what was found and what to do. The docstring is the rule in words, for
    ``docs/configuration.md``.
    """
    check.is_rule = True  # type: ignore[attr-defined]
    return check


class Section(BaseModel):
    """A group of settings: frozen, unknown keys refused, nothing coerced (an int may stand for a float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def rules(cls) -> Iterator[str]:
        """Names of this section's rules, those of its bases first, in the order of the source."""
        for base in reversed(cls.__mro__):
            yield from (name for name, member in vars(base).items() if getattr(member, "is_rule", False))

    @model_validator(mode="after")
    def _every_rule_holds(self) -> Self:
        # All broken rules at once, one line each: a user should not fix them one run at a time.
        broken = [message for name in self.rules() if (message := getattr(self, name)()) is not None]
        if broken:
            raise ValueError("\n".join(broken))
        return self
