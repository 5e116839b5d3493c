"""CTranslate2: another engine for the CPU, on a copy that its own converter makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, final

from dynamax.backbones.loading import read_tokenizer
from dynamax.bench.base import Contender, Subject, Told
from dynamax.bench.converted import converted

LAYOUT = 1
"""Version of what ``_convert`` writes; raised when it changes."""
ROOM = 9
"""Bytes a weight: the copy in float32, and as much again while it is written."""


@final
class CTranslate2(Contender):
    """CTranslate2's generator.

    Args:
        name: As for every contender.
        subject: As for every contender.
        quantization: Format of the weights: float32 or int8.
    """

    module: ClassVar[str] = "ctranslate2"
    package: ClassVar[str] = "ctranslate2"

    def __init__(self, name: str, subject: Subject, quantization: str) -> None:
        super().__init__(name, subject)
        self.about = f"CTranslate2, {quantization}"
        self.weights = quantization
        self._copy = Path()
        self._generator: Any = None
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Convert the folder."""
        assert self.subject.folder is not None, "absent says so"
        kind = f"ctranslate2-{version(self.package)}-{LAYOUT}-{self.weights}"
        make = partial(_convert, self.subject.folder, self.weights)
        self._copy = converted(self.subject.folder, kind, make, bytes_per_weight=ROOM)

    def load(self) -> None:
        """Load the copy."""
        assert self.subject.folder is not None, "absent says so"
        self._tokenizer = read_tokenizer(self.subject.folder)
        self._generator = import_module(self.module).Generator(
            str(self._copy / "model"),
            device="cpu",
            compute_type=self.weights,
            inter_threads=1,
            intra_threads=self.subject.threads,
        )

    def decode(self, prompt: Sequence[int], told: Told) -> None:
        """One search with a beam of one."""

        def tell(step: Any) -> bool:  # noqa: ANN401 - CTranslate2's record of a step
            told([step.token_id])
            return False

        self._generator.generate_batch(
            [self._tokenizer.convert_ids_to_tokens(list(prompt))],
            max_length=self.subject.max_new_tokens,
            end_token=list(self.subject.ends) or None,
            include_prompt_in_result=False,
            beam_size=1,
            sampling_topk=1,
            callback=tell,
        )

    def unload(self) -> None:
        """Let go of the model."""
        self._generator = self._tokenizer = None


def _convert(folder: Path, quantization: str, fresh: Path) -> None:
    converters = import_module("ctranslate2.converters")
    converter = converters.TransformersConverter(str(folder))
    target = fresh / "model"
    converter.convert(str(target), quantization=quantization)
    config = json.loads((target / "config.json").read_text())
    named = {name: "" if value is None else value for name, value in config.items()}  # its reader knows no null
    (target / "config.json").write_text(json.dumps(named))
