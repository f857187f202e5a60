"""From a Hugging Face directory to a rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from apo_megatron.config.model import ModelConfig
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from apo_megatron.errors import CheckpointError, RolloutError
from apo_megatron.models.transformer_config import TORCH_DTYPES
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rollout.embedded import EmbeddedEngine
from apo_megatron.rollout.engine import RolloutEngine
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.model_limits import ModelLimits
from apo_megatron.rollout.served_weights import AS_SERVED, ServedWeights
from apo_megatron.rollout.server import print_note
from apo_megatron.rollout.server_command import read_api_key
from apo_megatron.rollout.server_sources import server_source
from apo_megatron.rollout.server_watch import Note
from apo_megatron.rollout.sglang import SGLangEngine
from apo_megatron.rollout.sglang_update import Updater, WeightUpdater
from apo_megatron.rollout.transport import build_transport
from apo_megatron.weights.conversion.megatron_source import MegatronSource


def build_engine(
    rollout: RolloutConfig,
    model: ModelConfig,
    parallel: ParallelContext,
    run_folder: Path,
    note: Note = print_note,
) -> RolloutEngine:
    """The engine for training: the architecture of ``model.hf_path``, weights by ``update_weights``.

    Collective. ``run_folder`` is where logs of servers and files of weights go; ``note`` takes status lines.
    Raises CheckpointError where config.json cannot be read, ConfigError where the tokenizer does not fit.
    """
    if rollout.engine == "embedded":
        return build_embedded_engine(rollout, model, parallel.device)
    sglang = rollout.sglang

    def make_updater(loop: EventLoopThread) -> WeightUpdater:
        starts_servers = not sglang.urls and sglang.servers_file is None
        folder = run_folder / "rollout_weights"
        transport = build_transport(sglang, parallel, loop, folder, same_machine=starts_servers)
        return WeightUpdater(parallel, loop, transport, rollout.max_canary_gap)

    return _sglang_engine(rollout, model, parallel, run_folder, note, make_updater)


def build_embedded_engine(rollout: RolloutConfig, model: ModelConfig, device: torch.device) -> EmbeddedEngine:
    """``build_engine`` for an engine inside this process."""
    config = _read_config(model)
    with _without_touching_random_state(device):
        with device:
            hf_model = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[model.dtype])
        _keep_buffers_in_float32(hf_model)
    return _embedded_engine(rollout, model, hf_model, policy_version=-1)


def load_engine(
    rollout: RolloutConfig,
    model: ModelConfig,
    parallel: ParallelContext,
    run_folder: Path,
    note: Note = print_note,
) -> RolloutEngine:
    """The engine for evaluation without a trainer: with the weights of ``model``, as version 0. Collective.

    SGLang servers that run already are taken with the weights that they have; others are started with
    those of ``model.hf_path``. Raises as ``build_engine`` and ``load_embedded_engine``, and RolloutError
    where no server can be used.
    """
    if rollout.engine == "embedded":
        return load_embedded_engine(rollout, model, parallel.device)
    engine = _sglang_engine(
        rollout, model, parallel, run_folder, note, lambda loop: ServedWeights(parallel, loop)
    )
    engine.update_weights(AS_SERVED, version=0)
    return engine


def load_embedded_engine(rollout: RolloutConfig, model: ModelConfig, device: torch.device) -> EmbeddedEngine:
    """An engine inside this process with the weights of ``model``, as version 0.

    Raises CheckpointError where files are missing or truncated, or do not hold exactly the model's tensors.
    """
    if model.megatron_path is not None:
        return _load_megatron(rollout, model, model.megatron_path, device)
    transformers_logging.disable_progress_bar()  # the run shows its own
    with _without_touching_random_state(device):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model.hf_path, dtype=TORCH_DTYPES[model.dtype], use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"model.hf_path={model.hf_path}: cannot be loaded: {error}. Expected a directory with "
                "config.json and complete *.safetensors files"
            ) from error
    hf_model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(str(name) for name in sorted(report[problem])[:5])
            raise CheckpointError(
                f"model.hf_path={model.hf_path}: the safetensors do not fit config.json, "
                f"{problem.replace('_', ' ')}: {names} ({len(report[problem])} in all)"
            )
    return _embedded_engine(rollout, model, hf_model.to(device), policy_version=0)


def _load_megatron(
    rollout: RolloutConfig, model: ModelConfig, folder: str, device: torch.device
) -> EmbeddedEngine:
    engine = build_embedded_engine(rollout, model, device)
    with MegatronSource(folder, config_from=model.hf_path) as source:
        try:
            engine.load_weights((entry.to_hf([source.read(entry)]) for entry in source.entries), version=0)
        except RolloutError as error:
            raise CheckpointError(
                f"model.megatron_path={folder}: not the weights of model.hf_path={model.hf_path} ({error}): "
                "name the model that training started from as model.hf_path"
            ) from error
    return engine


def _read_config(model: ModelConfig) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(model.hf_path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.hf_path={model.hf_path}: no usable config.json: {error}") from error


def _sglang_engine(
    rollout: RolloutConfig,
    model: ModelConfig,
    parallel: ParallelContext,
    run_folder: Path,
    note: Note,
    make_updater: Callable[[EventLoopThread], Updater],
) -> SGLangEngine:
    config = _read_config(model)
    tokenizer = load_tokenizer(model.hf_path)
    check_tokenizer(tokenizer, config.vocab_size, model.hf_path)
    eos_token_ids = frozenset(read_eos_token_ids(model.hf_path, tokenizer))

    def decode(token_ids: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(token_ids, skip_special_tokens=True)

    api_key = read_api_key(rollout.sglang)
    loop = EventLoopThread()
    updater = make_updater(loop)
    source = None
    if parallel.is_main:  # servers load their weights while the trainer loads its own
        on_cpu = parallel.device.type == "cpu"
        source = server_source(rollout.sglang, model, run_folder / "servers", on_cpu, note)
    return SGLangEngine(
        rollout,
        ModelLimits(config.vocab_size, config.max_position_embeddings, eos_token_ids),
        decode,
        parallel,
        loop,
        updater,
        source,
        api_key,
        note,
    )


def _embedded_engine(
    rollout: RolloutConfig, model: ModelConfig, hf_model: PreTrainedModel, policy_version: int
) -> EmbeddedEngine:
    tokenizer = load_tokenizer(model.hf_path)
    check_tokenizer(tokenizer, hf_model.config.vocab_size, model.hf_path)
    return EmbeddedEngine(
        hf_model,
        tokenizer,
        eos_token_ids=read_eos_token_ids(model.hf_path, tokenizer),
        max_batch_size=rollout.max_batch_size,
        policy_version=policy_version,
        max_canary_gap=rollout.max_canary_gap,
    )


def read_eos_token_ids(hf_path: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's EOS and those of generation_config.json, where there is one.

    config.json is not asked: an architecture's default would be taken for a stop token.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    try:
        more = GenerationConfig.from_pretrained(hf_path).eos_token_id
    except OSError:  # the file is optional
        return ids
    if more is not None:
        ids.update([more] if isinstance(more, int) else more)
    return ids


def _keep_buffers_in_float32(model: PreTrainedModel) -> None:
    """What checkpoints hold beside parameters, the bias that decides among experts, is not rounded there."""
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.data = buffer.data.float()


@contextmanager
def _without_touching_random_state(device: torch.device) -> Iterator[None]:
    """Making a transformers model draws initial weights, which must not move the trainer's streams."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        yield
