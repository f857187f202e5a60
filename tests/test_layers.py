"""The structure of the program: import layers, purity, where devices and Ray may be named, light imports;
and that nothing runs code that comes with data."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from tests import import_layers as rules
from tests.import_layers import Module, layer_of

ROOT = Path(__file__).resolve().parent.parent
Check = Callable[[Mapping[str, Module]], Iterable[str]]
CHECKS: tuple[Check, ...] = (
    rules.modules_without_layer,
    rules.upward_imports,
    rules.forbidden_pairs,
    rules.impure_imports,
    rules.ray_outside_launch,
    rules.device_literals,
    rules.code_from_outside,
    rules.import_cycles,
)


@pytest.fixture(scope="module")
def program() -> dict[str, Module]:
    return rules.read_modules(ROOT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_program_keeps_the_rule(check: Check, program: dict[str, Module]) -> None:
    assert list(check(program)) == []


def test_the_checks_see_the_program(program: dict[str, Module]) -> None:
    assert {"apo_megatron", "apo_megatron.types", "apo_megatron.train"} <= set(program)
    assert "apo_megatron.errors.ConfigError" in {
        i.target for i in program["apo_megatron.parallel.state"].imports
    }


# (check, module -> source, what the message says; "" = the rule is kept)
BROKEN: tuple[tuple[Check, dict[str, str], str], ...] = (
    (rules.modules_without_layer, {"apo_megatron.extras": ""}, "apo_megatron.extras has no layer"),
    (rules.modules_without_layer, {"apo_megatron": "", "apo_megatron.actor.actor": ""}, ""),
    (
        rules.upward_imports,
        {"apo_megatron.types": "import apo_megatron.parallel.state"},
        "apo_megatron.types:1 (contracts) imports apo_megatron.parallel.state (parallel)",
    ),
    (
        rules.upward_imports,
        {
            "apo_megatron.objectives.kl": "from apo_megatron.weights import source",
            "apo_megatron.weights.source": "",
        },
        "(pure) imports apo_megatron.weights.source (parts)",
    ),
    (
        rules.upward_imports,
        {
            "apo_megatron.objectives.kl": "from apo_megatron.weights import layouts",
            "apo_megatron.weights.layouts": "",
        },
        "",
    ),
    (
        rules.upward_imports,
        {
            "apo_megatron.data.collate": "def f():\n    from apo_megatron.actor.actor import MegatronActor",
            "apo_megatron.actor.actor": "",
        },
        "apo_megatron.data.collate:2 (parts) imports apo_megatron.actor.actor (workers)",
    ),
    (
        rules.upward_imports,
        {"apo_megatron.parallel.vocab": "from ..models import build", "apo_megatron.models.build": ""},
        "(parallel) imports apo_megatron.models.build (parts)",
    ),
    (
        rules.upward_imports,
        {"apo_megatron.train": "from tools import x"},
        "(programs) imports tools.x (commands)",
    ),
    (rules.upward_imports, {"apo_megatron.train": "from apo_megatron.actor.actor import MegatronActor"}, ""),
    (
        rules.forbidden_pairs,
        {"apo_megatron.rollout.embedded": "from apo_megatron.actor import actor"},
        "apo_megatron.rollout never imports apo_megatron.actor",
    ),
    (rules.forbidden_pairs, {"apo_megatron.actor.actor": "import apo_megatron.rollout.engine"}, ""),
    (
        rules.impure_imports,
        {"apo_megatron.weights.table": "from torch import distributed"},
        "apo_megatron.weights.table:1 is pure and imports torch.distributed",
    ),
    (rules.impure_imports, {"apo_megatron.objectives.kl": "import megatron.core"}, "imports megatron.core"),
    (rules.impure_imports, {"apo_megatron.evaluation.pass_at_k": "import ray"}, "imports ray"),
    (rules.impure_imports, {"apo_megatron.weights.layouts": "import sglang"}, "imports sglang"),
    (rules.impure_imports, {"apo_megatron.weights.source": "import torch.distributed as dist"}, ""),
    (
        rules.impure_imports,
        {
            "apo_megatron.objectives.kl": "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from torch.distributed import ProcessGroup"
        },
        "",
    ),
    (rules.ray_outside_launch, {"apo_megatron.rollout.server": "import ray.util"}, "imports ray.util"),
    (rules.ray_outside_launch, {"apo_megatron.launch.ray": "import ray"}, ""),
    (rules.device_literals, {"apo_megatron.actor.actor": "x = f'cuda:{1}'"}, "names 'cuda'"),
    (rules.device_literals, {"tools.benchmark": "start(backend='cpu:gloo,nccl')"}, "names 'nccl'"),
    (rules.device_literals, {"apo_megatron.parallel.state": "device = 'cuda'"}, ""),
    (
        rules.device_literals,
        {"apo_megatron.models.build": '"""Moves it to cuda."""\nx = torch.cuda.is_available()'},
        "",
    ),
    (rules.code_from_outside, {"apo_megatron.rollout.a": "pickle.loads(answer)"}, "calls pickle.loads"),
    (rules.code_from_outside, {"apo_megatron.rollout.a": "from pickle import loads"}, "imports pickle.loads"),
    (rules.code_from_outside, {"apo_megatron.rewards.a": "eval(text)"}, "calls eval"),
    (rules.code_from_outside, {"tools.a": "torch.load(path)"}, "calls torch.load (weights_only missing)"),
    (rules.code_from_outside, {"tools.a": "torch.load(path, weights_only=True)"}, ""),
    (rules.code_from_outside, {"tools.a": "np.load(path, allow_pickle=True)"}, "(allow_pickle)"),
    (rules.code_from_outside, {"tools.a": "import pickle\nmodel.eval()\nx = pickle.MARK"}, ""),
    (
        rules.import_cycles,
        {
            "apo_megatron.data.a": "import apo_megatron.data.b",
            "apo_megatron.data.b": "from apo_megatron.data import a",
        },
        "import cycle: apo_megatron.data.a -> apo_megatron.data.b -> apo_megatron.data.a",
    ),
    (
        rules.import_cycles,
        {"apo_megatron.data.a": "import apo_megatron.data.b", "apo_megatron.data.b": ""},
        "",
    ),
)


@pytest.mark.parametrize(("check", "sources", "message"), BROKEN)
def test_each_rule_can_fail(check: Check, sources: dict[str, str], message: str) -> None:
    modules = {name: Module(name, ast.parse(source)) for name, source in sources.items()}
    found = list(check(modules))
    if message:
        assert len(found) == 1 and message in found[0], found
    else:
        assert found == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_check_is_proved_both_ways(check: Check) -> None:
    cases = [message for proved, _, message in BROKEN if proved is check]
    assert any(cases) and not all(cases)


def _loaded_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after ``statement``."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import apo_megatron",
        "from apo_megatron.evaluation import pass_at_k",
        "import apo_megatron.config",
        "import apo_megatron.evaluation.report",
        "import apo_megatron.doctor",
        "import apo_megatron.diagnosis.check_command",  # it must tell why torch cannot be loaded
        "import checkpoints_convert.command",
    ],
)
def test_import_is_light(statement: str) -> None:
    heavy = {"torch", "torch.distributed", "megatron", "transformers", "ray", "sglang", "datasets"}
    assert _loaded_after(statement) & heavy == set()


@pytest.mark.parametrize("command", ["plan", "selftest"])
def test_the_doctor_is_quick_to_start(command: str) -> None:
    heavy = {"megatron", "transformers", "ray", "sglang", "datasets"}
    assert _loaded_after(f"import apo_megatron.diagnosis.{command}_command") & heavy == set()


def test_pure_modules_load_nothing_above_them(program: dict[str, Module]) -> None:
    """What a package's __init__ imports loads with each of its modules: only a real import shows it."""
    pure = [name for name in program if layer_of(name) == "pure"]
    loaded = _loaded_after(f"import {', '.join(pure)}")
    packages = {".".join(name.split(".")[:length]) for name in pure for length in (1, 2)}
    ours = {name for name in loaded if rules.is_below(name, "apo_megatron")}
    assert {name for name in ours - packages if layer_of(name) not in ("pure", "contracts")} == set()
    assert loaded & {"megatron", "ray", "sglang"} == set()
