"""Tasks: what to ask a model, and how the field scores what it says."""

from dynamax.tasks.base import (
    ChoiceExample,
    ChoiceTask,
    Example,
    GenerationTask,
    Task,
    TextExample,
    TextTask,
    Window,
)
from dynamax.tasks.coqa import CoQA
from dynamax.tasks.perplexity import Perplexity
from dynamax.tasks.shipped import Passages, Questions
from dynamax.tasks.triviaqa import TriviaQA
from dynamax.tasks.truthfulqa import TruthfulQA, TruthfulQAMC

__all__ = [
    "ChoiceExample",
    "ChoiceTask",
    "CoQA",
    "TextExample",
    "Example",
    "GenerationTask",
    "Passages",
    "Perplexity",
    "Questions",
    "Task",
    "TextTask",
    "TriviaQA",
    "TruthfulQA",
    "TruthfulQAMC",
    "Window",
]
