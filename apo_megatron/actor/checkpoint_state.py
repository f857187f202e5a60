"""What a training checkpoint says beside its tensors, and whether a run may go on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from apo_megatron.config import RLConfig, SFTConfig
from apo_megatron.config.flat import default_settings, flat
from apo_megatron.errors import CheckpointError
from apo_megatron.objectives.unread_settings import with_unread_at_defaults

FORMAT_VERSION = 1


class _Nothing:
    """Stands for the value of a setting that does not exist."""

    def __repr__(self) -> str:
        return "no such setting"


_NOTHING = _Nothing()


@dataclass(frozen=True)
class CheckpointState:
    """``state.json``: plain JSON values only."""

    step: int  # completed steps
    policy_version: int  # of the weights, as the rollout engine counts them
    consecutive_skips: int  # updates just before the save that were not finite
    scheduler: dict[str, Any]
    parts: dict[str, Any]  # the named states beside the actor's: the data position, ...
    reference: str | None  # digest of the reference weights; None where the run has no reference
    metrics: dict[str, float | None]  # of the last completed step
    settings: dict[str, Any]  # what cannot change when the run goes on
    layout: dict[str, Any]  # the mesh that wrote it
    files: dict[str, int]  # bytes of every other file, by path below the checkpoint
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def read(path: Path) -> CheckpointState:
        """Raises CheckpointError where the file is missing, damaged, foreign or of a newer version."""
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: missing, so {path.parent} is not a training checkpoint of this program, or not "
                "complete. To start from the weights of another program's checkpoint, convert them "
                "(checkpoints_convert.megatron_to_hf) and name the result in model.hf_path"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged ({error}): resume an older checkpoint") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version {version} found, {FORMAT_VERSION} expected: resume it with the "
                f"{'newer' if isinstance(version, int) and version > FORMAT_VERSION else 'older'} version of "
                "this program that wrote it"
            )
        wanted = {field.name for field in fields(CheckpointState)}
        if values.keys() != wanted:
            differing = ", ".join(sorted(values.keys() ^ wanted))
            raise CheckpointError(f"{path}: damaged (fields missing or unknown: {differing})")
        try:
            return TypeAdapter(CheckpointState).validate_json(text, strict=True)
        except ValidationError as error:
            wrong = error.errors()[0]
            name = ".".join(str(part) for part in wrong["loc"])
            raise CheckpointError(
                f"{path}: damaged ({name}: {wrong['msg']}, found {str(wrong['input'])[:80]!r})"
            ) from None


def as_json(value: Any) -> Any:
    """``value`` as it will be read back: a copy, with tuples as lists."""
    return json.loads(json.dumps(value))


def fixed_settings(cfg: RLConfig | SFTConfig, reference: str | None) -> dict[str, Any]:
    """{dotted name: value} of what cannot change when a run is resumed: model, objective, optimizer.

    Settings that the chosen methods do not read can, and learning rates, so that a run that diverged may go
    on. So can the place of the initial weights where a digest of the ``reference`` says that they are the
    same.
    """
    sections: dict[str, BaseModel] = {"model": cfg.model, "optimizer": cfg.optimizer}
    settings: dict[str, Any] = {
        # Megatron stores the state of its two kinds of optimizers under different names.
        "parallel.distributed_optimizer": cfg.parallel.distributed_optimizer
    }
    if isinstance(cfg, RLConfig):
        sections["objective"] = with_unread_at_defaults(cfg.objective)
        settings["rollout.temperature"] = cfg.rollout.temperature
    if cfg.optimizer.lr_decay_style != "constant":  # the length of the schedule
        settings["train.num_steps"] = cfg.train.num_steps
        if isinstance(cfg, RLConfig):
            settings["train.num_mini_batches"] = cfg.train.num_mini_batches
    changeable = {"recompute", "transformer_impl", "max_logits_mib", "offload", "lr", "min_lr"}
    if reference is not None:
        changeable |= {"hf_path", "megatron_path"}
    for name, section in sections.items():
        values = section.model_dump(mode="json", exclude=changeable)
        settings |= {f"{name}.{field}": value for field, value in values.items()}
    return settings


def check_resumable(
    state: CheckpointState,
    folder: Path,
    settings: Mapping[str, Any],
    part_names: set[str],
    reference: str | None,
    max_step: int,
) -> None:
    """Raises CheckpointError where a run with these settings cannot go on from ``state``.

    A setting that is younger than the checkpoint had its default value there.
    """
    current = flat(as_json(dict(settings)))
    younger = {name: value for name, value in default_settings(RLConfig).items() if name in current}
    saved = younger | flat(state.settings)
    differing = [
        f"{name}: {saved.get(name, _NOTHING)!r} there, {current.get(name, _NOTHING)!r} here"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name, _NOTHING) != current.get(name, _NOTHING)
    ]
    if differing:
        raise CheckpointError(
            f"{folder} was made with other settings ({'; '.join(differing)}): take these back, or start "
            "anew in another train.run_dir"
        )
    if state.parts.keys() != part_names:
        raise CheckpointError(
            f"{folder} holds the states of {sorted(state.parts)}, this run has {sorted(part_names)}: it was "
            "made by another command; start anew in another train.run_dir"
        )
    if state.reference != reference:
        raise CheckpointError(
            f"{folder} was trained against reference weights with the digest {state.reference}, those of "
            f"model.hf_path (or model.megatron_path) have {reference}: the model there has changed since the "
            "run began. Restore it, or start anew in another train.run_dir"
        )
    if state.step > max_step:
        raise CheckpointError(
            f"{folder} has {state.step} completed steps, train.num_steps={max_step}: raise num_steps or "
            "choose another train.run_dir"
        )
