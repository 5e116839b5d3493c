"""The tokenizer of a model that starts from nothing: byte-level BPE, trained on its text. Knows texts, no models."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynamax.errors import UserError

END = "<|endoftext|>"
BYTES = 256
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}\n"
    "{% else %}Question: {{ message['content'] }}\nAnswer:{% endif %}{% endfor %}"
)
"""A chat as the corpus ``Answers`` writes it."""


def train_tokenizer(texts: Iterable[str], *, vocab: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE as GPT-2's; every text can be encoded and comes back unchanged.

    Args:
        texts: What merges are counted on.
        vocab: Tokens, bytes and the end of text among them.

    Raises:
        UserError: If the vocabulary is too small for the bytes, or the texts do not fill it.
    """
    if vocab <= BYTES:
        raise UserError(f"A vocabulary of {vocab} was asked for; {BYTES} bytes and the end of text need more.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab:
        raise UserError(
            f"A vocabulary of {vocab} was asked for, but the text has pairs for {tokenizer.get_vocab_size()} tokens "
            f"only. Give more text, or lower vocab."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
