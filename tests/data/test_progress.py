"""The bar over the filling of a store."""

from dynamax.data.fill import Progress


def test_the_bar_tells_tokens_a_second_and_time_left(capsys):
    with Progress(4, shown=True) as bar:
        bar.skip(2)
        bar.advance(100)
        bar.advance(100)
    shown = capsys.readouterr().err
    assert "tokens/s" in shown
    assert "100%" in shown
    assert "4/4" in shown
    with Progress(4, shown=False) as bar:
        bar.advance(1)
    with Progress(None, shown=True) as bar:
        bar.advance(1)
    assert "%" not in capsys.readouterr().err
