"""The harness on engines with known answers, on one and two ranks, and the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from apo_megatron.config import EvaluationConfig, RolloutConfig
from apo_megatron.config.evaluation import MeasurementConfig
from apo_megatron.errors import DataError, RolloutError
from apo_megatron.evaluation import pass_at_k
from apo_megatron.evaluation.harness import evaluate_pass_at_k
from apo_megatron.evaluation.result import PassAtKResult
from apo_megatron.evaluation.sample_store import read_samples
from apo_megatron.parallel.world import CPUWorld
from apo_megatron.rollout.engine import Progress, SampleRequest, SamplingParams
from apo_megatron.types import Completion, Prompt
from apo_megatron.weights.conversion.hf_to_megatron import hf_to_megatron
from tests.distributed import run_distributed
from tests.test_rollout import make_engine
from tests.tiny_models import make_tiny_model

EVALUATION = EvaluationConfig(num_samples=8, ks=(1, 2, 8), bootstrap_samples=200, seed=5)
ROLLOUT = RolloutConfig(max_new_tokens=4, max_batch_size=16)


def make_prompts(num_prompts: int) -> list[Prompt]:
    return [
        Prompt(f"p{i}", "", np.arange(10 + i, 14 + 2 * i, dtype=np.int32), {"i": i})
        for i in range(num_prompts)
    ]


class ScriptedEngine:
    """Sample s of problem i says ``i + s``; every third is cut off."""

    policy_version = 7

    def __init__(self) -> None:
        self.calls: list[tuple[int, SamplingParams]] = []
        self.num_looks = 0  # before the first generation is done
        self.failure: str | None = None
        self.sources: list[Any] = []  # that were offered to engines which came back

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.calls.append((len(prompts), sampling))
        return [[self._completion(p, s) for s in range(sampling.num_samples)] for p in prompts]

    def start(
        self, requests: Sequence[SampleRequest], sampling: SamplingParams, progress: Progress | None = None
    ) -> ScriptedGeneration:
        answers = self.generate([request.prompt for request in requests], sampling)
        return ScriptedGeneration(self, answers)

    def _completion(self, prompt: Prompt, sample: int) -> Completion:
        token_ids = np.zeros(1 + sample % 2, dtype=np.int32)
        return Completion(
            token_ids,
            np.zeros(len(token_ids), np.float32),
            f" {prompt.fields['i'] + sample} ",
            "length" if sample % 3 == 0 else "stop",
            ((self.policy_version, len(token_ids)),),
        )

    def update_weights(self, source: Any, version: int, probe: Any = None) -> dict[str, float]:
        return {}

    def recover(self, source: Any) -> bool:
        self.sources.append(source)
        return source is not None

    def sleep(self) -> None: ...

    def close(self) -> None: ...


class ScriptedGeneration:
    """Done after ``num_looks`` of the engine, unless that fails."""

    def __init__(self, engine: ScriptedEngine, answers: list[list[Completion]]) -> None:
        self._engine, self._answers = engine, answers
        self._is_stopped = False

    def wait(self, seconds: float) -> bool:
        if self._engine.failure is not None:
            raise RolloutError(self._engine.failure)
        self._engine.num_looks -= 1
        return self._is_stopped or self._engine.num_looks < 0

    def num_finished(self) -> int:
        return len(self._answers)

    def stop(self) -> None:
        self._is_stopped = True

    def results(self) -> list[list[Completion]]:
        return self._answers


class DigitReward:
    """Right: "3" and "4". Not judged: "5"."""

    required_fields: Mapping[str, type] = MappingProxyType({})

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        verdicts = {"3": 1.0, "4": 1.0, "5": math.nan}
        return [verdicts.get(completion.text.strip(), 0.0) for completion in completions]


class FirstTokenReward:
    """Right when the first token is in the lower half of the vocabulary."""

    required_fields: Mapping[str, type] = MappingProxyType({})

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        return [float(completion.token_ids[0] < 53) for completion in completions]


def test_counts_and_curves_are_those_of_the_script() -> None:
    engine = ScriptedEngine()
    steps: list[tuple[int, int]] = []
    result = evaluate_pass_at_k(
        engine,
        make_prompts(5),
        DigitReward(),
        EVALUATION,
        ROLLOUT,
        None,
        progress=lambda n, tokens: steps.append((n, tokens)),
    )
    # Problem i samples i .. i + 7: "3" is among them for i <= 3, "4" for i <= 4, "5" always.
    assert result.num_correct == (2, 2, 2, 2, 1)
    expected = {k: np.mean(pass_at_k(8, np.array([2, 2, 2, 2, 1]), k)) for k in (1, 2, 8)}
    assert result.pass_at_k == pytest.approx(expected)
    assert result.pass_at_k[8] == 1.0 and result.ci95[8] == (1.0, 1.0)
    assert all(low <= result.pass_at_k[k] <= high for k, (low, high) in result.ci95.items())
    assert result.ci95[1][0] < result.ci95[1][1]
    assert result.verifier_failures == 5
    assert result.distinct_correct == pytest.approx(9 / 5)
    assert result.mean_response_length == 1.5
    assert result.truncation_rate == 3 / 8
    assert (result.num_samples, result.policy_version) == (8, 7)
    assert result.prompt_ids == ("p0", "p1", "p2", "p3", "p4")
    assert [size for size, _ in engine.calls] == [2, 2, 1]  # 16 sequences at a time
    assert steps == [(2, 24), (2, 24), (1, 12)]


def test_sampling_is_that_of_the_evaluation_section() -> None:
    engine = ScriptedEngine()
    cfg = EvaluationConfig(
        num_samples=8, ks=(1, 8), temperature=0.6, top_p=0.95, seed=11, bootstrap_samples=10
    )
    rollout = RolloutConfig(
        temperature=1.0, top_k=5, group_size=2, max_new_tokens=33, stop_token_ids=(4,), max_batch_size=1
    )
    result = evaluate_pass_at_k(engine, make_prompts(1), DigitReward(), cfg, rollout, None, num_samples=3)
    assert engine.calls == [(1, SamplingParams(3, 0.6, 0.95, 0, 33, (4,), 11))]
    assert list(result.pass_at_k) == list(result.ci95) == [1]  # 8 does not fit into 3 samples


def test_a_result_survives_json() -> None:
    result = evaluate_pass_at_k(ScriptedEngine(), make_prompts(3), DigitReward(), EVALUATION, ROLLOUT, None)
    values = json.loads(json.dumps(result.to_json()))
    assert values["pass_at_k"]["8"] == 1.0 and values["ci95"]["8"] == [1.0, 1.0]
    assert PassAtKResult.from_json({**values, "config": {}}) == result


def test_no_problems_is_an_error() -> None:
    with pytest.raises(DataError, match="evaluation.data_path"):
        evaluate_pass_at_k(ScriptedEngine(), [], DigitReward(), EVALUATION, ROLLOUT, None)


def test_samples_of_other_weights_are_not_counted() -> None:
    engine = ScriptedEngine()
    engine.generate = lambda prompts, sampling: [  # type: ignore[method-assign,assignment,misc]
        [replace(engine._completion(prompts[0], 0), versions=((6, 1),))] * 8
    ]
    with pytest.raises(RolloutError, match=r"'p0'.*versions \[6\], expected 7"):
        evaluate_pass_at_k(engine, make_prompts(1), DigitReward(), EVALUATION, ROLLOUT, None)


def write_problems(folder: Path, num_problems: int = 5) -> Path:
    path = folder / "problems.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"w{i + 2} w9 w4", "answer": f"w{i}"} for i in range(num_problems)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(
    tmp_path: Path, model: Path, reward: str = "tests.word_reward:score", num_problems: int = 5
) -> Path:
    """The command's configuration: the tiny model on problems of its own."""
    problems = write_problems(tmp_path, num_problems)
    benchmark = {"name": "words", "path": str(problems), "reward": reward}
    config = {
        "model": {"hf_path": str(model), "dtype": "float32"},
        "benchmarks": [benchmark],
        "evaluation": EVALUATION.model_dump(mode="json", include=set(MeasurementConfig.model_fields)),
        "rollout": ROLLOUT.model_dump(mode="json"),
    }
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_evaluation_does_not_depend_on_ranks_and_the_command_writes_json(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    config = write_config(tmp_path, folder)
    outputs = [tmp_path / "two", tmp_path / "one"]
    payload = {
        "folder": str(folder),
        "evaluation": EVALUATION.model_dump(mode="json"),
        "rollout": ROLLOUT.model_dump(mode="json"),
        "argv": ["--config", str(config), f"output_dir={outputs[0]}", "label=tiny"],
    }
    first, second = run_distributed(2, "tests.workers.evaluation:evaluate_on_ranks", payload)

    engine = make_engine(folder, torch.float64)
    alone = evaluate_pass_at_k(engine, make_prompts(5), FirstTokenReward(), EVALUATION, ROLLOUT, None)
    assert first["result"] == second["result"] == alone.to_json()
    assert 0 < sum(alone.num_correct) < 40
    assert first["problems_shown"] == 5
    assert first["single"] == second["single"] and first["single"]["prompt_ids"] == ["p0"]
    for rank in (first, second):
        assert rank["waited"] == {"counts": [2, 2, 2, 2, 1], "offered": True}
        assert "version 7" in rank["lost"]
        assert rank["failed"] == "rank 1: the server is gone"

    argv = ["--config", str(config), f"output_dir={outputs[1]}", "label=tiny"]
    run_distributed(1, "tests.workers.evaluation:run_command_line", {"argv": argv})
    files = ["config.yaml", "generations", "problems", "report.html", "results.json"]
    assert sorted(path.name for path in outputs[0].glob("[!.]*")) == files
    for name in ("results.json", "report.html", "problems/words.jsonl"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
    results = json.loads((outputs[0] / "results.json").read_text())
    result = PassAtKResult.from_json(results["benchmarks"]["words"])
    assert results["label"] == "tiny" and result.prompt_ids == ("q0", "q1", "q2", "q3", "q4")
    assert 0 < sum(result.num_correct) < 40
    samples = list(read_samples(outputs[0] / "generations" / "words"))
    assert len(samples) == 40 and sum(s.reward == 1 for s in samples) == sum(result.num_correct)
    assert yaml.safe_load((outputs[0] / "config.yaml").read_text())["evaluation"]["num_samples"] == 8


def test_more_samples_leave_those_alone_that_are_there_and_fewer_take_the_first(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_tiny_model(tmp_path / "model"))
    samples, results = [], []
    for num_samples in (8, 20, 8):
        argv = ["--config", str(config), f"evaluation.num_samples={num_samples}"]
        argv.append(f"output_dir={tmp_path / 'out'}")
        run_distributed(1, "tests.workers.evaluation:run_command_line", {"argv": argv})
        file = tmp_path / "out" / "generations" / "words" / "rank_00000.jsonl"
        samples.append(file.read_text())
        results.append((tmp_path / "out" / "results.json").read_text())
    assert samples[1].startswith(samples[0]) and samples[1] == samples[2]
    assert len(samples[1].splitlines()) == 5 * 20
    assert results[0] == results[2] != results[1]

    other = ["--config", str(config), f"output_dir={tmp_path / 'out'}", "evaluation.temperature=0.5"]
    with pytest.raises(AssertionError, match=r"evaluation.temperature: 1.0 there, 0.5 now"):
        run_distributed(1, "tests.workers.evaluation:run_command_line", {"argv": other})
    path = tmp_path / "problems.jsonl"
    other = [*other[:3], f"benchmarks=[{{name: more, path: {path}, reward: exact_match}}]"]
    with pytest.raises(AssertionError, match=r"has results on words, which benchmarks does not name"):
        run_distributed(1, "tests.workers.evaluation:run_command_line", {"argv": other})


def test_megatron_checkpoints_are_evaluated_as_they_are(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_tiny_model(tmp_path / "base", "qwen3"))
    trained = make_tiny_model(tmp_path / "trained", "qwen3", seed=1)
    hf_to_megatron(trained, tmp_path / "megatron", CPUWorld())
    for name, weights in (
        ("hf", f"hf_path={trained}"),
        ("megatron", f"megatron_path={tmp_path / 'megatron'}"),
    ):
        argv = [
            "--config",
            str(config),
            "label=tiny",
            f"model.{weights}",
            f"output_dir={tmp_path / name}-out",
        ]
        run_distributed(1, "tests.workers.evaluation:run_command_line", {"argv": argv})
    files = [tmp_path / f"{name}-out" / "results.json" for name in ("hf", "megatron")]
    assert files[0].read_bytes() == files[1].read_bytes()
    samples = [set(read_samples(file.parent / "generations" / "words")) for file in files]
    assert samples[0] == samples[1]


def test_generations_of_an_evaluation_are_judged_without_a_model(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path / "no model", reward="exact_match")
    rows = [{"problem": f"q{i}", "text": [f"w{i}", "w0", "w1 w0"] * 3} for i in range(5)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--config", str(config), "model=null", f"generations.path={tmp_path / 'others.jsonl'}"]
    argv += [f"output_dir={tmp_path / 'out'}", "evaluation.num_samples=9"]
    run_distributed(1, "tests.workers.evaluation:run_command_line", {"argv": argv})
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    result = PassAtKResult.from_json(results["benchmarks"]["words"])
    assert result.num_correct == (6, 3, 3, 3, 3)
    assert result.mean_response_length is None
    assert result.majority_at_k[1] == pytest.approx(18 / 45)


def test_the_command_reports_errors_in_one_message(tmp_path: Path) -> None:
    config = write_config(tmp_path, make_tiny_model(tmp_path / "model"))
    (tmp_path / "problems.jsonl").write_text('{"prompt": "w2"}\n')
    words = [f"benchmarks=[{{name: words, path: {tmp_path / 'problems.jsonl'}, reward: exact_match}}]"]
    command = [sys.executable, "-m", "apo_megatron.evaluate", "--config", str(config), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2
    assert "problems.jsonl:1" in done.stderr and "Traceback" not in done.stderr
