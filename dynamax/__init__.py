"""Dynamic depth (early exit) for decoder-only language models.

>>> import dynamax
>>> engine = dynamax.load("assets/llama", exits=[2, 4])
>>> answer = engine.generate("What is the capital of France?", policy=dynamax.MaxProb(0.5), max_new_tokens=4)
>>> answer.depths[0]  # the first token comes from the prompt's own pass, at full depth
8

Names are imported when they are first used, so that ``import dynamax`` itself is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dynamax.errors import UserError

if TYPE_CHECKING:
    from dynamax.backbones.hf import HFBackbone
    from dynamax.backbones.skipped_state import CopyLayer, CopyToken, Exact, Propagate, Skip
    from dynamax.backbones.sources import GGUF, Folder, Hub, SmolLM2
    from dynamax.backbones.tuned import Tuned
    from dynamax.decoding.drafting import Speculative
    from dynamax.decoding.drafts import PromptLookup, TokenTable
    from dynamax.decoding.early_exit import EarlyExit
    from dynamax.decoding.full import Full
    from dynamax.decoding.sampling import Greedy, Sampled
    from dynamax.decoding.speculative import SelfSpeculative
    from dynamax.engine import Engine, load
    from dynamax.heads.bank import Exit, ExitBank
    from dynamax.policies import (
        AllOf,
        AnyOf,
        AtDepth,
        Decaying,
        Entropy,
        GateConfidence,
        Margin,
        MaxProb,
        Never,
        Patience,
        Saturation,
    )
    from dynamax.stream import Answer, Stream

__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(("Engine", "load"), "dynamax.engine"),
    **dict.fromkeys(("Answer", "Stream"), "dynamax.stream"),
    **dict.fromkeys(("Folder", "GGUF", "Hub", "SmolLM2"), "dynamax.backbones.sources"),
    "Tuned": "dynamax.backbones.tuned",
    **dict.fromkeys(("CopyLayer", "CopyToken", "Exact", "Propagate", "Skip"), "dynamax.backbones.skipped_state"),
    **dict.fromkeys(("Exit", "ExitBank"), "dynamax.heads.bank"),
    **dict.fromkeys(("Greedy", "Sampled"), "dynamax.decoding.sampling"),
    **dict.fromkeys(
        (
            "AllOf",
            "AnyOf",
            "AtDepth",
            "Decaying",
            "Entropy",
            "GateConfidence",
            "Margin",
            "MaxProb",
            "Never",
            "Patience",
            "Saturation",
        ),
        "dynamax.policies",
    ),
    **dict.fromkeys(("PromptLookup", "TokenTable"), "dynamax.decoding.drafts"),
    "EarlyExit": "dynamax.decoding.early_exit",
    "Full": "dynamax.decoding.full",
    "HFBackbone": "dynamax.backbones.hf",
    "Speculative": "dynamax.decoding.drafting",
    "SelfSpeculative": "dynamax.decoding.speculative",
}

__all__ = [
    "GGUF",
    "AllOf",
    "Answer",
    "AnyOf",
    "AtDepth",
    "CopyLayer",
    "CopyToken",
    "Decaying",
    "EarlyExit",
    "Engine",
    "Entropy",
    "Exact",
    "Exit",
    "ExitBank",
    "Folder",
    "Full",
    "GateConfidence",
    "Greedy",
    "HFBackbone",
    "Hub",
    "Margin",
    "MaxProb",
    "Never",
    "Patience",
    "PromptLookup",
    "Propagate",
    "Sampled",
    "Saturation",
    "SelfSpeculative",
    "Skip",
    "SmolLM2",
    "Speculative",
    "Stream",
    "TokenTable",
    "Tuned",
    "UserError",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'dynamax' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
