from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from dynamax.backbones.hf import HFBackbone
from dynamax.engine import Engine
from tests.data.small import characters, small_backbone


@pytest.fixture(scope="session")
def backbone() -> HFBackbone:
    return small_backbone()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return characters()


@pytest.fixture(scope="session")
def engine(backbone: HFBackbone, tokenizer: PreTrainedTokenizerBase) -> Engine:
    return Engine(backbone, tokenizer)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What ``datasets`` converts stays out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
