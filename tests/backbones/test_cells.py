"""A recurrent state that is marked, advanced and taken back, against one that only ever saw what was kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynamax.backbones.cache import Cache
from dynamax.backbones.cells import Keys, Past, Recurrent
from dynamax.types import Memory, Span


def decayed_sum(past: Past | None, x_BT: Tensor) -> tuple[Tensor, Past]:
    """The simplest recurrence whose state depends on the order of its rows."""
    state_B = torch.zeros(len(x_BT)) if past is None else past[0]
    out = []
    for x_B in x_BT.unbind(1):
        state_B = 0.5 * state_B + x_B
        out.append(state_B)
    return torch.stack(out, 1), (state_B,)


def read(cell: Recurrent, *numbers: float) -> None:
    cell.advance(decayed_sum, (torch.tensor([numbers]),))


def held(cell: Recurrent) -> Tensor:
    assert cell.past is not None
    return cell.past[0]


def state(*numbers: float) -> Tensor:
    return decayed_sum(None, torch.tensor([numbers]))[1][0]


def test_cropped_keys_leave_no_holes() -> None:
    """Positions skipped and taken back are seen again once they are written."""
    keys, one = Keys(4), torch.zeros(1, 1, 1, 2)
    keys.append(one, one)
    keys.skip(2)
    assert keys.holes == {1, 2}
    keys.crop(2)
    assert keys.holes == {1}
    keys.append(one, one)
    assert keys.holes == {1}


def test_a_mark_gives_back_what_heads_remembered_each_time() -> None:
    cache = Cache(Span(0, 2))
    cache.memories[1, "gate"] = Memory(values={"sum": torch.ones(1)}, read=3)
    mark = cache.mark()
    for _ in range(2):
        memory = cache.memories[1, "gate"]
        memory.values["sum"], memory.read = torch.zeros(1), 9
        cache.rollback(mark)
        assert cache.memories[1, "gate"].read == 3
        assert cache.memories[1, "gate"].values["sum"].item() == 1.0


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_the_first_positions_since_a_mark_can_be_kept_again_and_again(keep: int) -> None:
    cell = Recurrent()
    read(cell, 1.0, 2.0)
    mark = cell.mark()
    for wrong in (7.0, 9.0):
        read(cell, 3.0)
        read(cell, 4.0, 5.0)
        read(cell, wrong)
        cell.crop(2 + keep, mark)
        assert cell.fill == 2 + keep
        kept = (1.0, 2.0, 3.0, 4.0, 5.0)[: 2 + keep]
        assert held(cell).equal(state(*kept))
        cell.crop(2, mark)
    read(cell, 6.0)
    assert held(cell).equal(state(1.0, 2.0, 6.0))


def test_what_was_dropped_is_not_read_again() -> None:
    """Positions kept twice, others read in between: what the first rollback dropped is gone."""
    cell = Recurrent()
    read(cell, 1.0, 2.0)
    mark = cell.mark()
    read(cell, 3.0, 4.0)
    cell.crop(3, mark)
    read(cell, 8.0, 9.0)
    cell.crop(4, mark)
    assert held(cell).equal(state(1.0, 2.0, 3.0, 8.0))


def test_behind_skipped_positions_none_can_be_kept() -> None:
    cell = Recurrent()
    read(cell, 1.0)
    mark = cell.mark()
    cell.skip(1)
    read(cell, 2.0)
    with pytest.raises(AssertionError, match="only positions after the newest mark can be kept"):
        cell.crop(2, mark)
    cell.crop(1, mark)
    assert held(cell).equal(state(1.0))


def test_an_older_mark_can_be_returned_to_but_not_beyond() -> None:
    cell = Recurrent()
    read(cell, 1.0)
    older = cell.mark()
    read(cell, 2.0, 3.0)
    cell.mark()
    read(cell, 4.0)
    with pytest.raises(AssertionError, match="only positions after the newest mark can be kept"):
        cell.crop(2, older)
    cell.crop(1, older)
    assert held(cell).equal(state(1.0))


def test_a_mark_before_the_first_position() -> None:
    cell = Recurrent()
    mark = cell.mark()
    read(cell, 1.0)
    cell.crop(0, mark)
    assert (cell.fill, cell.past) == (0, None)


def test_nothing_is_noted_before_the_first_mark() -> None:
    cell = Recurrent()
    read(cell, 1.0)
    assert cell._rows == []
