"""All contenders by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from dynamax.bench.base import Contender, Subject
from dynamax.bench.ctranslate import CTranslate2
from dynamax.bench.economised import Calm, EconomizeExit, EconomizeLookup
from dynamax.bench.huggingface import Assisted, Lookup, Plain, Static
from dynamax.bench.llamacpp import KINDS, LlamaCpp
from dynamax.bench.ours import Chosen, Early, FullDepth, Lossless
from dynamax.errors import UserError
from dynamax.registry import near

Maker = Callable[[str, Subject], Contender]

PRECISIONS: tuple[str | None, ...] = (None, "float32", "float16", "bfloat16", "int8")
"""Precisions that ``dynamax.load`` takes and that are measured; None runs transformers' modules as they are."""

OURS: dict[str, Callable[..., Contender]] = {
    "dynamax-full": FullDepth,
    "dynamax-early-exit": Early,
    "dynamax-lossless": Lossless,
    "dynamax-decoder": Chosen,
}
"""This package's contenders, each measured at every precision, and all but the chosen decoder compiled, at float16."""

REFERENCE = "transformers"
"""The contender that all answers are compared with."""

CONTENDERS: dict[str, Maker] = {
    **{
        name if precision is None else f"{name}-{precision}": partial(maker, precision=precision)
        for precision in PRECISIONS
        for name, maker in OURS.items()
    },
    **{
        f"{name}-compiled": partial(maker, precision="float16", compiled=True)
        for name, maker in OURS.items()
        if maker is not Chosen
    },
    REFERENCE: partial(Plain, dtype="float32"),
    "transformers-bfloat16": partial(Plain, dtype="bfloat16"),
    "transformers-lookup": Lookup,
    "transformers-early-exit": Assisted,
    "transformers-static": Static,
    "economize-calm": Calm,
    "economize-lookup": EconomizeLookup,
    "economize-early-exit": EconomizeExit,
    "ctranslate2-float32": partial(CTranslate2, quantization="float32"),
    "ctranslate2-int8": partial(CTranslate2, quantization="int8"),
    **{f"llamacpp-{kind.lower()}": partial(LlamaCpp, kind=kind) for kind in KINDS},
}
"""Makers by name, in the order in which they are reported."""

ON_REQUEST = {
    **{
        f"{name}-{precision}": "float16 is measured, and other precisions if they are named: "
        f"--contenders all,{name}-{precision}"
        for precision in PRECISIONS
        for name in OURS
        if precision not in (None, "float16") and name != "dynamax-full"
    },
    "transformers-static": "it takes minutes to compile, so it runs only if it is named: "
    "--contenders all,transformers-static",
}
"""Contenders that run only if they are named, and why."""


def chosen(names: Sequence[str] | None) -> dict[str, bool]:
    """The contenders that were asked for, in the order of the report, and whether each was asked for by its name.

    Args:
        names: Names, or several with commas between; ``all`` is all but those on request. None for ``all``.

    Raises:
        UserError: If a name is unknown, or there is none.
    """
    given = ["all"] if names is None else [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not given:
        raise UserError(f"No contender was named; wanted: all, or some of {', '.join(CONTENDERS)}.")
    for name in given:
        if name != "all" and name not in CONTENDERS:
            known = ["all", *CONTENDERS]
            raise UserError(f"There is no contender {name!r}.{near(name, known)} Known: {', '.join(known)}.")
    return {name: name in given for name in CONTENDERS if name in given or ("all" in given and name not in ON_REQUEST)}
