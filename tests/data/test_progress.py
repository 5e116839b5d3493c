"""The bar over the filling of a store."""

import pytest

from dynamax.data.fill import fill_store
from tests.data.small import RandomText


class Stopped(RandomText):
    """Is interrupted before its third group."""

    def groups(self, engine, *, skip=0):
        yield from list(super().groups(engine, skip=skip))[:2]
        raise KeyboardInterrupt


class Uncounted(RandomText):
    """Cannot say how many groups there are."""

    def count(self):
        return None


def test_the_bar_tells_tokens_a_second_and_time_left(tmp_path, engine, capsys):
    options = {"k": 4, "shard_bytes": 1}
    with pytest.raises(KeyboardInterrupt):
        fill_store(tmp_path, engine, Stopped(groups=4), [2], **options)
    assert "2/4" in capsys.readouterr().err
    fill_store(tmp_path, engine, RandomText(groups=4), [2], **options)
    shown = capsys.readouterr().err
    assert "0/4" in shown  # before what is there was counted
    assert "1/4" not in shown
    assert "tokens/s" in shown
    assert "100%" in shown
    assert "4/4" in shown
    fill_store(tmp_path / "other", engine, RandomText(groups=4), [2], progress=False, **options)
    assert capsys.readouterr().err == ""
    fill_store(tmp_path / "more", engine, Uncounted(groups=1), [2], **options)
    shown = capsys.readouterr().err
    assert "tokens/s" in shown
    assert "%" not in shown
