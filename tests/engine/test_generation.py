"""What ``generation_config`` asks for: obeyed on every path, or refused by name; and options over it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dynamax
from dynamax import Engine, Folder, Greedy, Never, Sampled, UserError
from dynamax.backbones.loading import read_generation_config
from dynamax.cli import main
from dynamax.data.answers import Answers
from dynamax.data.generated import SelfGenerated
from dynamax.data.tasks import TaskData
from dynamax.generation import NEUTRAL, NEUTRAL_IN_SAMPLING, NO_EFFECT, OBEYED, generation_options
from dynamax.heads.bank import Exit
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.tasks.base import Example, GenerationTask
from tests.folders import byte_tokenizer

LLAMA = Path(__file__).parents[2] / "assets" / "llama"
FRANCE = "What is the capital of France?"
LIMIT = 40


class Question(GenerationTask):
    """One question; the answers it was to score are kept."""

    headline = "length"

    def __init__(self) -> None:
        self.answers: list[str] = []

    def examples(self) -> list[Example]:
        return [Example("france", FRANCE, ("Paris",), max_new_tokens=LIMIT)]

    def score(self, example: Example, answer: str) -> dict[str, float]:
        self.answers.append(answer)
        return {"length": float(len(answer))}


def with_rules(folder: Path, **rules: Any) -> Path:
    """The small trained model with a generation_config of its own."""
    shutil.copytree(LLAMA, folder)
    GenerationConfig(**rules).save_pretrained(folder)
    return folder


def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)


# -- two end tokens, on every path ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_rules(tmp_path_factory.mktemp("ends") / "m", eos_token_id=[0, 353], pad_token_id=0)


@pytest.fixture(scope="module")
def wanted(two_ends: Path) -> list[int]:
    """What transformers' ``generate`` says, in chat form, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(two_ends)
    model = AutoModelForCausalLM.from_pretrained(two_ends, dtype=torch.float32)
    turns = [{"role": "user", "content": FRANCE}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = model.generate(**prompt, max_new_tokens=LIMIT)[0, prompt["input_ids"].shape[1] :].tolist()
    assert len(told) == 5
    assert told[-1] == 353
    return told


def decoding(folder: Path) -> DecodingModule:
    return DecodingModule(Folder(folder), [Sweep(Never())], exits={2: Exit()}, chat=True)


def by_generate(folder: Path, capsys: pytest.CaptureFixture[str], place: Path) -> str:
    return dynamax.load(folder, device="cpu").generate(FRANCE, max_new_tokens=LIMIT).text


def by_stream(folder: Path, capsys: pytest.CaptureFixture[str], place: Path) -> str:
    engine = dynamax.load(folder, exits=[2], device="cpu")
    return "".join(token.text for token in engine.stream(FRANCE, Never(), max_new_tokens=LIMIT))


def by_command(folder: Path, capsys: pytest.CaptureFixture[str], place: Path) -> str:
    model = ["--backbone", "Folder", "--backbone.path", str(folder), "--exits={2: {}}", "--policy=Never"]
    with pytest.raises(SystemExit) as ended:
        main(["generate", FRANCE, *model, f"--max_new_tokens={LIMIT}", "--device=cpu"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "\n5 tokens in" in shown
    return shown[: shown.index("\n\n exit 2")]


def by_predict(folder: Path, capsys: pytest.CaptureFixture[str], place: Path) -> str:
    found: Any = trainer().predict(decoding(folder), datamodule=TaskData(Question()))
    assert len(found[0]["tokens"]) == 5
    return found[0]["text"]


def by_test(folder: Path, capsys: pytest.CaptureFixture[str], place: Path) -> str:
    module, task = decoding(folder), Question()
    trainer().test(module, datamodule=TaskData(task), verbose=False)
    assert [row.tokens for row in module.results.frontier] == [4, 4]  # behind the prompt's own
    (answer,) = set(task.answers)
    return answer


def self_generated(place: Path) -> SelfGenerated:
    (place / "prompts.txt").write_text(FRANCE)
    prompts = str(place / "prompts.txt")
    return SelfGenerated(prompts, field="text", documents=2, batch=2, max_new_tokens=LIMIT, top_k=1)  # so it is greedy


def by_self_generated(folder: Path, capsys: pytest.CaptureFixture[str], place: Path) -> str:
    ((first, second),) = self_generated(place).groups(dynamax.load(folder, device="cpu"))
    assert first.tokens == second.tokens
    answer = first.tokens[first.prompt :]
    assert len(answer) == 5
    return AutoTokenizer.from_pretrained(folder).decode(answer[:-1])


def by_answers(folder: Path, capsys: pytest.CaptureFixture[str], place: Path) -> str:
    corpus = Answers(Folder(folder), self_generated(place), folder=str(place / "answers"), device="cpu")
    (text,) = {each.text for each in corpus.texts()}
    begin = f"Question: {FRANCE}\nAnswer:"
    assert text.startswith(begin)
    return text.removeprefix(begin)


@pytest.mark.parametrize(
    "path", [by_generate, by_stream, by_command, by_predict, by_test, by_self_generated, by_answers]
)
def test_either_of_two_end_tokens_ends_the_text_on_every_path(
    two_ends: Path, wanted: list[int], path: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert path(two_ends, capsys, tmp_path) == AutoTokenizer.from_pretrained(two_ends).decode(wanted[:-1])


def test_an_answer_that_an_end_token_ended_is_not_cut_to_whole_sentences(two_ends: Path, tmp_path: Path) -> None:
    (text, *_) = Answers(Folder(two_ends), self_generated(tmp_path), folder=str(tmp_path), device="cpu").texts()
    assert text.text.endswith(" body")  # no full stop, and all the same the answer is whole


# -- the model's own way of sampling, on every path ---------------------------------------------------


@pytest.mark.slow
def test_sampling_that_the_model_asks_for_is_followed_and_reported(tmp_path: Path) -> None:
    folder = with_rules(tmp_path / "m", eos_token_id=0, do_sample=True, temperature=2.5, top_k=7, max_new_tokens=6)
    engine = dynamax.load(folder, device="cpu")
    sampler = engine.options().sampler
    assert isinstance(sampler, Sampled)
    assert (sampler.temperature, sampler.top_k, sampler.top_p) == (2.5, 7, 1.0)
    greedy = engine.generate(FRANCE, do_sample=False)
    assert len(greedy.tokens) == 6  # the model's own limit
    assert greedy.tokens != engine.generate(FRANCE).tokens == engine.generate(FRANCE, seed=0).tokens
    module, task = decoding(folder), Question()
    trainer().test(module, datamodule=TaskData(task), verbose=False)
    told = module.results.decoding.sampler
    assert {**told, "name": "Sampled", "temperature": 2.5, "top_k": 7, "top_p": 1.0} == told
    answers: Any = trainer().predict(decoding(folder), datamodule=TaskData(Question()))
    assert len(set(task.answers)) == 1
    assert answers[0]["text"] == task.answers[0]
    plain: Any = engine.generate(FRANCE, do_sample=False, max_new_tokens=LIMIT)
    assert plain.text != task.answers[0]


@pytest.mark.slow
def test_a_model_that_asks_for_a_penalty_is_refused_before_any_decoding(tmp_path: Path) -> None:
    folder = with_rules(tmp_path / "m", eos_token_id=0, repetition_penalty=1.2)
    engine = dynamax.load(folder, device="cpu")
    told = r"repetition_penalty=1.2 stands in the model's generation_config; .* Give repetition_penalty=1 to do without"
    with pytest.raises(UserError, match=told):
        engine.generate(FRANCE)
    with pytest.raises(UserError, match=told):
        trainer().test(decoding(folder), datamodule=TaskData(Question()), verbose=False)
    with pytest.raises(UserError, match=told):
        trainer().predict(decoding(folder), datamodule=TaskData(Question()))
    with pytest.raises(UserError, match=told):
        next(self_generated(tmp_path).groups(engine))
    assert len(engine.generate(FRANCE, repetition_penalty=1.0, max_new_tokens=3).tokens) == 3


# -- every entry there is -----------------------------------------------------------------------------

HARMLESS = [name for names in NO_EFFECT.values() for name in names]


def test_no_entry_is_in_two_tables() -> None:
    every = [*OBEYED, *NEUTRAL, *NEUTRAL_IN_SAMPLING, *HARMLESS]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("name", GenerationConfig().to_dict())
def test_every_entry_of_transformers_is_obeyed_or_refused_or_harmless_for_a_reason(name: str) -> None:
    assert name in {*OBEYED, *NEUTRAL, *NEUTRAL_IN_SAMPLING, *HARMLESS}


@pytest.mark.parametrize("name", [*NEUTRAL, *NEUTRAL_IN_SAMPLING])
@pytest.mark.parametrize("from_file", [True, False])
def test_what_changes_tokens_and_is_not_done_is_refused_by_name(name: str, from_file: bool) -> None:
    neutral = {**NEUTRAL, **NEUTRAL_IN_SAMPLING}[name]
    for value in neutral:
        generation_options(None, None, do_sample=True, **{name: value})
    if name == "renormalize_logits":
        return  # harmless either way
    other: Any = 0.37 if name != "cache_implementation" else "quantized"
    config = GenerationConfig()
    setattr(config, name, other)
    given = {"do_sample": True} if from_file else {name: other}
    with pytest.raises(UserError, match=f"{name}={other!r} .* is not done here"):
        generation_options(None, config if from_file else None, **given)
    if neutral:
        generation_options(None, config, do_sample=True, **{name: neutral[0]})  # as the message says


@pytest.mark.parametrize("name", NEUTRAL_IN_SAMPLING)
def test_what_only_sampling_heeds_does_not_stop_greedy_decoding(name: str) -> None:
    config = GenerationConfig()
    setattr(config, name, 0.37)
    assert isinstance(generation_options(None, config).sampler, Greedy)
    for sampler in (Sampled(1.0), None):
        with pytest.raises(UserError, match=name):
            generation_options(None, config, sampler=sampler, do_sample=None if sampler else True)


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_entries_of_a_model_are_passed_over_and_cannot_be_given(name: str) -> None:
    config = GenerationConfig()
    setattr(config, name, 3)
    own, plain = generation_options(None, config), generation_options(None, None)
    assert (own.eos_token_id, own.stop_strings, own.max_new_tokens) == ((), (), plain.max_new_tokens)
    assert isinstance(own.sampler, Greedy)
    with pytest.raises(UserError, match=f"There is no generation option {name}"):
        generation_options(None, None, **{name: 3})


def test_an_entry_of_the_future_is_refused(tmp_path: Path) -> None:
    entries = {"eos_token_id": 0, "banish_adverbs": True, "transformers_version": "9.0.0"}
    (tmp_path / "generation_config.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="banish_adverbs=True stands in the model's generation_config; it is not known"):
        generation_options(None, read_generation_config(tmp_path))
    with pytest.raises(UserError, match="There is no generation option banish_adverbs"):
        generation_options(None, None, banish_adverbs=True)


# -- options over the model's own ---------------------------------------------------------------------


def test_what_is_given_wins_over_the_models_own() -> None:
    config = GenerationConfig(eos_token_id=[3, 4], max_new_tokens=9, do_sample=True, temperature=0.3, top_k=5)
    own = generation_options(byte_tokenizer(), config)
    assert (own.eos_token_id, own.max_new_tokens) == ((3, 4), 9)
    assert isinstance(own.sampler, Sampled)
    given = generation_options(byte_tokenizer(), config, eos_token_id=7, max_new_tokens=2, temperature=0.8, seed=5)
    assert (given.eos_token_id, given.max_new_tokens) == ((7,), 2)
    assert isinstance(given.sampler, Sampled)
    assert (given.sampler.temperature, given.sampler.top_k, given.sampler.seed) == (0.8, 5, 5)
    assert isinstance(generation_options(byte_tokenizer(), config, do_sample=False).sampler, Greedy)
    greedy = Greedy()
    assert generation_options(byte_tokenizer(), config, sampler=greedy).sampler is greedy
    assert generation_options(byte_tokenizer(), None).eos_token_id == (0,)  # the tokenizer's
    assert generation_options(byte_tokenizer(), config, eos_token_id=[]).eos_token_id == ()
    assert generation_options(None, None).eos_token_id == ()


@pytest.mark.parametrize(
    ("own", "given", "room"),
    [
        ({}, {}, 64),
        ({"max_new_tokens": 9}, {}, 9),
        ({"max_length": 30}, {}, 20),
        ({"max_length": 30, "max_new_tokens": 25}, {}, 25),  # as transformers: new tokens win
        ({"max_length": 30}, {"max_new_tokens": 25}, 25),
        ({"max_new_tokens": 9}, {"max_length": 30}, 20),
        ({"max_new_tokens": 999}, {}, 90),  # to the end of the context
        ({}, {"max_length": 999}, 90),
        ({}, {"max_new_tokens": 999}, 999),  # asked for, so the decoder refuses it
    ],
)
def test_how_many_tokens_fit_behind_ten_in_a_context_of_a_hundred(
    own: dict[str, Any], given: dict[str, Any], room: int
) -> None:
    assert generation_options(None, GenerationConfig(**own), **given).room(10, 100) == room


def test_a_prompt_as_long_as_max_length_is_refused() -> None:
    with pytest.raises(UserError, match="The prompt has 10 tokens, and max_length is 10"):
        generation_options(None, None, max_length=10).room(10, 100)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_new_token": 3}, "no generation option max_new_token. Did you mean max_new_tokens"),
        ({"max_new_tokens": 3, "max_length": 9}, "limit the same"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many' was given; wanted: a whole number"),
        ({"max_new_tokens": True}, "wanted: a whole number"),
        ({"max_new_tokens": 2.0}, "wanted: a whole number"),
        ({"temperature": "hot"}, "temperature='hot' was given; wanted: a number"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": float("nan")}, "above 0"),
        ({"top_k": -1}, "at least 1"),
        ({"top_p": 1.5}, r"\(0, 1\]"),
        ({"do_sample": "yes"}, "wanted: true or false"),
        ({"eos_token_id": "</s>"}, "wanted: a token id, or a list"),
        ({"eos_token_id": [2, -1]}, "wanted: a token id, or a list"),
        ({"eos_token_id": True}, "wanted: a token id, or a list"),
        ({"stop_strings": ""}, "not empty"),
        ({"stop_strings": ["a", 3]}, "one or more strings"),
        ({"do_sample": False, "temperature": 0.5, "top_k": 3}, "temperature and top_k would change nothing"),
        ({"seed": 3}, "seed would change nothing, because do_sample is off"),
        ({"sampler": Greedy(), "temperature": 0.5}, "A sampler was given beside temperature"),
        ({"sampler": Sampled(1.0), "do_sample": True}, "A sampler was given beside do_sample"),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        generation_options(byte_tokenizer(), None, **given)


def test_a_damaged_entry_of_the_model_is_told_as_the_models() -> None:
    config = GenerationConfig()
    config.eos_token_id = "</s>"  # type: ignore[assignment]
    with pytest.raises(UserError, match="eos_token_id='</s>' stands in the model's generation_config"):
        generation_options(None, config)


def test_a_prompt_and_an_answer_that_do_not_fit_the_context_are_refused() -> None:
    engine: Engine = dynamax.load(LLAMA, device="cpu")
    with pytest.raises(UserError, match="context holds 512"):
        engine.generate(FRANCE, max_new_tokens=600)
