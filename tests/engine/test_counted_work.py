"""A guard of speed that no clock can disturb: the work of one packed decoding step, counted.

Time differs from machine to machine. How many operations a step calls, how many weights it reads and how much memory it
allocates does not. The figures were counted when they were written. A test that fails lists the operations that it
counted; compare them with those of the commit before. If there are fewer now, write the new figure. If there are more,
take them out of the step again, or raise the figure and say in the commit what it buys.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from dynamax.backbones.experts import matrices_of
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.packed import pack
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.heads import Exit, ExitBank, MambaGate
from dynamax.kernels.products import Columns, Float16, Product, Rows
from dynamax.policies import AtDepth, GateConfidence, MaxProb, TerminationPolicy
from dynamax.recording import tensors_in
from tests.tiny import tiny

X86 = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is on x86 alone")
PRODUCTS = {"linear", "mm", "addmm", "bmm", "matmul", "einsum", "fbgemm_linear_fp16_weight_fp32_activation"}
STEP = 10
"""The step that is counted: all that can be recorded is recorded by then."""

BLOCKS = {
    # 2 norms of 5 operations, 7 products, rotary angles 16, heads apart 6 and together 2, keys and values written and
    # read 6, attention 1, gated unit 2, residuals 2.
    "llama": (2 * 52, 2 * 3312),
    # 2 layer norms, 4 products, heads apart 3 and together 2, rotary angles on a part of each head 22, keys and values
    # 6, attention 1, gelu 1, residuals 2.
    "gpt_neox": (2 * 43, 2 * 2624),
    # A norm of 5, 4 products, a residual; convolution and recurrence, whose new state is most of what is allocated.
    "mamba": (2 * 37, 2 * 10036),
    # A norm of 5, a gated norm that stays as it is, 2 products, a residual; convolution and recurrence.
    "mamba2": (2 * 53, 2 * 9696),
    # A Mamba-2 block and an attention block, each with a gated unit.
    "granitemoehybrid-dense": (120, 15064),
    # A Llama block without its gated unit takes 47. The router and the views around the experts take 9; the numbers of
    # the experts 2, the two that a position takes 2 products and 3 operations between them each, their sum 5.
    "mixtral": (2 * 73, 10328),
}
"""Operations and allocated bytes of two blocks, the last two of six. Products and their bytes are the model's own."""


class Work(NamedTuple):
    """What was counted.

    Attributes:
        operations: Calls of torch, those of views included.
        products: Those that multiply rows with a matrix of the model.
        weight_bytes: What the products read of the matrices.
        allocated: Bytes of new tensors.
    """

    operations: int
    products: int
    weight_bytes: int
    allocated: int

    def __sub__(self, other: Work) -> Work:  # pyright: ignore[reportIncompatibleMethodOverride] - as numbers, not sets
        return Work(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


class Count(TorchDispatchMode):
    """Counts what is called while it is on.

    Args:
        weights: Tensors of the model; packed ones as they are packed.
        bytes_of: Bytes of a weight.
    """

    def __init__(self, weights: list[Tensor], bytes_of: float) -> None:
        super().__init__()
        self._weights, self._bytes = {place(weight) for weight in weights}, bytes_of
        self.names: Counter[str] = Counter()
        self.products = self.weight_bytes = self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        given = list(tensors_in((args, kwargs or {})))
        out = func(*args, **(kwargs or {}))
        self.names[str(func)] += 1
        places = {place(tensor) for tensor in given}
        self.allocated += sum(t.untyped_storage().nbytes() for t in tensors_in(out) if place(t) not in places)
        if str(func).split(".")[1] in PRODUCTS and places & self._weights:
            self.products += 1
            self.weight_bytes += round(given[0].shape[-1] * out.shape[-1] * self._bytes)
        return out

    @property
    def work(self) -> Work:
        return Work(self.names.total(), self.products, self.weight_bytes, self.allocated)


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def counted(
    name: str, depth: int, policy: TerminationPolicy | None = None, kind: type[Product] = Rows
) -> tuple[Work, Counter[str]]:
    """One step of a random model of so many blocks; with a policy there is an exit behind the second."""
    backbone = HFBackbone(tiny(name, depth=depth, dtype=torch.float32))
    pack(backbone, kind)
    parts, decoder = [backbone], Full(backbone)
    if policy is not None:
        bank = ExitBank({2: Exit(gates=[MambaGate])}, backbone.site)
        parts, decoder = [backbone, bank], EarlyExit(backbone, bank, policy)
    weights = [held for part in parts for module in part.modules() for held in held_in(module)]
    steps = decoder.decode(torch.arange(5)[None], max_new_tokens=STEP + 1)
    for _ in range(STEP):
        next(steps)
    assert backbone.recordings is not None
    assert not backbone.recordings.given_up
    with Count(weights, kind.bytes or 4) as count:
        next(steps)
    return count.work, count.names


def held_in(module: nn.Module) -> list[Tensor]:
    """Tensors of one module: parameters, and what is packed."""
    return [*module.parameters(recurse=False), *(value for value in vars(module).values() if isinstance(value, Tensor))]


def matrices(name: str) -> Work:
    """What a position is multiplied with in the last two of six blocks: how many, and the bytes in float32."""
    backbone = HFBackbone(tiny(name, dtype=torch.float32))
    sizes: list[int] = []
    for module in (module for block in backbone._blocks[4:] for module in block.modules()):
        if isinstance(module, nn.Linear | MixtralTopKRouter):
            sizes.append(module.weight.numel())
        for weight_EOI in matrices_of(module).values():
            sizes += [weight_EOI[0].numel()] * backbone.model.config.num_experts_per_tok
    assert sum(sizes) == sum(backbone.block_cost(index).active for index in (4, 5)), "what is charged"
    return Work(0, len(sizes), 4 * sum(sizes), 0)


def listed(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name.removeprefix('aten.')}" for name, count in names.most_common())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, Rows) for name in BLOCKS),
        ("llama", Columns),
        pytest.param("llama", Float16, marks=X86),
        pytest.param("mamba2", Float16, marks=X86),
    ],
)
def test_work_of_two_blocks(name: str, kind: type[Product]) -> None:
    """What a step takes more in six blocks than in four."""
    (six, names), (four, others) = counted(name, 6, kind=kind), counted(name, 4, kind=kind)
    model, found = matrices(name), six - four
    assert found.products == model.products
    assert found.weight_bytes == model.weight_bytes * (kind.bytes or 4) / 4
    wanted = found._replace(operations=BLOCKS[name][0], allocated=BLOCKS[name][1])
    assert found == wanted, f"two blocks of {name} take {listed(names - others)}"


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_work_around_the_blocks(name: str) -> None:
    """Embedding, rotary angles, final norm, output matrix, the token: 33 operations, and one product."""
    (six, names), (four, _) = counted(name, 6), counted(name, 4)
    found = four - (six - four) - (six - four)
    assert found.products == 1
    assert found.weight_bytes == 4 * 61 * 32
    assert found.operations <= 33, f"a step of {name} takes {listed(names)}"
    assert found.allocated <= 841, f"a step of {name} takes {listed(names)}"


@pytest.mark.parametrize(
    ("policy", "products", "weights", "operations", "allocated"),
    [
        # Norm and output matrix, softmax and its maximum; the decision.
        pytest.param(MaxProb(1.0), 1, 61 * 32, 19, 757, id="a reading of the output matrix"),
        # Three products; convolution and recurrence, as in a Mamba-2 block; the new state; the decision.
        pytest.param(GateConfidence(1.0), 3, 0, 56, 56129, id="a Mamba gate"),
    ],
)
def test_work_of_an_exit_that_is_passed(
    policy: TerminationPolicy, products: int, weights: int, operations: int, allocated: int
) -> None:
    """What a step takes more than in full decoding."""
    (early, names), (full, others) = counted("llama", 4, policy), counted("llama", 4)
    found = early - full
    assert found.products == products
    assert not weights or found.weight_bytes == 4 * weights
    assert found.operations <= operations, f"the exit takes {listed(names - others)}"
    assert found.allocated <= allocated, f"the exit takes {listed(names - others)}"


def test_work_of_a_step_that_leaves() -> None:
    """That of a model of two blocks, and five operations: the exit's decision, and the position that is owed."""
    (early, names), (full, others) = counted("llama", 6, AtDepth(2)), counted("llama", 6)
    (six, _), (four, _) = (full, others), counted("llama", 4)
    found = early - (four - (six - four))
    assert (found.products, found.weight_bytes) == (0, 0)
    assert found.operations <= 5, f"a step that leaves takes {listed(names)}; one that does not, {listed(others)}"
    assert found.allocated <= 128 * STEP + 1, f"a step that leaves takes {listed(names)}"


def test_what_is_counted() -> None:
    weight, x = torch.ones(5, 3), torch.ones(2, 3)
    with torch.inference_mode(), Count([weight], 4) as count:
        x.t().unsqueeze(0)  # two views
        x.add_(1)
        F.linear(x, weight)
        torch.matmul(x, x.t())  # another view, and a product without weights
    assert count.work == Work(operations=6, products=1, weight_bytes=60, allocated=4 * (2 * 5 + 2 * 2))
