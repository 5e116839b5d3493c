"""Text in files is text, byte for byte, whatever it looks like; and what is no such file is told with the place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dynamax.data.corpora import LocalText
from dynamax.data.generated import SelfGenerated
from dynamax.errors import UserError
from dynamax.rows import file_of, rows_of
from dynamax.tasks.rows import load

LOOKS = [
    *("007", "1e5", "1.0", "-0", "0x1F", "1_000", "NaN", "nan", "inf", "null", "NULL", "None", "NA", "N/A", "", "true"),
    *(
        "2020-01-01",
        "2020-01-01T00:00:00Z",
        "12:30",
        "yes",
        "off",
        "~",
        "=1+1",
        "  padded  ",
        "\ttab",
        '"quoted"',
        "a,b",
    ),
    *("two\nlines", "carriage\rreturn", "dos\r\nline", "line\u2028separator", "form\x0cfeed", "\x1c", "é", "e\u0301"),
    *("\ufeffmark", "\u200bzero width", "日本語", "🙂", "\x00", "a" * 300_000),
]


def write_csv(file: Path, texts: list[str]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["n", "text"], *([str(number), text] for number, text in enumerate(texts))])


def write_parquet(file: Path, texts: list[str]) -> None:
    parquet.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), file)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "a.csv": write_csv,
    "A.CSV": write_csv,
    "a.json": lambda file, texts: file.write_text(json.dumps([{"text": text} for text in texts])),
    "data.json": lambda file, texts: file.write_text(
        json.dumps({"data": [{"text": text} for text in texts]}, ensure_ascii=False), "utf-8"
    ),
    "lines.json": lambda file, texts: file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts)),
    "a.jsonl": lambda file, texts: file.write_bytes(
        "\r\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    ),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("many", [1, 700])
@pytest.mark.parametrize("name", WRITERS)
def test_text_stays_text(name: str, many: int, tmp_path: Path) -> None:
    """Also where thousands of rows of words stand before what looks like a number."""
    texts = ["words"] * 10_000 + LOOKS if many > 1 else LOOKS
    WRITERS[name](tmp_path / name, texts)
    assert [row["text"] for row in rows_of(file_of(tmp_path / name))] == texts
    found = [text for _, text in LocalText(str(tmp_path / name))._numbered(0)]
    assert found == texts
    assert [
        row.values["text"] for row in load(str(tmp_path / name), suffixes=(Path(name).suffix.lower(),), wanted="")
    ] == texts


@pytest.mark.parametrize("name", WRITERS)
def test_a_mark_of_the_encoding_is_left_out_and_no_other(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    WRITERS[name](file, ["\ufeffone", "two"])
    if not name.endswith(".parquet"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [row["text"] for row in rows_of(file)] == ["\ufeffone", "two"]


@pytest.mark.parametrize(
    ("by", "content", "wanted"),
    [
        ("line", "007\n1e5\n\nnull\n", ["007", "1e5", "", "null"]),
        ("line", "one\r\ntwo", ["one", "two"]),
        ("line", "a\rb\u2028c\x0cd\n", ["a\rb\u2028c\x0cd"]),
        ("paragraph", "one\ntwo\n\nthree", ["one\ntwo", "three"]),
        ("paragraph", "one\r\ntwo\r\n\r\nthree\r\n", ["one\r\ntwo", "three\r\n"]),
        ("document", "one\r\n\r\ntwo\n", ["one\r\n\r\ntwo\n"]),
        ("document", " \n\t", []),
    ],
)
def test_a_text_file_is_cut_and_not_changed(by: str, content: str, wanted: list[str], tmp_path: Path) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(mark + content.encode())
        assert [row["text"] for row in rows_of(tmp_path / "a.txt", sample_by=by)] == wanted  # type: ignore[arg-type]


def test_prompts_are_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"007\r\n1e5\n\n2020-01-01\n")
    prompts = SelfGenerated(str(tmp_path / "prompts.txt"), field="text")._prompts
    assert [prompt.plain for prompt in prompts] == ["007", "1e5", "2020-01-01"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b'text\n"never closed\n', r"Line \d of .*a.csv is not CSV: unexpected end of data"),
        ("a.csv", b'text\n"quote" behind\n', r"Line 2 of .*a.csv is not CSV"),
        ("a.csv", b"text,n\none,2,3\n", "Line 2 of .*a.csv has more cells than the 2 columns"),
        ("a.csv", b"text,text\none,two\n", "a.csv has two columns 'text'"),
        ("a.csv", "text\nnaïve".encode("latin-1"), "a.csv is not UTF-8 text"),
        ("a.csv", "text\none".encode("utf-16"), "a.csv is not UTF-8 text"),
        ("a.json", b'[{"text": "cut', "a.json is not JSON: .* Is the file whole"),
        ("a.json", b'{"text": "one"}', "neither a list nor an object with a list"),
        ("a.json", b'{"text": "one"}\n{"text": ', "Line 2 of .*a.json is not JSON"),
        ("a.json", b"[" * 200_000, "nested too deeply|is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text"', "Line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b"[" * 200_000, "Line 1 of .*a.jsonl is not JSON"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl is not UTF-8 text"),
        ("a.parquet", b"PAR1 no more", "a.parquet is not a Parquet file"),
        ("a.txt", b"\xff", "a.txt is not UTF-8 text"),
        ("a.doc", b"one", "ends in '.doc'. Known are"),
        ("a.txt", b"", "a.txt is empty"),
    ],
)
def test_a_damaged_file_is_told_with_the_place(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        list(rows_of(file_of(tmp_path / name)))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="a.txt is a folder"):
        file_of(tmp_path / "a.txt")
