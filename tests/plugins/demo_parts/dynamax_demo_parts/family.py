"""A model family of transformers from outside."""

from __future__ import annotations

from dynamax.backbones.families import FamilySpec

JAIS2 = FamilySpec()
"""Jais 2 is built as Llama is; its norms and biases are modules that run as they are."""
