"""The planner against published parameter counts and against counts by hand; its command line."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from apo_megatron import doctor
from apo_megatron.config import RLConfig
from apo_megatron.diagnosis import plan_command
from apo_megatron.errors import ConfigError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.parallel.lm_head import CPU_TILE, GPU_TILE
from apo_megatron.planning.activations import Numerics, layers_in_flight
from apo_megatron.planning.advice import warnings_of
from apo_megatron.planning.flops import StepFlops
from apo_megatron.planning.parameters import layers_of_stage, num_parameters, stage_parameters
from apo_megatron.planning.plan import Plan, Setting, make_plan
from apo_megatron.planning.proposals import overrides, propose
from apo_megatron.planning.vocabulary import TILE, VocabularyEnd

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
# Sizes and parameter counts (billions) as their authors published them.
_ALL: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 32768}
PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "Qwen2.5-7B": (
        7.62,
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
        },
    ),
    "Llama-3.1-8B": (
        8.03,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "Llama-3-70B": (
        70.55,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        },
    ),
    "Qwen3-30B-A3B": (
        30.53,
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
        },
    ),
}


def published_model(folder: Path, name: str) -> Path:
    """A model's directory with nothing but its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_ALL | PUBLISHED[name][1]))
    return folder


def config(path: Path, **sections: dict[str, Any]) -> RLConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {"hf_path": str(path)},
        "data": {"train_path": "none.jsonl", "max_prompt_length": 1024, "prompts_per_step": 128},
        "train": {"run_dir": "none", "num_steps": 1},
        "rollout": {"engine": "sglang", "group_size": 8, "max_new_tokens": 3072},
    }
    return RLConfig.model_validate(
        {key: values.get(key, {}) | sections.get(key, {}) for key in values | sections}
    )


def planned(cfg: RLConfig, world: int = 1, device_gib: float = 80, **options: Any) -> Plan:
    return make_plan(cfg, Setting(read_architecture(cfg.model.hf_path), world, device_gib * GIB, **options))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str, tmp_path: Path) -> None:
    architecture = read_architecture(published_model(tmp_path, name))
    assert round(num_parameters(architecture) / 1e9, 2) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_ranks_together_hold_the_model(name: str, tmp_path: Path) -> None:
    """Every number once over the ranks that divide it; what all of them hold, norms and routers, is small."""
    architecture = read_architecture(published_model(tmp_path, name))
    experts = 1 if architecture.experts is None else 8
    dims = ParallelDims(
        world=16, tensor=2, pipeline=2, virtual_pipeline=2, expert=experts, sequence_parallel=True
    )
    stages = stage_parameters(architecture, dims, architecture.vocab_size)
    total = sum(2 * (stage.total - stage.experts) + experts * stage.experts for stage in stages)
    assert total == pytest.approx(num_parameters(architecture), rel=2e-3)
    layers = [layer for stage in stages for layer in stage.layers]
    assert sorted(layers) == list(range(architecture.num_layers))
    assert stages[0].output == stages[1].embedding == 0 < stages[0].embedding == stages[1].output


def test_virtual_stages_take_turns() -> None:
    dims = ParallelDims(world=2, pipeline=2, virtual_pipeline=2)
    assert layers_of_stage(8, dims, 0) == (0, 1, 4, 5)
    assert layers_of_stage(8, dims, 1) == (2, 3, 6, 7)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stage", "micro_batches", "expected"),
    [
        (1, None, 0, 8, 8),  # no pipeline: one micro-batch, all 8 layers
        (4, None, 0, 8, 4 * 8),
        (4, None, 3, 8, 8),
        (4, None, 0, 2, 2 * 8),  # there are only two
        (4, 2, 0, 8, (2 * 3 + 4 + 1) * 4),  # chunks of 4 layers
        (4, 2, 3, 8, (4 + 1) * 4),
    ],
)
def test_layers_in_flight(
    pipeline: int, virtual: int | None, stage: int, micro_batches: int, expected: int
) -> None:
    dims = ParallelDims(world=pipeline, pipeline=pipeline, virtual_pipeline=virtual)
    assert layers_in_flight(dims, stage, 8, micro_batches) == expected


def test_state_of_a_7b_model(tmp_path: Path) -> None:
    """The well-known 2 + 4 + 12 bytes a parameter, of which data parallelism divides the 12."""
    path = published_model(tmp_path, "Qwen2.5-7B")
    number = num_parameters(read_architecture(path))
    (alone,), (sharded,) = planned(config(path)).stages, planned(config(path), world=4).stages
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * number, 4 * number, 12 * number)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (2 * number, 4 * number, 3 * number)
    whole = config(path, parallel={"distributed_optimizer": False})
    assert planned(whole, world=4).stages[0].optimizer == 12 * number
    (single,) = planned(config(path, model={"hf_path": str(path), "dtype": "float32"})).stages
    assert (single.weights, single.gradients, single.optimizer) == (4 * number, 4 * number, 8 * number)
    averaged = config(path, objective={"apo_variants": {"reference_decay": 0.99}})
    assert [planned(c).rollout.reference for c in (config(path), averaged)] == [2 * number, 6 * number]


def test_flops_are_six_per_parameter_and_token(tmp_path: Path) -> None:
    """Where sequences are short and all tokens are trained: 6 N, the embedding's rows being looked up."""
    path = published_model(tmp_path, "Qwen2.5-7B")
    data = {"train_path": "none", "max_prompt_length": 1, "prompts_per_step": 128}
    short = config(path, data=data, rollout={"engine": "sglang", "group_size": 8, "max_new_tokens": 127})
    plan = planned(short)
    tokens = 128 * 8 * 128
    looked_up = 152064 * 3584
    expected = 6 * (num_parameters(read_architecture(path)) - looked_up) * tokens
    assert plan.flops.training == pytest.approx(expected, rel=0.01)
    assert plan.flops.old_log_probs == pytest.approx(expected / 3, rel=0.01)
    assert plan.flops.reference == plan.flops.old_log_probs / 2  # the sequences with A < 0
    # At 4096 tokens the quadratic part shows: 2 S^2 (h d) a layer, three times, halved by the causal mask.
    long = planned(config(path)).flops.training
    tokens *= 32
    linear = 6 * (num_parameters(read_architecture(path)) - 2 * looked_up) * tokens
    head = 6 * looked_up * tokens * 3072 / 4096
    attention = 3 * 28 * 28 * 128 * 2 * 4096 * tokens
    assert long == pytest.approx(linear + head + attention, rel=1e-3)
    full = planned(
        config(path, model={"hf_path": str(path), "recompute": "full", "max_logits_mib": 512})
    ).flops
    # The layers, and the LM head: 870 MiB of logits go through the fused one.
    assert full.recompute == pytest.approx((linear + attention + head) / 3, rel=1e-3)
    unfused = {"hf_path": str(path), "recompute": "full", "max_logits_mib": 1000}
    assert planned(config(path, model=unfused)).flops.recompute == pytest.approx(
        (linear + attention) / 3, rel=1e-3
    )


@pytest.mark.parametrize(
    ("old_log_probs", "num_mini_batches", "passes"),
    [("recompute", 1, 0.0), ("recompute", 4, 0.75), ("rollout", 1, 1.0), ("rollout", 4, 1.0)],
)
def test_statistics_of_mini_batches_are_forward_passes(
    old_log_probs: str, num_mini_batches: int, passes: float, tmp_path: Path
) -> None:
    """None before the first update where it has the pass for old log-probs."""
    path = published_model(tmp_path, "Qwen2.5-7B")

    def flops(**objective: Any) -> StepFlops:
        train = {"num_mini_batches": num_mini_batches}
        return planned(
            config(path, train=train, objective=objective | {"old_log_probs": old_log_probs})
        ).flops

    with_statistics, without = flops(loss_mode="bapo"), flops(loss_mode="vanilla")
    assert without.statistics == 0
    assert with_statistics.statistics == pytest.approx(passes * without.training / 3)
    assert with_statistics.trainer - with_statistics.statistics == pytest.approx(without.trainer)


def test_the_own_top_k_takes_a_fused_head_once_more(tmp_path: Path) -> None:
    path = published_model(tmp_path, "Qwen2.5-7B")

    def again(loss_mode: str, max_logits_mib: int) -> float:
        model = {"hf_path": str(path), "max_logits_mib": max_logits_mib}
        return planned(config(path, model=model, objective={"loss_mode": loss_mode})).flops.recompute

    assert again("simko", 512) == 2 * again("vanilla", 512) > 0  # as above: fused below 870 MiB
    assert again("simko", 1000) == again("vanilla", 1000) == 0


def test_the_vocabulary_end_is_bounded_by_the_fused_head() -> None:
    """It grows with the logits up to max_logits_mib, and only with the hidden states from there."""

    def end(rows: int, max_logits_mib: int = 512) -> VocabularyEnd:
        return VocabularyEnd(3584, rows, 152064, Numerics(itemsize=2), max_logits_mib, shares_embedding=False)

    assert (end(1024).is_fused, end(32768).is_fused, end(8, max_logits_mib=0).is_fused) == (False, True, True)
    whole, fused = end(32768, max_logits_mib=16384), end(32768)
    assert whole.logits == fused.logits == 32768 * 152064 * 2
    assert whole.backward() > whole.logits > 9 * GIB and fused.backward() < 2.2 * GIB
    assert end(65536).backward() - fused.backward() == 32768 * 3584 * (2 + 2 + 4)  # states and gradients


def test_packed_micro_batches_are_the_budget(tmp_path: Path) -> None:
    path = published_model(tmp_path, "Qwen2.5-7B")

    def activations(**train: Any) -> float:
        whole = {"run_dir": "none", "num_steps": 1} | train
        return planned(config(path, train=whole)).stages[0].moment.activations

    padded = activations(micro_batch_size=2)
    assert activations(max_tokens_per_micro_batch=8192) == pytest.approx(padded, rel=0.01)
    # A sequence over the budget runs alone.
    assert activations(max_tokens_per_micro_batch=100) == pytest.approx(padded / 2, rel=0.01)


def test_proposals_fit_and_go_on_from_the_configuration(tmp_path: Path) -> None:
    cfg = config(published_model(tmp_path, "Llama-3-70B"))
    setting = Setting(read_architecture(cfg.model.hf_path), 32, 80 * GIB)
    found = propose(cfg, setting)
    assert found and not make_plan(cfg, setting).fits
    for plan in found:
        assert plan.fits and plan.dims.world == 32 and plan.dims.tensor <= 8
        changes = dict(change.split("=") for change in overrides(cfg, plan.cfg))
        assert changes["parallel.tensor_parallel_size"] == str(plan.dims.tensor)
        assert set(changes) <= {
            *(f"parallel.{name}" for name in type(cfg.parallel).model_fields),
            "model.recompute",
        }
    modes = [plan.cfg.model.recompute for plan in found]
    assert modes == sorted(modes, reverse=True)  # none before full
    for mode in set(modes):
        sizes = [plan.dims.model for plan in found if plan.cfg.model.recompute == mode]
        assert sizes == sorted(sizes)


def test_proposals_keep_the_times_of_the_configuration(tmp_path: Path) -> None:
    times = {"stall_minutes": 5.0, "timeout_minutes": 10.0}
    cfg = config(published_model(tmp_path, "Qwen2.5-7B"), parallel=times)
    found = propose(cfg, Setting(read_architecture(cfg.model.hf_path), 8, 80 * GIB))
    assert found and all(plan.cfg.parallel.stall_minutes == 5.0 for plan in found)


def test_more_ranks_are_proposed_where_nothing_fits(tmp_path: Path) -> None:
    cfg = config(published_model(tmp_path, "Llama-3-70B"))
    architecture = read_architecture(cfg.model.hf_path)
    assert {plan.dims.world for plan in propose(cfg, Setting(architecture, 1, 80 * GIB))} == {
        32
    }  # 16 hold the state alone
    assert propose(cfg, Setting(architecture, 1, 0.1 * GIB)) == []


@pytest.mark.parametrize(
    ("name", "world", "sections", "message"),
    [
        ("Llama-3-70B", 1, {}, "most of it is weights, gradients and optimizer state"),
        (
            "Qwen2.5-7B",
            1,
            {"rollout": {"max_new_tokens": 31744}, "model": {"max_logits_mib": 16384}},
            "logits of 31,744 tokens take 9.0 GiB: set model.max_logits_mib lower, or "
            "train.max_tokens_per_micro_batch to about 1,8",
        ),
        (
            "Qwen2.5-7B",
            8,
            {
                "model": {"recompute": "full"},
                "parallel": {"tensor_parallel_size": 2, "sequence_parallel": True},
            },
            "would fit: set none",
        ),
        ("Qwen2.5-7B", 2, {"model": {"recompute": "selective"}}, "recompute=selective saves 0.0 GiB only"),
        (
            "Qwen2.5-7B",
            8,
            {"parallel": {"tensor_parallel_size": 4}},
            "parallel.sequence_parallel=true would save",
        ),
        (
            "Qwen2.5-7B",
            8,
            {"parallel": {"distributed_optimizer": False}},
            "parallel.distributed_optimizer=true would save 74.5 GiB a rank",
        ),
        ("Llama-3-70B", 16, {"parallel": {"tensor_parallel_size": 16}}, None),
        (
            "Qwen2.5-7B",
            14,
            {"parallel": {"pipeline_parallel_size": 14}, "train": {"num_mini_batches": 64}},
            "14 stages with 16 micro-batches a rank and update stand idle 45% of the time",
        ),
        (
            "Qwen2.5-7B",
            4,
            {"rollout": {"sglang": {"colocated": True}}},
            "the server takes 85% (assumed) beside the trainer's weights; give "
            "rollout.sglang.server_args --mem-fraction-static 0.7",
        ),
        (
            "Llama-3-70B",
            64,
            {"rollout": {"engine": "embedded"}},
            "the embedded engine is a whole model on every rank; set rollout.engine=sglang",
        ),
    ],
)
def test_warnings(
    name: str, world: int, sections: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    path = published_model(tmp_path, name)
    defaults = {
        "model": {"hf_path": str(path)},
        "rollout": {"engine": "sglang", "group_size": 8, "max_new_tokens": 3072},
        "train": {"run_dir": "none", "num_steps": 1},
    }
    cfg = config(path, **{key: defaults.get(key, {}) | value for key, value in sections.items()})
    if message is None:  # more tensor parallel ranks than KV heads
        with pytest.raises(ConfigError, match="num_key_value_heads"):
            planned(cfg, world)
        return
    assert message in "\n".join(warnings_of(planned(cfg, world)))


def test_a_good_layout_has_no_warnings(tmp_path: Path) -> None:
    cfg = config(published_model(tmp_path, "Qwen2.5-7B"))
    (best, *_) = propose(cfg, Setting(read_architecture(cfg.model.hf_path), 8, 80 * GIB))
    assert warnings_of(best) == []


def write_config(folder: Path, name: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config(published_model(folder, name)).model_dump(mode="json")))
    return path


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_command, "gpu_memory_bytes", lambda: None)
    words = ["plan", "--config", str(write_config(tmp_path, "Qwen2.5-7B")), "--json"]
    assert doctor.main([*words, "--world-size", "8"]) == plan_command.EXIT_DOES_NOT_FIT
    shown = json.loads(capsys.readouterr().out)
    assert (shown["world_size"], shown["device_bytes"], shown["fits"]) == (8, 80 * GIB, False)
    assert shown["stages"][0]["weights"] == 2 * shown["stages"][0]["num_parameters"]
    best = shown["proposals"][0]
    assert doctor.main([*words, "--world-size", "8", *best["overrides"]]) == 0  # as it was printed
    assert json.loads(capsys.readouterr().out)["peak_bytes"] == best["peak_bytes"] <= shown["usable_bytes"]
    large = ["parallel.pipeline_parallel_size=4", "--device-memory-gib", "500", "--sequence-length", "100"]
    assert doctor.main([*words, *large]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["world_size"], shown["device_bytes"]) == (4, 500 * GIB)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--config", "{config}", "--world-size", "0"], "invalid positive int value: '0'"),
        (
            ["plan", "--config", "{config}", "--device-memory-gib", "nan"],
            "invalid positive float value: 'nan'",
        ),
        (["cure"], "invalid choice: 'cure'"),
        (["plan", "--config", "{config}", "--wold-size", "8"], "did you mean --world-size?"),
        (["plan", "--confg", "{config}"], "did you mean --config?"),
        (["plan"], "the following arguments are required: --config"),
        (
            ["plan", "--config", "{config}", "--world-size", "3", "parallel.tensor_parallel_size=2"],
            "must divide",
        ),
        (["plan", "--config", "{config}", "parallel.tensor_parallel_size=3"], "num_attention_heads"),
    ],
)
def test_wrong_words_are_explained(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path, "Qwen2.5-7B"))
    assert doctor.main([word.format(config=path) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_the_documented_plan_is_what_the_tool_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With APO_MEGATRON_UPDATE_DOCS=1 the page is rewritten."""
    page = ROOT / "docs" / "planning.md"
    text = page.read_text()
    settings, shown = re.search(r"```yaml\n(.*?)```", text, re.S), re.search(r"```text\n(.*?)```", text, re.S)
    command = re.search(r"^    apo-doctor (.*)$", text, re.M)
    assert settings and command and shown
    (tmp_path / "qwen.yaml").write_text(settings[1])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(
        plan_command,
        "read_architecture",
        lambda _: read_architecture(published_model(tmp_path, "Qwen2.5-7B")),
    )
    monkeypatch.chdir(tmp_path)
    assert doctor.main(shlex.split(command[1])) in (0, plan_command.EXIT_DOES_NOT_FIT)
    found = re.sub(r" +$", "", capsys.readouterr().out, flags=re.M)
    if os.environ.get("APO_MEGATRON_UPDATE_DOCS") == "1":
        page.write_text(text[: shown.start(1)] + found + text[shown.end(1) :])
    else:
        assert found == shown[1]


def test_the_tile_is_that_of_the_fused_lm_head() -> None:
    assert {True: CPU_TILE, False: GPU_TILE} == TILE
