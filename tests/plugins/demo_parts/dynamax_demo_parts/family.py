"""A model family of transformers from outside."""

from __future__ import annotations

from dynamax.backbones.families import FamilySpec

STABLELM = FamilySpec()
"""StableLM is built as Llama is; its norms and biases are modules that run as they are."""
