"""Megatron's optimizer and parameter scheduler from our config."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from apo_megatron.config.training import OptimizerConfig


def build_optimizer(
    cfg: OptimizerConfig, model_chunks: Sequence[torch.nn.Module], dtype: torch.dtype, distributed: bool
) -> MegatronOptimizer:
    """AdamW over DDP-wrapped ``model_chunks``; norms and biases are not decayed."""
    megatron_cfg = MegatronOptimizerConfig(
        optimizer="adam",
        lr=cfg.lr,
        min_lr=cfg.min_lr,
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.adam_beta1,
        adam_beta2=cfg.adam_beta2,
        adam_eps=cfg.adam_eps,
        clip_grad=cfg.clip_grad or math.inf,  # an infinite bound still measures the norm
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )
    # Without the overrides Megatron decays norms and biases too.
    return get_megatron_optimizer(
        megatron_cfg, list(model_chunks), config_overrides=get_standard_config_overrides(megatron_cfg)
    )


def build_scheduler(
    cfg: OptimizerConfig, optimizer: MegatronOptimizer, num_updates: int
) -> OptimizerParamScheduler:
    """Warm-up, then the decay style over ``num_updates``; counted in updates.

    The weight decay multipliers of the parameter groups take effect through it, so it is always there.
    """
    return OptimizerParamScheduler(
        optimizer,
        # The first update must not be lost to a learning rate of 0.
        init_lr=cfg.lr / cfg.lr_warmup_steps if cfg.lr_warmup_steps else cfg.lr,
        max_lr=cfg.lr,
        min_lr=cfg.lr if cfg.lr_decay_style == "constant" else cfg.min_lr,
        lr_warmup_steps=cfg.lr_warmup_steps,
        lr_decay_steps=max(num_updates, cfg.lr_warmup_steps + 1),
        lr_decay_style=cfg.lr_decay_style,
        start_wd=cfg.weight_decay,
        end_wd=cfg.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
        # A checkpoint brings the number of updates; the rates are those of the configuration.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
