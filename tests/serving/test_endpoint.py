"""The endpoint by OpenAI's own client, and the page in a browser."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx2
import openai
import pytest
import uvicorn

from dynamax.decoding.base import Decoder
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.policies import MaxProb, Never, OnlyAt
from dynamax.serving.answers import Answerer, Ended, Piece
from dynamax.serving.edge import Collaborative
from dynamax.serving.endpoint import endpoint
from dynamax.serving.link import Link
from dynamax.stream import Stream
from tests.report.browser import CHROMIUM, Browser
from tests.serving.house import cloud, edge_part, link, whole

JSON = {"content-type": "application/json"}
QUESTION = "What is the capital of France?"
TURNS = [{"role": "user", "content": QUESTION}]


@contextmanager
def served(answerer: Answerer, tokens: tuple[str, ...] = (), to: Link | None = None) -> Iterator[str]:
    """An endpoint that listens, by its address."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(endpoint(answerer, tokens, to), port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A whole model, at full depth."""
    with served(Answerer(whole("llama"), "sibling")) as found:
        yield found


def client(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def test_models_and_health(address: str) -> None:
    assert [model.id for model in client(address).models.list()] == ["sibling"]
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_the_engines_answer(address: str, stream: bool) -> None:
    wanted = whole("llama").generate(QUESTION, max_new_tokens=24)
    asked = {"model": "sibling", "messages": TURNS, "max_tokens": 24, "temperature": 0}
    if stream:
        chunks = list(
            client(address).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        reason, usage = reasons[-1], chunks[-1].usage
        assert set(reasons[:-1]) == {None}
    else:
        found = client(address).chat.completions.create(**asked)
        text, reason, usage = found.choices[0].message.content, found.choices[0].finish_reason, found.usage
    assert text == wanted.text
    assert reason == ("length" if wanted.finish_reason == "length" else "stop")
    assert usage.completion_tokens == len(wanted.tokens)
    assert usage.total_tokens == usage.prompt_tokens + len(wanted.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_goes_on_without_a_template(address: str, stream: bool) -> None:
    wanted = whole("llama").generate("Once upon a time", chat=False, max_new_tokens=12, stop_strings=["."])
    asked = {"model": "sibling", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "stop": "."}
    found = client(address).completions.create(**asked, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text
    assert text == wanted.text


@pytest.mark.slow
def test_chance_goes_by_the_seed(address: str) -> None:
    asked = {"model": "sibling", "messages": TURNS, "max_tokens": 16, "temperature": 1.5, "top_p": 0.9}
    said = [
        client(address).chat.completions.create(**asked, seed=seed).choices[0].message.content
        for seed in (1, 1, 2, 3, 4)
    ]
    assert said[0] == said[1]
    assert len(set(said)) > 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "gpt-4"}, "There is no model 'gpt-4'"),
        ({"n": 2}, "n is not followed"),
        ({"logprobs": True}, "logprobs is not followed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not followed"),
        ({"response_format": {"type": "json_object"}}, "response_format is not followed"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not followed"),
        ({"extra_body": {"beam_width": 3}}, "beam_width is not followed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "the context holds"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "give one of them"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"stop": ""}, "stop_strings"),
    ],
)
def test_what_is_not_followed_is_refused(address: str, change: dict[str, object], told: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client(address).chat.completions.create(**{"model": "sibling", "messages": TURNS, "max_tokens": 4} | change)
    assert refused.value.status_code in (400, 404)
    assert told in str(refused.value)


def test_fields_that_change_nothing_are_taken(address: str) -> None:
    harmless = {"n": 1, "frequency_penalty": 0, "logprobs": False, "user": "me", "response_format": {"type": "text"}}
    found = client(address).chat.completions.create(model="sibling", messages=TURNS, max_tokens=2, **harmless)
    assert found.usage.completion_tokens <= 2
    for seed in ({"seed": 1}, {"seed": 2, "temperature": 0}):
        same = client(address).chat.completions.create(model="sibling", messages=TURNS, max_tokens=2, **seed)
        assert same.choices[0].message.content == found.choices[0].message.content


def test_a_turn_may_come_in_parts_of_text(address: str) -> None:
    parts = [{"type": "text", "text": QUESTION[:9]}, {"type": "text", "text": QUESTION[9:]}]
    asked = {"model": "sibling", "max_tokens": 8}
    one, other = (
        client(address).chat.completions.create(messages=[{"role": "user", "content": content}], **asked)
        for content in (QUESTION, parts)
    )
    assert one.choices[0].message.content == other.choices[0].message.content


def test_what_is_not_there_is_said_in_the_words_of_the_protocol(address: str) -> None:
    assert client(address).models.retrieve("sibling").id == "sibling"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        client(address).models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match=r"POST /v1/embeddings: Not Found. Here are /v1/chat/completions"):
        client(address).embeddings.create(model="sibling", input="x")
    refused = httpx2.post(f"{address}/v1/chat/completions", content=b"no JSON", headers=JSON)
    assert refused.json()["error"]["message"].startswith("The request: JSON decode error")


def test_the_health_of_an_edge_tells_of_its_cloud() -> None:
    backbone, exits, _ = edge_part("llama")
    engine = Engine(backbone, whole("llama").tokenizer, exits, whole("llama").generation_config)
    with cloud("llama") as server, link("llama", server.port) as there, link("llama", 1) as gone:
        for connection, told in ((there, "ok"), (gone, "nothing listens there")):
            answerer = Answerer(engine, "edge", Never(), partial(Collaborative, link=connection), greedy=True)
            with served(answerer, to=connection) as address:
                found = httpx2.get(f"{address}/health").json()
                assert found["status"] == "ok"
                assert told in found["cloud"]


def test_a_wrong_key_is_refused() -> None:
    with served(Answerer(whole("llama"), "sibling"), ("secret",)) as address:
        for call in (
            lambda: client(address, "other").models.list(),
            lambda: client(address, "other").chat.completions.create(model="sibling", messages=TURNS),
        ):
            with pytest.raises(openai.AuthenticationError, match="give it as the API key"):
                call()
        assert client(address, "secret").models.list().data[0].id == "sibling"


def test_too_many_at_once_are_told_to_come_again() -> None:
    answerer = Answerer(whole("llama"), "sibling", waiting=0)
    with (
        served(answerer) as address,
        answerer.turn(),
        pytest.raises(openai.RateLimitError, match="wait for their turn"),
    ):
        client(address).chat.completions.create(model="sibling", messages=TURNS, max_tokens=2)


def test_a_caller_that_goes_away_does_not_hold_the_others_up() -> None:
    with served(Answerer(whole("llama"), "sibling")) as address:
        stream = client(address).chat.completions.create(model="sibling", messages=TURNS, max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
        found = client(address).chat.completions.create(model="sibling", messages=TURNS, max_tokens=2, temperature=0)
        assert found.usage.completion_tokens == 2


class Slow(Answerer):
    """Takes its time, and counts its tokens."""

    made = 0

    def pieces(self, stream: Stream, decoder: Decoder, ended: Ended) -> Iterator[Piece]:
        for piece in super().pieces(stream, decoder, ended):
            time.sleep(0.05)
            self.made += 1
            yield piece


@pytest.mark.slow
def test_a_caller_that_waits_no_longer_ends_a_whole_answer_too() -> None:
    answerer = Slow(whole("llama"), "sibling")
    asked = {"model": "sibling", "messages": TURNS, "stop": None, "temperature": 0}
    with served(answerer) as address:
        long = len(list(answerer.pieces(*answerer.prepared(QUESTION, chat=None, options={"do_sample": False}))))
        answerer.made = 0
        with pytest.raises(openai.APITimeoutError):
            client(address).with_options(timeout=0.3).chat.completions.create(**asked)
        found = client(address).chat.completions.create(**asked, max_tokens=2)
        assert found.usage.completion_tokens == 2
        assert answerer.made < long


def test_a_body_that_is_too_long_or_says_no_length_is_not_read() -> None:
    with served(Answerer(whole("llama"), "sibling"), ("secret",)) as address:
        place, head = f"{address}/v1/chat/completions", {"authorization": "Bearer secret"}
        assert httpx2.post(place, content=b"x" * 2_000_000, headers=head).status_code == 413
        assert httpx2.post(place, content=iter([b"{", b"}"]), headers=head).status_code == 413
        assert httpx2.post(place, content=b"x" * 2_000_000).status_code == 401
        assert httpx2.post(place, content=b"{", headers=head).status_code == 400


def test_what_cannot_decode_is_refused_before_anybody_asks() -> None:
    for options in ({"waiting": -1}, {"waiting": 99}, {"policy": OnlyAt(MaxProb(0.5), [3])}):
        with pytest.raises(UserError):
            Answerer(whole("llama"), "sibling", **options)


@contextmanager
def edge(policy: MaxProb | Never, **options: float) -> Iterator[Answerer]:
    backbone, exits, _ = edge_part("llama")
    engine = Engine(backbone, whole("llama").tokenizer, exits, whole("llama").generation_config)
    with cloud("llama") as server, link("llama", server.port, **options) as connection:
        yield Answerer(engine, "edge", policy, partial(Collaborative, link=connection), greedy=True)


@pytest.mark.slow
def test_an_edge_says_where_each_token_came_from() -> None:
    wanted = whole("llama").generate(QUESTION, policy=MaxProb(0.8), max_new_tokens=24)
    with edge(MaxProb(0.8)) as answerer, served(answerer) as address:
        found = client(address).chat.completions.create(model="edge", messages=TURNS, max_tokens=24, temperature=0)
        pieces = found.model_extra["dynamax"]
        assert found.choices[0].message.content == wanted.text
        assert [piece["depth"] for piece in pieces][: len(wanted.depths)] == wanted.depths
        assert [piece["origin"] for piece in pieces][: len(wanted.depths)] == [
            "cloud" if depth == 8 else "exit" for depth in wanted.depths
        ]
        again = client(address).chat.completions.create(model="edge", messages=TURNS, max_tokens=24)
        assert again.choices[0].message.content == wanted.text  # greedy unless asked otherwise
        seeded = client(address).chat.completions.create(model="edge", messages=TURNS, max_tokens=24, seed=3)
        assert seeded.choices[0].message.content == wanted.text  # the same for every seed
        for chance in ({"temperature": 1}, {"temperature": 0.2}, {"top_p": 0.9}):
            with pytest.raises(openai.BadRequestError, match="asks a cloud, which gives the most likely token"):
                client(address).chat.completions.create(model="edge", messages=TURNS, max_tokens=4, **chance)


def test_a_cloud_that_is_gone_is_said() -> None:
    backbone, exits, _ = edge_part("llama")
    engine = Engine(backbone, whole("llama").tokenizer, exits, whole("llama").generation_config)
    with link("llama", 1, timeout=0.3) as connection:
        answerer = Answerer(engine, "edge", Never(), partial(Collaborative, link=connection))
        with served(answerer) as address:
            for stream in (False, True):
                with pytest.raises(openai.APIError, match="did not answer within 0.3 s: nothing listens"):
                    list(client(address).chat.completions.create(model="edge", messages=TURNS, stream=stream))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_the_page_chats_and_colours_tokens(tmp_path: Path) -> None:
    with edge(MaxProb(0.8)) as answerer, served(answerer) as address, Browser(tmp_path / "profile") as browser:
        browser.open(f"{address}/")
        browser.evaluate(f"at('text').value = {QUESTION!r}; at('form').requestSubmit()")
        wait(browser, "document.querySelector('.facts') !== null")
        origins = browser.evaluate("[...document.querySelectorAll('.token')].map(each => each.className.split(' ')[1])")
        text = browser.evaluate("[...document.querySelectorAll('.token')].map(each => each.textContent).join('')")
        assert browser.errors == []
        assert {"cloud", "exit"} <= set(origins)
        assert text.strip() in whole("llama").generate(QUESTION, policy=MaxProb(0.8), max_new_tokens=256).text
        assert all(each.startswith((address, "data:")) for each in browser.asked)
        for turn in range(2, 5):  # with 256 tokens for each answer, the context of 512 is full at the third
            browser.evaluate("at('text').value = 'And " + "of all the towns in Spain and Portugal, " * 6 + "?'; 0")
            browser.evaluate("at('form').requestSubmit()")
            wait(browser, f"document.querySelectorAll('.facts').length === {turn}")
        assert "earliest turns are left out" in browser.evaluate("at('turns').textContent")
        browser.evaluate("at('new').click()")
        assert browser.evaluate("turns.length + at('turns').children.length") == 0
        assert all("400 (Bad Request)" in error for error in browser.errors)  # a browser notes what was refused


def wait(browser: Browser, condition: str) -> None:
    for _ in range(400):
        if browser.evaluate(condition):
            return
        time.sleep(0.05)
    raise AssertionError(condition)
