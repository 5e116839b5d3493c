"""Products with float16 weights as operators that inductor can call, built from C++ on first use.

The library is kept beside what else dynamax keeps on disk, one for each version of torch and of the source.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.utils import cpp_extension

from dynamax.compiling import cpp_compiler
from dynamax.errors import UserError
from dynamax.files import cache_folder
from dynamax.kernels.products import Float16, Product, pack_alone

SOURCE = Path(__file__).with_name("fbgemm.cpp")
TRIED_SHAPE = (96, 48)
"""A matrix that is multiplied once before the operators are used."""


@final
class Float16Operator(Product):
    """As ``Float16``, with the same results, by an operator of our own.

    Args:
        weight_OI: The weights, as a linear layer holds them.
        bias_O: Added to the product; None for none.
    """

    bytes = Float16.bytes
    storage = Float16.storage

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        self._packed = pack_alone(weight_OI.detach().contiguous())
        self._product = torch.ops.dynamax.product.default

    @classmethod
    def refusal(cls, weight_OI: Tensor) -> str | None:
        """As ``Float16``; ``load_operators`` says whether the operators can be had."""
        return Float16.refusal(weight_OI)

    def multiply(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product."""
        y = self._product(x, self._packed, self.out_features)
        return y if bias_O is None else y + bias_O


@functools.cache
def load_operators() -> None:
    """Make ``torch.ops.dynamax`` known to this process; build it if that was not done before.

    Raises:
        UserError: If there is no C++ compiler, it fails, or what it made does not multiply as torch does.
    """
    name = hashlib.sha256(f"{torch.__version__} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    library = cache_folder() / "operators" / f"{name}.so"
    if not library.exists():
        build(library)
    torch.ops.load_library(library)
    torch.library.register_fake("dynamax::product", lambda x, _, size: x.new_empty(*x.shape[:-1], size))
    torch.library.register_fake(
        "dynamax::products", lambda x, _, sizes: [x.new_empty(*x.shape[:-1], size) for size in sizes]
    )
    generator = torch.Generator().manual_seed(0)
    packed = pack_alone(torch.randn(TRIED_SHAPE, generator=generator))
    x = torch.randn(2, TRIED_SHAPE[1], generator=generator)
    wanted = torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, None)
    if not torch.equal(torch.ops.dynamax.product(x, packed, TRIED_SHAPE[0]), wanted):
        raise UserError(
            f"{library} does not multiply as torch {torch.__version__} does, so compiling cannot be had with this "
            f"version of torch at float16 weights. Leave compile out, or set precision to float32."
        )


def build(library: Path) -> None:
    """Compile the source into a library, which appears whole or not at all."""
    library.parent.mkdir(parents=True, exist_ok=True)
    print("dynamax: building operators for float16 weights, about 10 s, once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [cpp_compiler(), "-std=c++20", "-O2", "-fPIC", "-shared", "-fopenmp", str(SOURCE), "-o", str(made)]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        command += [f"-I{path}" for path in cpp_extension.include_paths()]
        command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"{command[0]} could not compile {SOURCE.name}: {done.stderr.strip()[-400:]} Compiling needs a C++20 "
                f"compiler such as g++ 10 or later; name it in the environment variable CXX, or leave compile out."
            )
        os.replace(made, library)
