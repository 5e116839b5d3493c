"""The engine beside transformers' own ``generate`` and forward pass, on a tiny model and the small trained ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynamax
from dynamax import AtDepth, EarlyExit, Engine, Full, Greedy, MaxProb, Never, SelfSpeculative, UserError
from dynamax.decoding.drafting import Speculative
from dynamax.decoding.drafts import TokenTable
from dynamax.decoding.sampling import Sampled
from dynamax.heads import LastBlockLens
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.candidates import CandidateProb
from dynamax.stream import TextStream
from dynamax.types import Step, Work
from tests.folders import byte_tokenizer

ASSETS = Path(__file__).parents[2] / "assets"
FRANCE = "What is the capital of France?"
TURNS = [{"role": "user", "content": FRANCE}]


class Reference:
    """A model folder as transformers itself loads it and generates with it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(self, prompt: str, *, chat: bool) -> torch.Tensor:
        if not chat:
            return self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    def generate(self, tokens_1T: torch.Tensor, **options: Any) -> Any:
        mask = torch.ones_like(tokens_1T)
        return self.model.generate(input_ids=tokens_1T, attention_mask=mask, pad_token_id=0, **options)

    def answer(self, prompt: str, *, chat: bool, **options: Any) -> list[int]:
        tokens_1T = self.tokens(prompt, chat=chat)
        return self.generate(tokens_1T, **options)[0, tokens_1T.shape[1] :].tolist()


@pytest.fixture(scope="module", params=["llama", "mamba2"])
def sibling(request: pytest.FixtureRequest) -> tuple[Engine, Reference]:
    folder = ASSETS / request.param
    return dynamax.load(folder, exits=[2, 4], device="cpu"), Reference(folder)


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Engine:
    return dynamax.load(tiny_folder, exits=[2, 4], device="cpu")


# -- generate ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_full_depth_is_transformers_generate_token_for_token(sibling: tuple[Engine, Reference], chat: bool) -> None:
    engine, reference = sibling
    for prompt in (FRANCE, "Tell me about the sun. It is", "Zoë said: naïve café 🙂"):
        answer = engine.generate(prompt, chat=chat, max_new_tokens=24)
        assert answer.tokens == reference.answer(prompt, chat=chat, max_new_tokens=24, do_sample=False)


def test_a_prompt_a_conversation_and_a_list_of_either(sibling: tuple[Engine, Reference]) -> None:
    engine, _ = sibling
    one = engine.generate(FRANCE, max_new_tokens=8)
    assert (
        engine.generate(TURNS, max_new_tokens=8).tokens == one.tokens
    )  # text is one user's turn where there is a template
    assert engine.generate(tuple(TURNS), max_new_tokens=8).tokens == one.tokens
    assert engine.generate(TURNS, chat=False, max_new_tokens=8).tokens == one.tokens  # turns are always a chat
    other = engine.generate("Who are you?", max_new_tokens=8)
    texts = engine.generate([FRANCE, "Who are you?"], max_new_tokens=8)
    assert [answer.tokens for answer in texts] == [one.tokens, other.tokens]
    assert [answer.tokens for answer in engine.generate([TURNS, TURNS], max_new_tokens=8)] == [one.tokens] * 2
    assert engine.generate([], max_new_tokens=8) == []


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, MaxProb(0.3)])
def test_prompts_side_by_side_are_answered_as_alone(
    sibling: tuple[Engine, Reference], policy: TerminationPolicy | None
) -> None:
    engine, _ = sibling
    prompts = [FRANCE, "Who are you?", "Tell me about the sun. It is", "Name a river.", "What is a dog?"]
    options: dict[str, Any] = {"max_new_tokens": 12, "stop_strings": ["."]}
    alone = engine.generate(prompts, policy, rows=1, **options)
    for together in (engine.generate(prompts, policy, **options), engine.generate(prompts, policy, rows=2, **options)):
        for mine, other in zip(together, alone, strict=True):
            assert (mine.text, mine.tokens, mine.depths) == (other.text, other.tokens, other.depths)
            assert (mine.finish_reason, mine.cost) == (other.finish_reason, other.cost)
            assert 0 < mine.first_token_seconds <= mine.seconds


def test_each_prompt_draws_with_the_seed_anew(sibling: tuple[Engine, Reference]) -> None:
    engine, _ = sibling
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.2, "seed": 3}
    one = engine.generate(FRANCE, **options)
    answers = engine.generate([FRANCE, "Who are you?", FRANCE], **options)
    assert answers[0].tokens == answers[2].tokens == one.tokens
    in_turn = engine.generate([FRANCE, FRANCE], sampler=Sampled(1.2, top_k=50, seed=3), max_new_tokens=12)
    assert in_turn[0].tokens == one.tokens != in_turn[1].tokens, "a sampler goes on"


def test_a_decoder_that_learns_is_one_for_all_prompts(sibling: tuple[Engine, Reference]) -> None:
    engine, _ = sibling
    made: list[Speculative] = []

    def factory(*parts: Any) -> Speculative:
        made.append(Speculative(*parts, sources=[TokenTable()]))
        return made[-1]

    prompts = [FRANCE, "Who are you?", FRANCE]
    answers = engine.generate(prompts, decoder=factory, max_new_tokens=12)
    assert len(made) == 1
    assert [each.tokens for each in answers] == [each.tokens for each in engine.generate(prompts, max_new_tokens=12)]
    assert any(step.accepted for step in answers[2].steps), "the table knows the first answer"


def test_prompts_that_cannot_go_side_by_side(sibling: tuple[Engine, Reference]) -> None:
    engine, _ = sibling
    prompts = [FRANCE, "Who are you?"]
    lossless = engine.generate(prompts, MaxProb(0.3), decoder=SelfSpeculative, max_new_tokens=6)
    assert [each.tokens for each in lossless] == [each.tokens for each in engine.generate(prompts, max_new_tokens=6)]
    with pytest.raises(UserError, match="in step.*rows is 2"):
        engine.generate(prompts, MaxProb(0.3), decoder=SelfSpeculative, max_new_tokens=6, rows=2)
    with pytest.raises(UserError, match="goes on drawing.*rows is 2"):
        engine.generate(prompts, sampler=Sampled(), max_new_tokens=6, rows=2)
    with pytest.raises(UserError, match="rows is 0"):
        engine.generate(prompts, max_new_tokens=6, rows=0)


def test_an_answer_tells_text_depths_cost_and_time(sibling: tuple[Engine, Reference]) -> None:
    engine, reference = sibling
    answer = engine.generate(FRANCE, AtDepth(4), max_new_tokens=9, eos_token_id=[4095])
    assert answer.finish_reason == "length"
    assert len(answer.tokens) == 9
    assert answer.depths == [8, *[4] * 8]
    assert answer.text == reference.tokenizer.decode(answer.tokens)
    assert (answer.cost.tokens, answer.cost.blocks_per_token, answer.cost.total) == (8, 4.0, 8)
    assert 0 < answer.cost.cost.flops < answer.cost.full.flops
    assert 0 < answer.first_token_seconds < answer.seconds
    full = engine.generate(FRANCE, max_new_tokens=9).cost
    assert full.cost == full.full


def test_costs_are_those_of_the_steps_one_by_one(tiny: Engine) -> None:
    answer = tiny.generate("ab", MaxProb(0.1), chat=False, max_new_tokens=7)
    assert sum(sum(step.work.calls) for step in answer.steps[1:]) / 6 == answer.cost.blocks_per_token
    context = len("ab")
    full = [tiny.costs.full(context + place) for place in range(6)]
    assert answer.cost.full.flops == pytest.approx(sum(cost.flops for cost in full))
    assert answer.cost.full.bytes == pytest.approx(sum(cost.bytes for cost in full))


@pytest.mark.parametrize("decoder", [SelfSpeculative, partial(SelfSpeculative, draft_limit=2)])
def test_a_lossless_decoder_says_what_the_model_says(sibling: tuple[Engine, Reference], decoder: Any) -> None:
    engine, reference = sibling
    answer = engine.generate(FRANCE, MaxProb(0.3), decoder=decoder, max_new_tokens=16)
    assert answer.tokens == reference.answer(FRANCE, chat=True, max_new_tokens=16, do_sample=False)
    assert min(answer.depths) < 8


def test_a_decoder_takes_its_options(tiny: Engine) -> None:
    decoder = tiny.decoder(MaxProb(0.5), SelfSpeculative, draft_limit=2)
    assert isinstance(decoder, SelfSpeculative)
    assert decoder.draft_limit == 2
    assert isinstance(tiny.decoder(), Full)
    assert isinstance(tiny.decoder(Never()), EarlyExit)


def test_each_way_to_end(tiny: Engine) -> None:
    whole = tiny.generate("ab", chat=False, max_new_tokens=12)
    third = whole.tokens[2]
    end = whole.tokens.index(third)
    by_token = tiny.generate("ab", chat=False, max_new_tokens=12, eos_token_id=[third])
    assert (by_token.finish_reason, by_token.tokens) == ("eos", whole.tokens[: end + 1])
    assert by_token.text == byte_tokenizer().decode(whole.tokens[:end])
    at_limit = tiny.generate("ab", chat=False, max_new_tokens=end + 1, eos_token_id=third)
    assert (at_limit.finish_reason, at_limit.tokens) == ("eos", by_token.tokens)  # both at once: it has ended
    limited = tiny.generate("ab", chat=False, max_new_tokens=4)
    assert (limited.finish_reason, limited.tokens) == ("length", whole.tokens[:4])


def test_a_stop_string_at_the_limit_is_a_stop_string(monkeypatch: pytest.MonkeyPatch, tiny: Engine) -> None:
    scripted(monkeypatch, "abc.")
    answer = tiny.generate("x", chat=False, max_new_tokens=4, stop_strings=".")
    assert (answer.text, answer.finish_reason) == ("abc", "stop_string")


def test_a_tokenizer_without_end_or_padding(tiny_folder: Path) -> None:
    loaded = dynamax.load(tiny_folder, device="cpu")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    answer = Engine(loaded.backbone, tokenizer).generate("ab", chat=False, max_new_tokens=5)
    assert len(answer.tokens) == 5


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "The prompt is empty"),
        ({"role": "user", "content": "Hi"}, "the turns of a conversation"),
        ([{"role": "user"}], "the turns of a conversation"),
        ([{"role": "user", "content": None}], "the turns of a conversation"),
        (["Hi", 3], "The prompt is 3; wanted: text"),
        (["Hi", ""], "The prompt is empty"),
        (b"Hi", "wanted: text"),
        (7, "wanted: text"),
        (None, "wanted: text"),
        ("half \ud83d", "not valid Unicode"),
    ],
)
def test_what_is_no_prompt_is_refused(tiny: Engine, prompt: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ messages[0]['content'] + 3 }}", "refuses this conversation: .*str"),
        ("{% for %}", "refuses this conversation"),
    ],
)
def test_a_chat_template_that_fails_is_told(tiny: Engine, template: str, told: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=told):
        Engine(tiny.backbone, tokenizer).generate("Hi", max_new_tokens=2)


def test_a_chat_without_a_template_is_refused(tiny: Engine) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    engine = Engine(tiny.backbone, tokenizer)
    for options in ({"prompt": "Hi", "chat": True}, {"prompt": TURNS}):
        with pytest.raises(UserError, match="no chat template"):
            engine.generate(**options, max_new_tokens=2)
    assert len(engine.generate("Hi", max_new_tokens=2).tokens) == 2


def test_an_engine_without_a_tokenizer_decodes_tokens_alone(tiny: Engine) -> None:
    engine = Engine(tiny.backbone)
    with pytest.raises(UserError, match="no tokenizer, so it reads no text"):
        engine.generate("Hi")
    tokens_1T = torch.tensor([[1, 2]])
    with pytest.raises(UserError, match="no tokenizer, so it writes no text"):
        engine.answer(engine.decoder(), tokens_1T, engine.options(max_new_tokens=2))
    assert len(list(engine.decoder().decode(tokens_1T, max_new_tokens=2))) == 2


def test_an_answer_is_to_one_prompt(tiny: Engine) -> None:
    with pytest.raises(UserError, match=r"shape \[2, 3\]; an answer is to one prompt"):
        tiny.answer(tiny.decoder(), torch.ones(2, 3, dtype=torch.long), tiny.options(max_new_tokens=2))


def test_a_policy_and_exits_that_do_not_fit_are_refused(tiny: Engine) -> None:
    with pytest.raises(UserError, match="no exits"):
        Engine(tiny.backbone, tiny.tokenizer).generate("Hi", MaxProb(0.5))
    with pytest.raises(UserError, match="depth 3"):
        tiny.generate("Hi", AtDepth(3))
    for policy, told in ((AtDepth(3), "depth 3"), (MaxProb({2: 0.5}), r"exits are at \[2, 4\]")):
        with pytest.raises(UserError, match=told):
            tiny.loglikelihood("a", "b", policy)
    with pytest.raises(UserError, match="there are no exits"):
        Engine(tiny.backbone, tiny.tokenizer).loglikelihood("a", "b", MaxProb(0.5))


# -- sampling ---------------------------------------------------------------------------------------

WAYS = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.5},
    {"do_sample": True, "top_k": 3},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_p": 0.8},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
]


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_drawn_from_transformers_distribution(
    sibling: tuple[Engine, Reference], way: dict[str, Any]
) -> None:
    engine, reference = sibling
    tokens_1T = reference.tokens(FRANCE, chat=True)
    torch.manual_seed(0)
    told = reference.generate(tokens_1T, **way, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    wanted_BV = told.scores[0].softmax(-1)
    (step,) = engine.stream(FRANCE, **way, max_new_tokens=1).answer().steps
    got_BV = engine.options(**way).sampler.distribution(step.logits_BV)
    torch.testing.assert_close(got_BV, wanted_BV, atol=2e-5, rtol=1e-3)
    assert (got_BV > 0).sum() == (wanted_BV > 0).sum()


def test_an_option_of_sampling_means_sampling(tiny: Engine) -> None:
    assert isinstance(tiny.options().sampler, Greedy)
    for way in ({"temperature": 0.7}, {"top_k": 50}, {"top_p": 0.9}):
        assert tiny.options(**way).sampler.__dict__.items() >= way.items()


def test_a_seed_makes_an_answer_again_and_another_seed_another(tiny: Engine) -> None:
    said = [tiny.generate("Hi", temperature=2.0, seed=seed, max_new_tokens=12).tokens for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    first, second = tiny.generate(["Hi", "Hi"], temperature=2.0, seed=1, max_new_tokens=12)
    assert first.tokens == second.tokens == said[0]  # each as if it were alone


@pytest.mark.slow
def test_first_tokens_of_many_seeds_have_the_distribution(tiny: Engine) -> None:
    way: dict[str, Any] = {"temperature": 0.5, "top_k": 5}
    runs, counts_V = 300, torch.zeros(tiny.backbone.spec.vocab)
    for seed in range(runs):
        answer = tiny.generate("Hi", **way, seed=seed, max_new_tokens=1)
        counts_V[answer.tokens[0]] += 1
    wanted_V = tiny.options(**way).sampler.distribution(answer.steps[0].logits_BV)[0]
    spread_V = (wanted_V * (1 - wanted_V) / runs).sqrt()
    assert (counts_V / runs - wanted_V).abs().le(4.5 * spread_V + 1 / runs).all()
    assert (counts_V > 0).sum() > 1


# -- stream -----------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """Let full decoding say a text, whatever the model."""
    tokens = byte_tokenizer()(text)["input_ids"]

    def steps(self: Full, session: Any) -> Any:
        for token in tokens:
            yield Step(torch.tensor([token]), torch.tensor([6]), torch.zeros(1, 257), work=Work(*[(0,) * 6] * 3))

    monkeypatch.setattr(Full, "steps", steps)
    return tokens


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("naïve 🙂!", [], "naïve 🙂!"),
        ("one. Two", ["\n"], "one. Two"),
        ("one\nQ: two", ["\nQ:"], "one"),
        ("one\nQuite", ["\nQ:"], "one\nQuite"),  # begins like a stop string, and is none
        ("one\nQ", ["\nQ:"], "one\nQ"),  # and the answer ends within it
        ("aab", ["ab"], "a"),
        ("été", ["é"], ""),
        ("a🙂b", ["🙂"], "a"),  # a stop string of four tokens
        ("xxSTOPyy", ["yy", "STOP"], "xx"),
    ],
)
def test_pieces_of_a_stream_make_its_text(
    monkeypatch: pytest.MonkeyPatch, tiny: Engine, text: str, stops: list[str], wanted: str
) -> None:
    tokens = scripted(monkeypatch, text)
    options: dict[str, Any] = {"chat": False, "max_new_tokens": len(tokens), "stop_strings": stops or None}
    stream = tiny.stream("x", **options)
    shown = ""
    for token in stream:
        shown += token.text
        assert wanted.startswith(shown)
        assert "\ufffd" not in shown
    assert shown == wanted == stream.answer().text == tiny.generate("x", **options).text
    stopped = wanted != text
    assert stream.answer().finish_reason == ("stop_string" if stopped else "length")
    if stopped:  # and not a token later
        found = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        assert len(stream.answer().tokens) == len(byte_tokenizer()(text[:found])["input_ids"])


def test_half_a_character_at_the_end_is_shown_as_what_it_is(monkeypatch: pytest.MonkeyPatch, tiny: Engine) -> None:
    scripted(monkeypatch, "aé")
    tokens = list(tiny.stream("x", chat=False, max_new_tokens=2))
    assert [(token.text, token.depth) for token in tokens] == [("a", 6), ("", 6), ("\ufffd", 6)]
    assert tokens[-1].token is None


def test_a_stream_is_generate_token_by_token(sibling: tuple[Engine, Reference]) -> None:
    engine, _ = sibling
    answer = engine.generate(FRANCE, MaxProb(0.4), max_new_tokens=20)
    stream = engine.stream(FRANCE, MaxProb(0.4), max_new_tokens=20)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == answer.text
    told = [(piece.token, piece.depth) for piece in pieces if piece.token is not None]
    assert told == list(zip(answer.tokens, answer.depths, strict=True))
    assert stream.answer().tokens == answer.tokens


def test_an_answer_of_a_stream_in_the_middle_is_the_whole_answer(tiny: Engine) -> None:
    stream = tiny.stream("Hi", max_new_tokens=6)
    next(stream)
    assert stream.answer().tokens == tiny.generate("Hi", max_new_tokens=6).tokens


def test_time_between_tokens_belongs_to_the_reader(monkeypatch: pytest.MonkeyPatch, tiny: Engine) -> None:
    now = [0.0]
    monkeypatch.setattr("dynamax.stream.time.perf_counter", lambda: now[0])
    stream = tiny.stream("Hi", max_new_tokens=4, eos_token_id=[])
    now[0] += 100
    for _ in stream:
        now[0] += 50
    assert stream.answer().seconds == 0


# -- known texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_loglikelihood_is_transformers_forward_in_float64(family: str) -> None:
    engine = dynamax.load(ASSETS / family, dtype="float64", device="cpu")
    reference = Reference(ASSETS / family, torch.float64)
    for context, continuation in ((FRANCE, " Paris."), ("The sun", " is warm, and the moon is not.")):
        found = engine.loglikelihood(context, continuation)
        whole_1T = reference.tokens(context + continuation, chat=False)
        start = reference.tokens(context, chat=False).shape[1]
        with torch.inference_mode():
            logits_TV = reference.model(whole_1T).logits[0, start - 1 : -1]
        target_T = whole_1T[0, start:]
        nats = logits_TV.log_softmax(-1)[torch.arange(len(target_T)), target_T]
        assert found.nats == pytest.approx(float(nats.sum()), rel=1e-6)
        assert found.tokens == len(target_T) == len(found.depths)
        assert found.greedy == bool((logits_TV.argmax(-1) == target_T).all())
        assert set(found.depths) == {8}


def test_loglikelihood_at_an_exit_is_that_of_the_exits_logits(tiny: Engine) -> None:
    found = tiny.loglikelihood("abc", "defg", AtDepth(2))
    read = tiny.read("abcdefg", start=2)
    target_T = torch.tensor(byte_tokenizer()("defg")["input_ids"])
    log_TV = read.exits[0].logits[:-1].log_softmax(-1)
    log_TV[0] = read.logits_TV[0].log_softmax(-1)  # the first is the prompt's own, at full depth
    assert found.nats == pytest.approx(float(log_TV.gather(1, target_T[:, None]).sum()), rel=1e-5)
    assert found.depths == [6, 2, 2, 2]


@pytest.mark.parametrize(("context", "continuation"), [("The capi", "tal"), ("What is th", "e sea?")])
def test_a_continuation_that_runs_into_its_context_is_encoded_alone(context: str, continuation: str) -> None:
    engine = dynamax.load(ASSETS / "llama", device="cpu")
    assert engine.tokenizer is not None
    parts = [engine.tokenizer(text)["input_ids"] for text in (context, continuation)]
    assert engine.tokenizer(context + continuation)["input_ids"] != sum(parts, []), "a token spans both"
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "llama", dtype=torch.float32)
    log_TV = model(torch.tensor([sum(parts, [])])).logits[0].detach().log_softmax(-1)
    start = len(parts[0])
    wanted = sum(float(log_TV[start + place - 1, token]) for place, token in enumerate(parts[1]))
    found = engine.loglikelihood(context, continuation)
    assert found.nats == pytest.approx(wanted, rel=1e-5)
    assert found.tokens == len(parts[1])


def test_a_continuation_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="'' has no tokens behind the prompt"):
        dynamax.load(ASSETS / "llama", device="cpu").loglikelihood("The capi", "")


@pytest.mark.parametrize("depth", [2, 4])
def test_reading_a_text_is_decoding_along_it(tiny: Engine, depth: int) -> None:
    answer = tiny.generate("ab", AtDepth(depth), chat=False, max_new_tokens=6)
    tokens_1T = torch.tensor([byte_tokenizer()("ab")["input_ids"] + answer.tokens[:-1]])
    read = tiny.read(tokens_1T, start=1)
    path = read.apply_policy(AtDepth(depth))
    assert path.depth_T.tolist() == answer.depths
    decoded_TV = torch.cat([step.logits_BV for step in answer.steps])
    torch.testing.assert_close(path.logits_TV, decoded_TV, atol=1e-4, rtol=1e-4)


def test_a_text_that_begins_with_the_start_token_gets_no_second(tiny: Engine) -> None:
    tokens_1T = tiny.encode("ab", chat=False)
    longer_1T = tiny.with_start_token(tokens_1T)
    assert longer_1T.tolist() == [[0, *tokens_1T[0].tolist()]]
    assert tiny.with_start_token(longer_1T).equal(longer_1T)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        Engine(tiny.backbone, tokenizer).with_start_token(tokens_1T)


# -- what would be wrong without a word -----------------------------------------------------------------


def test_a_lens_that_runs_the_last_block_has_no_likelihood_in_one_pass(tiny_folder: Path) -> None:
    engine = dynamax.load(tiny_folder, exits={2: dynamax.Exit(LastBlockLens)}, device="cpu")
    assert engine.loglikelihood("a", "b").tokens == 1
    with pytest.raises(UserError, match="a lens runs the last block"):
        engine.loglikelihood("a", "b", MaxProb(0.5))


def test_candidates_have_no_likelihood(tiny_folder: Path) -> None:
    engine = dynamax.load(tiny_folder, exits=[2], device="cpu")
    with pytest.raises(UserError, match="what earlier steps said"):
        engine.loglikelihood("a", "b", CandidateProb(0.5))


def test_options_draw_as_the_decoder_does_or_are_refused(tiny: Engine) -> None:
    options = tiny.options(temperature=1.5, seed=1, max_new_tokens=4)
    prompt_1T = tiny.encode("Hi", chat=False)
    with pytest.raises(UserError, match="another sampler than the decoder"):
        tiny.answer(tiny.decoder(), prompt_1T, options)
    drawn = tiny.answer(tiny.decoder(sampler=options.sampler), prompt_1T, options).tokens
    assert drawn == tiny.generate("Hi", chat=False, temperature=1.5, seed=1, max_new_tokens=4).tokens


def test_the_smallest_temperature_is_the_most_likely_token(tiny: Engine) -> None:
    tokens = [tiny.generate("Hi", max_new_tokens=4, **more).tokens for more in ({}, {"temperature": 1e-37})]
    assert tokens[0] == tokens[1]
    for given in ({"temperature": 1e-46}, {"temperature": 1.0, "seed": 2**70}, {"eos_token_id": 2**70}):
        with pytest.raises(UserError, match=next(reversed(given))):
            tiny.generate("Hi", max_new_tokens=4, **given)


def test_logits_that_are_nan_end_the_answer(tiny_folder: Path) -> None:
    engine = dynamax.load(tiny_folder, device="cpu")
    with torch.no_grad():
        next(p for name, p in engine.backbone.named_parameters() if name.endswith("norm.weight"))[0] = torch.nan
    for options in {}, {"temperature": 1.0}:
        stream = engine.stream("Hi", max_new_tokens=3, **options)
        with pytest.raises(UserError, match="hold NaN"):
            next(stream)


def test_a_stream_that_failed_has_no_answer(tiny: Engine) -> None:
    stream = tiny.stream("Hi", max_new_tokens=10**6)
    with pytest.raises(UserError, match="context"):
        next(stream)
    with pytest.raises(UserError, match="no answer"):
        stream.answer()


@pytest.mark.parametrize("policy", ["MaxProb", 0.5, MaxProb])
def test_what_is_no_policy_is_refused(tiny: Engine, policy: Any) -> None:
    with pytest.raises(UserError, match="wanted: a policy object"):
        tiny.generate("Hi", policy)


def test_a_depth_given_twice_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"exits at \[2, 2\]"):
        dynamax.load(tiny_folder, exits=[2, 2], device="cpu")


def test_text_that_changes_behind_is_not_cut_by_its_length(monkeypatch: pytest.MonkeyPatch, tiny: Engine) -> None:
    """A tokenizer may change what it has said, as those do that remove spaces before a comma."""
    tokenizer = byte_tokenizer()
    said = {1: "a ", 2: "a, b"}
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: said[len(tokens)])
    stream = TextStream(tokenizer, tiny.options(max_new_tokens=2, eos_token_id=[0]))
    assert [stream.add(2), stream.add(4)] == ["a ", ", b"]
    assert stream.text == "a, b"
