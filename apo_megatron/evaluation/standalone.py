"""One benchmark of the evaluation command: what its samples depend on, which are missing, what they say.

Samples lie in output_dir/generations/NAME (sample_store.py); nothing else is kept of a run, so a killed one
goes on with the same command, and its end is that of a run nobody killed.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from apo_megatron.config import EvalConfig, ModelConfig
from apo_megatron.errors import DataError
from apo_megatron.evaluation.benchmarks import ANSWER, LoadedBenchmark
from apo_megatron.evaluation.drawing import Unit, is_drawn, plan_units
from apo_megatron.evaluation.existing import Generations
from apo_megatron.evaluation.harness import evaluation_sampling
from apo_megatron.evaluation.result import PassAtKResult, ProblemTally, make_result
from apo_megatron.evaluation.sample_store import claim_folder, read_samples
from apo_megatron.files import write_atomically, written_aside
from apo_megatron.models.hf_config import resolve_model_path
from apo_megatron.rewards.interface import AnswerReward
from apo_megatron.rollout.engine import SamplingParams

_MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")
RESULTS_FILE = "results.json"
# Samples that a server draws in one request: few, because what is not complete is lost with the process.
_SERVER_UNIT = 16
_MAX_SERVER_UNITS = 256  # under way at once, so that servers always have work


class BenchmarkRun:
    """The evaluation of ``cfg`` on one benchmark."""

    def __init__(self, cfg: EvalConfig, benchmark: LoadedBenchmark) -> None:
        self.name, self.prompts, self.reward = benchmark.name, benchmark.prompts, benchmark.reward
        self.num_samples = benchmark.num_samples or cfg.evaluation.num_samples
        self.folder = Path(cfg.output_dir, "generations", benchmark.name)
        self._cfg = cfg
        self._problems_file = Path(cfg.output_dir, "problems", f"{benchmark.name}.jsonl")
        self._has_answers = isinstance(benchmark.reward, AnswerReward)
        self._max_problems = next(b.max_problems for b in cfg.benchmarks if b.name == benchmark.name)

    @property
    def sampling(self) -> SamplingParams:
        return evaluation_sampling(self._cfg.evaluation, self._cfg.rollout, self.num_samples)

    @property
    def max_running(self) -> int:
        """Units that are drawn at once."""
        return 1 if self._cfg.rollout.engine == "embedded" else _MAX_SERVER_UNITS

    def prepare(self) -> list[int]:
        """Claim the folder and write the problems; for the main rank, before any engine is there.

        Returns the numbers of samples that the drawing is planned by (``claim_folder``). Raises DataError
        where the folder has samples of other settings, or a file of generations too few.
        """
        generations = self.generations()
        if generations is not None:
            generations.check()
        stages = claim_folder(self.folder, self._settings(), self.num_samples)
        self._problems_file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(self._problems_file) as file:
            for prompt in self.prompts:
                gold = prompt.fields.get(ANSWER)
                line = {
                    "problem": prompt.prompt_id,
                    "prompt": prompt.text,
                    "gold": None if gold is None else str(gold),
                }
                file.write(json.dumps(line).encode("ascii") + b"\n")
        return stages

    def generations(self) -> Generations | None:
        """The samples to judge, where they are not to be drawn."""
        if self._cfg.generations is None:
            return None
        return Generations(
            self._cfg.generations, self.prompts, self.num_samples, has_others=self._max_problems is not None
        )

    def drawn(self) -> Mapping[str, set[int]]:
        """prompt id -> numbers of the samples that are on disk."""
        found: defaultdict[str, set[int]] = defaultdict(set)
        for sample in read_samples(self.folder):
            found[sample.problem].add(sample.sample)
        return found

    def missing_units(self, drawn: Mapping[str, set[int]], stages: Sequence[int]) -> list[Unit]:
        """What is still to be drawn. ``stages``: what ``prepare`` returned; what was asked for first is drawn
        as it was planned then, so that asking for more leaves it alone."""
        is_embedded = self._cfg.rollout.engine == "embedded"
        unit_size = self._cfg.rollout.max_batch_size if is_embedded else _SERVER_UNIT
        units = [
            unit
            for start, stop in pairwise([0, *stages])
            for unit in plan_units(self.prompts, range(start, stop), unit_size)
        ]
        return [unit for unit in units if not is_drawn(unit, drawn)]

    def result(self) -> PassAtKResult:
        """What the samples on disk say, once all are there."""
        tallies = {prompt.prompt_id: ProblemTally() for prompt in self.prompts}
        for sample in read_samples(self.folder):
            if sample.sample < self.num_samples:  # fewer may be wanted than were drawn once
                tallies[sample.problem].add(sample, self._has_answers)
        return make_result(
            prompt_ids=list(tallies),
            tallies=list(tallies.values()),
            num_samples=self.num_samples,
            cfg=self._cfg.evaluation,
            policy_version=0,
            has_answers=self._has_answers,
        )

    def _settings(self) -> dict[str, Any]:
        """All that samples and verdicts depend on, but not how many there are. Names are for messages."""
        cfg = self._cfg
        settings: dict[str, Any] = {}
        if cfg.generations is not None:
            path = Path(cfg.generations.path)
            settings["columns"] = cfg.generations.model_dump(mode="json", exclude={"path"})
            files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
            settings["files of generations (names, sizes, times)"] = _fingerprint(files)
        else:
            assert cfg.model is not None, "a rule demands one of them"
            for name in ("engine", "max_new_tokens", "stop_token_ids"):
                settings[f"rollout.{name}"] = getattr(cfg.rollout, name)
            for name in ("temperature", "top_p", "seed"):
                settings[f"evaluation.{name}"] = getattr(cfg.evaluation, name)
            settings["model.dtype"] = cfg.model.dtype
            if cfg.rollout.engine == "sglang":
                settings["rollout.sglang.server_args"] = cfg.rollout.sglang.server_args
            settings["files of the model (names, sizes, times)"] = _fingerprint(_model_files(cfg.model))
        benchmark = next(b for b in cfg.benchmarks if b.name == self.name)
        is_users = benchmark.reward is not None and ":" in benchmark.reward
        settings["reward"] = benchmark.reward if is_users else type(self.reward).__name__
        settings["problems"] = self._digest()
        return settings

    def _digest(self) -> str:
        """Of what is asked, and of what it is judged by."""
        digest = hashlib.blake2b(digest_size=8)
        for prompt in self.prompts:
            fields = json.dumps(dict(prompt.fields), sort_keys=True, default=str)
            digest.update(json.dumps([prompt.prompt_id, prompt.text, fields]).encode("ascii"))
            digest.update(prompt.token_ids.tobytes())
        return digest.hexdigest()


def _model_files(model: ModelConfig) -> list[Path]:
    folder = resolve_model_path(model.hf_path)
    files = [path for path in folder.iterdir() if path.suffix in _MODEL_SUFFIXES]
    if model.megatron_path is not None:
        files += [path for path in Path(model.megatron_path).rglob("*") if path.is_file()]
    return sorted(files)


def _fingerprint(files: Sequence[Path]) -> str:
    """Changes when a file is written anew; nothing is read, for checkpoints are large."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(json.dumps(stats).encode("ascii"), digest_size=8).hexdigest()


def check_results(cfg: EvalConfig) -> None:
    """Raises DataError where output_dir has results of benchmarks that ``cfg`` lacks: they would be lost."""
    path = Path(cfg.output_dir, RESULTS_FILE)
    if not path.exists():
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8"))["benchmarks"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not what an evaluation has written ({type(error).__name__}: {error}): remove it, or "
            "name another output_dir"
        ) from error
    lost = sorted(found.keys() - {benchmark.name for benchmark in cfg.benchmarks})
    if lost:
        raise DataError(
            f"{path}: has results on {', '.join(lost)}, which benchmarks does not name: name them, too (what "
            "is drawn is not drawn again), or another output_dir"
        )


def write_results(cfg: EvalConfig, results: Mapping[str, PassAtKResult]) -> None:
    """output_dir/results.json: whole or not at all."""
    content = {
        "label": cfg.shown_label,
        "benchmarks": {name: result.to_json() for name, result in results.items()},
    }
    write_atomically(Path(cfg.output_dir, RESULTS_FILE), json.dumps(content, indent=1) + "\n")
