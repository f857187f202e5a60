"""How the groups of a step come about: what is drawn, stopped, kept, dropped and drawn again.

Prompts are spread over the ranks, and a group stays on its rank until all its samples are there and scored.
Then all ranks agree which groups the step trains on, and get them all.

    rounds     a step draws in rounds: one, and more while groups are missing
    ahead      asynchronous: the first round of the next step runs while this one trains
    stopped    oversampling: what still runs once enough groups are complete. Its prompts are drawn again,
               or go on with the tokens that they have (partial_rollouts)
    refills    dynamic sampling (drop_zero_spread): rounds that replace groups that teach nothing, which for
               most advantage estimators are those of equal rewards

Every prompt that is taken from the data is trained on once, or dropped once because its group taught nothing.
How many samples it gets is decided when its draw begins (``allocation.py``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apo_megatron.config.schema import RLConfig
from apo_megatron.data.prompts import PromptLoader
from apo_megatron.errors import RolloutError
from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.world import World
from apo_megatron.rewards.registry import Reward
from apo_megatron.rollout.allocation import SampleAllocator
from apo_megatron.rollout.draws import Draw, Draws, Verdict
from apo_megatron.rollout.engine import Generation, Progress, RolloutEngine
from apo_megatron.rollout.gathering import SampleColumns, gather_groups
from apo_megatron.rollout.groups import check_versions, groups_that_teach, score_groups, step_sampling
from apo_megatron.rollout.step_counts import StepCounts
from apo_megatron.rollout.waiting import LateProgress, finish_generation, start_generation
from apo_megatron.types import Prompt, Sample, SampleGroup

if TYPE_CHECKING:
    from apo_megatron.weights.source import WeightSource

_ROUNDING = 1e-9  # 1.1 * 10 is a little more than 11


@dataclass(frozen=True)
class StepSamples:
    """What one step trains on."""

    groups: list[SampleGroup]  # data.prompts_per_step, scored, in the order in which prompts were drawn
    metrics: dict[str, float]
    note: str | None = None  # for the person who watches the run
    # Groups that taught nothing and that others took the place of: all but their tokens and log-probs.
    dropped: list[tuple[Prompt, SampleColumns]] = field(default_factory=list)


@dataclass(frozen=True)
class _Round:
    """Draws that are under way."""

    generation: Generation
    step: int  # that it draws for
    own: list[tuple[Draw, int]]  # of this rank, with their numbers of requests
    enough: int  # complete groups, over all ranks, that end it

    def num_complete(self) -> int:
        """Groups of this rank that are surely complete: an unfinished request keeps one from it at most."""
        num_requests = sum(count for _, count in self.own)
        return max(0, len(self.own) - (num_requests - self.generation.num_finished()))


class GroupSampler:
    """Draws the groups of one step after the other. Collective: every rank calls every method.

    The state is the same on every rank, but for the samples of groups that are not complete. The version of
    a step's weights is ``step`` at most: a step that has nothing to learn from leaves it as it is.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: PromptLoader,
        reward: Reward,
        cfg: RLConfig,
        parallel: World,
    ) -> None:
        self._engine, self._reward, self._cfg, self._parallel = engine, reward, cfg, parallel
        self._allocator = SampleAllocator(cfg.rollout)
        self._draws = Draws(prompts, parallel.world, self._allocator.allocate)
        self._round: _Round | None = None
        self._counts = StepCounts()  # of the step that is being drawn
        self._progress = LateProgress()
        self._has_noted = False

    def next_groups(self, step: int, source: WeightSource, progress: Progress | None = None) -> StepSamples:
        """The groups of ``step`` (counted from 0). ``source`` must hold the engine's current weights.

        Asynchronous: the next step's begin to be drawn before this returns. Raises RolloutError where the
        engine fails or answers with samples of other weights, RewardError and DataError where judging does,
        each on every rank.
        """
        assert self._engine.policy_version <= step, "a step adds one version at most"
        with self._progress.told_to(progress):
            while self._round is not None or (needed := self._num_needed()):
                if self._round is None:
                    self._begin_round(step, needed)
                self._finish_round(source)
        chosen, dropped = self._choose()
        # What the next step may not train on: it has the next version, if this one trains.
        self._drop_older(self._engine.policy_version + 1 - self._cfg.rollout.max_staleness)
        self._count_carried()
        own = [draw.group for draw in chosen if draw.group is not None]
        order = [(d.prompt, d.owner, d.verdict.columns) for d in chosen if d.verdict is not None]
        groups = gather_groups(own, order, self._parallel)
        assert len(groups) == self._cfg.data.prompts_per_step
        metrics = self._counts.metrics(groups, self._engine.policy_version)
        samples = StepSamples(
            groups,
            metrics,
            self._note(step),
            [(draw.prompt, draw.verdict.columns) for draw in dropped if draw.verdict is not None],
        )
        self._counts = StepCounts()
        is_last = step + 1 == self._cfg.train.num_steps
        if self._cfg.rollout.asynchronous and not is_last and (needed := self._num_needed()):
            self._begin_round(step + 1, needed)
        return samples

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The engine may get other weights inside: nothing is under way.

        Asynchronous: what was begun is drawn to its end before, or stopped and continued after
        (partial_rollouts). The trainer's weights may be newer than the engine's already.
        """
        ahead = self._round
        if ahead is not None:
            self._finish_round(None, enough=0 if self._cfg.rollout.partial_rollouts else ahead.enough)
        yield
        self._drop_older(self._engine.policy_version - self._cfg.rollout.max_staleness)
        draws = self._draws.open()
        if ahead is not None and (needed := min(self._num_needed(), len(draws))):
            self._start(draws, ahead.step, needed)

    def state_dict(self) -> dict[str, Any]:
        """Prompts that were taken from the data but not used up; belongs to the state of the data.

        Also how often prompts were solved, where that decides how many samples they get.
        """
        known = self._allocator.solve_rates
        return self._draws.state_dict() | ({"solve_rates": dict(known)} if known else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw what was under way anew, before other prompts. Raises CheckpointError for other data."""
        assert self._round is None, "nothing may be under way"
        self._draws.load_state_dict(state)
        self._allocator.go_on_from(state.get("solve_rates", {}))

    def _num_needed(self) -> int:
        """Complete groups that the next round should add; 0: the step has what it needs."""
        wanted = self._cfg.data.prompts_per_step
        complete = self._draws.complete()
        missing = wanted - sum(self._is_accepted(verdict) for _, verdict in complete)
        if self._counts.num_rounds == 0 or missing <= 0:
            return max(0, missing)
        if self._counts.num_rounds > self._cfg.rollout.max_refills:
            return max(0, wanted - len(complete))
        # As many as give the missing ones at the rate of this step so far, at most a whole step's.
        num_accepted = max(1, self._counts.num_accepted)
        return min(wanted, max(missing, math.ceil(missing * self._counts.num_complete / num_accepted)))

    def _is_accepted(self, verdict: Verdict) -> bool:
        return verdict.teaches or not self._cfg.rollout.drop_zero_spread

    def _begin_round(self, step: int, needed: int) -> None:
        count = math.ceil(self._cfg.rollout.oversampling * needed - _ROUNDING)
        carried = self._draws.open()
        new = self._draws.begin(max(0, count - len(carried)))
        self._counts.num_rounds += 1
        self._counts.num_prompts_drawn += len(new)
        self._start(carried + new, step, needed)

    def _start(self, draws: Sequence[Draw], step: int, enough: int) -> None:
        sampling = step_sampling(self._cfg, step, self._counts.num_starts)
        self._counts.num_starts += 1
        own = [draw for draw in draws if draw.owner == self._parallel.rank]
        requests = [draw.requests() for draw in own]
        everything = [request for of_draw in requests for request in of_draw]
        generation = start_generation(self._engine, everything, sampling, self._progress)
        counts = [len(of_draw) for of_draw in requests]
        self._round = _Round(generation, step, list(zip(own, counts, strict=True)), enough)

    def _finish_round(self, source: WeightSource | None, enough: int | None = None) -> None:
        """Wait for the round and take in what it has drawn."""
        this, self._round = self._round, None
        assert this is not None, "start comes first"
        started = time.monotonic()
        shares, is_whole = finish_generation(
            this.generation,
            self._engine,
            source,
            self._parallel,
            lambda: self._take_in(this),
            this.enough if enough is None else enough,
            this.num_complete,
        )
        self._counts.wait_seconds += time.monotonic() - started
        verdicts = [verdict for share, _ in shares for verdict in share]
        self._draws.complete_with(verdicts)
        num_stale = sum(stale for _, stale in shares)
        self._counts.num_complete += len(verdicts)
        self._counts.num_accepted += sum(self._is_accepted(verdict) for verdict in verdicts)
        self._counts.num_samples_stale += num_stale
        unfinished = self._draws.open()
        if is_whole and not verdicts:
            raise RolloutError(
                f"not one of {len(unfinished)} groups could be completed: {num_stale} samples were drawn "
                f"with weights older than rollout.max_staleness={self._cfg.rollout.max_staleness} allows, "
                "the others were cut off by the engine. Its logs should say why"
            )
        if not self._cfg.rollout.partial_rollouts:
            self._counts.num_unfinished += len(unfinished)
            self._draws.give_back(unfinished)

    def _take_in(self, this: _Round) -> tuple[list[Verdict], int]:
        """Sort the completions of this rank into their groups and score those that are complete.

        Returns what the other ranks must know of these, and the number of samples that are too old.
        """
        rollout, newest = self._cfg.rollout, self._engine.policy_version
        oldest = newest - rollout.max_staleness
        # Where samples wait or go on while weights change, one that is too old is only drawn again.
        oldest_allowed = 0 if rollout.asynchronous or rollout.partial_rollouts else oldest
        results = iter(this.generation.results())
        num_stale = 0
        complete = []
        for draw, num_requests in this.own:
            drawn = [completion for _ in range(num_requests) for completion in next(results)]
            check_versions(draw.prompt, drawn, oldest_allowed, newest)
            draw.replace_begun(drawn)
            num_stale += draw.drop_older(oldest)
            if draw.is_complete():
                draw.group = SampleGroup(draw.prompt, [Sample(c) for c in draw.completions])
                complete.append(draw)
        groups = [draw.group for draw in complete if draw.group is not None]
        score_groups(groups, self._reward, self._cfg.objective)
        verdicts = [
            Verdict(draw.number, draw.oldest_version(), teaches, SampleColumns.of(group.samples))
            for draw, group, teaches in zip(
                complete, groups, groups_that_teach(groups, self._cfg), strict=True
            )
        ]
        return verdicts, num_stale

    def _choose(self) -> tuple[list[Draw], list[Draw]]:
        """The draws of this step, first drawn first, and those that are dropped; groups that teach nothing
        only fill it up."""
        complete = self._draws.complete()
        accepted = [draw for draw, verdict in complete if self._is_accepted(verdict)]
        rejected = [draw for draw, verdict in complete if not self._is_accepted(verdict)]
        wanted = self._cfg.data.prompts_per_step
        fillers = rejected[: max(0, wanted - len(accepted))]
        chosen = sorted(accepted[:wanted] + fillers, key=lambda draw: draw.number)
        self._counts.num_fillers = len(fillers)
        dropped = rejected[len(fillers) :]
        self._counts.num_zero_spread = len(dropped)
        self._draws.use_up(chosen + dropped)
        for draw in chosen + dropped:
            if draw.verdict is not None:
                self._allocator.note(draw.prompt, draw.verdict.columns.rewards)
        return chosen, dropped

    def _drop_older(self, oldest_version: int) -> None:
        """Forget samples with older tokens; where nothing is carried over, their prompts are drawn anew."""
        if not self._cfg.rollout.partial_rollouts:
            too_old = [d for d, verdict in self._draws.complete() if verdict.oldest_version < oldest_version]
            self._draws.give_back(too_old)
            self._counts.num_surplus += len(too_old)
        elif draws := self._draws.all():
            num_stale = sum(draw.drop_older(oldest_version) for draw in draws)
            self._counts.num_samples_stale += sum(all_gather_objects(num_stale, self._parallel))

    def _count_carried(self) -> None:
        if draws := self._draws.all():
            num_carried = sum(len(draw.completions) for draw in draws)
            self._counts.num_samples_carried = sum(all_gather_objects(num_carried, self._parallel))

    def _note(self, step: int) -> str | None:
        """Said once; the metrics have it every time."""
        num_fillers, rollout = self._counts.num_fillers, self._cfg.rollout
        if not num_fillers or self._has_noted:
            return None
        self._has_noted = True
        return (
            f"step {step + 1}: {num_fillers} of {self._cfg.data.prompts_per_step} groups teach nothing (most "
            "often because they are all right or all wrong), after "
            f"rollout.max_refills={rollout.max_refills} further rounds. Raise it or rollout.oversampling, or "
            "choose prompts that are solved sometimes (said once: see rollout/num_groups_filled_up)"
        )
