"""A recurrent state that is snapshoted, advanced and taken back, against one that only ever saw what was kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynamax.backbones.cache import Cache
from dynamax.backbones.state import (
    REMEMBERED,
    BlockState,
    KeyValueState,
    Recurrence,
    RecurrentState,
    StateKind,
    Tensors,
)
from dynamax.types import Memory, Span


def decayed_sum(past: Tensors | None, x_BT: Tensor) -> tuple[Tensor, tuple[Tensors, ...]]:
    """The simplest recurrence whose state depends on the order of its rows."""
    state_B = torch.zeros(len(x_BT)) if past is None else past[0]
    out = []
    for x_B in x_BT.unbind(1):
        state_B = 0.5 * state_B + x_B
        out.append(state_B)
    return torch.stack(out, 1), ((state_B,),)


def every_sum(past: Tensors | None, x_BT: Tensor) -> tuple[Tensor, tuple[Tensors, ...]]:
    """The same, giving the state after every position."""
    out_BT = decayed_sum(past, x_BT)[0]
    return out_BT, tuple((out_B,) for out_B in out_BT.unbind(1))


def read(cell: RecurrentState, *numbers: float, by: Recurrence = decayed_sum) -> None:
    rows = (torch.tensor([numbers]),)
    cell.commit(by, rows, by(cell.tensors, *rows)[1])


def held(cell: RecurrentState) -> Tensor:
    assert cell.tensors is not None
    return cell.tensors[0]


def state(*numbers: float) -> Tensor:
    return decayed_sum(None, torch.tensor([numbers]))[1][-1][0]


def test_cropped_keys_leave_no_holes() -> None:
    """Positions skipped and taken back are seen again once they are written."""
    keys, one = KeyValueState(4), torch.zeros(1, 1, 1, 2)
    keys.write(one, one, 0)
    keys.skip(1, 2)
    assert keys.holes == {1, 2}
    keys.crop(2, keys.snapshot(0))
    assert keys.holes == {1}


def test_keys_and_values_outlive_the_growth_of_their_buffer() -> None:
    keys, one = KeyValueState(2), torch.ones(1, 1, 2, 2)
    keys.reserve(2)
    keys.write(one, 2 * one, 0)
    keys.reserve(5)
    keys.write(3 * one, 4 * one, 3)
    k_BHTD, v_BHTD = keys.read(0, 5)
    assert k_BHTD[0, 0, :, 0].tolist() == [1, 1, 0, 3, 3]
    assert v_BHTD[0, 0, :, 0].tolist() == [2, 2, 0, 4, 4]


@pytest.mark.parametrize(("kinds", "held"), [(("keys",), (True, False)), (("recurrent",), (False, True))])
def test_a_state_has_the_parts_its_block_keeps(kinds: tuple[StateKind, ...], held: tuple[bool, bool]) -> None:
    state = BlockState(kinds, 4)
    assert (state.keys is not None, state.recurrent is not None) == held
    both, none = BlockState(("keys", "recurrent"), 4), BlockState((), 4)
    assert both.keys is not None
    assert both.recurrent is not None
    assert none.keys is none.recurrent is None


def test_a_snapshot_gives_back_what_heads_remembered_each_time() -> None:
    cache = Cache(Span(0, 2))
    cache.memories[1, "gate"] = Memory(values={"sum": torch.ones(1)}, read=3)
    snapshot = cache.snapshot()
    for _ in range(2):
        memory = cache.memories[1, "gate"]
        memory.values["sum"], memory.read = torch.zeros(1), 9
        cache.rollback(snapshot)
        assert cache.memories[1, "gate"].read == 3
        assert cache.memories[1, "gate"].values["sum"].item() == 1.0


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_the_first_positions_since_a_snapshot_can_be_kept_again_and_again(keep: int) -> None:
    cell = RecurrentState()
    read(cell, 1.0, 2.0)
    snapshot = cell.snapshot(2)
    for wrong in (7.0, 9.0):
        read(cell, 3.0)
        read(cell, 4.0, 5.0)
        read(cell, wrong)
        cell.crop(2 + keep, snapshot)
        kept = (1.0, 2.0, 3.0, 4.0, 5.0)[: 2 + keep]
        assert held(cell).equal(state(*kept))
        cell.crop(2, snapshot)
    read(cell, 6.0)
    assert held(cell).equal(state(1.0, 2.0, 6.0))


@pytest.mark.parametrize("keep", range(8))
def test_states_that_are_known_are_taken_and_the_others_read_again(keep: int) -> None:
    """Chunks of both kinds in turn; read again is what stands behind the last state that is known."""
    cell, numbers = RecurrentState(), (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
    read(cell, 1.0)
    snapshot = cell.snapshot(1)
    for chunk, by in (((3.0, 4.0), every_sum), ((5.0, 6.0), decayed_sum), ((7.0, 8.0, 9.0), every_sum)):
        read(cell, *chunk, by=by)
    again: list[int] = []

    def counted(past: Tensors | None, x_BT: Tensor) -> tuple[Tensor, tuple[Tensors, ...]]:
        again.append(x_BT.shape[1])
        return decayed_sum(past, x_BT)

    cell._recurrence = counted
    for _ in range(2):
        cell.crop(1 + keep, snapshot)
        assert held(cell).equal(state(1.0, *numbers[:keep]))
    assert again == ([1] if keep == 3 else [])
    read(cell, 2.0)
    assert held(cell).equal(state(1.0, *numbers[:keep], 2.0))


def test_states_of_late_positions_are_not_held() -> None:
    cell = RecurrentState()
    snapshot = cell.snapshot(0)
    for _ in range(REMEMBERED + 5):
        read(cell, 1.0, by=every_sum)
    assert sum(bool(states) for _, states in cell._noted) == REMEMBERED
    cell.crop(REMEMBERED + 3, snapshot)
    assert held(cell).equal(state(*[1.0] * (REMEMBERED + 3)))


def test_what_was_dropped_is_not_read_again() -> None:
    """Positions kept twice, others read in between: what the first rollback dropped is gone."""
    cell = RecurrentState()
    read(cell, 1.0, 2.0)
    snapshot = cell.snapshot(2)
    read(cell, 3.0, 4.0)
    cell.crop(3, snapshot)
    read(cell, 8.0, 9.0)
    cell.crop(4, snapshot)
    assert held(cell).equal(state(1.0, 2.0, 3.0, 8.0))


def test_behind_skipped_positions_none_can_be_kept() -> None:
    cell = RecurrentState()
    read(cell, 1.0)
    snapshot = cell.snapshot(1)
    cell.skip(1, 1)
    read(cell, 2.0)
    with pytest.raises(AssertionError, match="only positions after the newest snapshot can be kept"):
        cell.crop(2, snapshot)
    cell.crop(1, snapshot)
    assert held(cell).equal(state(1.0))


def test_an_older_snapshot_can_be_returned_to_but_not_beyond() -> None:
    cell = RecurrentState()
    read(cell, 1.0)
    older = cell.snapshot(1)
    read(cell, 2.0, 3.0)
    cell.snapshot(3)
    read(cell, 4.0)
    with pytest.raises(AssertionError, match="only positions after the newest snapshot can be kept"):
        cell.crop(2, older)
    cell.crop(1, older)
    assert held(cell).equal(state(1.0))


def test_a_snapshot_before_the_first_position() -> None:
    cell = RecurrentState()
    snapshot = cell.snapshot(0)
    read(cell, 1.0)
    cell.crop(0, snapshot)
    assert cell.tensors is None


def test_nothing_is_noted_before_the_first_snapshot() -> None:
    cell = RecurrentState()
    read(cell, 1.0)
    assert cell._noted == []
