"""Files in parts, for places that take only small ones: split here, joined and checked there.

    python -m benchmarks.parts split SOURCE... --into FOLDER [--size 60]
    python -m benchmarks.parts join FOLDER --into TARGET

A source is a file or a folder. The parts may arrive one after the other; ``parts.json`` names them, with sizes and
SHA-256. What is joined appears whole or not at all. Knows files and nothing of what they hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dynamax.errors import UserError
from dynamax.files import whole_folder, write_atomically

MIB = 2**20
SIZE = 60
"""MiB of a part, if no other size is given."""
MANIFEST = "parts.json"

Entry = dict[str, Any]
"""A file in the manifest: ``path``, ``bytes``, ``sha256``, and ``parts`` with ``name``, ``bytes``, ``sha256``."""


def split(sources: Sequence[Path], into: Path, *, size: int = SIZE * MIB) -> list[Entry]:
    """Write the parts of files, and of all files in folders, and the manifest, last.

    Args:
        sources: Files and folders; each keeps its own name.
        into: Folder for the parts, empty or new.
        size: Most bytes of a part.

    Raises:
        UserError: If a source is missing, two have one name, the folder holds something, or the size is not positive.
    """
    if size < 1:
        raise UserError(f"Parts of {size} bytes were asked for; a part has one byte or more.")
    found = [pair for source in sources for pair in _files(source)]
    names = [name for name, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Two sources have a file {twice[0]}. Give one of them another name.")
    if into.is_dir() and any(into.iterdir()):
        raise UserError(f"{into} is not empty, and old parts would lie beside new ones. Name an empty or a new folder.")
    into.mkdir(parents=True, exist_ok=True)
    entries = [_split(path, name, into, number, size) for number, (name, path) in enumerate(found)]
    write_atomically(into / MANIFEST, f"{json.dumps({'files': entries}, indent=1)}\n".encode())
    return entries


def _files(source: Path) -> Iterator[tuple[str, Path]]:
    """The files of a source, with the paths they will have."""
    if source.is_file():
        yield source.name, source
    elif source.is_dir():
        base = source.resolve()
        for path in sorted(path for path in base.rglob("*") if path.is_file()):
            yield path.relative_to(base.parent).as_posix(), path
    else:
        raise UserError(f"{source} is neither a file nor a folder. Name what is to be split.")


def _split(path: Path, name: str, into: Path, number: int, size: int) -> Entry:
    whole, parts = hashlib.sha256(), []
    with path.open("rb") as file:
        while (content := file.read(size)) or not parts:
            whole.update(content)
            part = f"{number:03}-{len(parts):03}.part"
            write_atomically(into / part, content)
            parts.append({"name": part, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return {"path": name, "bytes": path.stat().st_size, "sha256": whole.hexdigest(), "parts": parts}


def join(folder: Path, into: Path) -> Path:
    """Join the files of a folder of parts in another folder; one that has them already stays as it is.

    Raises:
        UserError: If parts or manifest are missing, damaged, or not what ``split`` writes; if the target holds others.
    """
    entries = read_manifest(folder)
    if not into.is_dir():
        check(folder, entries)
        with whole_folder(into) as fresh:
            for entry in entries:
                _join(folder, entry, fresh / entry["path"])
    for entry in entries:
        path = into / entry["path"]
        if not path.is_file() or _hash(path) != entry["sha256"]:
            raise UserError(f"{path} is not the file that {folder / MANIFEST} names. Remove {into}, and join again.")
    return into


def _join(folder: Path, entry: Entry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for part in entry["parts"]:
            file.write((folder / part["name"]).read_bytes())


def check(folder: Path, entries: Sequence[Entry]) -> None:
    """Refuse (UserError) parts that are missing or damaged; all of them are named at once."""
    parts = [part for entry in entries for part in entry["parts"]]
    missing = [part["name"] for part in parts if not (folder / part["name"]).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(parts)} parts: {', '.join(missing)}. Bring them there.")
    damaged = [part["name"] for part in parts if _hash(folder / part["name"]) != part["sha256"]]
    if damaged:
        raise UserError(f"Damaged parts in {folder}: {', '.join(damaged)}. Bring them there again.")


def read_manifest(folder: Path) -> list[Entry]:
    """The entries of a folder of parts.

    Raises:
        UserError: If there is no manifest, or it is none.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{file} is missing. Name a folder that `python -m benchmarks.parts split` wrote.")
    try:
        entries = json.loads(file.read_text())["files"]
        names = [part["name"] for entry in entries for part in entry["parts"]]
        paths = [entry["path"] for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}). Split the files again.") from error
    for name in (*names, *paths):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{file} names {name}, which lies outside its folder. Split the files again.")
    return entries


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(given: Sequence[str] | None = None) -> int:
    """Split or join; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("split")
    one.add_argument("sources", type=Path, nargs="+")
    one.add_argument("--into", type=Path, required=True)
    one.add_argument("--size", type=int, default=SIZE, help="MiB of a part")
    other = commands.add_parser("join")
    other.add_argument("folder", type=Path)
    other.add_argument("--into", type=Path, required=True)
    args = parser.parse_args(given)
    try:
        if args.command == "split":
            entries = split(args.sources, args.into, size=args.size * MIB)
            print(f"{len(entries)} files in {sum(len(entry['parts']) for entry in entries)} parts in {args.into}")
        else:
            print(f"{len(read_manifest(args.folder))} files in {join(args.folder, args.into)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
