"""Whatever lies in the place of a record that is JSON is told in one line with the file's name, and never used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dynamax.backbones.parts import part_in
from dynamax.backbones.tuned import read_record as tuned
from dynamax.data.answers import read_texts
from dynamax.data.store import Manifest
from dynamax.data.streams import Streams
from dynamax.errors import UserError
from dynamax.files import read_mapping
from dynamax.heads.saved import read_record as heads
from dynamax.report.read import read_run

READERS: dict[str, Callable[[Path], object]] = {
    "part.json": part_in,
    "tuning.json": tuned,
    "heads.json": heads,
    "manifest.json": Manifest.load,
    "streams.json": Streams,
    "batch-00000.json": lambda folder: read_texts(folder / "batch-00000.json"),
    "report.json": read_run,
}
CONTENTS = {
    "a number": b"3",
    "null": b"null",
    "a text": b'"format"',
    "a list of lists": b"[[1], [2]]",
    "truth": b"true",
    "nothing": b"",
    "half": b'{"format": 1, ',
    "another encoding": '{"format": 1}'.encode("utf-16"),
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_record_is_told(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "heads.safetensors").touch()
    (tmp_path / name).write_bytes(CONTENTS[content])
    with pytest.raises(UserError) as caught:
        READERS[name](tmp_path)
    told = str(caught.value)
    assert name in told or str(tmp_path) in told
    assert len(told.splitlines()) == 1
    assert len(told) < 500 + len(str(tmp_path))


def test_names_and_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1], "b": "Ж"}', "utf-8")
    assert read_mapping(tmp_path / "x.json") == {"a": [1], "b": "Ж"}
