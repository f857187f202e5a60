"""The configuration of the evaluation command."""

from __future__ import annotations

from collections import Counter

from pydantic import Field

from apo_megatron.config.benchmarks import BenchmarkConfig
from apo_megatron.config.evaluation import GenerationsConfig, MeasurementConfig
from apo_megatron.config.model import ModelConfig
from apo_megatron.config.reward import VerifierConfig
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.config.section import FrozenList, Section, rule


class EvalConfig(Section):
    """``python -m apo_megatron.evaluate``."""

    benchmarks: FrozenList[BenchmarkConfig] = Field(description="What to evaluate on: names, or objects.")
    model: ModelConfig | None = Field(None, description="What to evaluate; null with generations.")
    generations: GenerationsConfig | None = Field(None, description="Judge these instead of drawing samples.")
    evaluation: MeasurementConfig = MeasurementConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: VerifierConfig = VerifierConfig()
    output_dir: str = Field("runs/evaluation", description="Folder for generations, results and report.")
    label: str | None = Field(
        None, description="What the report calls it; null = model.megatron_path, model.hf_path or the file."
    )

    @property
    def shown_label(self) -> str:
        """``label``, or what was evaluated."""
        if self.label is not None:
            return self.label
        if self.generations is not None:
            return self.generations.path
        assert self.model is not None, "a rule demands one of them"
        return self.model.megatron_path or self.model.hf_path

    @rule
    def something_is_evaluated(self) -> str | None:
        """Either `model` or `generations` must be given, not both; and at least one of `benchmarks`."""
        if (self.model is None) == (self.generations is None):
            found = "neither is given" if self.model is None else "both are given"
            return f"model and generations: {found}; name a model, or a file of what one has answered"
        if not self.benchmarks:
            return "benchmarks=[]: name at least one, such as math500"
        return None

    @rule
    def benchmarks_are_different(self) -> str | None:
        """`benchmarks` must have different names: results and files are called by them."""
        twice = [name for name, count in Counter(b.name for b in self.benchmarks).items() if count > 1]
        return f"benchmarks names {twice[0]!r} twice: give the second one another name" if twice else None

    @rule
    def every_benchmark_measures_something(self) -> str | None:
        """`num_samples` of each of `benchmarks` must be at least the smallest of `evaluation.ks`."""
        smallest = min(self.evaluation.ks)
        for benchmark in self.benchmarks:
            if benchmark.num_samples is not None and benchmark.num_samples < smallest:
                return (
                    f"benchmarks: {benchmark.name} has num_samples={benchmark.num_samples}, fewer than the "
                    f"smallest of evaluation.ks={list(self.evaluation.ks)}: raise it, or name a smaller K"
                )
        return None

    @rule
    def generations_are_of_one_benchmark(self) -> str | None:
        """With `generations`, there is one of `benchmarks`: the file does not say which it is about."""
        if self.generations is not None and len(self.benchmarks) > 1:
            return f"generations with {len(self.benchmarks)} benchmarks: evaluate each file by itself"
        return None

    @rule
    def servers_read_hugging_face_checkpoints(self) -> str | None:
        """`model.megatron_path` needs `rollout.engine` = embedded: SGLang reads `model.hf_path`."""
        if self.model is None or self.model.megatron_path is None or self.rollout.engine == "embedded":
            return None
        return (
            f"model.megatron_path={self.model.megatron_path} with rollout.engine={self.rollout.engine}: "
            "convert it with apo-convert megatron-to-hf and name the result as model.hf_path"
        )
