"""Messages: what was sent is what comes; anything else is refused before memory is taken for it."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynamax.errors import UserError
from dynamax.serving.wire import FORMATS, MOST_HEADER, Message, WireError, packed, states, unpacked, value, wire_format

VALUES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=20)


def sent(h_TW: Tensor, name: str, first: int = 0, **other: object) -> Message:
    header = {"first": first, "count": len(h_TW), **other}
    return unpacked(packed(header, FORMATS[name].encode(h_TW)))


@given(st.dictionaries(st.text(max_size=10), VALUES, max_size=8), st.binary(max_size=200))
def test_what_is_packed_comes_out(header: dict[str, object], body: bytes) -> None:
    found = unpacked(packed(header, body))
    assert found.header == header
    assert bytes(found.body) == body


@pytest.mark.parametrize("width", [32, 40, 576])
@pytest.mark.parametrize(
    ("name", "bits"), [("float32", 32), ("bfloat16", 16), ("float16", 16), ("int8", 8), ("int4", 4)]
)
def test_states_come_as_exact_as_their_format_is(name: str, bits: int, width: int) -> None:
    h_TW = torch.randn(7, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    first, found_TW = states(sent(h_TW, name, 5), FORMATS[name], width=width, most=12)
    assert (first, found_TW.dtype, found_TW.shape) == (5, torch.float32, h_TW.shape)
    apart_T = (found_TW - h_TW).norm(dim=1) / h_TW.norm(dim=1)
    bound = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-10, "int8": 0.02, "int4": 0.12}[name]
    assert float(apart_T.max()) <= bound
    per_value = 8 * FORMATS[name].size(7, width) / (7 * width)
    assert bits <= per_value <= bits + 1.2 or width % 32


@pytest.mark.parametrize("name", FORMATS)
def test_a_position_of_zeros_and_one_huge_one(name: str) -> None:
    h_TW = torch.zeros(2, 64)
    h_TW[1] = 3e4
    _, found_TW = states(sent(h_TW, name), FORMATS[name], width=64, most=2)
    torch.testing.assert_close(found_TW, h_TW, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({}, "first must be"),
        ({"first": 0}, "count must be"),
        ({"first": -1, "count": 1}, "first must be"),
        ({"first": 0, "count": 0}, "count must be"),
        ({"first": True, "count": 1}, "first must be"),
        ({"first": 0, "count": 1.0}, "count must be"),
        ({"first": 0, "count": 2**60}, "count must be"),
        ({"first": 8, "count": 3}, "of at most 10"),
        ({"first": 0, "count": 2**40}, "in one message, of at most 256"),
        ({"first": 0, "count": 3}, "bytes, but"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(header: dict[str, object], told: str) -> None:
    message = unpacked(packed(header, FORMATS["float32"].encode(torch.zeros(2, 4))))
    with pytest.raises(WireError, match=told):
        states(message, FORMATS["float32"], width=4, most=10)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_states_that_are_no_numbers_are_refused(name: str, odd: float) -> None:
    h_TW = torch.zeros(2, 4, dtype=getattr(torch, name))
    h_TW[1, 2] = odd
    message = unpacked(packed({"first": 0, "count": 2}, h_TW.view(torch.uint8).numpy().tobytes()))
    with pytest.raises(WireError, match="NaN or infinite"):
        states(message, FORMATS[name], width=4, most=10)


def test_states_too_large_for_float16_are_not_sent() -> None:
    with pytest.raises(UserError, match="bfloat16"):
        FORMATS["float16"].encode(torch.tensor([[1.0, 7e4]]))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_scales_that_are_no_numbers_are_refused(name: str) -> None:
    raw = b"\xff" * FORMATS[name].size(2, 32)
    with pytest.raises(WireError, match="NaN or infinite"):
        states(unpacked(packed({"first": 0, "count": 2}, raw)), FORMATS[name], width=32, most=10)


def test_ten_thousand_messages_of_random_bytes() -> None:
    """Each is refused; none takes more memory than a header may have."""
    order = random.Random(0)
    whole = packed({"first": 0, "count": 2}, FORMATS["float32"].encode(torch.zeros(2, 4)))
    tracemalloc.start()
    for number in range(10_000):
        raw = bytearray(whole if number % 2 else order.randbytes(order.randrange(0, 300)))
        if number % 2:  # one that would be right, with some bytes changed
            for _ in range(order.randrange(1, 4)):
                raw[order.randrange(len(raw))] = order.randrange(256)
            raw = raw[: order.randrange(len(raw) + 1)]
        try:
            first, h_TW = states(unpacked(bytes(raw)), FORMATS["float32"], width=4, most=10)
        except WireError:
            continue
        assert h_TW.isfinite().all()
        assert first + len(h_TW) <= 10
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_headers_that_are_none_are_refused() -> None:
    deep = b"[" * 4000
    for raw in (b"", b"\x01", struct.pack("<I", 5), struct.pack("<I", MOST_HEADER + 1) + b" " * 9000):
        with pytest.raises(WireError):
            unpacked(raw)
    for head in (b"[1]", b"7", b"{", b"\xff\xfe", deep, json.dumps("x").encode()):
        with pytest.raises(WireError):
            unpacked(struct.pack("<I", len(head)) + head)
    with pytest.raises(WireError, match="name must be a str"):
        value({"name": 3}, "name", str)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match="one of float32, float16, bfloat16, int8, int4"):
        wire_format("int2")
