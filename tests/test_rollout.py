"""Sampling and the embedded engine: against plain forward passes, and against itself in other batches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from apo_megatron.config import ModelConfig, RolloutConfig
from apo_megatron.errors import CheckpointError, ConfigError, RolloutError
from apo_megatron.rollout.build import build_embedded_engine, load_embedded_engine
from apo_megatron.rollout.decoding import plan_chunks
from apo_megatron.rollout.embedded import EmbeddedEngine
from apo_megatron.rollout.engine import SampleRequest, SamplingParams
from apo_megatron.rollout.sampling import (
    filter_probs,
    prompt_seed,
    prompt_uniforms,
    sample_tokens,
    sampling_log_probs,
    sampling_params,
)
from apo_megatron.types import Completion, Prompt
from tests.tiny_models import EOS_TOKEN_ID, FAMILIES, Family, make_tiny_model, write_word_level_tokenizer

CPU = torch.device("cpu")
VOCAB_SIZE = 107
SAMPLING = SamplingParams(
    num_samples=6,
    temperature=1.5,
    top_p=1.0,
    top_k=0,
    max_new_tokens=10,
    stop_token_ids=(5, 6, 7, 8, 9),
    seed=3,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_tiny_model(root / family, family) for family in FAMILIES}


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    experts = "eager" if dtype == torch.float64 else None  # the grouped product of experts has no float64
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts)


def make_engine(folder: Path, dtype: torch.dtype = torch.float32, max_batch_size: int = 64) -> EmbeddedEngine:
    return EmbeddedEngine(
        load_model(folder, dtype),
        AutoTokenizer.from_pretrained(folder),
        eos_token_ids=[EOS_TOKEN_ID],
        max_batch_size=max_batch_size,
        policy_version=0,
    )


def make_prompts(lengths: list[int]) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(f"p{i}", "", rng.integers(2, VOCAB_SIZE, length).astype(np.int32))
        for i, length in enumerate(lengths)
    ]


def all_token_ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids.tolist() for completion in group] for group in groups]


class FileSource:
    """What the engine reads of a WeightSource: buckets of (name, tensor)."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def buckets(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        named = list(self.tensors.items())
        for start in range(0, len(named), 4):
            yield named[start : start + 4]


# --- sampling


def test_samples_follow_the_softmax_at_the_temperature() -> None:
    num_draws, temperature = 50_000, 1.7
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    log_probs = sampling_log_probs(logits, temperature).expand(num_draws, -1)
    uniforms = torch.from_numpy(prompt_uniforms(0, "a", num_draws, 1)[:, 0])
    counts = torch.bincount(sample_tokens(log_probs, uniforms, top_k=0, top_p=1.0), minlength=12).double()
    expected = num_draws * torch.softmax(logits[0].double() / temperature, dim=-1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 99.9 % point at 11 degrees of freedom


def test_tokens_invert_the_cumulative_distribution() -> None:
    log_probs = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999])
    assert sample_tokens(log_probs, uniforms, top_k=0, top_p=1.0).tolist() == [0, 0, 2, 2, 3, 3]


def test_impossible_tokens_are_never_sampled() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 300, generator=generator) * 10
    logits[torch.rand(200, 300, generator=generator) < 0.8] = -torch.inf
    logits[:, 150] = 0.0
    logits[:, -20:] = -torch.inf
    logits[:, :20] = -torch.inf
    log_probs = sampling_log_probs(logits, 1.0)
    for value in (0.0, 2.0**-24, 1 - 2.0**-24, 1.0):  # 1.0: as if rounding had carried a draw to the end
        ids = sample_tokens(log_probs, torch.full((200,), value), top_k=0, top_p=1.0)
        assert torch.isfinite(log_probs.gather(-1, ids.unsqueeze(-1))).all()


def test_top_k_and_top_p_keep_exactly_the_likeliest() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])

    def kept(top_k: int, top_p: float) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in filter_probs(probs, top_k, top_p)]

    assert kept(0, 1.0) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(2, 1.0) == [[1, 3], [0, 1]]  # ties: lower ids
    assert kept(9, 1.0) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(0, 0.65) == [[1, 3], [0, 1, 2]]
    assert kept(0, 0.75) == [[1, 2, 3], [0, 1, 2]]
    assert kept(0, 1e-6) == [[1], [0]]
    assert kept(2, 0.55) == [[1], [0, 1]]  # top_p of what top_k left: 0.4 / 0.7 >= 0.55
    torch.testing.assert_close(filter_probs(probs, 2, 1.0)[0], torch.tensor([0.0, 0.4, 0.0, 0.3]))


def test_filtered_samples_are_renormalised() -> None:
    num_draws = 20_000
    log_probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(num_draws, -1)
    uniforms = torch.from_numpy(prompt_uniforms(0, "b", num_draws, 1)[:, 0])
    shares = torch.bincount(sample_tokens(log_probs, uniforms, top_k=2, top_p=1.0), minlength=4) / num_draws
    torch.testing.assert_close(shares, torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]), atol=0.015, rtol=0)


def test_random_streams_are_stable_and_separate() -> None:
    assert prompt_seed(0, "line-1") == 14206021508562341874  # the same in every process
    assert len({prompt_seed(seed, f"{i}") for seed in range(20) for i in range(20)}) == 400
    assert prompt_seed(1, "2:x") != prompt_seed(12, "x")
    many = prompt_uniforms(4, "p", 50, 7)
    np.testing.assert_array_equal(many[:3], prompt_uniforms(4, "p", 3, 7))
    assert many.min() >= 0 and many.max() < 1


def test_training_samples_as_the_config_says() -> None:
    rollout = RolloutConfig(group_size=4, temperature=0.7, top_p=0.9, top_k=20, stop_token_ids=(3,))
    assert sampling_params(rollout, seed=9) == SamplingParams(
        4, 0.7, 0.9, 20, rollout.max_new_tokens, (3,), 9
    )


# --- generation


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_a_plain_forward_pass(folders: dict[str, Path], family: str) -> None:
    prompts = make_prompts([3, 11, 7, 1])
    sampling = replace(SAMPLING, top_p=0.95, top_k=50)  # the filters must not show in the log-probs
    groups = make_engine(folders[family]).generate(prompts, sampling)
    model = load_model(folders[family])
    lengths = set()
    for prompt, group in zip(prompts, groups, strict=True):
        assert len(group) == sampling.num_samples
        for completion in group:
            tokens = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids])).long()
            with torch.no_grad():
                logits = model(tokens[None], use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
            expected = torch.log_softmax(logits / sampling.temperature, -1)
            expected = expected.gather(-1, tokens[len(prompt.token_ids) :, None])[:, 0]
            torch.testing.assert_close(torch.from_numpy(completion.log_probs), expected, atol=1e-5, rtol=0)
            assert completion.token_ids.dtype == np.int32 and completion.log_probs.dtype == np.float32
            lengths.add(len(completion.token_ids))
    assert len(lengths) > 3  # some stopped early, so sequences left the batch on the way


@pytest.mark.parametrize("family", ["qwen2", "llama3_tied", "qwen3_moe", "deepseek_v3"])
def test_samples_do_not_depend_on_the_batch(folders: dict[str, Path], family: str) -> None:
    # In float64: another batch shape moves logits in their last bits, and in float32 a draw could lie that
    # close to the border between two tokens; in float64 it practically cannot.
    prompts = make_prompts([3, 11, 7, 7, 1])
    expected = all_token_ids(make_engine(folders[family], torch.float64).generate(prompts, SAMPLING))
    assert len({tuple(tokens) for group in expected for tokens in group}) > 25  # samples differ
    for max_batch_size in (1, 4, 13):
        engine = make_engine(folders[family], torch.float64, max_batch_size)
        assert all_token_ids(engine.generate(prompts, SAMPLING)) == expected
    engine = make_engine(folders[family], torch.float64)
    assert all_token_ids(engine.generate(prompts[::-1], SAMPLING)) == expected[::-1]
    assert all_token_ids(engine.generate(prompts[2:3], SAMPLING)) == expected[2:3]  # as another rank's share
    fewer = engine.generate(prompts, replace(SAMPLING, num_samples=2))
    assert all_token_ids(fewer) == [group[:2] for group in expected]
    assert all_token_ids(engine.generate(prompts, replace(SAMPLING, seed=4))) != expected


def test_tokens_are_those_of_sampling_without_a_cache(folders: dict[str, Path]) -> None:
    (prompt,) = make_prompts([5])
    sampling = replace(SAMPLING, num_samples=3, top_p=0.9, stop_token_ids=())
    completions = make_engine(folders["qwen2"], torch.float64).generate([prompt], sampling)[0]
    model = load_model(folders["qwen2"], torch.float64)
    uniforms = torch.from_numpy(prompt_uniforms(sampling.seed, prompt.prompt_id, 3, sampling.max_new_tokens))
    for completion, draws in zip(completions, uniforms, strict=True):
        tokens = torch.from_numpy(prompt.token_ids).long()[None]
        for step in range(len(completion.token_ids)):
            with torch.no_grad():
                log_probs = sampling_log_probs(model(tokens, use_cache=False).logits[:, -1], 1.5)
            token = sample_tokens(log_probs, draws[step : step + 1], top_k=0, top_p=0.9)
            assert token.item() == completion.token_ids[step]
            tokens = torch.cat([tokens, token[None]], dim=1)


def test_completions_end_at_stop_tokens_or_at_the_length(folders: dict[str, Path]) -> None:
    engine = make_engine(folders["llama3"])
    stops = {EOS_TOKEN_ID, *SAMPLING.stop_token_ids}
    completions = engine.generate(make_prompts([4] * 30), SAMPLING)
    reasons = set()
    for completion in (c for group in completions for c in group):
        tokens = completion.token_ids.tolist()
        body = tokens[:-1] if completion.finish_reason == "stop" else tokens
        reasons.add((completion.finish_reason, tokens[-1] == EOS_TOKEN_ID))
        assert stops.isdisjoint(body)
        assert completion.finish_reason == ("stop" if tokens[-1] in stops else "length")
        assert len(tokens) == SAMPLING.max_new_tokens or completion.finish_reason == "stop"
        assert completion.text == " ".join(f"w{token}" for token in body if token > 1)
        assert len(completion.log_probs) == len(tokens) and completion.policy_version == 0
    assert reasons == {("stop", True), ("stop", False), ("length", False)}
    unstopped = engine.generate(make_prompts([4]), replace(SAMPLING, max_new_tokens=1, stop_token_ids=()))
    assert [len(c.token_ids) for c in unstopped[0]] == [1] * SAMPLING.num_samples


def test_a_chunk_is_never_larger_than_the_batch_size() -> None:
    for num_samples, max_batch_size in [(4, 16), (4, 17), (16, 16), (17, 16), (50, 16), (3, 1)]:
        lengths = [9, 1, 5, 5, 2, 7, 3]
        chunks = plan_chunks(lengths, num_samples, max_batch_size)
        assert all(0 < len(rows) * len(samples) <= max_batch_size for rows, samples in chunks)
        planned = [(row, sample) for rows, samples in chunks for row in rows for sample in samples]
        assert sorted(planned) == [(row, sample) for row in range(7) for sample in range(num_samples)]
    assert plan_chunks([], 4, 16) == []


def test_a_generation_is_drawn_by_its_first_wait(folders: dict[str, Path]) -> None:
    engine, prompts = make_engine(folders["qwen2"], torch.float64), make_prompts([3, 11, 7])
    expected = all_token_ids(engine.generate(prompts, SAMPLING))
    told: list[int] = []
    sizes = (6, 2, 6)
    requests = [SampleRequest(prompt, size) for prompt, size in zip(prompts, sizes, strict=True)]
    generation = engine.start(requests, SAMPLING, lambda n, tokens: told.append(n))
    assert generation.num_finished() == 0 and told == []
    assert generation.wait(0.0)
    assert generation.num_finished() == 3 and sum(told) == 14
    found = all_token_ids(generation.results())
    assert found == [group[:size] for group, size in zip(expected, sizes, strict=True)]
    assert engine.start([], SAMPLING).wait(0.0)

    generation = engine.start(requests, SAMPLING)
    generation.stop()
    assert generation.wait(0.0)
    cut = [completion for group in generation.results() for completion in group]
    assert len(cut) == 14 and all(c.finish_reason == "abort" and not len(c.token_ids) for c in cut)


# --- weights


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_changes_the_next_generation(
    folders: dict[str, Path], tmp_path: Path, family: Family
) -> None:
    other = make_tiny_model(tmp_path, family, seed=1)
    cfg = ModelConfig(hf_path=str(folders[family]), dtype="float32")
    engine = build_embedded_engine(RolloutConfig(), cfg, CPU)
    prompts = make_prompts([4, 6])
    with pytest.raises(RolloutError, match="update_weights"):
        engine.generate(prompts, SAMPLING)
    results = []
    for version, folder in enumerate((folders[family], other), start=5):
        source = FileSource(load_file(folder / "model.safetensors"))
        engine.update_weights(source, version)  # type: ignore[arg-type]
        groups = engine.generate(prompts, SAMPLING)
        assert engine.policy_version == version
        assert {c.policy_version for group in groups for c in group} == {version}
        assert all_token_ids(groups) == all_token_ids(make_engine(folder).generate(prompts, SAMPLING))
        results.append(all_token_ids(groups))
    assert results[0] != results[1]
    engine.close()
    with pytest.raises(RolloutError, match="update_weights"):
        engine.generate(prompts, SAMPLING)


def test_an_incomplete_or_foreign_update_is_refused(folders: dict[str, Path]) -> None:
    good = load_file(folders["qwen2"] / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    engine = make_engine(folders["qwen2"])
    cases = {
        norm: {name: tensor for name, tensor in good.items() if name != norm},
        "model.layers.7.mlp": {**good, "model.layers.7.mlp": torch.zeros(1)},
        r"model.norm.weight.*\[65\].*\[64\]": {**good, "model.norm.weight": torch.zeros(65)},
    }
    for message, tensors in cases.items():
        with pytest.raises(RolloutError, match=message):
            engine.update_weights(FileSource(tensors), 1)  # type: ignore[arg-type]
        with pytest.raises(RolloutError, match="no weights"):  # half-updated weights are not used
            engine.generate(make_prompts([4]), SAMPLING)
    engine.update_weights(FileSource(good), 2)  # type: ignore[arg-type]
    assert engine.generate(make_prompts([4]), SAMPLING)[0][0].policy_version == 2


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2_tied", "model.embed_tokens.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w3.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.5.down_proj.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)
def test_a_weight_that_is_not_sent_is_named(folders: dict[str, Path], family: str, name: str) -> None:
    tensors = load_file(folders[family] / "model.safetensors")
    del tensors[name]
    with pytest.raises(RolloutError, match=re.escape(name)):
        make_engine(folders[family]).update_weights(FileSource(tensors), 1)  # type: ignore[arg-type]


def test_the_bias_that_decides_among_experts_is_not_rounded(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "deepseek_v3", dtype=torch.bfloat16)
    engine = build_embedded_engine(RolloutConfig(), ModelConfig(hf_path=str(folder), dtype="bfloat16"), CPU)
    tensors = load_file(folder / "model.safetensors")
    engine.update_weights(FileSource(tensors), 1)  # type: ignore[arg-type]
    assert isinstance(engine, EmbeddedEngine)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    found = engine._model.state_dict()[name]
    assert found.dtype == torch.float32 and torch.equal(found, tensors[name])


def test_what_cannot_be_generated_is_reported(folders: dict[str, Path]) -> None:
    engine = make_engine(folders["qwen2"])
    with pytest.raises(RolloutError, match="'p0'.*max_position_embeddings=32768"):
        engine.generate(make_prompts([32_760]), SAMPLING)
    with pytest.raises(RolloutError, match=r"stop tokens \[107\]"):
        engine.generate(make_prompts([4]), replace(SAMPLING, stop_token_ids=(3, 107)))
    tensors = load_file(folders["qwen2"] / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    engine.update_weights(FileSource(tensors), 1)  # type: ignore[arg-type]
    with pytest.raises(RolloutError, match="not finite"):
        engine.generate(make_prompts([4]), SAMPLING)


def test_the_trainers_random_state_is_left_alone(folders: dict[str, Path]) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    cfg = ModelConfig(hf_path=str(folders["qwen2"]), dtype="float32")
    build_embedded_engine(RolloutConfig(), cfg, CPU)
    load_embedded_engine(RolloutConfig(), cfg, CPU).generate(make_prompts([4]), SAMPLING)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])  # type: ignore[index]


# --- building from a folder


def test_stop_tokens_come_from_tokenizer_and_generation_config(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(40, 80))}))
    cfg = ModelConfig(hf_path=str(folder), dtype="float32")
    sampling = replace(SAMPLING, num_samples=200, stop_token_ids=())
    completions = load_embedded_engine(RolloutConfig(), cfg, CPU).generate(make_prompts([4]), sampling)[0]
    last_tokens = {int(c.token_ids[-1]) for c in completions if c.finish_reason == "stop"}
    assert last_tokens <= {EOS_TOKEN_ID, *range(40, 80)} and len(last_tokens) > 20
    (folder / "generation_config.json").unlink()
    completions = load_embedded_engine(RolloutConfig(), cfg, CPU).generate(make_prompts([4]), sampling)[0]
    assert {int(c.token_ids[-1]) for c in completions if c.finish_reason == "stop"} == {EOS_TOKEN_ID}


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def load(folder: Path) -> None:
        load_embedded_engine(RolloutConfig(), ModelConfig(hf_path=str(folder), dtype="float32"), CPU)

    folder = make_tiny_model(tmp_path / "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)
    folder = make_tiny_model(tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing keys: model.norm.weight"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load(folder)
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere")
    large_tokenizer = make_tiny_model(tmp_path / "misfit")
    write_word_level_tokenizer(large_tokenizer, VOCAB_SIZE + 1)
    with pytest.raises(ConfigError, match="tokenizer"):
        load(large_tokenizer)
