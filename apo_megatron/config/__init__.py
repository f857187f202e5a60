"""Typed configuration: ``schema.py`` says what there is, ``loader.py`` reads it."""

from apo_megatron.config.evaluate import EvalConfig
from apo_megatron.config.evaluation import EvaluationConfig
from apo_megatron.config.loader import dump_config, load_config
from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    SFTConfig,
    SupervisedDataConfig,
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
