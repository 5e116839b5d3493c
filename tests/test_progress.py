"""What is shown while something takes long: a bar on a terminal, lines elsewhere; always on stderr."""

from __future__ import annotations

import pytest

from dynamax import progress
from dynamax.modules.bars import RunBars
from dynamax.progress import Bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(desc="store", total=100, mininterval=0)
    for second in range(25):
        clock[0] = float(second)
        bar.say(f"token {second}")
        bar.update()
    bar.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "\r" not in shown.err
    assert [line.split("|")[0].split()[1] for line in shown.err.splitlines()] == ["0%", "10%", "20%", "25%"]
    assert "token 24" in shown.err


def test_a_bar_that_is_not_to_stay_leaves_no_last_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    Bar(desc="validation", total=3, leave=False).close()
    Bar(desc="nothing", total=3, disable=True).close()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_terminal_gets_a_bar(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    with Bar(desc="store", total=2, mininterval=0) as bar:
        for step in range(2):
            clock[0] += 1.0
            bar.say(f"group {step}")
            bar.update()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\r") > 2
    assert "group 1" in shown.err
    assert "2/2" in shown.err


@pytest.mark.parametrize("columns", [0, 50])
def test_a_terminal_without_a_width_gets_a_bar(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setattr(progress, "_columns", lambda: columns)
    with Bar(desc="store", total=2) as bar:
        bar.update(2)
    assert "2/2" in capsys.readouterr().err


def test_a_test_s_bar_has_ended_when_others_print(capsys: pytest.CaptureFixture[str]) -> None:
    bars = RunBars()
    bars.test_progress_bar = Bar(desc="Testing", total=1)  # type: ignore[assignment]
    bars.test_progress_bar.update()
    bars.on_test_epoch_end(None, None)  # type: ignore[arg-type]
    shown = capsys.readouterr().err
    assert "100%" in shown
    bars.test_progress_bar.close()  # as Lightning does afterwards
    assert capsys.readouterr().err == ""
