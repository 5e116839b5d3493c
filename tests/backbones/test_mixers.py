"""What transformers gets wrong in recurrent mixers: each fault is still there, and ours does not have it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel
from transformers.models.qwen3_next import modeling_qwen3_next

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.mixers import check_devices
from dynamax.types import Span
from tests.float64 import upcast64
from tests.states import PURE
from tests.tiny import tiny

TOKENS = torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(3))


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """Transformers' own code as it is, but for kernels that it would give CPU tensors to where they are installed."""
    for module in model.modules():
        check_devices(module)
    return model


def continued(model: PreTrainedModel, sizes: list[int]) -> float:
    """Largest error of transformers' own logits when it continues its own cache, relative to its one pass."""
    plain(model)
    cache, logits, at = DynamicCache(config=model.config), [], 0
    keyword = "cache_params" if model.config.model_type in PURE else "past_key_values"
    for size in sizes:
        positions = {} if keyword == "cache_params" else {"position_ids": torch.arange(at, at + size)[None]}
        logits.append(model(TOKENS[:, at : at + size], use_cache=True, **{keyword: cache}, **positions).logits)
        at += size
    wanted = model(TOKENS).logits
    return float((torch.cat(logits, 1) - wanted).abs().max() / wanted.abs().max())


def ours(model: PreTrainedModel, sizes: list[int]) -> float:
    """The same, continued by the backbone, against the model's own one pass."""
    backbone, logits = HFBackbone(model), []
    cache = backbone.new_cache()
    for piece in TOKENS.split(sizes, 1):
        logits.append(backbone.unembed(backbone.run(backbone.embed(piece, cache), Span(0, 6), cache)))
    wanted = model(TOKENS).logits
    return float((torch.cat(logits, 1) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_mamba_1_forgets_its_state_in_chunks(family: str) -> None:
    with upcast64(), torch.inference_mode():
        assert continued(tiny(family), [9, 7, 4]) > 1e-3
        assert ours(tiny(family), [9, 7, 4]) < 1e-12


def small_steps(family: str) -> PreTrainedModel:
    """A model whose step sizes fall below ``time_step_min``."""
    model = tiny(family)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            parameter.data.fill_(-9.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zamba2", "nemotron_h"])
def test_chunks_clamp_what_steps_do_not(family: str) -> None:
    sizes = [9] + [1] * 11
    with upcast64(), torch.inference_mode():
        assert continued(small_steps(family), sizes) > 1e-3
        model = small_steps(family)
        HFBackbone(model)
        assert continued(model, sizes) < 1e-12, "wrapping repairs transformers' own decoding too"
        assert ours(small_steps(family), sizes) < 1e-12


def test_a_limit_on_step_sizes_holds_in_steps_too() -> None:
    """Where a configuration does limit them, transformers' single steps ignore it."""
    limited = {"time_step_limit": (0.5, 0.9)}
    with upcast64(), torch.inference_mode():
        assert continued(tiny("mamba2", **limited), [9] + [1] * 11) > 1e-3
        assert ours(tiny("mamba2", **limited), [9] + [1] * 11) < 1e-12
        assert HFBackbone(tiny("nemotron_h", **limited))._mixers[0].module.time_step_limit == (0.5, 0.9)


@pytest.mark.parametrize("family", ["mamba-bias", "mamba2-bias", "falcon_h1-normed", "lfm2-bias"])
def test_padding_comes_through_the_bias_of_a_projection(family: str) -> None:
    """transformers masks what goes into the input projection; its bias then fills the convolution's window."""
    padded_BT, mask_BT = torch.nn.functional.pad(TOKENS, (3, 0)), torch.tensor([[0] * 3 + [1] * 20])
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    with upcast64(), torch.inference_mode():
        model = plain(tiny(family))
        options = {} if model.config.model_type in PURE else {"position_ids": positions_BT}
        wanted = model(TOKENS).logits
        assert (model(padded_BT, attention_mask=mask_BT, **options).logits[:, 3:] - wanted).abs().max() > 1e-3
        backbone = HFBackbone(model)
        cache = backbone.new_cache(pad_B=torch.tensor([3]))
        got = backbone.unembed(backbone.run(backbone.embed(padded_BT, cache), Span(0, 6), cache))
        assert (got[:, 3:] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["mamba2", "granitemoehybrid-dense"])
def test_mamba_2_pads_short_chunks(family: str) -> None:
    """As shipped, two positions cost as much as a chunk of 256; counted in products, since time would be noise."""
    sized = {"chunk_size": 256} if family == "mamba2" else {"mamba_chunk_size": 256}
    model = plain(tiny(family, dtype=torch.float32, **sized))
    with torch.inference_mode():
        theirs = products(lambda: model(TOKENS[:, :2]))
        backbone = HFBackbone(model)
        mine = products(lambda: backbone.run(backbone.embed(TOKENS[:, :2]), Span(0, 6)))
    assert theirs > 10 * mine


def products(call) -> int:  # noqa: ANN001
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


FAKE = {
    "mamba_ssm/__init__.py": """
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False): raise RuntimeError("kernel")
def mamba_inner_fn(*args): raise RuntimeError("kernel")
""",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/selective_scan_interface.py": "from mamba_ssm import mamba_inner_fn, selective_scan_fn",
    "mamba_ssm/ops/triton/ssd_combined.py": """
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              dt_softplus=False, dt_limit=None, return_final_states=False): raise RuntimeError("kernel")
def mamba_split_conv1d_scan_combined(*args): raise RuntimeError("kernel")
""",
    "mamba_ssm/ops/triton/selective_state_update.py": """
def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None,
                           dt_softplus=False): raise RuntimeError("kernel")
""",
}
"""A package whose kernels fail on every tensor."""

PROGRAM = """
import torch
from dynamax.backbones.hf import HFBackbone
from dynamax.testing import check_backbone
from tests.tiny import tiny
for family in ("mamba", "mamba2", "granitemoehybrid"):
    model = tiny(family, dtype=torch.float32)
    try:
        model(torch.arange(20)[None])
    except RuntimeError as error:
        assert str(error) == "kernel", error
    else:
        raise AssertionError("transformers no longer calls kernels on CPU tensors: the repair can go")
    backbone = HFBackbone(model)
    check_backbone(backbone, backbone.reference)
    model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
"""


@pytest.mark.slow
def test_with_mamba_ssm_importable_cpu_tensors_meet_no_kernel(tmp_path: Path) -> None:
    for name, text in FAKE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=root,
        env={"PYTHONPATH": f"{tmp_path}:{root}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_transformers_gets_as_many_keys_as_values_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of its gated delta rule repeat the heads of keys themselves, others do not."""
    known, seen = modeling_qwen3_next.torch_chunk_gated_delta_rule, []

    def rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> object:
        seen.append((q.shape[2], k.shape[2], v.shape[2]))
        return known(q, k, v, **options)

    backbone = HFBackbone(tiny("qwen3_next"))
    monkeypatch.setattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule", rule)
    backbone.run(backbone.embed(TOKENS), Span(0, 6))
    assert seen
    assert all(len(set(heads)) == 1 for heads in seen)
