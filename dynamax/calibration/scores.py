"""What a policy scores and what it loses along texts that are known, document by document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dynamax.data.text import Document, held_out, origin_hash
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.engine import Engine
from dynamax.policies.base import ScorePolicy, TerminationPolicy

T = TypeVar("T")


class Reads(NamedTuple):
    """What was read at an exit: its logits, rows of the output matrix alone, gates; whether it says one of the rows."""

    logits: bool
    rows: int
    gates: tuple[str, ...]
    few: bool


@dataclass(frozen=True)
class Scores:
    """One document at all exits; the position that the prompt's own pass decides is left out.

    Attributes:
        score_ET: The policy's score at each exit.
        right_ET: Whether the exit says what the full model says.
        reads: What the policy read at each exit to score it.
    """

    score_ET: np.ndarray
    right_ET: np.ndarray
    reads: tuple[Reads, ...]


@dataclass(frozen=True)
class Outcome:
    """One document under one policy.

    Attributes:
        wrong_T: Whether each token is another than the full model's.
        depth_T: Blocks that each token ran through.
    """

    wrong_T: np.ndarray
    depth_T: np.ndarray


def texts(engine: Engine, documents: Iterable[Document]) -> Iterable[TeacherForcedPass]:
    """Read documents one after the other; those in which nothing is decided behind the prompt are passed over."""
    for document in documents:
        if decided(document):
            start = max(0, document.prompt - 1)
            yield engine.read(torch.tensor([document.tokens[:-1]], device=engine.device), start=start)


def decided(document: Document) -> bool:
    """Whether a token stands behind the one that the prompt's own pass decides."""
    return len(document.tokens) - max(1, document.prompt) >= 2


@torch.inference_mode()
def scored(text: TeacherForcedPass, policy: ScorePolicy) -> Scores:
    """What the policy scores at every exit, and whether the exit is right."""
    scores = [policy.score(evidence)[1:] for evidence in text.exits]
    reads = tuple(
        Reads(each.logits_read, each.rows_read, each.gates_read, each.answers_from_few) for each in text.exits
    )
    right = [(evidence.answer.argmax(-1) == text.top_T)[1:] for evidence in text.exits]
    return Scores(array(torch.stack(scores).double()), array(torch.stack(right)), reads)


@torch.inference_mode()
def outcome(text: TeacherForcedPass, policy: TerminationPolicy) -> Outcome:
    """What comes of a document if the policy decides."""
    wrong_T = torch.zeros(len(text.logits_TV), dtype=torch.bool, device=text.logits_TV.device)
    depth_T = torch.full(wrong_T.shape, text.total, device=wrong_T.device)
    for evidence, leaves_T in text.departures(policy):
        few = evidence.answers_from_few
        said_T = evidence.answer.argmax(-1) if few else evidence.token  # the latter is kept, for the next policy
        wrong_T = wrong_T | leaves_T & (said_T != text.top_T)
        depth_T = depth_T.masked_fill(leaves_T, evidence.depth)
    return Outcome(array(wrong_T[1:]), array(depth_T[1:]))


def array(values: Tensor) -> np.ndarray:
    """A tensor as an array."""
    return values.cpu().numpy()


def fingerprint(documents: Sequence[Document]) -> str:
    """Identity of some documents: hash over their tokens and where their answers begin."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(repr((document.prompt, document.tokens)).encode())
    return digest.hexdigest()[:16]


def split(items: Sequence[T], origins: Iterable[str], share: float) -> tuple[list[T], list[T]]:
    """Two parts, the first with a share of the origins; what goes back to one origin is on one side."""
    first_N = held_out(torch.tensor([origin_hash(origin) for origin in origins]), share).tolist()
    pairs = list(zip(items, first_N, strict=True))
    return [item for item, first in pairs if first], [item for item, first in pairs if not first]
