"""A task from outside: three questions."""

from __future__ import annotations

from dynamax.tasks.base import Example, GenerationTask

CAPITALS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima"}


class Capitals(GenerationTask):
    """Which city is the capital? An answer is right if it names it.

    Args:
        max_new_tokens: Most tokens of an answer.
    """

    headline = "right"

    def __init__(self, max_new_tokens: int = 8) -> None:
        self.max_new_tokens = max_new_tokens

    def examples(self) -> list[Example]:
        """A question a country."""
        return [
            Example(land, f"What is the capital of {land}?", (city,), max_new_tokens=self.max_new_tokens)
            for land, city in CAPITALS.items()
        ]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """1 if the city is named."""
        return {"right": float(example.references[0] in answer)}
