"""Files in parts: what is joined is what was split, and nothing else is joined."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.parts import MANIFEST, join, main, read_manifest, split
from dynamax import UserError


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    (model / "inner/weights.bin").write_bytes(bytes(range(256)) * 40)
    (model / "empty.txt").write_bytes(b"")
    wheel = tmp_path / "one.whl"
    wheel.write_bytes(b"wheel" * 100)
    return [model, wheel]


@pytest.fixture
def parts(sources: list[Path], tmp_path: Path) -> Path:
    split(sources, tmp_path / "parts", size=1000)
    return tmp_path / "parts"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_joined_is_what_was_split(parts: Path, tmp_path: Path) -> None:
    found = content(join(parts, tmp_path / "joined"))
    assert found == {
        "model/empty.txt": b"",
        "model/inner/weights.bin": bytes(range(256)) * 40,
        "one.whl": b"wheel" * 100,
    }
    sizes = [path.stat().st_size for path in parts.glob("*.part")]
    assert max(sizes) == 1000
    assert len(sizes) == 1 + 11 + 1


def test_what_is_joined_already_stays_even_without_the_parts(parts: Path, tmp_path: Path) -> None:
    joined = join(parts, tmp_path / "joined")
    for part in parts.glob("*.part"):
        part.unlink()
    assert join(parts, joined) == joined
    (joined / "one.whl").write_bytes(b"other")
    with pytest.raises(UserError, match=r"one.whl is not the file .* Remove"):
        join(parts, joined)


def test_missing_parts_are_all_named(parts: Path, tmp_path: Path) -> None:
    for name in ("001-003.part", "002-000.part"):
        (parts / name).unlink()
    with pytest.raises(UserError, match=r"lacks 2 of 13 parts: 001-003.part, 002-000.part. Bring"):
        join(parts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("damage", [b"", b"x" * 1000, b"x"])
def test_damaged_parts_are_named(parts: Path, tmp_path: Path, damage: bytes) -> None:
    (parts / "001-001.part").write_bytes(damage)
    with pytest.raises(UserError, match=r"Damaged parts .*: 001-001.part. Bring"):
        join(parts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"files": [{"path": "a"}]}', '{"files": 3}'])
def test_a_damaged_manifest_is_told(parts: Path, text: str) -> None:
    (parts / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(parts)


@pytest.mark.parametrize(("field", "value"), [("path", "../outside"), ("path", "/tmp/outside")])
def test_nothing_is_written_outside(parts: Path, tmp_path: Path, field: str, value: str) -> None:
    known = json.loads((parts / MANIFEST).read_text())
    known["files"][0][field] = value
    (parts / MANIFEST).write_text(json.dumps(known))
    with pytest.raises(UserError, match="outside its folder"):
        join(parts, tmp_path / "joined")


def test_what_cannot_be_split_is_refused(sources: list[Path], parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a file nor a folder"):
        split([tmp_path / "nothing"], tmp_path / "new")
    with pytest.raises(UserError, match="is not empty"):
        split(sources, parts)
    with pytest.raises(UserError, match="Parts of 0 bytes"):
        split(sources, tmp_path / "new", size=0)
    with pytest.raises(UserError, match=r"Two sources have a file one.whl"):
        split([sources[1], sources[1]], tmp_path / "new")


def test_by_command(sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made, joined = str(tmp_path / "parts"), str(tmp_path / "joined")
    assert main(["split", *map(str, sources), "--into", made, "--size", "1"]) == 0
    assert main(["join", made, "--into", joined]) == 0
    assert capsys.readouterr().out == f"3 files in 3 parts in {made}\n3 files in {joined}\n"
    assert main(["join", str(tmp_path / "nothing"), "--into", joined]) == 2
    assert "parts.json is missing" in capsys.readouterr().err
