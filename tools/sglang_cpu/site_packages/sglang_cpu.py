"""Lets torchvision be imported beside a torch without CUDA. Python runs this at start-up (sglang_cpu.pth).

SGLang imports torchvision's image functions. The wheel of torchvision is the CUDA build, whose compiled
operators cannot be loaded without CUDA: torchvision goes on without them, but registers shape functions for
two of them (nms, qnms), which fails where nobody has declared the operators. So they are declared here, right
before torchvision is imported; nothing in SGLang calls them. No line of SGLang itself is changed.
"""

import importlib.abc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_OPERATORS = ("nms", "qnms")
_libraries: list[Any] = []  # a declaration lasts as long as its library object


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds no module: it waits for the import of torchvision."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch  # seconds, which most processes of this environment need not spend

            if torch.version.cuda is None:  # else torchvision loads its own
                library = torch.library.Library("torchvision", "DEF")
                for name in _OPERATORS:
                    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _libraries.append(library)
        return None


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    sys.meta_path.insert(0, _DeclareOperators())
