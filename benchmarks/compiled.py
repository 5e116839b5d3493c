"""All blocks compiled as one graph by inductor, beside their recorded programs, in turn in one process.

    python -m benchmarks.compiled [--precision float16] [--steps 60] [--rounds 5] [--cpp] [--threads N] [--out FILE]

SmolLM2, one position a step, at contexts that grow. What is compiled is what was recorded: the 30 programs called one
after the other, on keys and values in buffers, with the number of keys as a symbol, so that one graph serves all steps.
FBGEMM's products are operators of a small C++ extension, since inductor cannot look into those of torch; it needs a C++
compiler, as inductor does. ``--cpp`` lets inductor write the calls in C++ too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.utils.cpp_extension import load_inline

from benchmarks.models import load
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.precision import set_precision
from dynamax.kernels import products
from dynamax.metrics.environment import environment
from dynamax.types import Span

CONTEXT = 512
"""Keys that there is room for."""

SOURCE = """
#include <torch/extension.h>
#include <ATen/native/quantized/PackedParams.h>
std::vector<c10::intrusive_ptr<LinearPackedParamsBase>> held;
int64_t keep(c10::intrusive_ptr<LinearPackedParamsBase> packed) { held.push_back(packed); return held.size() - 1; }
at::Tensor alone(const at::Tensor& x, const at::Tensor& packed, int64_t size) {
  return at::fbgemm_linear_fp16_weight_fp32_activation(x, packed, std::nullopt);
}
at::Tensor shared(const at::Tensor& x, int64_t number, int64_t size) { return held[number]->apply_dynamic(x, false); }
TORCH_LIBRARY(benchmark_compiled, m) {
  m.def("keep(__torch__.torch.classes.quantized.LinearPackedParamsBase packed) -> int", &keep);
  m.def("alone(Tensor x, Tensor packed, int size) -> Tensor");
  m.def("shared(Tensor x, int number, int size) -> Tensor");
}
TORCH_LIBRARY_IMPL(benchmark_compiled, CPU, m) { m.impl("alone", &alone); m.impl("shared", &shared); }
"""


class Held:
    """Stands in for a block's view: keys and values in buffers, written at a position that is a tensor.

    Args:
        keys_BHTD: Buffer.
        values_BHTD: Buffer.
        at_1: Where the step's own are written.
        stop: Keys that it sees.
    """

    def __init__(self, keys_BHTD: Tensor, values_BHTD: Tensor, at_1: Tensor, stop: int) -> None:
        self._pair, self._at_1, self._stop = (keys_BHTD, values_BHTD), at_1, stop

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor) -> list[Tensor]:
        """Write, and read all that the step may see."""
        for held, row in zip(self._pair, (k_BHTD, v_BHTD), strict=True):
            held.index_copy_(2, self._at_1, row)
        return [held[:, :, : self._stop] for held in self._pair]


def extension() -> Any:  # noqa: ANN401
    """The operators, with the shapes that they return."""
    load_inline("benchmark_compiled", SOURCE.replace("torch/extension.h", "torch/all.h"), is_python_module=False)
    for name in ("alone", "shared"):
        torch.library.register_fake(
            f"benchmark_compiled::{name}", lambda x, *given: x.new_empty(*x.shape[:-1], given[-1])
        )
    return torch.ops.benchmark_compiled


def programs(backbone: HFBackbone) -> list[Callable[..., Tensor]]:
    """The recorded programs of a step of one position, with the extension's products in place of torch's."""
    assert backbone.recordings is not None
    kinds = [next(k for k in backbone.recordings.ready if k[0] == i and k[2] == 1) for i in range(backbone.spec.depth)]
    found = [backbone.recordings.ready[kind] for kind in kinds]
    if backbone.weight_bytes != 2:
        return found
    ops, known = extension(), {}
    for module in backbone.model.modules():
        if isinstance(module, products.Float16):
            assert module.bias is None
            known[id(module._alone)] = (module._alone, module.out_features)
            known[id(module._shared)] = (
                ops.keep(module._shared) if module._shared is not None else 0,
                module.out_features,
            )
    known[id(products.PRODUCT)] = lambda x, pair, _: ops.alone(x, *pair)
    known[id(products.SHARED)] = lambda x, pair: ops.shared(x, *pair)
    known.pop(id(None), None)
    return [
        FunctionType(each.__code__, {name: known.get(id(value), value) for name, value in each.__globals__.items()})
        for each in found
    ]


def compiled(backbone: HFBackbone) -> Callable[[Tensor, int], Tensor]:
    """A step through all blocks as one graph: ``(token_11, position) -> h_11D``."""
    config, parts = backbone.model.config, programs(backbone)
    shape = (1, config.num_key_value_heads, CONTEXT, config.hidden_size // config.num_attention_heads)
    buffers = [(torch.zeros(shape), torch.zeros(shape)) for _ in parts]

    @torch.compile(fullgraph=True)
    def blocks(h: Tensor, cos: Tensor, sin: Tensor, at_11: Tensor, seen_S: Tensor) -> Tensor:
        for part, pair in zip(parts, buffers, strict=True):
            h = part(h, cos, sin, at_11, None, None, Held(*pair, at_11[0], seen_S.shape[0]))
        return h

    def step(token_11: Tensor, position: int) -> Tensor:
        h_11D = backbone.model.get_input_embeddings()(token_11)
        plan = backbone.plan(h_11D, start=position)
        angles, seen_S = plan.angles(backbone._rotary_types[0]), torch.empty(position + 1)
        assert angles is not None
        torch._dynamo.mark_dynamic(seen_S, 0)
        return blocks(h_11D, *angles, plan.positions_BT, seen_S)

    return step


@torch.inference_mode()
def measured(backbone: HFBackbone, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step of both, in turn, and what compiling took."""
    span, tokens_1S = Span(0, backbone.spec.depth), torch.arange(100, 100 + steps)[None]

    def recorded(cache: Any, at: int) -> Tensor:  # noqa: ANN401
        return backbone.run(backbone.embed(tokens_1S[:, at : at + 1], cache), span, cache)

    cache = backbone.new_cache(CONTEXT)
    for at in range(4):
        recorded(cache, at)
    begin = time.perf_counter()
    step = compiled(backbone)
    for at in range(4):  # the second differs in what is dynamic
        step(tokens_1S[:, at : at + 1], at)
    found: dict[str, Any] = {"seconds to compile": time.perf_counter() - begin, "largest difference": 0.0}
    times: dict[str, list[float]] = {"recorded": [], "compiled": []}
    for number in range(rounds):
        cache = backbone.new_cache(CONTEXT)
        for at in range(steps):
            said = {}
            for name in times if (at + number) % 2 else reversed(times):
                begin = time.perf_counter()
                said[name] = recorded(cache, at) if name == "recorded" else step(tokens_1S[:, at : at + 1], at)
                times[name].append(1000 * (time.perf_counter() - begin))
            gap = float((said["recorded"] - said["compiled"]).abs().max() / said["recorded"].abs().max())
            found["largest difference"] = max(found["largest difference"], gap)
    return found | {"ms a step": {name: statistics.median(each) for name, each in times.items()}}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("float32", "float16"), default="float16")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpp", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone, _ = load("smollm2", dtype="float32", device="cpu", prompts=1)
    precision = set_precision(backbone, args.precision)
    with inductor.patch(cpp_wrapper=args.cpp):
        found = measured(backbone, args.steps, args.rounds)
    print(json.dumps(found, indent=1))
    if args.out is not None:
        known = environment("cpu", dtype="float32", batch=1, precision=precision)
        options = {name: getattr(args, name) for name in ("precision", "steps", "rounds", "cpp")}
        args.out.write_text(json.dumps({"environment": known, "options": options, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
