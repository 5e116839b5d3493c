"""A stand-in for a kernel's package."""

import sys
from types import ModuleType

import pytest


def install(monkeypatch: pytest.MonkeyPatch, user: ModuleType, module: str, **functions: object) -> None:
    """Put functions where a kernel is imported from, and let the user of it choose the package on any device."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for name, function in functions.items():
        setattr(sys.modules[module], name, function)
    monkeypatch.setattr(user, "backend", lambda package, device, dtype: package)
