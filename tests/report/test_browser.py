"""The page in a browser: no error on the console, nothing from the network, readable on a phone, usable by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamax.report.page import page
from dynamax.report.read import read_runs
from tests.report.browser import CHROMIUM, Browser
from tests.report.made import report, run_folder

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A page of two runs: a long name and text that cannot be broken are among them."""
    wide = report()
    wide["answers"][0]["prompt"] = "<b>x</b>" + "W" * 300
    wide["answers"][0]["given"] = [
        {"policy": "Full", "threshold": None, "tokens": ["W" * 200, "<i>"], "depths": [6, 6]},
        {"policy": "MaxProb", "threshold": 0.5, "tokens": ["x"], "depths": [6]},
        {"policy": "MaxProb", "threshold": 0.9, "tokens": ["y", "\n", "z"], "depths": [6, 2, 4]},
    ]
    wide["frontier"][1]["policy"] = "AllOf(" + ", ".join(["GateConfidence(MambaGate)"] * 5) + ")"
    folders = [run_folder(tmp_path / "one", wide), run_folder(tmp_path / ("two" * 25))]
    place = tmp_path / "page.html"
    place.write_text(page(read_runs([str(folder) for folder in folders]), "dynamax report"))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_no_error_nothing_from_the_network_no_overflow(browser: Browser, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width=width, dark=dark)
    assert browser.errors == []
    assert browser.asked == [file.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_can_be_read(browser: Browser, file: Path, dark: bool) -> None:
    """Contrast by WCAG 2: 4.5 for text on its background, 3 for curves on the page."""
    browser.open(file, dark=dark)
    measured = browser.evaluate(CONTRAST)
    assert len(measured) > 40
    assert [each for each in measured if each["ratio"] < each["least"]] == []


CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
      value => value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
  };
  const found = [];
  const add = (element, colour, least) => {
    const pair = [light(colour), light(behind(element))].sort((a, b) => b - a);
    found.push({what: element.outerHTML.slice(0, 80), ratio: (pair[0] + 0.05) / (pair[1] + 0.05), least});
  };
  const texts = "p, th, td, dd, dt, code, a, summary, figcaption, .tokens span, .missing *";
  for (const element of document.querySelectorAll(texts)) add(element, getComputedStyle(element).color, 4.5);
  for (const element of document.querySelectorAll("svg text")) add(element, getComputedStyle(element).fill, 4.5);
  for (const element of document.querySelectorAll("svg .curve")) add(element, getComputedStyle(element).stroke, 3);
  return found;
})()"""


@pytest.mark.slow
def test_answers_are_chosen_by_keyboard(browser: Browser, file: Path) -> None:
    browser.open(file)
    shown = "[...document.querySelectorAll('#answers-0 .answer:not([hidden]) h5')].map(each => each.textContent)"
    assert browser.evaluate(shown) == ["Full", "MaxProb at 0.5"]
    browser.evaluate("document.querySelector('select').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowDown", code="ArrowDown", windowsVirtualKeyCode=40)
    assert browser.evaluate(shown) == ["Full", "MaxProb at 0.9"]
    assert browser.evaluate("document.querySelectorAll('i').length") == 1, "the token without text; text is no element"


@pytest.mark.slow
def test_without_a_script_all_answers_are_there(browser: Browser, file: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(file)
    assert browser.evaluate("document.querySelectorAll('.answer[hidden]').length") == 0
    assert browser.evaluate("document.querySelector('.chooser').hidden") is True


@pytest.mark.slow
def test_the_browser_finds_what_it_looks_for(browser: Browser, tmp_path: Path) -> None:
    """A page with an error, something from the network and something too wide."""
    content = (
        '<!DOCTYPE html><div style="width:900px">x</div><img src="http://127.0.0.1:9/a.png"><script>nothing()</script>'
    )
    (tmp_path / "bad.html").write_text(content)
    browser.open(tmp_path / "bad.html", width=360)
    assert "http://127.0.0.1:9/a.png" in browser.asked
    assert any("nothing is not defined" in each for each in browser.errors)
    assert browser.evaluate("document.documentElement.scrollWidth") > 360


@pytest.mark.slow
def test_the_page_cannot_load_anything(browser: Browser, file: Path) -> None:
    """Its own policy stops what it might be made to load."""
    browser.open(file)
    browser.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/a.png'}))")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert any("Content Security Policy" in each for each in browser.errors)
