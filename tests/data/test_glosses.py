from __future__ import annotations

from pathlib import Path

import pytest

from dynamax.data.glosses import FILES, Glosses, gloss

HEAD = "  1 This software and database is being provided to you  \n"
LINES = {
    "data.noun": "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived  \n"
    '02122298 05 n 02 house_cat 0 kitty 1 001 @ 02121808 n 0000 | a cat; "she has a cat"  \n',
    "data.verb": "00001740 29 v 01 breathe 0 000 01 + 02 00 | draw air into the lungs  \n",
    "data.adj": "00002312 00 s 02 abaxial(a) 0 dorsal(ip) 4 000 | facing away  \n",
    "data.adv": "00001740 02 r 01 a_cappella 0 000 | without musical accompaniment  \n",
}
TEXTS = [
    "entity (noun): that which is perceived",
    'house cat, kitty (noun): a cat; "she has a cat"',
    "breathe (verb): draw air into the lungs",
    "abaxial, dorsal (adjective): facing away",
    "a cappella (adverb): without musical accompaniment",
]


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    for name, lines in LINES.items():
        (tmp_path / name).write_text(HEAD + lines)
    return tmp_path


def test_every_file_is_read_and_the_licence_is_not(wordnet: Path) -> None:
    assert [text for text, _ in Glosses(str(wordnet)).texts()] == TEXTS
    assert [text for text, _ in Glosses(str(wordnet), rows=2).texts()] == TEXTS[:2]


def test_words_are_counted_in_hexadecimal() -> None:
    words = " ".join(f"w{number} 0" for number in range(10))
    assert gloss(f"1 03 n 0a {words} 000 | ten") == f"{', '.join(f'w{number}' for number in range(10))} (noun): ten"


def test_it_is_a_source_of_documents_too(wordnet: Path, engine) -> None:
    source = Glosses(str(wordnet), length=16)
    groups = list(source.groups(engine))
    assert source.count() == len(groups) == 1
    assert sum(len(document.tokens) for document in groups[0]) == sum(map(len, TEXTS))


def test_identity_is_of_the_contents(wordnet: Path, tmp_path_factory) -> None:
    before = Glosses(str(wordnet)).identity()
    copy = tmp_path_factory.mktemp("copy")
    for name in FILES:
        (copy / name).write_bytes((wordnet / name).read_bytes())
    assert Glosses(str(copy)).identity() == before
    (copy / "data.adv").write_text(HEAD)
    assert Glosses(str(copy)).identity() != before


def test_a_folder_that_is_none(wordnet: Path) -> None:
    (wordnet / "data.verb").unlink()
    with pytest.raises(ValueError, match=r"lacks data.verb.*wordnet-base"):
        list(Glosses(str(wordnet)).texts())
    with pytest.raises(ValueError, match="rows=0"):
        Glosses(rows=0)


def test_files_without_glosses(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text(HEAD)
    with pytest.raises(ValueError, match="holds no glosses"):
        list(Glosses(str(tmp_path)).texts())
