"""Typed configuration: ``schema.py`` lists the sections, each in a file beside it; ``loader.py`` reads it."""

from apo_megatron.config.data import DataConfig, SupervisedDataConfig
from apo_megatron.config.evaluate import EvalConfig
from apo_megatron.config.evaluation import EvaluationConfig
from apo_megatron.config.loader import dump_config, load_config
from apo_megatron.config.model import ModelConfig
from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.config.parallel import ParallelConfig
from apo_megatron.config.reward import RewardConfig
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.config.schema import RLConfig, SFTConfig
from apo_megatron.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    SupervisedTrainConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RLConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "SupervisedDataConfig",
    "SupervisedTrainConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
]
