"""Laws on the real model, in float32: SmolLM2-135M-Instruct beside transformers' generate."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dynamax.backbones.hf import HFBackbone
from dynamax.data.generated import questions
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.heads.bank import Exit, ExitBank
from dynamax.policies.confidence import MaxProb
from dynamax.policies.schedule import AtDepth, Never
from tests.laws.house import generate

PROMPTS, TOKENS = 8, 48
GENERATED = 3
"""Prompts that transformers answers token by token."""


def encoded(tokenizer: PreTrainedTokenizerBase, count: int) -> list[torch.Tensor]:
    chats = [[{"role": "user", "content": question.question}] for question in questions()[:count]]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]


@pytest.mark.slow
def test_never_leaving_is_generate(
    smollm2: tuple[HFBackbone, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 48 tokens of all prompts: the end of text ends neither side.

    Behind the first prompts one pass of transformers over prompt and answer tells the same, and takes less time.
    """
    backbone, tokenizer = smollm2
    monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", None)
    bank = ExitBank({depth: Exit() for depth in (15, 19, 23, 27)}, backbone.site)
    decoder = EarlyExit(backbone, bank, Never())
    for number, prompt_1T in enumerate(encoded(tokenizer, PROMPTS)):
        got = torch.stack([step.token_B for step in decoder.decode(prompt_1T, max_new_tokens=TOKENS)], 1)
        assert got.shape == (1, TOKENS)
        if number < GENERATED:
            wanted = generate(backbone.model, prompt_1T, TOKENS)
        else:
            whole_1T = torch.cat([prompt_1T, got[:, :-1]], 1)
            wanted = backbone.model(whole_1T).logits[:, prompt_1T.shape[1] - 1 :].argmax(-1)
        assert got.equal(wanted)


@pytest.mark.slow
def test_lossless_is_generate(smollm2: tuple[HFBackbone, PreTrainedTokenizerBase]) -> None:
    backbone, tokenizer = smollm2
    bank = ExitBank({24: Exit(), 28: Exit()}, backbone.site)
    decoder = SelfSpeculative(backbone, bank, MaxProb(0.5), draft_limit=3)
    accepted = 0
    for prompt_1T in encoded(tokenizer, 3):
        steps = list(decoder.decode(prompt_1T, max_new_tokens=24, eos_token_id=[tokenizer.eos_token_id]))
        wanted = generate(backbone.model, prompt_1T, len(steps))
        got = torch.stack([step.token_B for step in steps], 1)
        end = len(steps) - 1 if got[0, -1] == tokenizer.eos_token_id else len(steps)
        assert got[0, :end].equal(wanted[0, :end])
        accepted += sum(step.accepted for step in steps)
    assert accepted > 0


@pytest.mark.slow
def test_forced_depths_call_that_many_blocks(smollm2: tuple[HFBackbone, PreTrainedTokenizerBase]) -> None:
    backbone, tokenizer = smollm2
    depths = tuple(range(1, backbone.spec.depth, 3))
    bank = ExitBank({depth: Exit() for depth in depths}, backbone.site)
    calls: list[int] = []
    hooks = [b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(backbone._blocks)]
    for depth in depths:
        for number, _ in enumerate(
            EarlyExit(backbone, bank, AtDepth(depth)).decode(encoded(tokenizer, 1)[0], max_new_tokens=3)
        ):
            assert calls == list(range(backbone.spec.depth if number == 0 else depth))
            calls.clear()
    for hook in hooks:
        hook.remove()
