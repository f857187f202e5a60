"""What a training run reads, checked before anything starts: prompts or demonstrations, tokenizer, reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from apo_megatron.config import RLConfig, SFTConfig
from apo_megatron.config.data import PromptFormat
from apo_megatron.data.demonstrations import DemonstrationLoader, load_demonstrations
from apo_megatron.data.mixture import MixturePart
from apo_megatron.data.prompts import PromptLoader, load_prompts, with_source_name
from apo_megatron.data.tokenizer import check_tokenizer, load_tokenizer
from apo_megatron.errors import ConfigError, DataError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.rewards.registry import Reward, build_reward
from apo_megatron.types import Prompt
from apo_megatron.weights.architecture import Architecture


@dataclass(frozen=True)
class TrainingData:
    """Everything a step needs beside the models; the same on every rank."""

    prompts: PromptLoader
    held_out: list[Prompt]
    reward: Reward


def load_training_data(cfg: RLConfig) -> TrainingData:
    """Read and check data, tokenizer and reward: all that can fail before a model is built."""
    architecture, tokenizer = _read_model_files(cfg.model.hf_path)
    reward = build_reward(cfg.reward)

    def load(path: str, form: PromptFormat, max_rows: int | None = None) -> list[Prompt]:
        prompts = load_prompts(
            path, tokenizer, form, cfg.data.max_prompt_length, reward.required_fields, max_rows
        )
        _check_prompts(prompts, path, reward, cfg.rollout.max_new_tokens, architecture)
        return prompts

    prompts: list[Prompt] = []
    mixture: list[MixturePart] = []
    if cfg.data.train_path is not None:
        prompts = load(cfg.data.train_path, cfg.data)
    for source in cfg.data.sources:
        part = with_source_name(load(source.path, source), source.label)
        prompts += part
        mixture.append(MixturePart(source.label, len(part), source.weight))
    held_out_path = cfg.evaluation.data_path
    return TrainingData(
        prompts=PromptLoader(prompts, cfg.data.prompts_per_step, cfg.train.seed, cfg.data.shuffle, mixture),
        held_out=(
            [] if held_out_path is None else load(held_out_path, cfg.evaluation, cfg.evaluation.max_problems)
        ),
        reward=reward,
    )


def _check_prompts(
    prompts: Sequence[Prompt], path: str, reward: Reward, max_new_tokens: int, architecture: Architecture
) -> None:
    """Find now what would otherwise stop the run when the prompt is drawn."""
    for prompt in prompts:
        try:
            reward.score(prompt, [])
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    longest, limit = max(len(p.token_ids) for p in prompts), architecture.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ConfigError(
            f"{path}: the longest prompt has {longest} tokens; with rollout.max_new_tokens={max_new_tokens} "
            f"that is more than the model's max_position_embeddings={limit}: lower data.max_prompt_length or "
            "rollout.max_new_tokens"
        )


def load_supervised_data(cfg: SFTConfig) -> DemonstrationLoader:
    """Read and check demonstrations and tokenizer: all that can fail before a model is built."""
    architecture, tokenizer = _read_model_files(cfg.model.hf_path)
    data = cfg.data
    demonstrations = load_demonstrations(
        data.train_path, tokenizer, data.prompt_field, data.response_field, data.max_length
    )
    longest = int(np.diff(demonstrations.offsets).max())
    if longest > architecture.max_position_embeddings:
        raise ConfigError(
            f"{data.train_path}: the longest example has {longest} tokens, more than the model's "
            f"max_position_embeddings={architecture.max_position_embeddings}: lower data.max_length"
        )
    return DemonstrationLoader(demonstrations, cfg.train.batch_size, cfg.train.seed, data.shuffle)


def _read_model_files(hf_path: str) -> tuple[Architecture, PreTrainedTokenizerBase]:
    architecture, tokenizer = read_architecture(hf_path), load_tokenizer(hf_path)
    check_tokenizer(tokenizer, architecture.vocab_size, hf_path)
    return architecture, tokenizer
