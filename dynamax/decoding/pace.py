"""How many drafts pay, by what was measured so far. Knows times and counts, neither tokens nor blocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

FIRST_GUESS = 0.12
"""What a further position of a chunk costs, as a part of a step, until it is measured."""

MEMORY = 64
"""Tries after which older ones begin to count less."""

AGAIN = 48
"""Times that drafts of a kind do not pay before one of them is tried again."""


FIRST_ROUNDS, WARM_ROUNDS = 5, 3
"""Rounds of each way before they are compared, and how many of these, and of each length, do not count."""

MOST_PATIENCE = 1024
"""Rounds after which a way that was worse is tried again, at the most."""


@dataclass
class Tries:
    """How often drafts of one kind were right; it begins at a half."""

    right: float = 1.0
    wrong: float = 1.0
    passed: int = 0

    @property
    def share(self) -> float:
        """Expected share of right ones."""
        return self.right / (self.right + self.wrong)

    def note(self, *, right: bool) -> None:
        """One more try."""
        if self.right + self.wrong > MEMORY:
            self.right, self.wrong = self.right / 2, self.wrong / 2
        if right:
            self.right += 1
        else:
            self.wrong += 1


@dataclass
class Rate:
    """Tokens and seconds of a way to decode; older rounds count less."""

    tokens: float = 0.0
    seconds: float = 0.0
    rounds: int = 0
    passed: int = 0
    patience: int = AGAIN

    @property
    def tokens_per_second(self) -> float:
        """The newest rounds' speed."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """One more round. The first ones are slow, since steps of their kind are new."""
        self.rounds += 1
        kept = 0.0 if self.rounds <= WARM_ROUNDS else 0.95
        self.tokens, self.seconds = kept * self.tokens + tokens, kept * self.seconds + seconds


class Pace:
    """Chooses draft lengths so that the expected tokens a second are the most.

    A chunk of ``1 + k`` positions is worth a step and its right drafts. What it costs is measured while decoding; so is
    how often drafts of each kind are right. Drafts that do not pay are left out, and tried again now and then.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._chunks: Counter[int] = Counter()
        self._tries: defaultdict[Hashable, Tries] = defaultdict(Tries)
        self._rates: defaultdict[str, Rate] = defaultdict(Rate)

    def begin(self, kind: Hashable, right: int, wrong: int) -> None:
        """So many drafts of a kind were right and wrong elsewhere; they count for a quarter of the memory at most."""
        share = min(1.0, MEMORY / 4 / max(1, right + wrong))
        self._tries[kind] = Tries(1 + share * right, 1 + share * wrong)

    def cost(self, length: int) -> float:
        """What a chunk of so many positions takes, in steps of one position."""
        if length == 1:
            return 1.0
        one, known = self._seconds.get(1), self._seconds.get(length)
        if one is not None and known is not None:
            return max(1.0, known / one)
        return 1.0 + FIRST_GUESS * (length - 1)

    def length(self, kinds: Sequence[Hashable]) -> int:
        """How many of the drafts on offer to take.

        Args:
            kinds: The kind of each draft, in the order of the text.
        """
        best, most, worth, reached = 0, 1.0, 1.0, 1.0
        for count, kind in enumerate(kinds, 1):
            reached *= self._tries[kind].share
            worth += reached
            if worth / self.cost(1 + count) > most:
                best, most = count, worth / self.cost(1 + count)
        if best or not kinds:
            return best
        tries = self._tries[kinds[0]]
        tries.passed += 1
        return int(tries.passed % AGAIN == 0)

    def way(self, ways: Sequence[str]) -> str:
        """Which of several ways to go on gave the most tokens a second; each is tried, and again now and then."""
        for way in ways:
            if self._rates[way].rounds < FIRST_ROUNDS:
                return way
        best = max(ways, key=lambda way: self._rates[way].tokens_per_second)
        for way in ways:
            rate = self._rates[way]
            rate.passed = 0 if way == best else rate.passed + 1
            if rate.passed >= rate.patience:
                rate.passed, rate.patience = 0, min(2 * rate.patience, MOST_PATIENCE)
                return way
        return best

    def gave(self, way: str, tokens: int, seconds: float) -> None:
        """A round of one of the ways gave so many tokens."""
        self._rates[way].note(tokens, seconds)

    def learn(self, kinds: Sequence[Hashable], right: int) -> None:
        """The first ``right`` of the drafts taken were right; the next one, if there is one, was wrong."""
        for place, kind in enumerate(kinds[: right + 1]):
            self._tries[kind].note(right=place < right)

    def took(self, length: int, seconds: float) -> None:
        """A chunk of so many positions took so long. The first ones are slow; one that was held up counts little."""
        self._chunks[length] += 1
        if self._chunks[length] <= WARM_ROUNDS:
            return
        known = self._seconds.get(length, seconds)
        share = 0.5 if seconds < known else 0.05
        self._seconds[length] = known + share * (min(seconds, 2 * known) - known)
