"""A calibrated policy and what was promised of it: one YAML file that ``test`` and ``generate`` take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import yaml

from dynamax.calibration.risk import Method
from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.sampling import Greedy
from dynamax.errors import UserError
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.policies.combine import OnlyAt
from dynamax.tasks.base import Task

Level = Literal["document", "answer", "token"]
"""What one loss is: the share of a document's tokens, whether any, or a token by itself."""


def losses(wrong_N: np.ndarray, starts_D: np.ndarray, level: Level) -> np.ndarray:
    """The losses in [0, 1] of documents: one a document, ``D``, or one a token, ``N``.

    Args:
        wrong_N: Whether each of their tokens is wrong, document after document.
        starts_D: Where each document begins; the first at 0, none without a token.
        level: What one loss is.
    """
    if level == "token":
        return wrong_N.astype(float)
    if level == "answer":
        return np.maximum.reduceat(wrong_N, starts_D).astype(float)
    return np.add.reduceat(wrong_N.astype(float), starts_D) / np.diff([*starts_D, len(wrong_N)])


def score_loss(full: float, early: float) -> float:
    """The loss in [0, 1] of one example: how much lower its score is than that of the full model's answer."""
    return max(0.0, full - early)


@dataclass(frozen=True)
class TaskScore:
    """The score that a promise is about, and how its examples are asked.

    Args:
        task: Class name of the task.
        score: Name of the score.
        chat: Whether prompts stand in the chat template.
    """

    task: str
    score: str
    chat: bool = False


@dataclass(frozen=True)
class Promise:
    """What was promised of a policy, and on what grounds.

    Args:
        level: What one loss is: the share of an answer's tokens that are not the full model's (``document``), whether
            any is not (``answer``), a single token (``token``), or how much lower an example's score is than that of
            the full model's answer (``score``).
        epsilon: The mean loss is at most this,
        delta: with a probability of at least 1 less this, over the choice of the calibration's documents.
        method: How that was tested: ltt, ucb, crc or naive; see ``dynamax.calibration.promised``.
        documents: Documents that it was tested on; others were used to choose what was tested. For a task's score,
            they are the full model's answers to examples.
        tokens: Their tokens.
        loss: Their mean loss.
        blocks: Blocks a token of them; for a task's score, a token of the policy's own answers.
        data: Fingerprint of the texts.
        model: Fingerprint of the model.
        reason: Why nothing could be promised, where the policy is Never.
        task: The score that it is about; None where losses are of tokens.
    """

    level: Level | Literal["score"]
    epsilon: float
    delta: float
    method: Method
    documents: int
    tokens: int
    loss: float
    blocks: float
    data: str
    model: str
    reason: str | None = None
    task: TaskScore | None = None

    def __post_init__(self) -> None:
        if (self.level == "score") != (self.task is not None):
            raise UserError(
                f"A promise was given level {self.level} and task {self.task}; a task is named where the level is "
                f"score, and there alone. Take the promise as `dynamax calibrate` wrote it."
            )

    def losses(self, wrong_T: np.ndarray) -> np.ndarray:
        """The losses of one document whose tokens are wrong where ``wrong_T`` says so; see ``losses``."""
        assert self.level != "score", "those are losses of scores"
        return losses(wrong_T, np.array([0]), self.level)

    def check_task(self, task: Task, *, chat: bool) -> None:
        """Refuse (UserError) another task than the one whose score the promise is about, or one asked otherwise."""
        here = TaskScore(type(task).__name__, task.headline, chat)
        if self.task not in (None, here):
            raise UserError(
                f"The promise is about {self.task}, but this run would measure {here}. Test on that task, or leave the "
                f"promise out."
            )

    def check_decoder(self, decoder: Decoder) -> None:
        """Refuse (UserError) another way of decoding than the one that a promise about a task's score is about."""
        exact = isinstance(decoder, EarlyExit) and decoder.teacher_forced
        if self.task is not None and not (exact and isinstance(decoder.sampler, Greedy)):
            raise UserError(
                f"The promise is about answers of EarlyExit with exact state, decoded greedily, but this run has "
                f"{type(decoder).__name__} with {decoder.options()} and {type(decoder.sampler).__name__}. Leave "
                f"decoder out and set sampler to Greedy, or leave the promise out."
            )

    def check_model(self, fingerprint: str) -> None:
        """Refuse (UserError) another model than the one that the promise is about."""
        if self.model != fingerprint:
            raise UserError(
                f"The promise is about the model {self.model}, but this one is {fingerprint}. Calibrate anew, or leave "
                f"the promise out."
            )

    @property
    def text(self) -> str:
        """The promise in words."""
        if self.task is not None:
            score = f"{self.task.score} of {self.task.task}"
            what = f"{score} below the full model's, mean over examples, 0 where it is above"
            counted = f"{self.documents} examples"
        else:
            what = {
                "document": "share of tokens unlike the full model's, mean over documents",
                "token": "share of tokens unlike the full model's",
                "answer": "share of documents with a token unlike the full model's",
            }[self.level]
            counted = f"{self.documents} documents"
        if self.method == "naive":
            return f"{what}: {self.loss:.2%} on {counted}; nothing is promised"
        chance = "on average" if self.method == "crc" else f"with probability {1 - self.delta:.0%}"
        return f"{what}: at most {self.epsilon:.1%} {chance} ({self.method}, {counted})"


def described(policy: TerminationPolicy, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A calibrated policy as class name and options, which YAML can hold.

    Args:
        policy: What ``calibrate`` found: ``OnlyAt`` over the policy that was given, or ``Never``.
        recipe: Class name and options of the policy that was given.
    """
    if not isinstance(policy, OnlyAt):
        return {"class_path": "Never"}
    levels = policy.threshold
    assert isinstance(policy.policy, ScorePolicy), "other policies are refused"
    assert isinstance(levels, Mapping), "a threshold for each exit"
    options = {
        **recipe.get("init_args", {}),
        **policy.policy.fitted_options,
        "threshold": {int(depth): float(level) for depth, level in levels.items()},
    }
    inner = {"class_path": recipe["class_path"].rpartition(".")[2], "init_args": options}
    return {"class_path": "OnlyAt", "init_args": {"policy": inner, "depths": sorted(levels)}}


def as_yaml(policy: Mapping[str, Any], promise: Promise, command: str) -> str:
    """The content of the file.

    Args:
        policy: Class name and options.
        promise: What is promised of it.
        command: What was called.
    """
    head = f"# {promise.text}\n# {command}\n"
    return head + yaml.safe_dump({"policy": dict(policy), "promise": asdict(promise)}, sort_keys=False)
