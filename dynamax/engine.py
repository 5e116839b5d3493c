"""A loaded model with its exits: generates, streams, scores and reads. Knows no trainer.

>>> import dynamax
>>> engine = dynamax.load("assets/llama", exits=[2, 4])
>>> answer = engine.generate("What is the capital of France?", policy=dynamax.MaxProb(0.5), max_new_tokens=8)
>>> len(answer.tokens) == len(answer.depths) <= 8
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast, final, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dynamax.backbones.base import Backbone
from dynamax.backbones.loading import on_cpu
from dynamax.backbones.precision import Choice, capture_steps, set_precision
from dynamax.backbones.sources import GGUF, Folder, Hub, Source, source_from
from dynamax.backbones.tuned import ADAPTER, TUNED, Tuned
from dynamax.decoding.base import Decoder, DecoderFactory
from dynamax.decoding.batching import refusal
from dynamax.decoding.cost import CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.sampling import Greedy, Sampler
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.device import chosen
from dynamax.errors import UserError
from dynamax.generation import Chat, GenerationOptions, encode, generation_options
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.saved import RECORD, read_record
from dynamax.policies.base import TerminationPolicy
from dynamax.registry import SOURCES
from dynamax.stream import Answer, Stream, answers_together

Prompt = str | Chat
Exits = Mapping[int, Exit] | Sequence[int]

ROWS = 8
"""Prompts answered side by side, where nobody says otherwise."""


@dataclass(frozen=True)
class Likelihood:
    """How likely a text is after a context.

    Attributes:
        nats: Log-likelihood of all its tokens.
        tokens: How many there are.
        greedy: Whether each token is the most likely one where the policy leaves.
        depths: Blocks that each token ran through.
    """

    nats: float
    tokens: int
    greedy: bool
    depths: list[int]


@final
class Engine:
    """A backbone, its tokenizer and its exits. ``load`` makes one from a name.

    Args:
        backbone: The model.
        tokenizer: Its tokenizer; without one, token ids alone are read.
        exits: Its exits; without them, it decodes at full depth.
        generation_config: The rules of generation that came with the model.
        precision: How its weights are held; None for as they were loaded.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase | None = None,
        exits: ExitBank | None = None,
        generation_config: GenerationConfig | None = None,
        precision: Choice | None = None,
    ) -> None:
        self.backbone = backbone
        self.precision = precision
        self.tokenizer = tokenizer
        self.exits = exits
        self.generation_config = generation_config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.backbone.parameters()).dtype

    def to(self, device: torch.device | str) -> Engine:
        """Move model and exits.

        Raises:
            UserError: If its steps were captured in CUDA graphs, which know where its weights are.
        """
        if self.backbone.captured is not None and torch.device(device).type != self.device.type:
            raise UserError(
                f"The engine was asked to move to {device}, but its steps were captured in CUDA graphs on "
                f"{self.device}, so it stays where it was loaded. Load it there, or without compile."
            )
        self.backbone.to(device)
        if self.exits is not None:
            self.exits.to(device)
        return self

    # -- decoding -----------------------------------------------------------------------------------

    def decoder(
        self,
        policy: TerminationPolicy | None = None,
        decoder: DecoderFactory | None = None,
        *,
        sampler: Sampler | None = None,
        **options: Any,  # noqa: ANN401 - of the decoder's class
    ) -> Decoder:
        """A decoder over this model; its ``decode`` takes token ids.

        Args:
            policy: When to leave.
            decoder: Its class, or a partial of it; left out, EarlyExit where there is a policy, else Full.
            sampler: How tokens are drawn; greedy by default.
            **options: Options of the class, such as ``draft_limit``.

        Raises:
            UserError: If the policy and the exits do not fit, or there are none.
        """
        if policy is not None and not isinstance(policy, TerminationPolicy):
            raise UserError(f"The policy is {policy!r:.80}; wanted: a policy object, such as MaxProb(0.9).")
        factory = decoder or (Full if policy is None else EarlyExit)
        return partial(factory, **options)(self.backbone, self.exits, policy, sampler)

    def options(self, *, sampler: Sampler | None = None, **given: Any) -> GenerationOptions:  # noqa: ANN401
        """The model's own rules of generation, and over them those that are given; see ``generation_options``."""
        return generation_options(self.tokenizer, self.generation_config, sampler=sampler, **given)

    def encode(self, prompt: Prompt, *, chat: bool | None = None, day: date | None = None) -> Tensor:
        """A prompt to ``tokens_1T``; see ``dynamax.generation.encode``."""
        return encode(self.tokenizer, prompt, chat=chat, day=day, device=self.device)

    @overload
    def generate(self, prompt: Prompt, policy: TerminationPolicy | None = ..., **options: Any) -> Answer: ...  # noqa: ANN401
    @overload
    def generate(
        self,
        prompt: list[str] | list[Chat],
        policy: TerminationPolicy | None = ...,
        *,
        rows: int | None = ...,
        **options: Any,  # noqa: ANN401
    ) -> list[Answer]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        policy: TerminationPolicy | None = None,
        *,
        rows: int | None = None,
        decoder: DecoderFactory | None = None,
        chat: bool | None = None,
        sampler: Sampler | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Answer | list[Answer]:
        """Answer a prompt, or several, each as if it were alone.

        Several are answered side by side, ``rows`` at a time; one after the other if the decoder drafts, if its rule
        for skipped state wants rows in step, or if a ``sampler`` is given, which goes on drawing from one prompt to the
        next. ``seed`` begins anew with each. A decoder that learns, such as Speculative, is one for all of them.

        Args:
            prompt: Text; the turns of a conversation, ``[{"role": "user", "content": ...}]``; or a list of either.
            policy: When to leave; left out, every token runs at full depth.
            rows: Most prompts at a time; left out, 8, or 1 where they are answered one after the other.
            decoder: As for ``decoder``.
            chat: As for ``stream``.
            sampler: As for ``stream``.
            **options: As for ``stream``.

        Raises:
            UserError: If an option is unknown, or prompt and answer do not fit the context; if ``rows`` is above 1 and
                they can only be answered one after the other.
        """
        if rows is not None and rows < 1:
            raise UserError(f"rows is {rows}; it must be at least 1.")
        if not isinstance(prompt, list | tuple) or (prompt and isinstance(prompt[0], Mapping)):
            one = cast(Prompt, prompt)
            return self.stream(one, policy, decoder=decoder, chat=chat, sampler=sampler, **options).answer()
        said = [self.options(sampler=sampler, **options) for _ in prompt]  # a sampler each, if none is given
        encoded = [self.encode(cast(Prompt, each), chat=chat) for each in prompt]
        made = self.decoder(policy, decoder, sampler=sampler)
        reason = refusal(made)
        if sampler is not None:
            reason = "A sampler was given, which goes on drawing from one prompt to the next."
        if reason is not None and rows is not None and rows > 1:
            raise UserError(f"{reason} So prompts are answered one after the other, but rows is {rows}. Leave it out.")
        if self.tokenizer is not None and reason is None and rows != 1 and len(encoded) > 1:
            return answers_together(made, self.tokenizer, encoded, said, ROWS if rows is None else rows)
        answers = []
        for prompt_1T, own in zip(encoded, said, strict=True):
            made.sampler = own.sampler
            answers.append(self.answer(made, prompt_1T, own))
        return answers

    def stream(
        self,
        prompt: Prompt,
        policy: TerminationPolicy | None = None,
        *,
        decoder: DecoderFactory | None = None,
        chat: bool | None = None,
        sampler: Sampler | None = None,
        **options: Any,  # noqa: ANN401 - entries of transformers' GenerationConfig
    ) -> Stream:
        """Answer a prompt token by token.

        Args:
            prompt: Text, or the turns of a conversation.
            policy: When to leave; left out, every token runs at full depth.
            decoder: As for ``decoder``.
            chat: Whether text is wrapped as a user's turn in the chat template; left out, where there is one.
            sampler: How tokens are drawn, in place of ``do_sample`` and the like.
            **options: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``seed``,
                ``stop_strings``, ``eos_token_id``; what is left out is as the model's ``generation_config`` says.

        Returns:
            An iterator of ``Token``; once it has ended, its ``answer()`` has everything.

        Raises:
            UserError: If an option is unknown; at the first token, if prompt and answer do not fit the context.
        """
        said = self.options(sampler=sampler, **options)
        made = self.decoder(policy, decoder, sampler=said.sampler)
        prompt_1T = self.encode(prompt, chat=chat)
        assert self.tokenizer is not None, "the prompt has been encoded"
        return Stream(made, self.tokenizer, prompt_1T, said)

    def answer(self, decoder: Decoder, prompt_1T: Tensor, options: GenerationOptions) -> Answer:
        """Answer one encoded prompt with a decoder of this engine.

        Raises:
            UserError: If the options draw tokens otherwise than the decoder does, or there is no tokenizer.
        """
        both_greedy = type(decoder.sampler) is type(options.sampler) is Greedy
        if decoder.sampler is not options.sampler and not both_greedy:
            raise UserError(
                "The options have another sampler than the decoder, which draws. Make the decoder with it: "
                "engine.decoder(..., sampler=options.sampler)."
            )
        if self.tokenizer is None:
            raise UserError(
                "This engine has no tokenizer, so it writes no text. Use decoder.decode, which gives tokens."
            )
        return Stream(decoder, self.tokenizer, prompt_1T.to(self.device), options).answer()

    @cached_property
    def costs(self) -> CostModel:
        """What full decoding costs."""
        return CostModel(self.backbone)

    # -- known texts --------------------------------------------------------------------------------

    def read(self, text: str | Tensor, *, start: int = 0) -> TeacherForcedPass:
        """What every exit says of every position of a known text, from one pass over it.

        Args:
            text: Text, or token ids ``tokens_1T``.
            start: First position that is read.
        """
        tokens_1T = self.encode(text, chat=False) if isinstance(text, str) else text.to(self.device)
        return TeacherForcedPass(self.backbone, self.exits, tokens_1T, start=start)

    def loglikelihood(self, context: str, continuation: str, policy: TerminationPolicy | None = None) -> Likelihood:
        """How likely a continuation is after a context, where the policy leaves, read off one exact pass.

        Args:
            context: Text before.
            continuation: Text whose tokens are scored, at least one.
            policy: When to leave; left out, the top is read.

        Raises:
            UserError: If the continuation has no tokens; if a lens runs the last block, or the policy goes by earlier
                steps, so that one pass does not tell what decoding would do.
        """
        if policy is not None and self.exits is not None and not self.decoder(policy).teacher_forced:
            raise UserError(
                "A likelihood is read off one pass, and decoding would read otherwise: a lens runs the last block, "
                "or the policy goes by what earlier steps said. Use exits with other lenses, another policy, or none."
            )
        whole_1T, start = self.encode_pair(context, continuation)
        path = self.read(whole_1T[:, :-1], start=start - 1).apply_policy(policy)
        target_T = whole_1T[0, start:]
        nats = path.logits_TV.log_softmax(-1).gather(1, target_T[:, None]).sum()
        greedy = bool((path.logits_TV.argmax(-1) == target_T).all())
        return Likelihood(float(nats), len(target_T), greedy, path.depth_T.tolist())

    def encode_pair(self, context: str, continuation: str) -> tuple[Tensor, int]:
        """Context and continuation as one text, ``tokens_1T``, and where the continuation's tokens begin.

        Where a token would span both, the continuation is encoded alone, so that it has tokens of its own.

        Raises:
            UserError: If the continuation has no tokens.
        """
        start_1T = self.encode(context, chat=False)
        whole_1T, start = self.encode(context + continuation, chat=False), start_1T.shape[1]
        if not whole_1T[:, :start].equal(start_1T):
            assert self.tokenizer is not None, "the context has been encoded"
            alone = self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
            whole_1T = torch.cat([start_1T, torch.tensor([alone], dtype=torch.long, device=self.device)], 1)
        if whole_1T.shape[1] <= start:
            raise UserError(
                f"{continuation!r:.80} has no tokens behind the prompt, so it has no likelihood. Leave it out."
            )
        return whole_1T, start

    def with_start_token(self, tokens_1T: Tensor) -> Tensor:
        """A text behind the token that begins texts: BOS, or else the end token.

        Raises:
            UserError: If the tokenizer has neither.
        """
        if self.tokenizer is None:
            raise UserError(
                "This engine has no tokenizer, so it has no start token. Load the model with its tokenizer."
            )
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        if first is None:
            raise UserError(
                "This model's tokenizer has neither a BOS nor an EOS token, so the first token of a text has nothing "
                "to be predicted from. Give it one (tokenizer.bos_token), or use a task that generates."
            )
        return tokens_1T if tokens_1T[0, 0] == first else torch.cat([tokens_1T.new_tensor([[first]]), tokens_1T], 1)


@on_cpu
def load(
    model: str | Path | Source,
    *,
    heads: str | Path | None = None,
    exits: Exits | None = None,
    dtype: str = "float32",
    precision: str | None = None,
    compile: bool = False,
    device: Literal["auto", "cpu", "cuda"] | str = "auto",
) -> Engine:
    """Load a model with its exits.

    Args:
        model: A folder of heads, as ``dynamax fit`` writes it, which knows its model; a folder of ``dynamax tune``,
            which knows its base; a model folder; a GGUF file; the
            name of a source without options, such as ``SmolLM2``; a name on the Hugging Face Hub; or a source object.
        heads: Folder of heads for the model.
        exits: Untrained exits in place of heads, by depth; depths alone get the logit lens.
        dtype: What the model computes in, such as float32 or bfloat16.
        precision: How its weights are held for fast decoding: float32, float16, bfloat16, int8 or int4; ``auto`` takes
            the faster of float32 and float16 here. Left out, transformers' modules run as they are.
        compile: Whether the steps of one sequence, of up to 4 positions, are made faster. On a CPU inductor compiles
            them: it needs a precision and a C++ compiler, and takes half a minute the first time; what it made is kept
            on disk. On a GPU they are captured in CUDA graphs, for each span of blocks between two exits.
        device: Where it runs; ``auto`` is a GPU where there is one.

    Raises:
        UserError: If it cannot be found or does not fit.

    Example:
        >>> load("assets/mamba2", exits=[2, 4, 6]).exits.depths
        (2, 4, 6)
    """
    source, own_heads = find_source(model)
    heads = own_heads if heads is None and exits is None else heads
    if heads is not None and exits is not None:
        raise UserError(f"load was given heads: {heads} and exits: {exits}; give one of the two.")
    if heads is not None:
        read_record(Path(heads))  # before the model, which takes longer
    place = chosen(device)
    backbone = source.load(dtype=dtype, device=place)
    by_graphs = compile and torch.device(place).type == "cuda"
    if precision is None and compile and not by_graphs:
        raise UserError(
            "load was given compile without a precision, whose recorded steps are what it compiles. Give "
            "one, such as precision='auto'."
        )
    choice = None if precision is None else set_precision(backbone, precision, compiled=compile and not by_graphs)
    bank: ExitBank | None = None
    if heads is not None:
        bank = ExitBank.load(heads, backbone.site)
    elif exits is not None:
        if len(set(exits)) < len(exits):
            raise UserError(f"load was given exits at {list(exits)}, one depth more than once. Give each depth once.")
        given = exits if isinstance(exits, Mapping) else {depth: Exit() for depth in exits}
        bank = ExitBank(given, backbone.site)
    engine = Engine(backbone, source.tokenizer(), bank, source.generation_config(), choice).to(place)
    if by_graphs:
        engine.precision = capture_steps(backbone, () if bank is None else bank.depths, choice)
    return engine


def find_source(model: str | Path | Source) -> tuple[Source, Path | None]:
    """The source that ``load`` takes a model from, and the folder of heads if that was named.

    Args:
        model: As for ``load``.

    Raises:
        UserError: If the name is no model.
    """
    if isinstance(model, Source):
        return model, None
    if not str(model).strip():
        raise UserError("The name of the model is empty. Give a folder, a .gguf file, OWNER/NAME, or a source.")
    path = Path(model).expanduser()
    if (path / RECORD).is_file():
        record: object = read_record(path)
        recipe = record.get("source") if isinstance(record, dict) else None
        if not (isinstance(recipe, dict) and {"class", "options"} <= set(recipe)):
            raise UserError(
                f"The heads in {path} do not say where their model comes from. Give it: "
                f"dynamax.load(MODEL, heads={str(path)!r})."
            )
        return source_from(recipe), path
    if (path / TUNED).is_file() and (path / ADAPTER).is_file():
        return Tuned(path), None
    if path.is_dir():
        return Folder(str(path)), None
    if path.suffix == ".gguf":
        return GGUF(str(path)), None
    name = str(model)
    if name in SOURCES.names():
        try:
            return SOURCES.get(name)(), None
        except TypeError as error:
            raise UserError(
                f"The source {name} needs options: {error}. Give the object: dynamax.{name}(...)."
            ) from error
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{name} is no folder of heads, no model folder, no .gguf file, no name of a source "
            f"({', '.join(SOURCES.names())}) and no name on the Hub, which has the form OWNER/NAME. Correct it."
        )
    return Hub(name), None
