"""Bad input: each an error that says what was given, what was wanted, and what to do."""

import pytest

from dynamax.tasks import CoQA, Perplexity, TriviaQA, TruthfulQA, TruthfulQAMC

TASKS = [TruthfulQA, TruthfulQAMC, TriviaQA, CoQA, Perplexity]
SUFFIX = {TruthfulQA: ".csv", TruthfulQAMC: ".csv", TriviaQA: ".jsonl", CoQA: ".json", Perplexity: ".txt"}


@pytest.mark.parametrize("task", TASKS)
def test_missing_file(task, tmp_path):
    path = tmp_path / f"nowhere{SUFFIX[task]}"
    with pytest.raises(ValueError, match=rf"There is no file {path} .*Wanted: .*Correct the task's path"):
        task(str(path)).examples()


@pytest.mark.parametrize("task", TASKS)
def test_wrong_suffix(task, tmp_path):
    path = tmp_path / "data.xlsx"
    path.touch()
    with pytest.raises(ValueError, match=r"ends in '.xlsx'; wanted a file ending in \."):
        task(str(path)).examples()


@pytest.mark.parametrize("task", TASKS)
def test_empty_file(task, tmp_path):
    path = tmp_path / f"empty{SUFFIX[task]}"
    path.write_text("[]" if path.suffix == ".json" else "")
    with pytest.raises(ValueError, match=rf"empty{SUFFIX[task]} has no rows\. Wanted: .*at least one row"):
        task(str(path)).examples()


@pytest.mark.parametrize("task", TASKS)
def test_no_network(task, hub):
    with pytest.raises(
        ValueError, match=r"could not be loaded from the Hub \(ConnectionError: no network.*task's path"
    ):
        task().examples()


def test_broken_files(tmp_path):
    path = tmp_path / "trivia.jsonl"
    path.write_text('{"question": "x"}\n{"question": ')
    with pytest.raises(ValueError, match=r"Line 2 of .*trivia.jsonl is not JSON.*Is the file whole"):
        TriviaQA(str(path)).examples()
    path.write_text('{"question": "x"}\n3\n')
    with pytest.raises(ValueError, match=r"Row 2 of trivia.jsonl is no object but 3"):
        TriviaQA(str(path)).examples()
    path.write_bytes("{'é'}".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        TriviaQA(str(path)).examples()
    path = tmp_path / "coqa.json"
    path.write_text('{"stories": []}')
    with pytest.raises(ValueError, match="neither a list nor an object with a list under 'data'"):
        CoQA(str(path)).examples()
    path = tmp_path / "trivia.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        TriviaQA(str(path)).examples()


@pytest.mark.parametrize("task", TASKS)
def test_options_out_of_range(task):
    with pytest.raises(ValueError, match=rf"{task.__name__} was given limit=0; wanted 1 or more"):
        task(limit=0)
    with pytest.raises(ValueError, match=rf"{task.__name__} was given offset=-1; wanted 0 or more"):
        task(offset=-1)


def test_offset_beyond_the_data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One document.")
    with pytest.raises(ValueError, match="leaves out its first 1 examples .*there are 1. Lower offset"):
        Perplexity(str(path), offset=1).examples()
