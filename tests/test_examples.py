"""examples/math: every script starts what it says, every configuration plans and fits, the table is current.

With APO_MEGATRON_UPDATE_DOCS=1 the table of examples/README.md and the heads of the scripts are rewritten.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from apo_megatron.config import EvalConfig, RLConfig, load_config
from apo_megatron.config.data import PrepareConfig
from apo_megatron.errors import RolloutError
from apo_megatron.evaluation.benchmarks import BENCHMARKS
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.planning.advice import warnings_of
from apo_megatron.planning.plan import Plan, Setting, make_plan
from apo_megatron.planning.report import layout_of
from apo_megatron.rollout.server import keep_running
from examples.countdown.prepare import write_initial_model
from tests.test_planning import published_model

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "math"
PAGE = ROOT / "examples" / "README.md"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
RUNS = [path for path in SCRIPTS if path.name.startswith("run_")]
UPDATES = os.environ.get("APO_MEGATRON_UPDATE_DOCS") == "1"
GIB = 2**30
GPU_GIB = 80
# The published shapes (tests/test_planning.py) of the models; those of Math are Qwen2.5-7B's.
SHAPES = {
    "Qwen/Qwen2.5-7B": "Qwen2.5-7B",
    "Qwen/Qwen2.5-Math-7B": "Qwen2.5-7B",
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3.1-8B",
    "meta-llama/Meta-Llama-3-70B-Instruct": "Llama-3-70B",
    "Qwen/Qwen3-30B-A3B": "Qwen3-30B-A3B",
}
# Longest context; that of the others is 32,768 or more.
CONTEXT = {"Qwen/Qwen2.5-Math-7B": 4096, "meta-llama/Meta-Llama-3-70B-Instruct": 8192}
HEADER = (
    "| Configuration | Layout | GPUs | tokens: sequence | micro-batch | weights | gradients | optimizer | "
    "activations and vocabulary | peak | pinned host memory |"
)
STUB = """#!/usr/bin/env bash
for word in "$0" "$@"; do printf '%s\\0' "$word"; done
"""


@pytest.fixture(scope="module", autouse=True)
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with programs that print how they were called."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("torchrun", "python"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    return folder


def call(stubs: Path, script: Path, *words: str, **variables: str) -> list[str]:
    """What the script starts: program and words. It is run from another folder than its own."""
    result = subprocess.run(
        ["bash", str(script), *words],
        cwd=stubs,
        env={"PATH": f"{stubs}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    program, *arguments = result.stdout.removesuffix("\0").split("\0")
    return [Path(program).name, *arguments]


@dataclass(frozen=True)
class Started:
    cfg: RLConfig
    config_file: str
    num_gpus: int
    words: list[str]


def started(stubs: Path, script: Path, *words: str, **variables: str) -> Started:
    """The training run that a script starts."""
    found = call(stubs, script, *words, NODE_RANK="0", MASTER_ADDR="first", **variables)
    assert found[0] == "torchrun"
    options = dict(zip(found[1:-1], found[2:], strict=True))
    assert options["-m"] == "apo_megatron.train"
    after = found[found.index("--config") + 1 :]
    return Started(
        cfg=load_config(RLConfig, ROOT / after[0], after[1:]),
        config_file=after[0],
        num_gpus=int(options["--nnodes"]) * int(options["--nproc-per-node"]),
        words=found,
    )


def plan_of(run: Started, folder: Path) -> Plan:
    shapes = published_model(folder, SHAPES[run.cfg.model.hf_path])
    return make_plan(run.cfg, Setting(read_architecture(str(shapes)), run.num_gpus, GPU_GIB * GIB))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_with_a_head(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    named = re.findall(r"\bexamples/[\w./-]+\.(?:sh|yaml|md)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("script", RUNS, ids=lambda path: path.name)
def test_a_run_fits_and_its_head_says_how(script: Path, stubs: Path, tmp_path: Path) -> None:
    run = started(stubs, script)
    plan = plan_of(run, tmp_path)
    assert plan.fits and warnings_of(plan) == []
    length = run.cfg.data.max_prompt_length + run.cfg.rollout.max_new_tokens
    assert length <= CONTEXT.get(run.cfg.model.hf_path, 32768)
    text = script.read_text()
    head = f"# Needs: {run.num_gpus} GPUs of {GPU_GIB} GiB, planned peak {plan.peak / GIB:.1f} GiB a GPU; "
    if UPDATES:
        script.write_text(re.sub(r"# Needs: .*? a GPU; ", head, text))
    else:
        assert head in text, f"{script.name}: APO_MEGATRON_UPDATE_DOCS=1 pytest {__file__}"
    sglang = run.cfg.rollout.sglang
    assert sglang.colocated == (run.num_gpus == 8) == (sglang.servers_file is None)
    assert ("serve.sh" in text) == (sglang.servers_file is not None)


@pytest.mark.parametrize("script", RUNS, ids=lambda path: path.name)
def test_arguments_and_machines_reach_the_trainer(script: Path, stubs: Path) -> None:
    words = ("train.num_steps=77", "objective.apo_topk=4", "evaluation.ks=[1, 3]")
    run = started(stubs, script, *words, NUM_NODES="16", GPUS_PER_NODE="4")
    assert run.cfg.evaluation.ks == (1, 3)
    assert (run.cfg.train.num_steps, run.cfg.objective.apo_topk, run.num_gpus) == (77, 4, 64)
    alone = call(stubs, script, NUM_NODES="1")
    assert alone[alone.index("--master-addr") + 1] == "127.0.0.1"


def test_several_machines_want_a_number_and_an_address(stubs: Path) -> None:
    for variables in ({"NODE_RANK": "1"}, {"MASTER_ADDR": "first"}):
        with pytest.raises(AssertionError, match="number of this machine|address of machine 0"):
            call(stubs, FOLDER / "run_apo_llama_70B.sh", **variables)


def test_the_methods_differ_in_their_objective_only(stubs: Path) -> None:
    names = ("run_apo_7B", "run_grpo_7B", "run_kl_7B", "run_kl_on_wrong_7B")
    runs = {name: started(stubs, FOLDER / f"{name}.sh").cfg for name in names}
    assert len({run.train.run_dir for run in runs.values()}) == len(runs)
    plain = runs["run_apo_7B"]
    for run in runs.values():
        same = {"train": run.train.model_copy(update={"run_dir": ""}), "objective": plain.objective}
        assert run.model_copy(update=same) == plain.model_copy(update={"train": same["train"]})
    objectives = [run.objective for run in runs.values()]
    assert [(o.loss_mode, o.use_kl_loss, o.use_kl_loss_on_wrong) for o in objectives] == [
        ("apo_ratio", False, False),
        ("vanilla", False, False),
        ("vanilla", True, False),
        ("vanilla", False, True),
    ]


def test_the_settings_of_the_paper(stubs: Path) -> None:
    """Push 1.05, pull 0.1, K 8, without the sampled token, in every run."""
    for script in RUNS:
        o = started(stubs, script).cfg.objective
        assert (o.apo_push_coeff, o.apo_pull_coeff, o.apo_topk, o.apo_exclude_sampled) == (1.05, 0.1, 8, True)


COUNTDOWN = (
    "countdown/apo",
    "countdown/grpo",
    "countdown/grpo_kl",
    "countdown/kl_on_wrong",
    "cluster/countdown",
)


@pytest.mark.parametrize("name", COUNTDOWN)
def test_countdown_fits_on_two_cores(name: str, tmp_path: Path) -> None:
    write_initial_model(tmp_path, seed=0)
    cfg = load_config(RLConfig, ROOT / "examples" / f"{name}.yaml", [f"model.hf_path={tmp_path}"])
    plan = make_plan(cfg, Setting(read_architecture(str(tmp_path)), 2, GIB, on_cpu=True))
    assert plan.fits


@pytest.mark.parametrize(("name", "num_samples"), [("eval_model", 8), ("eval_pass_at_k", 256)])
def test_evaluation_scripts(name: str, num_samples: int, stubs: Path) -> None:
    words = call(stubs, FOLDER / f"{name}.sh", "owner/model", "evaluation.seed=3")
    assert words[:4] == ["python", "-m", "apo_megatron.evaluate", "--config"]
    cfg = load_config(EvalConfig, ROOT / words[4], words[5:])
    assert cfg.model is not None and cfg.model.hf_path == "owner/model"
    assert "/" not in cfg.output_dir.removeprefix("runs/").partition("/")[2]
    assert cfg.evaluation.num_samples == max(cfg.evaluation.ks) == num_samples
    assert cfg.evaluation.seed == 3
    assert {benchmark.name for benchmark in cfg.benchmarks} <= set(BENCHMARKS)
    with pytest.raises(AssertionError, match="which model"):
        call(stubs, FOLDER / f"{name}.sh")


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "llama3_70b"])
def test_servers_of_a_machine_of_their_own(name: str, stubs: Path) -> None:
    words = call(stubs, FOLDER / "serve.sh", str(FOLDER / f"{name}.yaml"), HOST="10.0.0.9")
    assert words[:4] == ["python", "-m", "apo_megatron.rollout.server", "--config"]
    sglang = load_config(RLConfig, words[4], words[5:]).rollout.sglang
    assert (sglang.host, sglang.num_servers * sglang.tensor_parallel_size) == ("10.0.0.9", 8)


def test_servers_may_start_before_the_run_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they end at once, and take their addresses back."""
    monkeypatch.chdir(tmp_path)
    false = shutil.which("false")
    overrides = [f"rollout.sglang.python={false}", "rollout.sglang.num_servers=1"]
    cfg = load_config(
        RLConfig, FOLDER / "llama3_70b.yaml", [*overrides, "rollout.sglang.tensor_parallel_size=1"]
    )
    with pytest.raises(RolloutError, match="server-0"):
        keep_running(cfg)
    assert json.loads((tmp_path / "runs/llama3_70b_apo/servers.json").read_text()) == []


def test_the_table_of_plans_is_up_to_date(stubs: Path, tmp_path: Path) -> None:
    runs: dict[str, Started] = {}
    for script in RUNS:
        run = started(stubs, script)
        runs.setdefault(Path(run.config_file).name, run)
    shipped = {path.name for path in FOLDER.glob("*.yaml")}
    assert set(runs) == shipped - {"base.yaml", "prepare.yaml", "evaluate.yaml"}
    rows = [table_row(name, plan_of(run, tmp_path)) for name, run in sorted(runs.items())]
    table = "\n".join([HEADER, "|---|---|" + "---:|" * 9, *rows]) + "\n"
    before, begin, rest = PAGE.read_text().partition("<!-- plans -->\n")
    shown, end, after = rest.partition("<!-- end of plans -->\n")
    assert begin and end
    if UPDATES:
        PAGE.write_text(before + begin + table + end + after)
    else:
        assert shown == table, f"APO_MEGATRON_UPDATE_DOCS=1 pytest {__file__}"


def table_row(name: str, plan: Plan) -> str:
    """GiB of one rank of the stage that needs most, in the columns of ``HEADER``."""
    stage = plan.worst
    sizes = (
        stage.weights,
        stage.gradients,
        stage.optimizer_on_device,
        stage.moment.total,
        plan.peak,
        plan.rollout.reference + plan.rollout.moved_out,
    )
    cells = (
        f"[{name}](math/{name})",
        f"{layout_of(plan)}, recompute {plan.cfg.model.recompute}",
        str(plan.dims.world),
        f"{plan.workload.sequence_length:,}",
        f"{plan.workload.tokens_per_micro_batch:,}",
        *(f"{size / GIB:.1f}" for size in sizes),
    )
    return f"| {' | '.join(cells)} |"


def is_variable(word: str) -> bool:
    return re.match(r"[A-Z_]+=", word) is not None


def test_commands_of_the_page_are_accepted(stubs: Path) -> None:
    lines = re.findall(r"^    (.+)$", PAGE.read_text().replace("\\\n", " "), re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) >= 8
    for words in commands:
        variables = dict(word.split("=", 1) for word in takewhile(is_variable, words))
        words = words[len(variables) :]
        if words[0].endswith(".sh"):
            arguments = [str(ROOT / word) if word.startswith("examples/") else word for word in words[1:]]
            words = call(stubs, ROOT / words[0], *arguments, HOST="10.0.0.9", **variables)
        config, *rest = words[words.index("--config") + 1 :]
        kinds = {"tools.prepare_data": PrepareConfig, "apo_megatron.evaluate": EvalConfig}
        kind: Any = next((kinds[word] for word in words if word in kinds), RLConfig)
        load_config(kind, ROOT / config, [word for word in rest if "=" in word])


def test_every_script_and_configuration_is_in_the_page() -> None:
    text = PAGE.read_text()
    names = [path.name for path in FOLDER.iterdir()]
    assert [name for name in names if f"](math/{name})" not in text] == []
