"""llama.cpp, by way of llama-cpp-python, on a GGUF copy in F32, F16 or Q8_0.

The copy in F32 is written here, the others by llama.cpp's own quantiser. It has no tokenizer: prompts are token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, final

from dynamax.backbones.loading import read_config
from dynamax.bench.base import Contender, Subject, Told
from dynamax.bench.converted import converted
from dynamax.bench.gguf_copy import LAYOUT, uncovered, write_gguf
from dynamax.errors import UserError

KINDS = {"F32": ("float32", 0), "F16": ("float16", 1), "Q8_0": ("int8", 7)}
"""Format of the weights and llama.cpp's number of the file type, by its name."""
ROOM = 5
"""Bytes a weight: in float32, and some room."""


@final
class LlamaCpp(Contender):
    """llama.cpp's evaluation with a greedy choice.

    Args:
        name: As for every contender.
        subject: As for every contender.
        kind: File type, a name of ``KINDS``.
    """

    module: ClassVar[str] = "llama_cpp"
    package: ClassVar[str] = "llama-cpp-python"

    def __init__(self, name: str, subject: Subject, kind: str) -> None:
        super().__init__(name, subject)
        self.about = f"llama.cpp, {kind}"
        self.kind = kind
        self.weights = KINDS[kind][0]
        self._copy = Path()
        self._llama: Any = None

    def absent(self) -> str | None:
        """Also whether a GGUF copy of this model can be written here."""
        reason = super().absent()
        if reason is None and self.subject.folder is not None:
            reason = uncovered(read_config(self.subject.folder))
        return reason

    def prepare(self) -> None:
        """Write the copy."""
        assert self.subject.folder is not None, "absent says so"
        self._copy = copy_of(self.subject.folder, self.kind)

    def load(self) -> None:
        """Load the copy."""
        self._llama = import_module(self.module).Llama(
            str(self._copy),
            n_ctx=self.subject.context,
            n_threads=self.subject.threads,
            n_threads_batch=self.subject.threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def decode(self, prompt: Sequence[int], told: Told) -> None:
        """Evaluate the prompt from the start, then token by token."""
        self._llama.reset()  # or it goes on from the longest common start of this prompt and the last
        for count, token in enumerate(self._llama.generate(list(prompt), temp=0.0, repeat_penalty=1.0), 1):
            told([int(token)])
            if token in self.subject.ends or count == self.subject.max_new_tokens:
                return

    def unload(self) -> None:
        """Let go of the model."""
        if self._llama is not None:
            self._llama.close()
        self._llama = None


def copy_of(folder: Path, kind: str) -> Path:
    """The GGUF copy of a model, made now if it is not there."""
    make = partial(write_gguf, folder) if kind == "F32" else partial(_quantise, folder, kind)
    return converted(folder, f"gguf-{LAYOUT}-{kind}", make, bytes_per_weight=ROOM) / "model.gguf"


def _quantise(folder: Path, kind: str, fresh: Path) -> None:
    llama = import_module("llama_cpp")
    options = llama.llama_model_quantize_default_params()
    options.ftype = KINDS[kind][1]
    target = fresh / "model.gguf"
    if llama.llama_model_quantize(str(copy_of(folder, "F32")).encode(), str(target).encode(), options):
        raise UserError(f"llama.cpp could not write {target} in {kind}. Make room on the disk, or leave it out.")
