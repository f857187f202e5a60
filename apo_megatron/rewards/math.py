"""Mathematical answers, judged by math-verify in worker processes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from apo_megatron.config.reward import RewardConfig
from apo_megatron.rewards.answers import final_answer, plain_answer
from apo_megatron.rewards.equivalence import is_equivalent
from apo_megatron.rewards.judging import Judge, gold_answer, judged_rewards, voted_answers
from apo_megatron.rewards.workers import WorkerPool
from apo_megatron.types import Completion, Prompt

MAX_CACHED = 20_000  # verdicts that are kept; a pair is at most two texts of some 1,000 characters

_Pair = tuple[str, str]  # gold, final answer


class MathReward:
    """Right is what math-verify finds equal to the gold answer in column ``answer_field``.

    The workers see the final answer only (``answers.final_answer``), so completions that reason differently
    and end alike are verified once, and not again while the verdict is among the latest ``MAX_CACHED``. An
    answer whose worker was killed at the deadline or crashed is not judged: NaN, and not remembered.
    """

    def __init__(self, cfg: RewardConfig) -> None:
        self._field = cfg.answer_field
        self.required_fields: Mapping[str, type] = {cfg.answer_field: object}  # its type is seen by score
        self._workers = WorkerPool(cfg.num_workers, cfg.timeout, preload=["math_verify"])
        self._verdicts: OrderedDict[_Pair, bool] = OrderedDict()

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """Rewards as ``judged_rewards`` says; DataError for a prompt without a gold answer."""
        return self.score_batch([prompt], [completions])[0]

    def score_batch(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[float]]:
        """``score`` of all prompts: every different pair of gold and answer is verified once, in one go."""
        golds = [gold_answer(prompt, self._field) for prompt in prompts]
        finals = {
            completion.text: final_answer(completion.text)
            for row in completions
            for completion in row
            if completion.finish_reason == "stop"
        }
        verdicts = self._verify(
            {
                (gold, finals[completion.text])
                for gold, row in zip(golds, completions, strict=True)
                for completion in row
                if completion.text in finals
            }
        )

        def judge(gold: str) -> Judge:
            return lambda text: verdicts[gold, finals[text]]

        return [judged_rewards(row, judge(gold)) for gold, row in zip(golds, completions, strict=True)]

    def answers(
        self, prompt: Prompt, completions: Sequence[Completion], rewards: Sequence[float]
    ) -> list[str | None]:
        """Answers as ``voted_answers`` says, the wrong ones read by ``plain_answer``."""
        return voted_answers(completions, rewards, gold_answer(prompt, self._field), plain_answer)

    def _verify(self, pairs: set[_Pair]) -> dict[_Pair, bool | None]:
        verdicts: dict[_Pair, bool | None] = {pair: self._verdicts.get(pair) for pair in pairs}
        new = sorted(pair for pair, verdict in verdicts.items() if verdict is None)
        verdicts.update(zip(new, self._workers.map(is_equivalent, new), strict=True))
        for pair, verdict in verdicts.items():
            if verdict is not None:
                self._verdicts[pair] = verdict
                self._verdicts.move_to_end(pair)
        while len(self._verdicts) > MAX_CACHED:
            self._verdicts.popitem(last=False)
        return verdicts

    def close(self) -> None:
        """End the workers; the next answer to verify starts new ones."""
        self._workers.close()
