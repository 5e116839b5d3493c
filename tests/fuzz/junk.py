"""What nobody should write and somebody does: values, texts, and harm to files. All by a seeded generator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

NUMBERS = ("nan", ".nan", ".inf", "-.inf", "-1", "0", "1e30", "1e400", "-3.5", "0.5", "2", "5e-324", "9" * 21, "0x1f")
WORDS = ("", " ", "null", "true", "words", "a b", "é", "\u2028", "~", "x" * 3000, "a/b", "./a", "/", "..", "-", "--")
SHAPES = ("[]", "{}", "[1]", "{a: b}", "[[[]]]", "{class_path: 3}", "{class_path: Nope}", "{init_args: 3}", "[null]")
SIGNS = ("'", '"', "{", "}", "[", "]", ":", "a: b: c", "*a", "&a", "!x", "!!python/object:os.system x", "%", "@", "`")
FILES = ("nope.yaml", "text.txt", "parts", "fit.yaml", "parts/exit.yaml", "tiny", "heads", "/dev/null", "afile/x")
JUNK = (*NUMBERS, *WORDS, *SHAPES, *SIGNS, *FILES)

LETTERS = "abc XYZ 019\t\n.,:;-_#*&!|>'\"%@`{}[]()<>/\\~^$?=+é漢🙂\u200b\u2028\ufeff\x07\x00"


def text(rng: Random, longest: int = 40) -> str:
    """Any characters that can be encoded."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(0, longest)))


def value(rng: Random) -> str:
    """A value for an option."""
    return rng.choice(JUNK) if rng.random() < 0.9 else text(rng)


def mutated(rng: Random, good: str) -> str:
    """A good text with some of it gone, doubled, or replaced."""
    for _ in range(rng.randint(1, 3)):
        if not good:
            break
        at = rng.randrange(len(good))
        end = min(len(good), at + rng.randint(1, 12))
        put = rng.choice(("", good[at:end] * 2, value(rng)[:60], rng.choice(LETTERS), "\n", "\t"))
        good = good[:at] + put + good[end:]
    return good


def junk_at_a_line(rng: Random, good: str) -> str:
    """A good YAML text in which one line has another value."""
    lines = good.splitlines()
    places = [place for place, line in enumerate(lines) if ":" in line]
    place = rng.choice(places)
    lines[place] = f"{lines[place].partition(':')[0]}: {value(rng)[:80]}"
    return "\n".join(lines)


def _flipped(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def _cut(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def _put(content: bytes) -> Callable[[Path, Random], None]:
    return lambda path, rng: path.write_bytes(content) and None


def _folder(path: Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()


def _link(target: str) -> Callable[[Path, Random], None]:
    def harm(path: Path, rng: Random) -> None:
        path.unlink()
        path.symlink_to(target)

    return harm


HARM: dict[str, Callable[[Path, Random], None]] = {
    "flipped": _flipped,
    "cut": _cut,
    "empty": _put(b""),
    "null": _put(b"null"),
    "a list": _put(b"[]"),
    "a number": _put(b"7"),
    "an object": _put(b"{}"),
    "zeros": _put(b"\0" * 300),
    "Latin-1": _put('{"a": "\xe9"}'.encode("latin-1")),
    "a page": _put(b"<html>404</html>" * 20),
    "a pointer": _put(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"),
    "missing": lambda path, rng: path.unlink(),
    "a folder": _folder,
    "a link to nowhere": _link("/nowhere/at/all"),
    "a link to itself": lambda path, rng: _link(path.name)(path, rng),
}


def harmed(rng: Random, folder: Path) -> str:
    """Harm one file of a folder, of those that are there; what was done."""
    path = rng.choice(sorted(each for each in folder.rglob("*") if each.is_file()))
    name = rng.choice(sorted(HARM))
    HARM[name](path, rng)
    return f"{path.name} is {name}"


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_text("mine"),
    "a full device": lambda path: path.symlink_to("/dev/full"),
    "a link to nowhere": lambda path: path.symlink_to("/nowhere/at/all"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder with a file": lambda path: path.mkdir() or (path / "mine").write_text("mine"),
}
