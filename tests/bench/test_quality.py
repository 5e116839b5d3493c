"""What precisions cost in quality: counted again here, in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import dynamax
from dynamax import UserError
from dynamax.backbones.precision import PRECISIONS, set_precision
from dynamax.bench.quality import passages, qualities, read, table
from dynamax.commands import info

X86 = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is on x86 alone")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine() -> dynamax.Engine:
    return dynamax.load(ROOT / "assets" / "llama", device="cpu")


@pytest.mark.slow
def test_every_precision_has_a_row(engine: dynamax.Engine) -> None:
    found = list(qualities(engine, passages(), 300))
    assert [row.precision for row in found] == [None, *PRECISIONS]
    assert found[0].same_argmax == 1.0
    for row in found[1:]:
        assert (row.reason is None) == (row.ms_per_token is not None) == (row.positions == 300)
        assert row.reason is not None or 0.5 < row.same_argmax <= 1.0
    assert found[1].kl < 1e-6
    text = table(found)
    assert all(name in text for name in PRECISIONS)
    assert engine.precision is None  # the engine itself is left as it was
    assert all(type(module).__name__ != "Float16" for module in engine.backbone.modules())


@pytest.mark.slow
@X86
def test_figures_are_those_of_the_logits(engine: dynamax.Engine) -> None:
    """The last window is shorter than the others."""
    tokens_1T = engine.encode(passages(), chat=False).flatten()[None, :300]
    packed = copy.deepcopy(engine.backbone)
    set_precision(packed, "bfloat16")
    with torch.inference_mode():
        pairs = [(read(engine.backbone, w).double(), read(packed, w).double()) for w in tokens_1T.split(256, 1)]
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs]).mean().item()
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).double().mean().item()
    (row,) = (row for row in qualities(engine, passages(), 300) if row.precision == "bfloat16")
    assert row.kl == pytest.approx(kl, rel=1e-2)
    assert row.same_argmax == pytest.approx(same)


def test_a_text_that_is_too_short(engine: dynamax.Engine) -> None:
    with pytest.raises(UserError, match="The text has .* tokens, and 300 positions were asked for"):
        list(qualities(engine, "Hello.", 300))


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["info", "--precision", str(ROOT / "assets" / "mamba2")])
    printed = capsys.readouterr().out
    assert "Reading 512 positions in each precision" in printed
    assert "as loaded" in printed


@pytest.mark.slow
def test_the_command_reads_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One two three four. " * 20)
    info.main(["info", "--precision", str(ROOT / "assets" / "llama"), "--positions", "40", "--text", str(file)])
    assert "Reading 40 positions in each precision" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"nothing\.txt cannot be read: No such file"):
        info.main(["info", "--precision", "--text", str(tmp_path / "nothing.txt")])


@pytest.mark.parametrize(
    "given",
    [
        ["--precison"],
        ["two", "models"],
        ["--precision", "a", "b"],
        ["--precision", "--positions"],
        ["--precision", "a", "--positions", "0"],
        ["--precision", "--positions", "many"],
        ["--precision", "--positions", "5", "--positions", "6"],
        ["--precision", "--pages", "5"],
    ],
)
def test_other_options_are_refused(given: list[str]) -> None:
    with pytest.raises(UserError, match=r"wanted: .*--precision \[MODEL\]"):
        info.main(["info", *given])
