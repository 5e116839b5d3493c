"""Small folders with odd rules, tokenizers and templates: what comes out is what transformers' ``generate`` says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import dynamax
from dynamax import UserError
from dynamax.data.fill import tokenizer_hash
from dynamax.data.generated import SelfGenerated
from dynamax.generation import DAY
from tests.folders import byte_tokenizer
from tests.tiny import tiny

LIMIT = 24
PROMPT = "What is the capital of France?"
TURNS = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hello <end> there"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": PROMPT},
]


# -- tokenizers ------------------------------------------------------------------------------------------


def framed(before: str, after: str = "") -> PreTrainedTokenizerFast:
    """One token a byte, between special tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>", "additional_special_tokens": ["<sep>"]})
    names = [name for name in (*before.split(), *after.split()) if name != "$A"]
    single = " ".join([*before.split(), "$A", *after.split()])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    return tokenizer


def lowered() -> PreTrainedTokenizerFast:
    """A normaliser that changes the text, and a token that is not special in the middle of words."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_tokens([AddedToken("capital", single_word=False, normalized=True)])
    return tokenizer


def pieces() -> PreTrainedTokenizerFast:
    """Unigram with a metaspace, as Llama 2 and Gemma have it."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.<>|:{}'0123456789"
    vocab = [("<unk>", 0.0), ("<end>", 0.0), *((letter, -4.0) for letter in letters), ("▁the", -1.0), ("ap", -2.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


def words() -> PreTrainedTokenizerFast:
    """Words, with one for all unknown ones and no end."""
    names = ["<unk>", "What", "is", "the", "capital", "of", "France", "?", *(f"w{number}" for number in range(40))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


# -- folders ---------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A folder: its rules, where ``END`` stands for the fifth token that the plain model says, and ``LATE`` the ninth.

    ``asked`` are options over the rules, given to both. The tokenizer puts so many tokens ``behind`` a text; an answer
    does not go on behind them.
    """

    rules: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[], PreTrainedTokenizerFast] = byte_tokenizer
    template: Any = None
    asked: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": LIMIT})
    family: str = "llama"
    in_config: bool = False
    behind: int = 0


END, LATE = "<the fifth token>", "<the ninth token>"
FIRST = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
CASES: dict[str, Case] = {
    "no end": Case(),
    "one end": Case({"eos_token_id": END}),
    "two ends": Case({"eos_token_id": [LATE, END]}),
    "two ends, twice": Case({"eos_token_id": [END, END]}),
    "an end that never comes": Case({"eos_token_id": [256]}),
    "the end is the padding": Case({"eos_token_id": END, "pad_token_id": END}),
    "the end stands in config.json": Case({"eos_token_id": END}, in_config=True),
    "two ends in config.json": Case({"eos_token_id": [LATE, END]}, in_config=True),
    "a recurrent model": Case({"eos_token_id": [END]}, family="mamba2"),
    "a hybrid": Case({"eos_token_id": [END]}, family="bamba"),
    "windows": Case({"eos_token_id": LATE}, family="mistral"),
    "softcaps": Case({"eos_token_id": LATE}, family="gemma2"),
    "a limit of the model": Case({"max_new_tokens": 7}, asked={}),
    "a limit with the prompt": Case({"max_length": 60}, asked={}),
    "both limits": Case({"max_length": 60, "max_new_tokens": 5}, asked={}),
    "a limit over the model's": Case({"max_length": 60, "max_new_tokens": 5}, asked={"max_new_tokens": 11}),
    "another end asked for": Case({"eos_token_id": LATE}, asked={"eos_token_id": END, "max_new_tokens": LIMIT}),
    "penalties that are none": Case(
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1, "eos_token_id": LATE}
    ),
    "sampling of one": Case({"do_sample": True, "top_k": 1, "temperature": 3.0}),
    "sampling of a sliver": Case({"do_sample": True, "top_k": 0, "top_p": 1e-6}),
    "sampling cold": Case({"do_sample": True, "temperature": 1e-5, "top_k": 50}),
    "sampling switched off": Case(
        {"do_sample": True, "temperature": 9.0}, asked={"do_sample": False, "max_new_tokens": 9}
    ),
    "options of sampling without it": Case({"temperature": 0.1, "top_p": 0.3, "do_sample": False}),
    "begin": Case({"eos_token_id": LATE}, lambda: framed("<begin>")),
    "two begins": Case({"eos_token_id": LATE}, lambda: framed("<begin> <sep>")),
    "begin and end": Case({"eos_token_id": LATE}, lambda: framed("<begin>", "<end>"), behind=1),
    "two ends behind the prompt": Case(tokenizer=lambda: framed("", "<sep> <end>"), behind=2),
    "a normaliser": Case({"eos_token_id": LATE}, lowered),
    "a metaspace": Case({"eos_token_id": END}, pieces),
    "words": Case(tokenizer=words),
    "a template": Case({"eos_token_id": LATE}, template=FIRST + "{% if add_generation_prompt %}[assistant]{% endif %}"),
    "a template with the begin": Case(tokenizer=lambda: framed("<begin>"), template="{{ bos_token }}" + FIRST),
    "a template that ends turns": Case(template=FIRST.replace("\n", "{{ eos_token }}\n") + "[assistant]"),
    "a template of only the last turn": Case(template="{{ messages[-1].content | trim }}:"),
    "a template with a set and a loop": Case(
        template="{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
        "{{ ns.n }}{{ m['content'] | upper }}{%- endfor -%}"
    ),
    "several templates": Case(template={"default": FIRST, "tool_use": "{{ tools }}"}),
    "a template that knows the day": Case(template="{{ strftime_now('%Y') }} " + FIRST),
    "a template and begin and end": Case(tokenizer=lambda: framed("<begin>", "<end>"), template=FIRST + "[assistant]"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model without rules, made once for each family."""
    made: dict[str, Path] = {}

    def one(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family, dtype=torch.float32, depth=4, vocab=264).save_pretrained(made[family])
        return made[family]

    return one


def theirs(folder: Path, prompt: Any, asked: dict[str, Any], *, cut: int) -> list[int]:  # noqa: ANN401
    """The tokens of transformers' ``generate``; of the prompt's, the last ``cut`` are left out."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if tokenizer.chat_template is None:
        ids = tokenizer(prompt)["input_ids"]
        ids = ids[: len(ids) - cut]
    else:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt_1T = torch.tensor([ids])
    extra = {"tokenizer": tokenizer} if model.generation_config.stop_strings else {}
    told_1T = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), **asked, **extra)
    return told_1T[0, len(ids) :].tolist()


def without_rules(case: Case, source: Path, folder: Path) -> Path:
    """The folder of a case, with its tokenizer and without its rules."""
    shutil.copytree(source, folder)
    tokenizer = case.tokenizer()
    tokenizer.chat_template = case.template
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


ASKED = [(name, PROMPT) for name in CASES] + [(name, TURNS) for name, case in CASES.items() if case.template]


@pytest.mark.parametrize(
    ("name", "chat"),
    ASKED,
    ids=lambda value: value if value is not PROMPT and isinstance(value, str) else type(value).__name__,
)
def test_tokens_are_those_of_generate(name: str, chat: Any, plain: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES[name]
    folder = without_rules(case, plain(case.family), tmp_path / "m")
    free = theirs(folder, chat, {"max_new_tokens": LIMIT, "eos_token_id": None}, cut=case.behind)
    assert len(free) == LIMIT
    said = {END: free[4], LATE: free[8]}

    def filled(value: Any) -> Any:  # noqa: ANN401
        return [said.get(each, each) for each in value] if isinstance(value, list) else said.get(value, value)

    rules = {key: filled(value) for key, value in case.rules.items()}
    asked = {key: filled(value) for key, value in case.asked.items()}
    if case.in_config:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.update(rules)
        model.config.save_pretrained(folder)
    elif rules:
        (folder / "generation_config.json").write_text(json.dumps(rules))
    wanted = theirs(folder, chat, asked, cut=case.behind)
    engine = dynamax.load(folder, device="cpu")
    if rules.get("eos_token_id") is None and "eos_token_id" not in asked:
        asked = {**asked, "eos_token_id": []}  # the tokenizer's end token ends an answer here, and none there
    found = engine.generate(chat, **asked)
    assert found.tokens == wanted


def test_stop_strings_of_the_model_are_obeyed_and_cut(plain: Callable[[str], Path], tmp_path: Path) -> None:
    folder = without_rules(Case(), plain("llama"), tmp_path / "m")
    engine = dynamax.load(folder, device="cpu")
    whole = engine.generate(PROMPT, max_new_tokens=LIMIT, eos_token_id=[]).text
    stop = whole[5:8]
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": ["never said", stop]}))
    told = AutoTokenizer.from_pretrained(folder).decode(theirs(folder, PROMPT, {"max_new_tokens": LIMIT}, cut=0))
    found = dynamax.load(folder, device="cpu").generate(PROMPT, max_new_tokens=LIMIT, eos_token_id=[])
    assert found.text == told[: told.index(stop)]


def test_the_end_of_the_tokenizer_counts_where_no_rule_names_one(plain: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers' ``generate`` goes on to its limit there."""
    folder = without_rules(Case(), plain("llama"), tmp_path / "m")
    free = theirs(folder, PROMPT, {"max_new_tokens": LIMIT}, cut=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[4])
    tokenizer.save_pretrained(folder)
    assert dynamax.load(folder, device="cpu").generate(PROMPT).tokens == free[:5]


def test_a_template_that_writes_half_a_character_is_told(plain: Callable[[str], Path], tmp_path: Path) -> None:
    folder = without_rules(Case(template="{{ '\\ud83d' }}"), plain("llama"), tmp_path / "m")
    with pytest.raises(UserError, match="writes part of a character"):
        dynamax.load(folder, device="cpu").generate(PROMPT)


# -- the day, and what else shapes a prompt -----------------------------------------------------------------


def test_prompts_that_are_kept_or_scored_are_the_same_every_day(
    plain: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = Case(template="{{ strftime_now('%d %B %Y, %A') }} " + FIRST)
    engine = dynamax.load(without_rules(dated, plain("llama"), tmp_path / "m"), device="cpu")
    assert engine.tokenizer is not None

    def text(**options: Any) -> str:  # noqa: ANN401
        return engine.tokenizer.decode(engine.encode(PROMPT, **options)[0])

    assert text(day=DAY).startswith("26 July 2024, Friday [user]")
    assert text(day=date(2031, 1, 2)).startswith("02 January 2031, Thursday")
    assert text().startswith(f"{date.today():%d %B %Y}")  # whoever asks now is told the day
    (first, *_) = SelfGenerated(questions=1, passages=0, documents=1, max_new_tokens=2).groups(engine)
    assert engine.tokenizer.decode(first[0].tokens).startswith("26 July 2024")


CHANGES: dict[str, Callable[[PreTrainedTokenizerFast], None]] = {
    "normaliser": lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    "pre-tokenizer": lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(True)),
    "frame": lambda t: setattr(
        t.backend_tokenizer, "post_processor", processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 0)])
    ),
    "template": lambda t: setattr(t, "chat_template", FIRST),
    "special token": lambda t: t.add_special_tokens({"bos_token": "<begin>"}),
    "word": lambda t: t.add_tokens(["capital"]),
    "literal special tokens": lambda t: setattr(t, "split_special_tokens", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_shapes_tokens_is_in_the_identity_of_a_store(name: str) -> None:
    changed = byte_tokenizer()
    CHANGES[name](changed)
    assert tokenizer_hash(changed) != tokenizer_hash(byte_tokenizer())


def test_the_identity_of_a_tokenizer_outlasts_its_use_and_a_save(tmp_path: Path) -> None:
    used = byte_tokenizer()
    used(["one", "three"], padding=True, truncation=True, max_length=3)
    used.save_pretrained(tmp_path)
    assert (
        len({tokenizer_hash(each) for each in (byte_tokenizer(), used, AutoTokenizer.from_pretrained(tmp_path))}) == 1
    )
