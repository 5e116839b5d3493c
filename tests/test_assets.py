"""The models that come with the repository: small, whole, and what their cards say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamax.backbones.sources import Folder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.heads.bank import Exit, ExitBank
from dynamax.modules.export import card
from dynamax.policies.confidence import MaxProb
from dynamax.policies.schedule import Never

ROOT = Path(__file__).parent.parent
ASSETS = sorted(path.parent for path in (ROOT / "assets").rglob("config.json"))
PROMPT = "Question: What is the capital of Italy?\nAnswer:"


@pytest.mark.parametrize("folder", ASSETS, ids=lambda folder: str(folder.relative_to(ROOT / "assets")))
def test_a_model_is_small_and_has_a_card(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size < 12 * 2**20
    written, report = (folder / "README.md").read_text(), json.loads((folder / "training.json").read_text())
    title = next(line for line in written.splitlines() if line.startswith("# "))
    assert written == card(title.removeprefix("# "), report)
    assert report["depths"]["8"]["agreement"] == 1.0
    assert report["files"] == sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("folder", ASSETS, ids=lambda folder: str(folder.relative_to(ROOT / "assets")))
def test_a_model_decodes_as_transformers_does(folder: Path) -> None:
    """Laws 1 and 2 on trained weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_1T = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = model.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=24, min_new_tokens=24, do_sample=False
    )[0, prompt_1T.shape[1] :]
    backbone = Folder(str(folder)).load()
    bank = ExitBank({depth: Exit() for depth in (2, 4, 6)}, backbone.site)
    end = tokenizer.eos_token_id
    for decoder in (EarlyExit(backbone, bank, Never()), SelfSpeculative(backbone, bank, MaxProb(0.5))):
        got = [int(step.token_B) for step in decoder.decode(prompt_1T, max_new_tokens=24)]
        until = got.index(end) if end in got else len(got)  # generate goes on past an end that it was forbidden
        assert until >= 5, "there is something to compare"
        assert got[:until] == wanted[:until].tolist()
