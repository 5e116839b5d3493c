"""Contracts for plug-in authors: run these on a class of your own before anyone else does.

Each check raises ``UserError`` with what differed; none needs the network or a GPU.
"""

from __future__ import annotations

from dynamax.backbones.check import Reference, check_backbone
from dynamax.heads.check import check_head, toy_evidence, toy_site
from dynamax.policies.check import check_policy

__all__ = ["Reference", "check_backbone", "check_head", "check_policy", "toy_evidence", "toy_site"]
