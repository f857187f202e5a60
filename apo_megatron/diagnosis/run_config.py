"""One run's own needs: its files, data, tokenizer, and whether its plan fits.

    python -m apo_megatron.diagnosis.run_config RUN.yaml 8 [section.field=value ...]

0 for 8: the fewest ranks that the layout takes.
A process of its own, so that what it loads can be kept from the network, and cannot take the doctor with it.
Prints the findings as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from apo_megatron.config import RLConfig, load_config
from apo_megatron.diagnosis.finding import Finding, Section
from apo_megatron.diagnosis.plan_command import DEFAULT_DEVICE_GIB, default_world
from apo_megatron.errors import ConfigError, DataError, RewardError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.objectives.unread_settings import unread_note
from apo_megatron.parallel.device_memory import gpu_memory_bytes
from apo_megatron.planning.plan import Setting, make_plan
from apo_megatron.training_data import load_training_data

SECTION = Section("Run")
_GIB = 2**30


def findings_of(cfg: RLConfig, world_size: int) -> list[Finding]:
    """Settings without effect; data, tokenizer and reward, read as the run would; nothing is built."""
    settings = check_settings(cfg)
    if _is_to_be_fetched(cfg.model.hf_path):
        return [
            *settings,
            SECTION.warning(
                "model",
                f"model.hf_path={cfg.model.hf_path}: no such directory, and as a hub id not in the model "
                "cache, so tokenizer, data and plan were not looked at",
                "a run fetches it where there is a network: fetch it first, then check again",
            ),
        ]
    return [*settings, check_weights(cfg), check_data(cfg), check_plan(cfg, world_size)]


def check_settings(cfg: RLConfig) -> list[Finding]:
    """A warning where settings of methods change nothing."""
    unread = unread_note(cfg)
    if unread is None:
        return []
    return [SECTION.warning("settings", unread, "leave them out, or choose the method that reads them")]


def _is_to_be_fetched(hf_path: str) -> bool:
    """Whether it can only be a hub id, of which nothing is here."""
    if Path(hf_path).is_dir():
        return False
    try:
        return not isinstance(try_to_load_from_cache(hf_path, "config.json"), str)
    except HFValidationError:  # not of the form of a hub id
        return False


def check_weights(cfg: RLConfig) -> Finding:
    """That the initial weights are where the configuration says."""
    path = Path(cfg.model.megatron_path or cfg.model.hf_path)
    field = "model.megatron_path" if cfg.model.megatron_path else "model.hf_path"
    if not path.is_dir() and cfg.model.megatron_path is None:
        return SECTION.ok("weights", f"{field}={path}: a hub id, fetched when the run starts")
    pattern = "metadata.json" if cfg.model.megatron_path else "*.safetensors"
    files = list(path.glob(pattern))
    if not files:
        return SECTION.problem(
            "weights", f"{field}={path}: no {pattern} there", "convert or download it first"
        )
    return SECTION.ok(
        "weights", f"{field}={path}, {sum(file.stat().st_size for file in path.rglob('*')) / _GIB:.1f} GiB"
    )


def check_data(cfg: RLConfig) -> Finding:
    """Every row, the tokenizer and the reward, as at the start of the run."""
    try:
        data = load_training_data(cfg)
    except (ConfigError, DataError, RewardError, OSError) as error:
        return SECTION.problem("data and tokenizer", str(error), "the run would end with this message")
    return SECTION.ok(
        "data and tokenizer", f"{data.prompts.num_prompts} prompts, {len(data.held_out)} held out"
    )


def check_plan(cfg: RLConfig, world_size: int) -> Finding:
    """The prediction of ``apo-doctor plan``."""
    measured = gpu_memory_bytes()
    device_bytes = measured or DEFAULT_DEVICE_GIB * _GIB
    try:
        plan = make_plan(cfg, Setting(read_architecture(cfg.model.hf_path), world_size, device_bytes))
    except ConfigError as error:
        return SECTION.problem("plan", str(error), "apo-doctor plan proposes layouts")
    device = "this GPU" if measured else f"a GPU of {DEFAULT_DEVICE_GIB:g} GiB (there is none here)"
    needed, usable = plan.peak / _GIB, plan.usable_bytes / _GIB
    found = f"{needed:.1f} GiB of {usable:.1f} GiB on {world_size} rank(s), each {device}"
    advice = "apo-doctor plan shows where it goes, and layouts that fit"
    if plan.fits:
        return SECTION.ok("plan", found)
    return SECTION.problem("plan", found, advice) if measured else SECTION.warning("plan", found, advice)


def main() -> None:
    path, world_size, *overrides = sys.argv[1:]
    cfg = load_config(RLConfig, path, overrides)
    found = findings_of(cfg, int(world_size) or default_world(cfg.parallel))
    print(json.dumps([asdict(finding) for finding in found]))


if __name__ == "__main__":
    main()
