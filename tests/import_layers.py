"""Which module may import which, and what none may call: the table, and the checks that read the sources.

A module belongs to the layer of the longest entry that it equals or lies below, and imports from its own
layer and those under it. Imports inside functions count: they hide a dependency, they do not remove it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# From the top down.
LAYERS: dict[str, tuple[str, ...]] = {
    "commands": (
        "apo_megatron.launch",
        "apo_megatron.doctor",
        "apo_megatron.report",
        "apo_megatron.diagnosis",
        "checkpoints_convert",
        "tools",
        "examples",
    ),
    "programs": (
        "apo_megatron.train",
        "apo_megatron.sft",
        "apo_megatron.evaluate",
        "apo_megatron.run",
        "apo_megatron.training_data",
        "apo_megatron.weight_sync",
    ),
    "workers": ("apo_megatron.actor", "apo_megatron.rollout", "apo_megatron.evaluation"),
    "parts": (
        "apo_megatron.weights",
        "apo_megatron.models",
        "apo_megatron.data",
        "apo_megatron.health",
        "apo_megatron.rewards",
        "apo_megatron.telemetry",
        "apo_megatron.evaluation.report",
    ),
    "parallel": ("apo_megatron.parallel",),
    "pure": (
        "apo_megatron.objectives",
        "apo_megatron.planning",
        "apo_megatron.parallel.dims",
        "apo_megatron.models.layout",
        "apo_megatron.models.expert_config",
        "apo_megatron.weights.layouts",
        "apo_megatron.weights.rules",
        "apo_megatron.weights.families",
        "apo_megatron.weights.table",
        "apo_megatron.weights.architecture",
        "apo_megatron.evaluation.answers",
        "apo_megatron.evaluation.bootstrap",
        "apo_megatron.evaluation.comparison",
        "apo_megatron.evaluation.pass_at_k",
    ),
    "contracts": ("apo_megatron.types", "apo_megatron.config", "apo_megatron.errors", "apo_megatron.files"),
}
PACKAGE = "apo_megatron"  # its __init__ holds the version only: anyone may import it
NEVER_IMPORTS = (("apo_megatron.rollout", "apo_megatron.actor"),)
FORBIDDEN_IN_PURE = ("torch.distributed", "megatron", "ray", "sglang")
RAY_HOME = "apo_megatron.launch.ray"
DEVICE_HOME = "apo_megatron.parallel"
DEVICE_LITERAL = re.compile(r"\b(cuda|nccl)\b")

# What runs code that lies in the data it reads.
CODE_RUNNERS = re.compile(
    r"(eval|exec|(c?pickle|cloudpickle|dill)\.(load|loads|Unpickler)|marshal\.loads?|shelve\.open"
    r"|joblib\.load|pandas\.read_pickle|yaml\.(load|load_all|full_load|unsafe_load))"
)
UNSAFE_FLAGS = ("allow_pickle", "trust_remote_code")

OUR_ROOTS = ("apo_megatron", "checkpoints_convert", "tools", "examples")
_LAYER_OF = {entry: layer for layer, entries in LAYERS.items() for entry in entries}
_HEIGHT = {layer: height for height, layer in enumerate(reversed(LAYERS))}


@dataclass(frozen=True)
class Import:
    """One imported name, as written: the target is a module, or a name in a module."""

    target: str
    line: int
    for_types_only: bool  # below `if TYPE_CHECKING`


@dataclass(frozen=True)
class Module:
    name: str
    tree: ast.Module
    is_package: bool = False

    @cached_property
    def imports(self) -> list[Import]:
        """All imports, those inside functions included."""
        nodes = list(ast.walk(self.tree))
        typing_only = {
            id(node)
            for branch in nodes
            if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING")
            for statement in branch.body
            for node in ast.walk(statement)
        }
        found = []
        for node in nodes:
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._base_of(node)
                targets = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [Import(target, node.lineno, id(node) in typing_only) for target in targets]
        return found

    def _base_of(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        parts = self.name.split(".")
        package = parts[: len(parts) - node.level + (1 if self.is_package else 0)]
        return ".".join([*package, *([node.module] if node.module else [])])


def read_modules(root: Path) -> dict[str, Module]:
    """Every module of ours below ``root``, by dotted name."""
    modules = {}
    for top in OUR_ROOTS:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules[name] = Module(name, ast.parse(path.read_text(encoding="utf-8")), is_package)
    return modules


def is_below(name: str, ancestor: str) -> bool:
    """Whether the module (or a name in it) is ``ancestor`` or lies below it."""
    return name == ancestor or name.startswith(f"{ancestor}.")


def layer_of(name: str) -> str | None:
    """The layer of a module; None for one that the table does not know."""
    parts = name.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((_LAYER_OF[entry] for entry in candidates if entry in _LAYER_OF), None)


def _our_module(target: str, modules: Mapping[str, Module]) -> str | None:
    """The module of ours that ``target`` names or lies in; None for other people's."""
    if target.split(".")[0] not in OUR_ROOTS:
        return None
    parts = target.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in candidates if name in modules), target)


def modules_without_layer(modules: Mapping[str, Module]) -> Iterator[str]:
    for name in modules:
        if name != PACKAGE and layer_of(name) is None:
            yield f"{name} has no layer: give it one in LAYERS"


def upward_imports(modules: Mapping[str, Module]) -> Iterator[str]:
    for module, imported, line in _our_imports(modules):
        own, other = layer_of(module), layer_of(imported)
        if own is not None and other is not None and _HEIGHT[other] > _HEIGHT[own]:
            yield f"{module}:{line} ({own}) imports {imported} ({other}), which lies above it"


def forbidden_pairs(modules: Mapping[str, Module]) -> Iterator[str]:
    for module, imported, line in _our_imports(modules):
        for importer, target in NEVER_IMPORTS:
            if is_below(module, importer) and is_below(imported, target):
                yield f"{module}:{line} imports {imported}: {importer} never imports {target}"


def impure_imports(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if layer_of(module.name) != "pure":
            continue
        for found in module.imports:
            if not found.for_types_only and any(is_below(found.target, f) for f in FORBIDDEN_IN_PURE):
                yield f"{module.name}:{found.line} is pure and imports {found.target}"


def ray_outside_launch(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for found in module.imports:
            if is_below(found.target, "ray") and not is_below(module.name, RAY_HOME):
                yield f"{module.name}:{found.line} imports {found.target}: only {RAY_HOME} may"


def device_literals(modules: Mapping[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if is_below(module.name, DEVICE_HOME):
            continue
        docstrings = {id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                literal = DEVICE_LITERAL.search(node.value)
                if literal:
                    yield f"{module.name}:{node.lineno} names {literal.group()!r}: only {DEVICE_HOME} may"


def code_from_outside(modules: Mapping[str, Module]) -> Iterator[str]:
    """Reading that would run what it reads: unpickling, evaluation of text, models that bring code."""
    for module in modules.values():
        for found in module.imports:
            if CODE_RUNNERS.fullmatch(found.target):
                yield f"{module.name}:{found.line} imports {found.target}: it runs what it reads"
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            flags = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg is not None}
            unsafe = [name for name in UNSAFE_FLAGS if flags.get(name, "False") != "False"]
            if called == "torch.load" and flags.get("weights_only") != "True":
                unsafe.append("weights_only missing")
            if CODE_RUNNERS.fullmatch(called) or unsafe:
                why = ", ".join(unsafe)
                yield f"{module.name}:{node.lineno} calls {called} ({why}): it runs what it reads"


def import_cycles(modules: Mapping[str, Module]) -> Iterator[str]:
    """One message for each cycle met on a depth-first walk; imports for types only do not count."""
    edges: dict[str, list[str]] = {name: [] for name in modules}
    for module, imported, _ in _our_imports(modules, with_types=False):
        edges[module].append(imported)
    finished: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> Iterator[str]:
        if name in trail:
            yield "import cycle: " + " -> ".join([*trail[trail.index(name) :], name])
        elif name not in finished:
            for imported in edges.get(name, ()):
                yield from walk(imported, (*trail, name))
            finished.add(name)

    for name in sorted(modules):
        yield from walk(name, ())


def _our_imports(modules: Mapping[str, Module], with_types: bool = True) -> Iterable[tuple[str, str, int]]:
    """(module, imported module, line) of all imports between our modules."""
    for module in modules.values():
        for found in module.imports:
            imported = _our_module(found.target, modules)
            if imported is not None and (with_types or not found.for_types_only):
                yield module.name, imported, found.line
