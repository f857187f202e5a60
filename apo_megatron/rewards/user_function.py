"""A reward of the user's own: a function, named by its import path."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from apo_megatron.errors import ConfigError, RewardError
from apo_megatron.types import Completion, Prompt

RewardFunction = Callable[[Prompt, Sequence[Completion]], Sequence[float]]


class UserFunctionReward:
    """``function(prompt, completions)``: one number per completion, NaN where it cannot judge.

    ``prompt.fields`` has the other columns of the dataset row, ``completion.text`` the answer and
    ``completion.finish_reason`` how it ended. The function runs in the trainer's own process and has no
    deadline: what may hang belongs into a process of its own.
    """

    required_fields: Mapping[str, type] = MappingProxyType({})

    def __init__(self, path: str, field: str = "reward.name") -> None:
        """``path`` is ``package.module:function``; ``field`` is where it was configured, for messages.

        Raises ConfigError where there is no such function.
        """
        self._path = path
        self._function = _import_function(path, field)

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """What the function says, checked. Raises RewardError where it fails or says something else."""
        if not completions:
            return []
        where = f"reward function {self._path}, prompt {prompt.prompt_id!r}"
        try:
            values = self._function(prompt, completions)
        except Exception as error:  # whatever a stranger's code raises: the other ranks must hear of it
            raise RewardError(f"{where}: raised {type(error).__name__}: {error}") from error
        if not isinstance(values, Sequence) or len(values) != len(completions):
            raise RewardError(
                f"{where}: expected a list of {len(completions)} numbers, one per completion, found "
                f"{str(values)[:80]}"
            )
        return [_checked(value, where) for value in values]


def _checked(value: object, where: str) -> float:
    if isinstance(value, int | float) and not math.isinf(value):
        return float(value)
    raise RewardError(
        f"{where}: a reward is {str(value)[:80]!r}, expected a finite number, or NaN for not judged"
    )


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """A console script, unlike ``python -m``, does not look there."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import_function(path: str, field: str) -> RewardFunction:
    module_name, _, function_name = path.partition(":")
    expected = "expected package.module:function, importable from where the run is started"
    try:
        with _working_directory_on_path():
            module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise ConfigError(f"{field}={path!r}: cannot import {module_name!r} ({error}); {expected}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{field}={path!r}: {module_name} has no function {function_name!r}; {expected}")
    return function
