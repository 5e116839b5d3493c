"""Models that engines are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.folders import model_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model: 6 blocks, one token a byte, a chat template."""
    return model_folder(tmp_path_factory.mktemp("tiny"))
