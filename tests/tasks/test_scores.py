"""Scores against the packages behind them, and against the official scripts' rules worked out by hand."""

import sys

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu

from dynamax.tasks import scores
from dynamax.tasks.scores import (
    bleu,
    contains,
    contrast,
    coqa_exact,
    coqa_f1,
    leave_one_out,
    normalize,
    rouge,
    triviaqa_exact,
    triviaqa_f1,
)

TEXTS = [
    ("The watermelon seeds pass through your digestive system.", "Watermelon seeds pass through you."),
    ("The watermelon seeds pass through your digestive system.", ""),
    ("You die.", "You die."),
    ("You die.", "you DIE"),
    ("Nothing happens . You eat seeds . That is all.", "You eat seeds . Nothing happens . That is all."),
    ("Café Zürich 3.5 %", "Café Zürich costs 3.5 %, more or less — perhaps."),
    ("x", "word " * 60),
]


@pytest.mark.parametrize(("reference", "answer"), TEXTS)
def test_bleu_is_sacrebleu_with_truthfulqas_options(reference, answer):
    expected = corpus_bleu(
        [answer],
        [[reference]],
        smooth_method="exp",
        smooth_value=0.0,
        force=False,
        lowercase=False,
        tokenize="intl",
        use_effective_order=False,
    )
    assert bleu(reference, answer) == expected.score


@pytest.mark.parametrize(("reference", "answer"), TEXTS)
def test_rouge_is_rouge_score_in_percent(reference, answer):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"])
    expected = scorer.score(reference.replace(" . ", ".\n"), answer.replace(" . ", ".\n"))
    found = rouge(reference, answer)
    assert found["rouge1"] == expected["rouge1"].fmeasure * 100
    assert found["rouge2"] == expected["rouge2"].fmeasure * 100
    assert found["rougeL"] == expected["rougeLsum"].fmeasure * 100


def test_rouge_l_takes_a_lone_full_stop_for_a_sentence_end():
    swapped = rouge("Nothing happens . You eat seeds", "You eat seeds . Nothing happens")
    assert swapped["rougeL"] == 100.0


def test_contrast():
    assert contrast("bleu", [10.0, 30.0], [20.0]) == {"bleu_max": 30.0, "bleu_acc": 1.0, "bleu_diff": 10.0}
    assert contrast("bleu", [20.0], [20.0]) == {"bleu_max": 20.0, "bleu_acc": 0.0, "bleu_diff": 0.0}


@pytest.mark.parametrize(
    ("text", "coqa", "triviaqa"),
    [
        ("The U.S.'s answer: an_apple!", "uss answer anapple", "u s s answer apple"),
        ("A  man,\ta\nplan", "man plan", "man plan"),
        ("rock-and-roll", "rockandroll", "rock and roll"),
        ("Theatre and another", "theatre and another", "theatre and another"),
        ("the cat’s ‘toy’", "cat’s ‘toy’", "cat s toy"),
        ("«the» ÉCOLE", "« » école", "« » école"),
        ("3,000.50", "300050", "3 000 50"),
        ("a an the", "", ""),
        ("", "", ""),
    ],
)
def test_normalisation(text, coqa, triviaqa):
    assert normalize(text, scores.COQA) == coqa
    assert normalize(text, scores.TRIVIAQA) == triviaqa


def test_coqa_f1_and_exact_by_hand():
    # Gold: white kitten; answer: kitten was white. Two words shared of 2 and 3: P 2/3, R 1, F1 0.8.
    assert coqa_f1("a white kitten", "The kitten was white.") == pytest.approx(0.8)
    assert coqa_f1("yes yes no", "yes") == pytest.approx(0.5)  # P 1, R 1/3: a word counts as often as both have it
    assert coqa_f1("red", "blue") == 0.0
    assert coqa_exact("The Duke of Mowbray.", "duke of mowbray") == 1.0
    assert coqa_exact("1 2", "12") == 0.0


@pytest.mark.parametrize(("gold", "answer", "f1"), [("", "", 1.0), ("the", "a.", 1.0), ("", "x", 0.0), ("x", "", 0.0)])
def test_coqa_f1_of_nothing(gold, answer, f1):
    assert coqa_f1(gold, answer) == f1


def test_leave_one_out_by_hand():
    golds = ["strolling", "his hands behind his back", "with his hands behind his back", "strolling"]
    # Without any one of the golds, another "strolling" or itself is left: always 1.
    assert leave_one_out(coqa_exact, golds, "Strolling.") == 1.0
    # Only one gold equals this answer; leaving that one out gives 0, the other three leave-outs 1.
    assert leave_one_out(coqa_exact, golds, "his hands behind his back") == 0.75
    # F1: the third gold has 6 words, the answer 5, all shared: 10 / 11 when the second is left out.
    assert leave_one_out(coqa_f1, golds, "his hands behind his back") == pytest.approx((3 + 10 / 11) / 4)
    assert leave_one_out(coqa_exact, ["no"], "No!") == 1.0


def test_triviaqa_by_hand():
    aliases = ["mark twain", "samuel l clemens"]
    assert triviaqa_exact(aliases, " Mark-Twain!") == 1.0
    assert triviaqa_exact(aliases, "Twain") == 0.0
    assert triviaqa_f1(aliases, "the author Samuel Clemens") == pytest.approx(2 * 2 / (3 + 3))
    assert triviaqa_f1(aliases, "") == 0.0
    assert triviaqa_exact(["", "x"], "The") == 1.0  # as the official script: both normalise to nothing
    assert triviaqa_f1([""], "The") == 0.0


def test_contains_whole_words_only():
    assert contains(["Ra"], "It was the god Ra.") == 1.0
    assert contains(["Ra"], "A rainbow") == 0.0
    assert contains(["The"], "The end") == 0.0  # an alias of nothing but an article is no evidence
    assert contains(["7"], "Seven, or 7, or 17") == 1.0
    assert contains(["New York City", "New York"], "in new-york") == 1.0
    assert contains(["x"], "") == 0.0


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    scores.scorers.cache_clear()
    with pytest.raises(ValueError, match=r"need sacrebleu, not installed.*dynamax-exits\[eval\]"):
        scores.scorers()
