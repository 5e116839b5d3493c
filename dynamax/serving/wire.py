"""What goes over the wire: a header of plain values, and hidden states as raw bytes. No pickle, no code.

A message is the length of its header, the header as JSON, then the body. The length of a body is known from the header
before anything of it is read, so that what does not fit is refused without memory being taken for it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamax.errors import UserError

VERSION = 2
SERVICE, METHODS = "dynamax.Cloud", ("open", "send", "next", "close", "health")
"""Of gRPC: requests and replies are messages as below."""

MOST_HEADER = 8192
"""Bytes that a header may have."""

ALIVE_MS = 2000
"""After so long a silence either side asks whether the other is there, and gives the connection up after as long."""

MOST_DRAFTS = 64
"""Tokens that a cloud verifies at a time."""

CHUNK = 256
"""Most positions of one message."""

GROUP = 32
"""Channels of a row that share a scale in ``int4``."""

LENGTH = struct.Struct("<I")


class WireError(ValueError):
    """A message that is none, or does not say what it should."""


class Message(NamedTuple):
    """A header and a body."""

    header: dict[str, Any]
    body: memoryview = memoryview(b"")


def packed(header: Mapping[str, Any], body: bytes = b"") -> bytes:
    """A message as bytes."""
    head = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    assert len(head) <= MOST_HEADER, "headers hold a few numbers and names"
    return LENGTH.pack(len(head)) + head + body


def unpacked(raw: bytes) -> Message:
    """The message in some bytes.

    Raises:
        WireError: If they are none.
    """
    if len(raw) < LENGTH.size:
        raise WireError(f"the message has {len(raw)} bytes, fewer than its header's length takes")
    (length,) = LENGTH.unpack_from(raw)
    if length > min(MOST_HEADER, len(raw) - LENGTH.size):
        raise WireError(f"the header is said to have {length} bytes, of a message of {len(raw)}")
    stop = LENGTH.size + length
    try:
        header = json.loads(raw[LENGTH.size : stop])
    except (ValueError, RecursionError) as error:
        raise WireError("the header is not JSON") from error
    if not isinstance(header, dict):
        raise WireError("the header holds no names and values")
    return Message(header, memoryview(raw)[stop:])


def value(header: Mapping[str, Any], name: str, kind: type, least: int | None = None) -> Any:  # noqa: ANN401
    """An entry of a header, of the kind that is wanted; a whole number not below ``least``.

    Raises:
        WireError: If it is missing, or another.
    """
    found: Any = header.get(name)
    if type(found) is not kind or (least is not None and found < least) or (kind is int and found >= 2**53):
        raise WireError(f"{name} must be a {kind.__name__}{'' if least is None else f' of at least {least}'}")
    return found


# -- hidden states ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WireFormat:
    """How hidden states travel.

    Attributes:
        size: Bytes of so many positions of so many channels.
        encode: Positions ``h_TW`` to bytes.
        decode: Bytes to positions ``h_TW``, float32, given their number and width.
    """

    size: Callable[[int, int], int]
    encode: Callable[[Tensor], bytes]
    decode: Callable[[memoryview, int, int], Tensor]


def _as_they_are(kind: torch.dtype) -> WireFormat:
    def encode(h_TW: Tensor) -> bytes:
        said_TW = h_TW.to(kind).contiguous()
        if kind is torch.float16 and not bool(said_TW.isfinite().all()):
            raise UserError(
                f"The hidden states reach {float(h_TW.abs().max()):.3g}, more than float16 holds. Send them in "
                f"bfloat16, int8 or float32."
            )
        return said_TW.view(torch.uint8).numpy().tobytes()

    def decode(raw: memoryview, t: int, w: int) -> Tensor:
        return torch.frombuffer(bytearray(raw), dtype=kind).view(t, w).float()

    return WireFormat(lambda t, w: kind.itemsize * t * w, encode, decode)


def _int8() -> WireFormat:
    """A scale for each position, its largest value / 127 in float32; behind all scales a byte for each channel."""

    def encode(h_TW: Tensor) -> bytes:
        scale_T1 = h_TW.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        return scale_T1.numpy().tobytes() + (h_TW.float() / scale_T1).round().to(torch.int8).numpy().tobytes()

    def decode(raw: memoryview, t: int, w: int) -> Tensor:
        scale_T1 = torch.frombuffer(bytearray(raw[: 4 * t]), dtype=torch.float32)[:, None]
        return torch.frombuffer(bytearray(raw[4 * t :]), dtype=torch.int8).view(t, w).float() * scale_T1

    return WireFormat(lambda t, w: 4 * t + t * w, encode, decode)


def _int4() -> WireFormat:
    """A scale for each 32 channels, their largest value / 7 in float16; behind all scales two channels a byte."""

    def groups(w: int) -> int:
        return math.ceil(w / GROUP)

    def encode(h_TW: Tensor) -> bytes:
        t, w = h_TW.shape
        h_TGC = torch.nn.functional.pad(h_TW.float(), (0, groups(w) * GROUP - w)).view(t, groups(w), GROUP)
        scale_TG1 = (h_TGC.abs().amax(2, keepdim=True) / 7).clamp(2.0**-24, 65504).half()
        said = (h_TGC / scale_TG1.float()).round().clamp(-7, 7).to(torch.int8) + 8
        pairs = said.view(t, -1, 2).to(torch.uint8)
        return scale_TG1.numpy().tobytes() + (pairs[..., 0] | pairs[..., 1] << 4).numpy().tobytes()

    def decode(raw: memoryview, t: int, w: int) -> Tensor:
        scales = 2 * t * groups(w)
        scale_TG1 = torch.frombuffer(bytearray(raw[:scales]), dtype=torch.float16).view(t, groups(w), 1)
        said = torch.from_numpy(np.frombuffer(raw[scales:], dtype=np.uint8).copy()).view(t, -1)
        pairs = torch.stack([said & 15, said >> 4], -1).view(t, groups(w), GROUP)
        return ((pairs.float() - 8) * scale_TG1.float()).view(t, -1)[:, :w]

    return WireFormat(lambda t, w: t * groups(w) * (2 + GROUP // 2), encode, decode)


FORMATS = {
    "float32": _as_they_are(torch.float32),
    "float16": _as_they_are(torch.float16),
    "bfloat16": _as_they_are(torch.bfloat16),
    "int8": _int8(),
    "int4": _int4(),
}


def wire_format(name: str) -> WireFormat:
    """A format by name.

    Raises:
        UserError: If there is none.
    """
    if name not in FORMATS:
        raise UserError(f"The wire format {name!r} was given; one of {', '.join(FORMATS)} is wanted.")
    return FORMATS[name]


def states(message: Message, kind: WireFormat, *, width: int, most: int) -> tuple[int, Tensor]:
    """The place of the first position in a message, and its positions ``h_TW``.

    Args:
        message: The message: ``first``, ``count``, and a body.
        kind: How the body was written.
        width: Channels that each position must have.
        most: Most positions that a run may have.

    Raises:
        WireError: If the numbers are none, are too many for one message, reach behind ``most`` or do not fit the
            body; or the states are not finite.
    """
    first, count = value(message.header, "first", int, 0), value(message.header, "count", int, 1)
    if count > CHUNK:
        raise WireError(f"{count} positions were sent in one message, of at most {CHUNK}")
    if first + count > most:
        raise WireError(f"positions {first} to {first + count} were sent, of at most {most}")
    if len(message.body) != kind.size(count, width):
        raise WireError(
            f"{count} positions of {width} channels take {kind.size(count, width)} bytes, but {len(message.body)} came"
        )
    h_TW = kind.decode(message.body, count, width)
    if not bool(h_TW.isfinite().all()):
        raise WireError("the states hold NaN or infinite numbers")
    return first, h_TW
