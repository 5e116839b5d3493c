"""A backbone that is no model of transformers, and its source: checked, and heads trained on it by the public path."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from dynamax.backbones.base import Backbone
from dynamax.backbones.sources import Source, source_from
from dynamax.data import HiddenStates
from dynamax.heads import Exit, LinearGate, TunedLens
from dynamax.modules.heads import HeadsModule
from dynamax.modules.phases import Phase
from dynamax.objectives import GateObjective, LensDistillation
from dynamax.testing import check_backbone
from dynamax.types import BlockCost, Spec
from tests.data.small import RandomText
from tests.folders import byte_tokenizer

WIDTH, VOCAB, DEPTH = 16, 257, 3


class Toy(Backbone):
    """Three residual blocks of one attention head, without positions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, WIDTH)
            self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(DEPTH))
            self.output = nn.Linear(WIDTH, VOCAB, bias=False)
        self.spec = Spec("toy", DEPTH, WIDTH, VOCAB, 512, f"toy {seed}")
        self.requires_grad_(False).eval()

    def embed(self, tokens_BT, cache=None):
        return self.embedding(tokens_BT)

    def block(self, index, h_BTD, plan, view):
        q, k, v = (x[:, None] for x in self.qkv[index](F.rms_norm(h_BTD, (WIDTH,))).chunk(3, -1))
        k, v = view.update(k, v)
        causal = view.mask is None and q.shape[2] > 1
        return h_BTD + F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask, is_causal=causal)[:, 0]

    def normalize(self, h_BTD):
        return F.rms_norm(h_BTD, (WIDTH,))

    def project(self, u_BTD, tokens_C=None):
        matrix_VD = self.output.weight
        return (u_BTD @ (matrix_VD if tokens_C is None else matrix_VD[tokens_C]).T).float()

    def block_cost(self, index):
        weights = 3 * WIDTH * WIDTH
        return BlockCost(weights, weights, 2 * WIDTH, 2 * WIDTH, None, weights)


class ToySource(Source):
    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def load(self, *, dtype: str = "float32", device: str = "cpu") -> Toy:
        return Toy(self.seed).to(device=device, dtype=getattr(torch, dtype))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return byte_tokenizer()


def by_hand(toy: Toy, tokens_BT: Tensor) -> Tensor:
    """The same model, written out."""
    h_BTD = toy.embedding(tokens_BT)
    seen_TT = torch.ones(tokens_BT.shape[1], tokens_BT.shape[1]).tril().bool()
    for projection in toy.qkv:
        q, k, v = projection(h_BTD / (h_BTD.pow(2).mean(-1, keepdim=True) + 1e-7).sqrt()).chunk(3, -1)
        h_BTD = h_BTD + (q @ k.mT / WIDTH**0.5).masked_fill(~seen_TT, -torch.inf).softmax(-1) @ v
    return toy.output(h_BTD / (h_BTD.pow(2).mean(-1, keepdim=True) + 1e-7).sqrt()).float()


def test_it_keeps_the_contract() -> None:
    toy = Toy()
    check_backbone(toy, lambda tokens_BT: by_hand(toy, tokens_BT))


def test_heads_are_trained_on_it(tmp_path) -> None:
    source = ToySource(seed=3)
    exits = {1: Exit(TunedLens, [LinearGate])}
    phases = {"lenses": Phase(LensDistillation(), epochs=1), "gates": Phase(GateObjective())}
    module = HeadsModule(source, exits, phases)
    data = HiddenStates(source, RandomText(), [1], folder=str(tmp_path / "store"), validation=0.3)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=2, default_root_dir=tmp_path, accelerator="cpu", **quiet)
    module.configure_model()
    before = {name: value.clone() for name, value in module.bank.state_dict().items()}
    trainer.fit(module, data)
    assert module.spec == Spec("toy", DEPTH, WIDTH, VOCAB, 512, "toy 3")
    assert all(not torch.equal(before[name], value) for name, value in module.bank.state_dict().items())


def test_its_source_needs_two_methods_only() -> None:
    source = ToySource(seed=3)
    assert source.output_stage().site(2).spec.fingerprint == "toy 3"
    assert source.generation_config().eos_token_id == source.tokenizer().eos_token_id == 0
    again = source_from(source.recipe)
    assert isinstance(again, ToySource)
    assert again.seed == 3
