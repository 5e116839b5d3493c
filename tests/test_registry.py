"""Entry points that cannot be loaded are told with what stands in their way."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dynamax.registry import Registry


def registry(value: str) -> Registry:
    made = Registry("dynamax.heads", "exit head")
    made._points = {"LongGate": EntryPoint("LongGate", value, "dynamax.heads")}
    return made


def test_a_file_that_stands_before_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys_gates.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="LongGate cannot be imported") as caught:
        registry("somebodys_gates:LongGate").get("LongGate")
    assert str(tmp_path / "somebodys_gates.py") in str(caught.value)


def test_a_package_that_is_gone_is_told() -> None:
    with pytest.raises(ValueError, match=r"from nobodys_gates:LongGate: No module named .* Python found no file"):
        registry("nobodys_gates:LongGate").get("LongGate")
