"""The page in headless Chromium, against the real HTTP application with made-up scores: what it shows, what it never runs, keys alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from tests.helpers.chromium import Chromium
from tests.helpers.page_service import ATTRIBUTES, CANARY, CRITIC, CURRENT, STEPS, PageService, as_pasted, reward_of

PROMPT = "My sourdough came out flat. Why?"
GOOD = "First look at the starter, because it must double within six hours. If it does not, feed it twice a day."
POOR = "Baking is hard!"
EVIL = "</script><img src=x onerror=window.hacked=1><svg onload=window.hacked=1>"


@pytest.fixture(scope="module")
def service() -> Iterator[PageService]:
    with PageService() as running:
        yield running


@pytest.fixture(scope="module")
def window(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(chromium, tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def browser(window: Chromium, service: PageService) -> Iterator[Chromium]:
    window.size(1400, 1000)
    window.prefer("light")
    yield window
    window.evaluate("localStorage.clear(), sessionStorage.clear()")


@pytest.fixture
def page(browser: Chromium, service: PageService) -> Chromium:
    """The page, with its models and the service's state on it."""
    browser.open(service.url)
    browser.wait_for("document.querySelector('#live .version') && document.getElementById('model')")
    return browser


def _write(page: Chromium, prompt: str, *completions: str) -> None:
    texts = json.dumps(completions)
    page.evaluate(f"document.getElementById('prompt').value = {json.dumps(prompt)}")
    page.evaluate(
        f"{texts}.forEach((text, index) => {{ const areas = () => document.querySelectorAll('#completions textarea');"
        " while (areas().length <= index) document.getElementById('add').click(); areas()[index].value = text; })"
    )


def _score(page: Chromium, *, shows: str = "document.querySelector('.result')") -> None:
    page.press("Enter", ctrl=True)
    page.wait_for(f"!document.getElementById('score').disabled && {shows}")


def _choose(page: Chromium, model: str) -> None:
    page.evaluate(f"(() => {{ const m = document.getElementById('model'); m.value = '{model}'; m.dispatchEvent(new Event('change')); }})()")


def _texts(page: Chromium, selector: str) -> list[str]:
    found: list[str] = page.evaluate(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")
    return found


def _number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def test_rewards_bars_chances_and_the_trace(page: Chromium, service: PageService) -> None:
    _write(page, PROMPT, POOR, GOOD, "Maybe.")
    _score(page)
    rewards = {"A": reward_of(POOR), "B": reward_of(GOOD), "C": reward_of("Maybe.")}
    order = sorted(rewards, key=lambda letter: -rewards[letter])
    assert _texts(page, ".result .letter") == order
    assert [_number(text) for text in _texts(page, ".result .reward")] == pytest.approx([rewards[letter] for letter in order], abs=1e-3)

    # Bars begin at the mean of the reference set, 0.42, and all have one scale.
    widths = page.evaluate("[...document.querySelectorAll('.result .head .bar i')].map((bar) => parseFloat(bar.style.width))")
    distances = [abs(rewards[letter] - 0.42) for letter in order]
    assert [width / widths[0] for width in widths] == pytest.approx([distance / distances[0] for distance in distances], rel=1e-3)

    cells = _texts(page, ".wins td")
    expected = [100 / (1 + math.exp(rewards[other] - rewards[one])) for one in order for other in order if other != one]
    shown = [cell for cell in cells if cell]
    assert [cell.replace("\xa0%", "") for cell in shown] == [_percent(value) for value in expected]

    traced: list[str] = page.evaluate("[...document.querySelectorAll('.heat')].map((heat) => heat.textContent)")
    assert dict(zip(order, traced, strict=True)) == {"A": POOR, "B": GOOD, "C": "Maybe."}
    page.evaluate("document.querySelector('.heat').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown', bubbles: true }))")
    page.evaluate(
        "for (let i = 0; i < 99; i++) document.querySelector('.heat').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown' }))"
    )
    (readout,) = [text for text in _texts(page, ".legend span") if text.startswith("token ")]
    assert _number(readout.split("reward ")[1].split(" ·")[0]) == pytest.approx(rewards[order[0]], abs=1e-3), (
        "the last token's is the reward"
    )
    assert CURRENT in _texts(page, "#results code")
    assert page.problems() == []
    assert _outside(page, service) == []


def _percent(value: float) -> str:
    return "<1" if 0 < value < 0.5 else ">99" if value > 99.5 else str(math.floor(value + 0.5))


def _outside(page: Chromium, service: PageService) -> list[str]:
    asked = [message["params"]["request"]["url"] for message in page.messages if message.get("method") == "Network.requestWillBeSent"]
    assert any(url.endswith("/v1/score") for url in asked), "the requests were not seen"
    return [url for url in asked if not url.startswith((service.url, "data:"))]


def test_no_text_is_ever_markup(page: Chromium) -> None:
    _write(page, EVIL, EVIL, f"error:{EVIL}", f"{EVIL} twice")
    _score(page)
    assert len(_texts(page, ".result")) == 3
    _choose(page, CRITIC)
    _score(page, shows="document.querySelector('.critique')")
    # As if something had slipped into the markup after all: the content policy runs none of it.
    page.evaluate("document.getElementById('results').insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=1>')")
    page.evaluate("new Promise((done) => { const probe = new Image(); probe.onerror = done; probe.src = 'missing'; })")
    assert page.evaluate("window.hacked === undefined")
    assert page.evaluate("document.querySelectorAll('#results img, #results svg:not(.curve)').length") == 1, "only the one put there"


def test_what_models_of_other_kinds_add(page: Chromium) -> None:
    _write(page, PROMPT, GOOD, POOR)
    _choose(page, ATTRIBUTES)
    _score(page, shows="document.querySelector('.attributes')")
    names = _texts(page, ".result:first-of-type .attributes > span:not(.num)")
    assert names[:5] == ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    assert _texts(page, "#options label")[1].startswith("Weights")

    _choose(page, CRITIC)
    page.evaluate("document.getElementById('critiques').value = 3")
    _score(page, shows="document.querySelectorAll('.critique').length === 6")
    assert any(text.startswith("±") for text in _texts(page, ".facts .tag"))

    _choose(page, STEPS)
    _score(page, shows="document.querySelector('.steps')")
    # It cannot trace, says so of every item, and is asked again without.
    assert _texts(page, ".heat") == []
    assert _texts(page, ".wins td") == [], "probabilities of steps are no Bradley–Terry rewards"
    assert page.problems() == []


def test_one_completion_without_a_reward_leaves_the_others_theirs(page: Chromium) -> None:
    _write(page, PROMPT, GOOD, "error:too_long", POOR)
    _score(page)
    assert _texts(page, ".result .letter") == ["A", "C", "B"]
    assert len(_texts(page, ".result .reward")) == 2
    assert "9312 tokens" in _texts(page, ".result .error")[0]
    assert "too_long" in _texts(page, ".result .tag.warm")


def test_a_refused_request_says_why_and_what_to_do(page: Chromium) -> None:
    _write(page, PROMPT, GOOD, "overload")
    _score(page, shows="!document.getElementById('problem').hidden")
    (problem,) = _texts(page, "#problem")
    assert "41,200 tokens wait" in problem
    assert "send less at once" in problem
    assert "429" in problem
    assert page.evaluate("document.getElementById('results').classList.contains('stale')"), "what stands below is of another request"
    _write(page, PROMPT, GOOD, POOR)
    _score(page)
    assert page.evaluate("document.getElementById('problem').hidden")
    assert not page.evaluate("document.getElementById('results').classList.contains('stale')")


def test_keys_alone(page: Chromium) -> None:
    page.press("/")
    page.type(PROMPT)
    page.press("Escape")
    page.press("1")
    page.type(GOOD)
    page.press("Escape")
    page.press("n")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Completion C"
    page.type(POOR)
    _score(page)
    assert _texts(page, ".result .letter") == ["A", "C"]
    page.press("Escape")
    page.press("r")
    assert page.evaluate("document.activeElement.classList.contains('result')")
    before = page.evaluate("document.querySelector('.heat span:nth-child(4)').style.background")
    page.press("m")
    assert page.evaluate("document.querySelector('.heat span:nth-child(4)').style.background") != before
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    page.press("?")
    assert page.evaluate("document.getElementById('shortcuts').open")
    page.press("n")
    assert len(_texts(page, ".completion")) == 3, "a dialog is open"


def test_an_item_can_be_pasted_whole(page: Chromium) -> None:
    paste = (
        "(() => {{ const given = new DataTransfer(); given.setData('text/plain', {text}); document.getElementById('prompt')"
        ".dispatchEvent(new ClipboardEvent('paste', {{ clipboardData: given, bubbles: true, cancelable: true }})); }})()"
    )
    page.evaluate(paste.format(text=json.dumps(as_pasted(PROMPT, [GOOD, POOR, "C"]))))
    assert page.evaluate("document.getElementById('prompt').value") == PROMPT
    assert page.evaluate("[...document.querySelectorAll('#completions textarea')].map((area) => area.value)") == [GOOD, POOR, "C"]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    page.evaluate(paste.format(text=json.dumps(json.dumps({"prompt": turns, "chosen": GOOD, "rejected": POOR}))))
    assert _texts(page, "#kind") == ["2 messages"]
    _score(page)
    sent = [message["params"]["request"] for message in page.messages if message.get("method") == "Network.requestWillBeSent"]
    (body,) = [json.loads(request["postData"]) for request in sent if request["url"].endswith("/v1/score")]
    assert [item["prompt"] for item in body["items"]] == [turns, turns]
    assert [item["completions"] for item in body["items"]] == [[GOOD], [POOR]]


def test_a_pinned_version_answers(page: Chromium) -> None:
    _write(page, PROMPT, GOOD)
    page.evaluate(f"document.getElementById('version').value = '{CANARY}'")
    _score(page)
    assert CANARY in _texts(page, "#results code")


def _wait_for_news(page: Chromium) -> None:
    shown = json.dumps(_texts(page, ".big b"), separators=(",", ":"), ensure_ascii=False)
    page.wait_for(f"JSON.stringify([...document.querySelectorAll('.big b')].map((b) => b.textContent)) !== {json.dumps(shown)}")


def test_the_service_is_shown_as_it_stands(page: Chromium) -> None:
    assert _texts(page, "#health span") == ["4 of 4 models up · 10 replicas · 1 failed"]
    assert _texts(page, "#live .version code")[:3] == [CURRENT, CANARY, "0c55aa91e3f7"]
    tags = _texts(page, "#live .version .tag")
    assert {"current 90\xa0%", "canary 10\xa0%", "failed", "drifted"} <= set(tags)
    _wait_for_news(page)


def test_another_model_is_chosen_beside(page: Chromium) -> None:
    assert _texts(page, ".other button") == [ATTRIBUTES, CRITIC, STEPS]
    page.evaluate("document.querySelectorAll('.other button')[1].focus()")
    _wait_for_news(page)
    assert page.evaluate("document.activeElement.textContent") == CRITIC, "news do not take the focus away"
    page.evaluate("document.querySelector('.other button').click()")
    assert page.evaluate("document.getElementById('model').value") == ATTRIBUTES
    assert "helpfulness, correctness" in _texts(page, ".card dd")[1]


def test_without_the_manager_scoring_goes_on(page: Chromium, service: PageService) -> None:
    service.manager.away = True
    try:
        page.wait_for("document.getElementById('health').classList.contains('down')")
        assert "does not answer" in _texts(page, "#health span")[0]
        _write(page, PROMPT, GOOD)
        _score(page)
        assert len(_texts(page, ".result .reward")) == 1
    finally:
        service.manager.away = False
    page.wait_for("document.getElementById('health').classList.contains('up')")


def test_a_service_with_keys_asks_for_one(browser: Chromium) -> None:
    key = "sk-0123456789abcdef"
    with PageService(keys=f"ppo:{key}") as service:
        browser.open(service.url)
        browser.wait_for("document.getElementById('keys').open")
        browser.evaluate("document.getElementById('secret').focus()")
        browser.type("not-the-right-key")
        browser.press("Enter")
        browser.wait_for("!document.getElementById('keys').open")
        _write(browser, PROMPT, GOOD)
        browser.press("Enter", ctrl=True)
        browser.wait_for("!document.getElementById('problem').hidden && document.getElementById('keys').open")
        browser.evaluate("document.getElementById('secret').focus()")
        browser.type(key)
        browser.press("Enter")
        browser.wait_for("document.querySelector('#live .version')")
        _score(browser)
        assert len(_texts(browser, ".result .reward")) == 1
        assert browser.evaluate("location.href") == service.url
        assert browser.evaluate("JSON.stringify(localStorage)").find(key) < 0
        assert key not in browser.evaluate("document.documentElement.outerHTML")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(page: Chromium, scheme: str) -> None:
    page.prefer(scheme)
    page.wait_for(f"document.documentElement.dataset.theme === '{scheme}'")
    _write(page, PROMPT, GOOD, POOR, "error:too_long")
    _score(page)
    assert page.evaluate(CONTRASTS) == [], "contrasts below 4.5"


@pytest.mark.parametrize("width", [360, 768, 1100, 1400])
def test_nothing_runs_over_the_edge(page: Chromium, width: int) -> None:
    page.size(width, 900)
    _write(page, "word" * 300, GOOD * 20, "x" * 3000, "error:too_long", *["Short."] * 8)
    _score(page, shows="document.querySelectorAll('.result').length === 11")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    over: list[Any] = page.evaluate(
        "[...document.querySelectorAll('main *')].filter((node) => !node.closest('.scroll, svg, .sr, select') &&"
        f" node.getBoundingClientRect().right > {width} + 1).map((node) => node.className)"
    )
    assert over == []


CONTRASTS = """
(() => {
  const parse = (color) => {
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => top.slice(0, 3).map((part, index) => part * top[3] + under[index] * (1 - top[3]));
  const light = (color) => color.map((part) => { const c = part / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; })
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const under = (node) => {
    if (!node) return [255, 255, 255];
    const own = parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, under(node.parentElement));
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !node.checkVisibility() || node.closest('script, style, .sr, .skip, button:disabled, option')) continue;
    const back = under(node);
    const [a, b] = [light(over(parse(getComputedStyle(node).color), back)), light(back)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push(`${node.tagName}.${node.className} ${text.slice(0, 20)} ${contrast.toFixed(2)}`);
  }
  return [...new Set(found)];
})()
"""
