"""Stands in for SGLang's compiled GPU kernels, whose package loads CUDA libraries when it is imported.

SGLang imports names from it everywhere and calls none of them with its plain torch backends: every name is a
function that raises when it is called.
"""

import os
from collections.abc import Callable
from typing import Any, NoReturn

if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
    raise ImportError("this environment is for CPUs only: set SGLANG_USE_CPU_ENGINE=1, or install sgl_kernel")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):  # what the import system asks for must look absent
        raise AttributeError(name)

    def missing(*_positional: Any, **_named: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU: this environment runs SGLang on a CPU")

    missing.__name__ = name
    return missing
