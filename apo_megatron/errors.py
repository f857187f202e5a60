"""Errors a user can act on. Each subclasses the stdlib type a caller would expect to catch.

A message names the field or file, what was found, what was expected and what to do about it.
"""


class ConfigError(ValueError):
    """A configuration value (or a combination of values) that cannot work."""


class DataError(ValueError):
    """A dataset file or row that cannot be used; the message names file and line."""


class WeightMappingError(KeyError):
    """A parameter without a rule, a left-over tensor, or a tensor of the wrong shape."""

    def __str__(self) -> str:  # KeyError would print the repr of its message
        return str(self.args[0]) if self.args else ""


class CheckpointError(ValueError):
    """A checkpoint (Hugging Face or Megatron) that is missing, truncated or does not fit."""


class RolloutError(RuntimeError):
    """A rollout engine that failed, or answered with something that cannot be trained on."""


class RewardError(RuntimeError):
    """A reward function that failed in a way that is not the model's fault."""


class TrainingError(RuntimeError):
    """Training that cannot go on, for instance several non-finite steps in a row."""


class RunInterrupted(RuntimeError):
    """A run that was asked to stop, saved its state and can go on later."""
