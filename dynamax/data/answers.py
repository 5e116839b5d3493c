"""A corpus that a backbone writes: its answers as plain text, kept on disk as they are written. Knows no training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, final

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dynamax.backbones.sources import Source
from dynamax.data.fill import tokenizer_hash
from dynamax.data.generated import Answered, SelfGenerated
from dynamax.data.manifest import fingerprint
from dynamax.data.prompts import Prompt
from dynamax.data.text import Corpus, Text
from dynamax.data.writer import locked
from dynamax.device import chosen
from dynamax.engine import load
from dynamax.files import write_atomically

ENDS = ".!?"


@final
class Answers(Corpus):
    """What a backbone answers to prompts, as text: ``Question: ... Answer: ...``.

    Written once, a batch at a time: a run that was stopped goes on behind the last whole batch, and the
    texts are those of a run that never was.

    Args:
        writer: Which backbone writes.
        text: What it is asked, and how its answers are sampled.
        folder: Where texts are kept; those of each writer and each way of asking in a folder of their own.
        dtype: What the writer computes in.
        device: Where it runs; ``auto`` takes a GPU if there is one.
    """

    def __init__(
        self,
        writer: Source,
        text: SelfGenerated,
        *,
        folder: str = "runs/answers",
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        self.writer, self.text, self.folder, self.dtype = writer, text, folder, dtype
        self.device = chosen(device)

    def identity(self) -> dict[str, Any]:
        """Writer, prompts and options."""
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {
            "source": "Answers",
            "writer": self.writer.output_stage().spec.fingerprint,
            "tokenizer": tokenizer_hash(self._tokenizer),
            "dtype": self.dtype,
            "text": self.text.identity(),
        }

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self.writer.tokenizer()

    def texts(self) -> Iterator[Text]:
        """All answers; those that are not on disk yet are written now."""
        place = Path(self.folder) / fingerprint(self.identity())
        total = self.text.count()
        assert total is not None, "the number of batches is known beforehand"
        files = [place / f"batch-{index:05d}.json" for index in range(total)]
        with locked(place):
            self._write(files)
        for file in files:
            for text, origin in json.loads(file.read_text("utf-8")):
                yield Text(text, origin)

    def _write(self, files: list[Path]) -> None:
        """Write what is missing. Batches are written in order, so the first that is missing tells where to go on."""
        done = next((index for index, file in enumerate(files) if not file.is_file()), len(files))
        if done == len(files):
            return
        batches = self.text.answers(load(self.writer, dtype=self.dtype, device=self.device), skip=done)
        rest = tqdm(zip(files[done:], batches, strict=True), desc="answers", total=len(files), initial=done)
        for file, batch in rest:
            texts = [self._text(answered) for answered in batch]
            write_atomically(file, json.dumps(texts).encode())

    def _text(self, answered: Answered) -> Text:
        tokens = answered.answer[:-1] if answered.ended else answered.answer  # an end token need not be a special one
        answer = str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        if not answered.ended:
            answer = whole(answer)
        return Text(f"{opening(answered.asked.prompt)} {answer}", answered.asked.prompt.origin)


def opening(prompt: Prompt) -> str:
    r"""A prompt as the text begins that answers it.

    >>> opening(Prompt(("Tell a story.",), "Tell a story.", "Tell a story."))
    'Question: Tell a story.\nAnswer:'
    """
    return prompt.plain if prompt.plain.endswith(":") else f"Question: {prompt.plain}\nAnswer:"


def whole(answer: str) -> str:
    """An answer that ran out of room, up to its last whole sentence; all of it if there is none.

    >>> whole("It is warm. It may")
    'It is warm.'
    """
    end = max(answer.rfind(sign) for sign in ENDS)
    return answer[: end + 1] or answer
