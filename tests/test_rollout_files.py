"""The files of a run's samples: every token has its own mark on every layout; what is kept and refused."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apo_megatron.config import ObjectiveConfig, TrainConfig
from apo_megatron.errors import DataError
from apo_megatron.objectives import build_objective
from apo_megatron.rollout.gathering import SampleColumns
from apo_megatron.rollout.sample_records import SampleRecord, read_step, step_path, step_paths, write_step
from apo_megatron.rollout.sampler import StepSamples
from apo_megatron.rollout.step_files import StepFiles
from apo_megatron.types import Completion, Prompt, Sample, SampleGroup
from tests.distributed import run_distributed
from tests.objective_cases import config, inputs_of, make_case, token_weights
from tests.tiny_models import make_tiny_model

VOCAB_SIZE, TOPK = 107, 4
PUSH, PULL, CLIP_LOW = 1.05, 0.1, 0.2
OBJECTIVE = {"apo_topk": TOPK, "old_log_probs": "rollout", "apo_push_coeff": PUSH, "apo_pull_coeff": PULL}
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"alone": {}},
    2: {"tp2": {"tensor_parallel_size": 2}, "pp2": {"pipeline_parallel_size": 2}, "dp2": {}},
}


# --- the mark is what the gradient says ---


@pytest.mark.parametrize("setting", ["plain", "inclusive", "narrow_clip", "dual_clip", "k1_of_topk", "kl"])
@pytest.mark.parametrize("correction", ["none", "icepop"])
def test_marked_are_the_tokens_with_a_gradient_of_the_anchor_mass(setting: str, correction: str) -> None:
    outcomes = set()
    for seed in range(4):
        cfg = config("apo_ratio", setting).model_copy(
            update={"mismatch_correction": correction, "icepop_low": 0.8, "icepop_high": 1.2}
        )
        case = make_case(0.8, seed)
        inputs = inputs_of(case, cfg)
        inputs.rollout_log_probs[::3] += 0.5  # type: ignore[index]
        assert inputs.anchor_log_mass is not None
        loss, metrics = build_objective(cfg)(inputs, token_weights(case, cfg))
        (gradient,) = torch.autograd.grad(loss, inputs.anchor_log_mass)
        expected = gradient.nan_to_num() != 0  # NaN: where S is empty, log P = -inf
        assert torch.equal(metrics["pull_fraction"].values, expected)
        outcomes |= set(expected[case.advantages < 0].tolist())
    assert outcomes == {True, False}


def test_nothing_is_marked_without_a_pull() -> None:
    case = make_case()
    cfg = ObjectiveConfig(apo_topk=3, apo_push_coeff=1.0, apo_pull_coeff=0.0)
    _, metrics = build_objective(cfg)(inputs_of(case, cfg), token_weights(case, cfg))
    assert not metrics["pull_fraction"].values.any()
    cfg = ObjectiveConfig(loss_mode="vanilla", apo_topk=3)
    assert "pull_fraction" not in build_objective(cfg)(inputs_of(case, cfg), token_weights(case, cfg))[1]


# --- every sample gets its own ---


def _log_probs(path: Path, token_ids: list[int], start: int) -> torch.Tensor:
    """log pi over the vocabulary for each response token, [R, V]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(token_ids)[None]).logits[0][start - 1 : -1].log_softmax(-1)


def _sample(rng: np.random.Generator, paths: tuple[Path, Path], prompt: list[int], i: int) -> dict[str, Any]:
    response = rng.integers(0, VOCAB_SIZE, rng.integers(1, 12)).tolist()
    policy, reference = (_log_probs(path, prompt + response, len(prompt)) for path in paths)
    targets = torch.tensor(response)[:, None]
    gap = torch.from_numpy(rng.normal(0, 0.25, len(response)).astype(np.float32))
    top = reference.topk(TOPK).indices
    keep = top != targets
    anchor = (policy.gather(1, top).exp() * keep).sum(1) / (reference.gather(1, top).exp() * keep).sum(1)
    rectified = PUSH * gap.neg().exp() - PULL * anchor
    assert ((rectified - (1 - CLIP_LOW)).abs() > 1e-4).all(), "too close to call: take another seed"
    is_wrong = i % 3 != 1
    return {
        "token_ids": response,
        "log_probs": (policy.gather(1, targets)[:, 0] + gap).tolist(),
        "reward": float(not is_wrong),
        "advantage": -0.5 if is_wrong else 1.0,
        "pulled": [is_wrong and bool(r >= 1 - CLIP_LOW) for r in rectified],
    }


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("marks")
    torch.manual_seed(0)
    paths = (
        make_tiny_model(folder / "policy", "qwen2"),
        make_tiny_model(folder / "reference", "qwen2", seed=1),
    )
    rng = np.random.default_rng(3)
    groups = []
    for number in range(5):
        prompt = rng.integers(0, VOCAB_SIZE, rng.integers(2, 7)).tolist()
        samples = [_sample(rng, paths, prompt, i) for i in range(4)]
        groups.append({"id": f"problem-{number}", "token_ids": prompt, "samples": samples})
    for sample in groups[1]["samples"]:  # all wrong
        sample |= {"reward": 0.0, "advantage": 0.0, "not_trained": "equal_rewards"}
    groups[2]["samples"][0] |= {"reward": math.nan, "advantage": None, "not_trained": "unjudged"}
    groups[3]["samples"][2] |= {"advantage": None, "not_trained": "truncated"}
    return {
        "folder": str(folder),
        "model": str(paths[0]),
        "reference": str(paths[1]),
        "objective": OBJECTIVE,
        "groups": groups,
    }


@pytest.mark.parametrize("world", sorted(LAYOUTS))
def test_marks_equal_plain_torch_on_every_layout(world: int, payload: dict[str, Any]) -> None:
    expected = [(group["id"], i, s) for group in payload["groups"] for i, s in enumerate(group["samples"])]
    trained = [s for _, _, s in expected if "not_trained" not in s]
    shares = {sum(s["pulled"]) / len(s["pulled"]) for s in trained}
    assert len(shares) > 4  # tokens of one sample would not pass for those of another
    run_distributed(world, "tests.workers.rollout_files:write_files", {**payload, "layouts": LAYOUTS[world]})
    for name in LAYOUTS[world]:
        found = list(read_step(step_path(Path(payload["folder"], name, "rollouts"), 1)))
        assert [(r.problem, r.sample) for r in found] == [(problem, i) for problem, i, _ in expected]
        for record, (_, _, sample) in zip(found, expected, strict=True):
            assert record.token_ids == sample["token_ids"]
            assert record.log_probs == pytest.approx(sample["log_probs"], abs=1e-4)
            assert record.not_trained == sample.get("not_trained")
            if record.not_trained is None:
                digits = "".join(str(int(bit)) for bit in sample["pulled"])
                assert (record.pulled, record.advantage) == (digits, sample["advantage"]), name
            else:
                assert record.pulled is None and record.advantage is None


@pytest.mark.parametrize(
    ("name", "changes", "marks"),
    [
        ("vanilla", {"objective": {"loss_mode": "vanilla"}}, None),
        ("skipped", {"advantage_factor": math.inf}, set("0")),
    ],
)
def test_no_marks_without_a_pull_and_where_updates_are_skipped(
    name: str, changes: dict[str, Any], marks: set[str] | None, payload: dict[str, Any]
) -> None:
    settings = {**payload, **changes, "layouts": {name: {}}}
    run_distributed(1, "tests.workers.rollout_files:write_files", settings)
    found = read_step(step_path(Path(payload["folder"], name, "rollouts"), 1))
    assert {r.pulled and "".join(set(r.pulled)) for r in found if r.not_trained is None} == {
        None if marks is None else "".join(marks)
    }


# --- the files ---


def _completion(rng: np.random.Generator, length: int = 5) -> Completion:
    tokens = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
    versions = ((3, 2), (4, length - 2))
    return Completion(tokens, rng.normal(-1, 1, length).astype(np.float32), "a \x1b[2J b", "stop", versions)


def _step(rewards: tuple[tuple[float, ...], ...]) -> StepSamples:
    rng = np.random.default_rng(0)
    groups = []
    for number, of_group in enumerate(rewards):
        samples = [Sample(_completion(rng), reward, reward - 0.5) for reward in of_group]
        if len(set(of_group)) == 1:
            samples = [Sample(s.completion, s.reward, 0.0) for s in samples]
        groups.append(SampleGroup(Prompt(f"p{number}", "1 + 1", np.arange(3, dtype=np.int32)), samples))
    dropped = (Prompt("p9", "2 + 2", np.arange(3, dtype=np.int32)), SampleColumns.of(groups[0].samples))
    return StepSamples(groups, {}, None, [dropped])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    samples = _step(((0.0, 1.0), (1.0, 1.0)))
    marks = {0: np.array([True, False, True, True, False])}
    write_step(tmp_path, 7, samples, marks, keep=0)
    found = list(read_step(step_path(tmp_path, 7)))
    assert [(r.problem, r.sample, r.not_trained) for r in found] == [
        ("p0", 0, None), ("p0", 1, None), ("p1", 0, "equal_rewards"), ("p1", 1, "equal_rewards"),
        ("p9", 0, "dropped"), ("p9", 1, "dropped"),
    ]  # fmt: skip
    completion = samples.groups[0].samples[0].completion
    assert found[0] == SampleRecord(
        step=7,
        problem="p0",
        sample=0,
        prompt="1 + 1",
        text=completion.text,
        reward=0.0,
        advantage=-0.5,
        not_trained=None,
        finish_reason="stop",
        num_tokens=5,
        versions=[(3, 2), (4, 3)],
        token_ids=completion.token_ids.tolist(),
        log_probs=[round(float(value), 4) for value in completion.log_probs],
        pulled="10110",
    )
    assert found[1].pulled is None and found[4].token_ids is None and found[4].versions == [(3, 2), (4, 3)]
    before = step_path(tmp_path, 7).read_bytes()
    write_step(tmp_path, 7, samples, marks, keep=0)
    assert step_path(tmp_path, 7).read_bytes() == before  # equal samples, equal bytes


def _files(
    run_dir: Path, after_step: int = 0, note: Callable[[str], None] = print, **settings: int
) -> StepFiles:
    class OneRank:
        is_main, world, rank, tensor_rank = True, 1, 0, 0

    cfg = TrainConfig(run_dir=str(run_dir), num_steps=20, **settings)
    return StepFiles(cfg, OneRank(), after_step, note)  # type: ignore[arg-type]


def test_interval_bound_and_what_a_resumed_run_removes(tmp_path: Path) -> None:
    samples = _step(((0.0, 1.0),))
    files = _files(tmp_path, save_rollouts=2, keep_rollouts=3)
    for step in range(1, 13):
        files.save(step, samples, None)
    files.finish()
    folder = tmp_path / "rollouts"
    assert list(step_paths(folder)) == [8, 10, 12]
    assert not list(folder.glob(".*"))
    _files(tmp_path, after_step=10)
    assert list(step_paths(folder)) == [8, 10]
    files = _files(tmp_path, save_rollouts=0)
    files.save(11, samples, None)
    assert list(step_paths(folder)) == []  # a run that starts anew


def test_a_file_that_cannot_be_written_is_noted_and_costs_no_run(tmp_path: Path) -> None:
    notes: list[str] = []
    files = _files(tmp_path, note=notes.append)
    (tmp_path / "rollouts").write_text("in the way")
    files.save(1, _step(((0.0, 1.0),)), None)
    files.finish()
    files.finish()  # said once
    assert len(notes) == 1 and "rollouts (File exists): training goes on" in notes[0]
    (tmp_path / "rollouts").unlink()
    files.save(2, _step(((0.0, 1.0),)), None)
    files.finish()
    assert list(step_paths(tmp_path / "rollouts")) == [2] and len(notes) == 1
    files.close()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"reward":1.0', b'"reward":"1"', r"jsonl.gz:2: reward: Input should be a valid number"),
        (b'"pulled":null}', b'"pulled":"01"}', r"jsonl.gz:1: .*pulled has 2 entries, num_tokens is 5"),
        (b'"pulled":null}', b'"pulled":"01x11"}', r"jsonl.gz:1: .*other characters than 0 and 1"),
        (b'"problem":"p1",', b"", r"jsonl.gz:3: problem: Field required; expected a line as in"),
        (b"\n", b"", r"jsonl.gz:1: malformed JSON"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    write_step(tmp_path, 1, _step(((0.0, 1.0), (1.0, 1.0))), {}, keep=0)
    path = step_path(tmp_path, 1)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(old, new)))
    with pytest.raises(DataError, match=message):
        list(read_step(path))


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    write_step(tmp_path, 1, _step(((0.0, 1.0),)), {}, keep=0)
    path = step_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"step_000001.jsonl.gz: damaged after line \d"):
        list(read_step(path))
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"damaged after line 0 \(Not a gzipped file"):
        list(read_step(path))
