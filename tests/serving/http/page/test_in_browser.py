"""The page in a headless Chromium, with clicks and keys of a person's."""

import json
import re
from subprocess import PIPE

import pytest

from tests.support import browser as chromium
from tests.support.http_server import serving
from tests.support.process import QMIX, started

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(chromium.program() is None, reason="there is no Chromium"),
]
REPLY = "article.assistant .text"
DONE = "!document.querySelector('#send').disabled"


@pytest.fixture(scope="module")
def served():
    with serving() as served:
        yield served


@pytest.fixture
def page(served):
    with chromium.opened() as page:
        page.open(f"http://127.0.0.1:{served.port}/")
        page.until("document.querySelector('#model').innerText.includes('context')")
        page.evaluate("document.querySelector('#temperature').value = 0")
        yield page
        assert page.problems == []


def ask(page, text, tokens=8):
    page.evaluate(f"document.querySelector('#max_tokens').value = {tokens}")
    page.click("#message")
    page.type(text)
    page.click("#send")
    page.until(DONE)


def contents(page, selector):
    return page.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.textContent)"
    )


def completion(served, *messages, tokens=8):
    """The text of a greedy reply, asked without the page."""
    roles = ("user", "assistant")
    asked = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    body = {"messages": asked, "max_tokens": tokens, "temperature": 0}
    return served.post("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]


def test_a_conversation_is_written_regenerated_and_edited(served, page):
    ask(page, "def add(a, b):")
    first = completion(served, "def add(a, b):")
    assert contents(page, REPLY) == [first]
    assert "8 tokens" in page.text(".stats")
    ask(page, "and more")
    second = completion(served, "def add(a, b):", first, "and more")
    assert contents(page, REPLY) == [first, second]
    page.click("#regenerate")
    page.until(DONE)
    assert contents(page, REPLY) == [first, second]
    page.click("#edit")
    assert page.evaluate("document.querySelector('#message').value") == "and more"
    page.type(" please")
    page.key("Enter")
    page.until(DONE)
    edited = completion(served, "def add(a, b):", first, "and more please")
    assert contents(page, "article.user .text") == ["def add(a, b):", "and more please"]
    assert contents(page, REPLY) == [first, edited]
    page.click("#clear")
    assert contents(page, "article") == []


def test_enter_sends_and_shift_enter_does_not(page):
    page.evaluate("document.querySelector('#max_tokens').value = 2")
    page.click("#message")
    page.type("one")
    page.key("Enter", chromium.SHIFT)
    page.type("two")
    page.key("Enter")
    page.until("document.querySelector('.stats')?.textContent")
    assert contents(page, "article.user .text") == ["one\ntwo"]


@pytest.mark.parametrize("how", ["#stop", "Escape"])
def test_a_stopped_reply_stays_and_the_server_stops_too(served, page, how):
    before = served.engine.counts.cancelled
    page.evaluate("document.querySelector('#max_tokens').value = 200")
    served.model.next_logits, quick = slowed(served.model.next_logits), served.model.next_logits
    try:
        page.click("#message")
        page.type("def add(a, b):")
        page.key("Enter")
        page.until("document.querySelectorAll('.token').length > 2")
        page.until("document.querySelector('#slots').innerText.includes('writing')")
        page.key(how) if how == "Escape" else page.click(how)
        page.until(DONE)
    finally:
        served.model.next_logits = quick
    (text,) = contents(page, REPLY)
    assert text
    assert page.text(".stats").startswith("stopped")
    served.until_idle()
    assert served.engine.counts.cancelled == before + 1
    ask(page, "more")
    assert len(contents(page, REPLY)) == 2


def slowed(function):
    import time

    def slow(*arguments):
        time.sleep(0.1)
        return function(*arguments)

    return slow


def test_probabilities_show_on_hover_and_on_the_keyboard(page):
    ask(page, "def add(a, b):")
    page.hover(".token:nth-child(3)")
    assert page.evaluate("!document.querySelector('#tip').hidden")
    shown = page.text("#tip")
    assert shown.count("%") >= 5
    assert shown.startswith("\u2192 ")
    page.hover("h1")
    assert page.evaluate("document.querySelector('#tip').hidden")
    page.evaluate("document.querySelector('#log').focus()")
    page.key("Tab")
    for _ in range(2):
        page.key("ArrowRight")
    focused = "document.activeElement.matches('.token:nth-child(3)')"
    assert page.evaluate(focused)
    assert page.text("#tip") == shown
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.key("Escape")
    assert page.evaluate("document.querySelector('#tip').hidden")


def test_the_heatmap_has_a_cell_for_each_expert_of_each_layer(served, page):
    page.click("#expert_counts")
    ask(page, "def add(a, b):")
    page.click(".experts summary")
    rows = page.evaluate(
        "[...document.querySelectorAll('.experts tbody tr')].map((row) =>"
        "[...row.querySelectorAll('td')].map((cell) => Number(cell.textContent)))"
    )
    config = served.model.config
    assert len(rows) == config.num_hidden_layers
    assert {len(row) for row in rows} == {config.num_local_experts}
    assert all(abs(sum(row) - 100) <= len(row) for row in rows)


HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"


def test_markup_of_a_model_or_a_user_stays_text(page, served, monkeypatch):
    tokens = served.tokenizer.encode(HOSTILE, add_special_tokens=False)
    monkeypatch.setattr(type(served.engine), "submit", told(type(served.engine).submit, tokens))
    ask(page, HOSTILE, tokens=len(tokens))
    assert contents(page, "article.user .text") == [HOSTILE]
    assert contents(page, REPLY) == [HOSTILE]
    page.hover(".token:nth-child(2)")
    assert page.evaluate("window.hit === undefined")
    assert (
        page.evaluate("document.querySelectorAll('article script, article img, #tip img').length")
        == 0
    )
    assert (
        page.evaluate(  # and where some code tried, the browser would refuse
            "(() => { try { document.body.innerHTML = '<b>'; return 'set' } catch (e) { return e.name } })()"
        )
        == "TypeError"
    )
    page.problems.clear()


def told(submit, tokens):
    """A `submit` whose requests can only choose these ids."""
    from dataclasses import replace

    def told_submit(engine, request, listener):
        def only(ids, scores):
            wanted = tokens[ids.shape[1] - len(request.ids)]
            kept = scores[:, wanted].clone()
            scores = scores.clone().fill_(float("-inf"))
            scores[:, wanted] = kept
            return scores

        return submit(engine, replace(request, processors=[only]), listener)

    return told_submit


MARKDOWN = (
    "# A title\n- **bold** and `x*y`\n1. one\n```py\n**no** `no`\n```\nends **open\n```\na < b"
)


def test_markdown_is_drawn_and_its_text_stays(page, served, monkeypatch):
    tokens = served.tokenizer.encode(MARKDOWN, add_special_tokens=False)
    monkeypatch.setattr(type(served.engine), "submit", told(type(served.engine).submit, tokens))
    ask(page, "with probabilities", tokens=len(tokens))
    page.click("#logprobs")
    ask(page, "without", tokens=len(tokens))
    drawn = {"strong": ["A title", "bold"], "code": ["x*y", "**no** `no`\n", "a < b"]}
    for place in ("nth-of-type(2)", "nth-of-type(4)"):
        reply = f"article:{place} .text"
        assert contents(page, reply) == [MARKDOWN]
        for tag, texts in drawn.items():
            assert contents(page, f"{reply} {tag}") == texts
    shown = "document.querySelector('article:nth-of-type(4) .text').innerText"
    assert list(filter(None, page.evaluate(shown).split("\n"))) == [
        *("A title", "- bold and x*y", "1. one", "**no** `no`", "ends **open", "a < b"),
    ]
    assert "".join(contents(page, ".token")) == MARKDOWN
    page.hover("article:nth-of-type(2) code .token")
    assert "%" in page.text("#tip")


def test_a_reply_that_was_cut_goes_on(served, page):
    ask(page, "def add(a, b):", tokens=4)
    (begun,) = contents(page, REPLY)
    page.click("#continue")
    page.until(f"{DONE} && document.querySelector('{REPLY}').textContent !== {json.dumps(begun)}")
    messages = [
        {"role": "user", "content": "def add(a, b):"},
        {"role": "assistant", "content": begun},
    ]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, "continue_final_message": True}
    rest = served.post("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    assert contents(page, REPLY) == [begun + rest]
    assert len(contents(page, "article")) == 2
    page.until("!document.querySelector('#continue').disabled")
    page.evaluate("document.querySelector('#system').value = 'word '.repeat(300)")
    page.click("#continue")
    page.until("document.querySelector('#alert').textContent")
    assert contents(page, REPLY) == [begun + rest]
    page.problems.clear()


def test_an_error_is_said_and_the_message_comes_back(page):
    page.evaluate("document.querySelector('#max_tokens').value = 4")
    page.click("#message")
    page.type("word " * 300)
    page.click("#send")
    page.until("document.querySelector('#alert').textContent")
    assert "context" in page.text("#alert")
    assert page.evaluate("document.querySelector('#message').value").startswith("word word")
    assert contents(page, "article") == []
    page.problems.clear()  # the status 400 that the console shows


def test_a_setting_out_of_range_is_not_sent(page):
    page.evaluate("document.querySelector('#settings').open = false")
    page.evaluate("document.querySelector('#temperature').value = 3")
    page.click("#message")
    page.type("Hi")
    page.key("Enter")
    page.until("document.querySelector('#settings').open")
    assert contents(page, "article") == []


def test_a_key_is_asked_for_and_kept_in_memory_only():
    with serving(key="secret") as served, chromium.opened() as page:
        page.open(f"http://127.0.0.1:{served.port}/")
        page.until("document.querySelector('#key-dialog').open")
        page.type("wrong")
        page.key("Enter")
        page.until("document.querySelector('#alert').textContent.includes('Bearer')")
        page.until("document.querySelector('#key-dialog').open")
        page.type("secret")
        page.key("Enter")
        page.until("document.querySelector('#model').innerText.includes('context')")
        ask(page, "Hi")
        assert contents(page, REPLY)[0]
        kept = "document.cookie + JSON.stringify(localStorage) + JSON.stringify(sessionStorage)"
        assert "secret" not in page.evaluate(kept + " + document.documentElement.outerHTML")


def test_a_screen_reader_finds_a_name_for_everything(page):
    page.click("#expert_counts")
    ask(page, "def add(a, b):")
    page.click(".experts summary")
    found = page.accessible()
    for role in ("textbox", "button", "spinbutton", "checkbox", "article", "log", "form", "table"):
        names = [name for each, name in found if each == role]
        assert names, role
        assert all(names), (role, names)
    for expected in (
        *(("textbox", "Message"), ("textbox", "System prompt"), ("spinbutton", "Temperature")),
        *(("log", "Conversation"), ("region", "Experts by layer"), ("button", "Regenerate")),
    ):
        assert expected in found, expected
    levels = [(role, name) for role, name in found if role == "heading"]
    assert levels[:3] == [("heading", "qmix"), ("heading", "You"), ("heading", "Model")]


def test_a_server_that_is_gone_is_said_and_the_reply_stays():
    with started([*QMIX, "serve", "--demo", "--port", "0"], stderr=PIPE, text=True) as server:
        url = next(filter(None, (re.search(r"http://[^ /]+", line) for line in server.stderr)))[0]
        with chromium.opened() as page:
            page.open(f"{url}/")
            page.until("document.querySelector('#model').innerText.includes('context')")
            page.click("#message")
            page.type("Tell me a story")
            page.evaluate("document.querySelector('#temperature').value = 2")
            page.key("Enter")
            page.until("document.querySelectorAll('.token').length > 3")
            server.kill()
            page.until("document.querySelector('#alert').textContent.includes('is gone')")
            assert contents(page, REPLY)[0]
            page.until("document.querySelector('#load').textContent.includes('not answer')")
            assert contents(page, "#slots td") == []


def test_everything_is_reached_by_tab_and_a_narrow_screen_does_not_scroll_sideways(page):
    ask(page, "def add(a, b):")
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.key("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    wanted = {
        "log",
        "message",
        "send",
        "continue",
        "regenerate",
        "edit",
        "clear",
        "system",
        "temperature",
    }
    assert wanted | {"seed", "logprobs", "expert_counts", "SUMMARY", "SPAN"} <= set(reached)
    for width in (360, 400, 1400):
        page.resize(width, 800)
        over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(over) == 0
