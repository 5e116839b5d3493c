"""A corpus that a backbone writes: its answers as plain text, kept on disk as they are written. Knows no training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from dynamax.backbones.sources import Source
from dynamax.data.fill import locked, tokenizer_hash
from dynamax.data.generated import Answered, Prompt, SelfGenerated
from dynamax.data.store import fingerprint
from dynamax.data.text import Corpus, Text
from dynamax.device import chosen
from dynamax.engine import Engine, load
from dynamax.errors import UserError
from dynamax.files import write_atomically
from dynamax.progress import Bar

ENDS = ".!?"


@final
class Answers(Corpus):
    """What a backbone answers to prompts, as text: ``Question: ... Answer: ...``.

    Written once, a batch at a time. A run that was stopped continues after the last complete batch, and the texts are
    the same as without the stop.

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
        self._identity: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """Writer, prompts and options; the writer's weights are read once."""
        self._identity = self._identity or {
            "source": "Answers",
            "writer": self.writer.output_stage().spec.fingerprint,
            "tokenizer": tokenizer_hash(self.writer.tokenizer()),
            "dtype": self.dtype,
            "text": self.text.identity(),
        }
        return self._identity

    def texts(self) -> Iterator[Text]:
        """All answers; those that are not on disk yet are written now, in order."""
        place = Path(self.folder) / fingerprint(self.identity())
        total = self.text.count()
        assert total is not None, "the number of batches is known beforehand"
        files = [place / f"batch-{index:05d}.json" for index in range(total)]
        with locked(place):
            done = next((index for index, file in enumerate(files) if not file.is_file()), total)
            if done < total:
                engine = load(self.writer, dtype=self.dtype, device=self.device)
                batches = self.text.answers(engine, skip=done)
                missing = zip(files[done:], batches, strict=True)
                for file, batch in Bar(iterable=missing, desc="answers", total=total, initial=done):
                    texts = [_text(engine, answered) for answered in batch]
                    write_atomically(file, json.dumps(texts).encode())
        for file in files:
            yield from read_texts(file)


def read_texts(file: Path) -> list[Text]:
    """The texts of one batch.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        found = [Text(text, origin) for text, origin in json.loads(file.read_text("utf-8"))]
        if all(isinstance(each, str) for pair in found for each in pair):
            return found
        fault: object = "it holds other things than texts"
    except (ValueError, TypeError, RecursionError) as error:
        fault = error
    raise UserError(f"{file} is damaged: {fault}. Remove it; the next run writes it again.")


def _text(engine: Engine, answered: Answered) -> Text:
    assert engine.tokenizer is not None, "a source has a tokenizer"
    tokens = answered.answer[:-1] if answered.ended else answered.answer  # an end token need not be a special one
    answer = str(engine.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    if not answered.ended:
        answer = whole(answer)
    return Text(f"{opening(answered.prompt)} {answer}", answered.prompt.origin)


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
