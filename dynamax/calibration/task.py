"""From a task's examples to a policy with a promise about their score.

As for documents, but a loss is of an answer's score, and an answer is decoded freely: behind the first token that is
another than the full model's, one pass over the full model's answer does not tell what comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dynamax.calibration.calibrate import Calibrated, Progress, check, concluded, searched
from dynamax.calibration.promise import Promise, TaskScore, score_loss
from dynamax.calibration.risk import Method, promised
from dynamax.calibration.scores import fingerprint, scored, split, texts
from dynamax.calibration.search import Searched, frontier
from dynamax.data.text import Document
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.generation import DAY, GenerationOptions
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.stream import Answer
from dynamax.tasks.base import Example, GenerationTask, Scale, Task

SCALES: dict[Scale, str] = {"binary": "0 or 1", "fraction": "from 0 to 1", "any": "any number"}


def options_for(engine: Engine, example: Example, sampler: Sampler | None) -> GenerationOptions:
    """How an example is answered: where its answer ends, and how tokens are drawn; None as the model itself says."""
    return engine.options(
        sampler=sampler, max_new_tokens=example.max_new_tokens, stop_strings=example.stop_strings or None
    )


@dataclass(frozen=True)
class Asked:
    """An example, and what the full model answers.

    Attributes:
        example: The example.
        prompt_1T: Its tokens.
        document: The prompt with the answer.
        score: The answer's headline score.
    """

    example: Example
    prompt_1T: Tensor
    document: Document
    score: float


def calibrate_task(
    engine: Engine,
    policy: ScorePolicy,
    task: Task,
    *,
    epsilon: float,
    delta: float = 0.1,
    method: Method = "ltt",
    share: float = 0.5,
    chat: bool = False,
    progress: Progress = lambda parts, label: parts,
) -> Calibrated:
    """Thresholds, and the exits that are asked, at which a task's score is at most epsilon below the full model's.

    The loss of an example is how much lower the headline score of its greedy answer is than that of the full model's
    answer; 0 where it is not lower. Candidates are those of ``frontier``. They decode one after the other, the surest
    first, until the promise of one does not hold: those after it would not be accepted.

    Args:
        engine: The model with its exits.
        policy: Its score is used; its threshold is not. If it must be fitted, it is fitted to the full model's answers
            to the searched examples.
        task: Its examples are drawn as those that the promise is about. Those of one origin stay on one side, but they
            depend on one another, and each counts: a promise over few origins is less sure than it says.
        epsilon: The bound on the mean loss, in (0, 1).
        delta: Probability in (0, 1) that the bound does not hold.
        method: ltt, ucb, crc or naive; see ``promised``.
        share: Part of the examples' origins, in (0, 1), that is searched; the rest tests.
        chat: Whether prompts are wrapped in the chat template.
        progress: See ``Progress``.

    Raises:
        UserError: If an option is out of range, the task does not fit, there are no exits or too few examples, or
            decoding would read something else than one pass over a text.
    """
    generating, (first, second) = usable(task), parted(task, share)
    check(engine, policy, epsilon=epsilon, delta=delta, share=share)
    full = engine.decoder(sampler=Greedy())
    asked = []
    for example in progress([*first, *second], "full model"):
        prompt_1T = engine.encode(example.prompt, chat=chat, day=DAY)
        answer, score = answered(engine, full, generating, example, prompt_1T)
        prompt = prompt_1T[0].tolist()
        asked.append(Asked(example, prompt_1T, Document(prompt + answer.tokens, len(prompt)), score))
    known, tested = asked[: len(first)], asked[len(first) :]
    documents = [each.document for each in tested]
    policy, search = searched(engine, policy, [each.document for each in known], documents, progress)
    test = [scored(text, policy) for text in texts(engine, progress(documents, "test"))]
    promise = Promise(
        level="score",
        epsilon=epsilon,
        delta=delta,
        method=method,
        documents=len(tested),
        tokens=sum(each.score_ET.shape[1] for each in test),
        loss=0.0,
        blocks=0.0,
        data=fingerprint(documents),
        model=engine.backbone.spec.fingerprint,
        task=TaskScore(type(task).__name__, task.headline, chat),
    )
    candidates = frontier(engine, policy, Searched.of(search))
    return Calibrated(*tested_in_order(engine, generating, candidates, tested, promise, progress), search, test)


def tested_in_order(
    engine: Engine,
    task: GenerationTask,
    candidates: Sequence[TerminationPolicy],
    tested: Sequence[Asked],
    asked: Promise,
    progress: Progress,
) -> tuple[TerminationPolicy, Promise]:
    """Let the candidates answer, the surest first, until the promise of one does not hold; see ``concluded``."""
    binary, tried = task.headline_scale == "binary", 0
    lost_CD: list[list[float]] = []
    blocks_C: list[float] = []
    for candidate in candidates:
        decoder = engine.decoder(candidate, EarlyExit, sampler=Greedy())
        losses, depths = [], []
        for each in progress(tested, f"test {tried + 1} of {len(candidates)}"):
            answer, score = answered(engine, decoder, task, each.example, each.prompt_1T)
            losses.append(score_loss(each.score, score))
            depths += answer.depths[1:]  # the first token comes from the prompt's own pass
        lost_CD.append(losses)
        blocks_C.append(float(np.mean(depths)))
        tried += 1
        if promised(np.array(lost_CD).T, asked.epsilon, asked.delta, asked.method, binary=binary) != tried - 1:
            break
    never, total = [0.0] * len(tested), float(engine.backbone.spec.depth)
    lost_DC = np.array([*lost_CD, never]).T
    return concluded(candidates[:tried], lost_DC, [*blocks_C, total], asked, binary=binary)


def usable(task: Task) -> GenerationTask:
    """The task, if its score can be promised.

    Raises:
        UserError: If it does not ask for words, its headline of one example is not in [0, 1], or smaller is better.
    """
    name = type(task).__name__
    if not isinstance(task, GenerationTask):
        raise UserError(
            f"calibrate was given the task {name}, which asks for likelihoods; wanted: one whose answers are decoded, "
            f"a GenerationTask such as Questions or TriviaQA. Name one of these, or calibrate on texts (--text)."
        )
    if task.headline_scale == "any" or not task.higher_is_better:
        raise UserError(
            f"calibrate was given the task {name}, whose score {task.headline} may be {SCALES[task.headline_scale]}, "
            f"and {'greater' if task.higher_is_better else 'smaller'} is better; wanted: a score of one example in "
            f"[0, 1], and greater is better. Name another task; for one of your own whose score is so, set "
            f"headline_scale to binary or fraction."
        )
    return task


def parted(task: Task, share: float) -> tuple[list[Example], list[Example]]:
    """The task's examples that are searched, and those that test.

    Raises:
        UserError: If there are none of one kind.
    """
    examples = task.examples()
    origins = [example.prompt if example.origin is None else example.origin for example in examples]
    first, second = split(examples, origins, share)
    if not first or not second:
        raise UserError(
            f"{type(task).__name__} has {len(examples)} examples that go back to {len(set(origins))} origins: "
            f"{len(first)} to search and {len(second)} to test. Wanted: at least one of each, and some hundreds for a "
            f"promise. Raise the task's limit, or change share."
        )
    return first, second


def answered(
    engine: Engine, decoder: Decoder, task: GenerationTask, example: Example, prompt_1T: Tensor
) -> tuple[Answer, float]:
    """The greedy answer to an example, and its headline score.

    Raises:
        UserError: If the score is not on the task's own scale.
    """
    answer = engine.answer(decoder, prompt_1T, options_for(engine, example, Greedy()))
    scores = task.score(example, answer.text)
    score = scores.get(task.headline, float("nan"))
    if not (score in (0.0, 1.0) if task.headline_scale == "binary" else 0.0 <= score <= 1.0):
        raise UserError(
            f"{type(task).__name__} gave example {example.id} the scores {scores}; its headline {task.headline} was to "
            f"be {SCALES[task.headline_scale]}. Correct the task's score, headline or headline_scale."
        )
    return answer, score
