"""Cutting, averaging, likelihood of text, and what every task of the package keeps to."""

import math

import pytest
from jsonargparse import ArgumentParser

from dynamax.generation import cut
from dynamax.registry import TASKS
from dynamax.tasks import ChoiceTask, GenerationTask, Perplexity, Task, TextExample, TextTask
from dynamax.tasks.base import mean


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("Paris.\nNo", (".", "\n"), "Paris"),
        ("Paris\nNo.", (".", "\n"), "Paris"),
        ("Paris", (".", "\n"), "Paris"),
        ("Paris.", (), "Paris."),
        ("\nParis", ("\n",), ""),
        ("", ("\n",), ""),
        ("ab\nQ: c", ("\nQ:", "b\n"), "a"),
        ("Zürich — Straße", ("—",), "Zürich "),
    ],
)
def test_cut_ends_at_the_earliest_stop(text, stops, expected):
    assert cut(text, stops) == expected


def test_mean_and_no_scores():
    assert mean([{"f1": 0.5, "em": 0.0}, {"f1": 1.0, "em": 1.0}]) == {"f1": 0.75, "em": 0.5}
    with pytest.raises(ValueError, match="No example was scored"):
        mean([])


def test_text_scores_by_hand():
    task = Perplexity()
    scores = [
        task.score_text(TextExample("a", "abé"), -4 * math.log(8), 4),  # 4 bytes in 4 tokens of 3 bits
        task.score_text(TextExample("b", "xxxx"), -2 * math.log(2), 2),  # 4 bytes in 2 tokens of 1 bit
    ]
    total = task.aggregate(scores)
    assert total["perplexity"] == pytest.approx(2 ** (14 / 6))
    assert total["bits_per_byte"] == pytest.approx(14 / 8)


def test_perplexity_beyond_floats_is_infinite():
    task = Perplexity()
    assert task.aggregate([task.score_text(TextExample("a", "x"), -1e6, 1)])["perplexity"] == math.inf


def test_registered_tasks_are_of_a_known_kind():
    for task in map(TASKS.get, TASKS.names()):
        assert issubclass(task, Task)
        assert issubclass(task, GenerationTask | ChoiceTask | TextTask)
        assert task.headline


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TruthfulQA", {"path": "x.csv", "limit": 3}),
        ("TruthfulQAMC", {}),
        ("TriviaQA", {"shots": 5}),
        ("CoQA", {"last_turn_only": True}),
        ("Perplexity", {"stride": 128}),
        ("Questions", {"offset": 10}),
        ("Passages", {"max_new_tokens": 8}),
    ],
)
def test_tasks_compose_by_class_path(name, options):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    given = parser.parse_object({"task": {"class_path": f"dynamax.tasks.{name}", "init_args": options}})
    task = parser.instantiate(given).task
    assert type(task).__name__ == name
    for option, value in options.items():
        assert getattr(task, option) == value
