from __future__ import annotations

import json
import math

import datasets
import pytest

from dynamax.data.corpora import GROUP, HubText, LocalText
from dynamax.data.text import derived_seed, windows
from dynamax.engine import Engine
from tests.data.small import characters, small_backbone

TEXTS = ["one fish", "two fish, red fish", "  ", "null", "blue fish: the end."]


def write(folder, suffix, rows):
    file = folder / f"rows{suffix}"
    table = datasets.Dataset.from_list(rows)
    if suffix == ".csv":
        table.to_csv(file)
    elif suffix == ".jsonl":
        table.to_json(file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        table.to_parquet(file)
    else:
        file.write_text("\n\n".join(row["text"] for row in rows))
    return str(file)


def all_documents(source, engine, skip=0):
    return [document for group in source.groups(engine, skip=skip) for document in group]


def texts_of(documents, tokenizer):
    return ["".join(tokenizer.convert_ids_to_tokens(document.tokens)) for document in documents]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet", ".txt"])
def test_every_kind_of_file_is_read(tmp_path, tokenizer, engine, suffix):
    path = write(tmp_path, suffix, [{"text": text, "number": 3} for text in TEXTS])
    source = LocalText(path)
    documents = all_documents(source, engine)
    assert texts_of(documents, tokenizer) == [text for text in TEXTS if text.strip()]
    assert all(document.prompt == 0 for document in documents)
    assert source.count() == 1


@pytest.mark.parametrize(("by", "wanted"), [("line", 4), ("paragraph", 2), ("document", 1)])
def test_a_text_file_has_lines_or_paragraphs(tmp_path, engine, by, wanted):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nfour")
    assert len(all_documents(LocalText(str(tmp_path / "a.txt"), sample_by=by), engine)) == wanted


def test_long_rows_become_several_documents_of_one_origin(tokenizer, engine):
    documents = windows("abcdefg", engine, length=3)
    assert texts_of(documents, tokenizer) == ["abc", "def", "g"]
    assert {document.origin for document in documents} == {"abcdefg"}
    assert len(windows("abc", engine, length=3)) == 1


def test_a_template_stands_around_the_text_and_rows_are_cropped(tmp_path, tokenizer, engine):
    path = write(tmp_path, ".jsonl", [{"text": "abcdefg"}, {"text": "h"}])
    source = LocalText(path, length=4, template="a{text}b", per_row=1)
    documents = all_documents(source, engine)
    assert texts_of(documents, tokenizer) == ["aabc", "ahb"]
    assert [document.origin for document in documents] == ["abcdefg", "h"]
    plain = LocalText(path, length=4)
    assert source.identity() == {**plain.identity(), "template": "a{text}b", "per_row": 1}
    assert not {"template", "per_row"} & set(plain.identity()), "stores that were filled before are found"
    with pytest.raises(ValueError, match="no place for the text"):
        LocalText(path, template="<text>")
    with pytest.raises(ValueError, match="per_row=0"):
        LocalText(path, per_row=0)


@pytest.mark.parametrize("rows", [1, GROUP, GROUP + 1, 2 * GROUP, 1000])
@pytest.mark.parametrize("skip", [0, 1, 5])
def test_going_on_gives_the_groups_that_are_left(tmp_path, engine, rows, skip):
    path = write(tmp_path, ".jsonl", [{"text": f"row {'abcdefghij'[row % 10]}"} for row in range(2 * GROUP)])
    source = LocalText(path, rows=rows)
    groups = list(source.groups(engine))
    assert len(groups) == source.count() == math.ceil(min(rows, 2 * GROUP) / GROUP)
    assert sum(map(len, groups)) == min(rows, 2 * GROUP)
    assert list(source.groups(engine, skip=skip)) == groups[skip:]


def test_identity_goes_by_contents_and_options_and_not_by_place(tmp_path):
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_text("else")
    first = LocalText(str(tmp_path / "a.txt")).identity()
    assert LocalText(str(tmp_path / "b.txt")).identity() == first
    assert LocalText(str(tmp_path / "c.txt")).identity() != first
    for option in ({"length": 7}, {"field": "x"}, {"rows": 3}, {"sample_by": "line"}):
        assert LocalText(str(tmp_path / "a.txt"), **option).identity() != first
    json.dumps(first)


# -- bad input --------------------------------------------------------------------------------------


def refused(path, message, **options):
    with pytest.raises(ValueError, match=message):
        all_documents(LocalText(str(path), **options), Engine(small_backbone(), characters()))


def test_a_missing_field_names_row_field_and_the_fields_there_are(tmp_path):
    rows = [{"text": "a", "title": "b"}, {"title": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(tmp_path / "a.jsonl", r"Row 2 of \S+a.jsonl has nothing in the field 'text'.*are: 'title'")
    refused(tmp_path / "a.jsonl", "Row 1 .*'body'.*'text', 'title'", field="body")


def test_a_field_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hello", "year": 1999}')
    refused(tmp_path / "a.jsonl", "Row 1 .* holds int in the field 'year', and text is wanted: 1999", field="year")
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d"}')
    refused(tmp_path / "a.jsonl", "Row 1 .* holds part of a character in the field 'text'")
    (tmp_path / "a.jsonl").write_text('["hello"]')
    refused(tmp_path / "a.jsonl", r"Row 1 .* is \['hello'\]; wanted: names and values")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("a.csv", "text,year\n"), ("a.jsonl", ""), ("a.jsonl", "\n"), ("a.json", "[]"), ("a.txt", "")],
)
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, r"at least one row")


def test_a_file_that_is_not_what_its_suffix_says_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"')
    refused(tmp_path / "a.jsonl", "Line 1 of .*a.jsonl is not JSON: .* Is the file whole")
    (tmp_path / "a.parquet").write_text("no parquet")
    refused(tmp_path / "a.parquet", "a.parquet is not a Parquet file: .* Is the file whole")


def test_unknown_suffixes_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    refused(tmp_path / "a.docx", r"ends in '.docx'. Known are: .csv, .json, .jsonl, .parquet, .txt")
    refused(tmp_path / "noname", "ends in 'no suffix'")
    refused(tmp_path / "none.txt", "There is no file .*none.txt. Give the path")


def test_documents_longer_than_the_context_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "513 tokens.*context holds 512.*Lower", length=513)


@pytest.mark.parametrize("option", ["length", "rows"])
@pytest.mark.parametrize("source", [LocalText, HubText])
def test_counts_below_one_are_refused(source, option):
    with pytest.raises(ValueError, match=f"{source.__name__} was given {option}=0"):
        source("a.txt", **{option: 0})


# -- the Hub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_a_data_set_laid_out_as_on_the_hub_is_read(tmp_path, engine, streaming):
    write(tmp_path, ".jsonl", [{"body": f"row {'abc'[row % 3]}"} for row in range(GROUP + 5)])
    source = HubText(str(tmp_path), field="body", streaming=streaming)
    groups = list(source.groups(engine))
    assert list(map(len, groups)) == [GROUP, 5]
    assert list(source.groups(engine, skip=1)) == groups[1:]
    few = HubText(str(tmp_path), field="body", streaming=streaming, rows=3)
    assert len(all_documents(few, engine)) == 3
    assert (few.count(), HubText("x", rows=None).count()) == (1, None)


def test_identity_of_a_data_set_changes_with_its_contents(tmp_path):
    write(tmp_path, ".jsonl", [{"text": "a"}])
    first = HubText(str(tmp_path)).identity()
    assert HubText(str(tmp_path)).identity() == first
    write(tmp_path, ".jsonl", [{"text": "longer"}])
    assert HubText(str(tmp_path)).identity() != first


def test_what_is_asked_of_the_hub(monkeypatch, tokenizer, engine):
    asked: dict[str, object] = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return datasets.Dataset.from_list([{"text": "hello"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HubText("owner/set", config="en", split="train[:5]", revision="v1", streaming=False)
    assert texts_of(all_documents(source, engine), tokenizer) == ["hello"]
    assert source.identity()["version"] == "v1"  # and nobody was asked
    assert asked == {"name": "owner/set", "config": "en", "split": "train[:5]", "revision": "v1", "streaming": False}


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("unknown split")])
def test_a_data_set_that_cannot_be_had_is_told(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    monkeypatch.setattr(datasets, "load_dataset_builder", fails)
    for ask in (lambda: list(HubText("owner/set").read(0)), HubText("owner/set").identity):
        with pytest.raises(ValueError, match=rf"'owner/set'.*could not be loaded: {error}.*network.*SelfGenerated"):
            ask()


def test_derived_seeds_differ():
    assert len({derived_seed(seed, index) for seed in range(10) for index in range(10)}) == 100
    assert derived_seed(0, 1) == derived_seed(0, 1)
