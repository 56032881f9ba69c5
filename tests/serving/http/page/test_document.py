"""The page's structure: its policy, its labels, its names, and what its script must never do."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from qmix.serving.http.page import document

SOURCES = ("page.html", "page.css", *document.SCRIPTS)
CONTROLS = ("input", "textarea", "button", "summary", "dialog")


class Elements(HTMLParser):
    """All start tags with their attributes, and the text of script and style."""

    def __init__(self, html):
        super().__init__()
        self.found, self.texts, self._inside = [], {}, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.texts[self._inside] = self.texts.get(self._inside, "") + data


@pytest.fixture(scope="module")
def page():
    return document.page()


@pytest.fixture(scope="module")
def elements(page):
    return Elements(page.html.decode())


def test_the_policy_names_this_script_and_this_style_and_nothing_else(page, elements):
    policy = dict(
        rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; ")
    )
    for kind in ("script", "style"):
        digest = hashlib.sha256(elements.texts[kind].encode()).digest()
        assert policy[f"{kind}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert "unsafe" not in page.headers["content-security-policy"]


def test_nothing_is_loaded_and_no_attribute_is_code(page, elements):
    html = page.html.decode()
    assert not re.search(r"https?://|//\w+\.\w+/|@import|url\(", html)
    for _, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert attributes.keys() & {"src", "srcset", "action"} == set()
    assert [a["href"] for _, a in elements.found if "href" in a] == ["data:,"]


def test_the_script_sets_text_as_text_and_keeps_nothing():
    script = "".join(map(document.source, document.SCRIPTS))
    for way in (
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextual"),
        *("DOMParser", "setHTML", "srcdoc", "eval(", "Function(", "import(", "localStorage"),
        *("sessionStorage", "indexedDB", "cookie", "postMessage"),
    ):
        assert way not in script, way


def test_every_control_has_a_name_and_every_id_is_one(elements):
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes.get("for") for tag, attributes in elements.found if tag == "label"}
    for tag, attributes in elements.found:
        if tag in ("input", "textarea") and attributes.get("type") != "checkbox":
            assert attributes["id"] in labelled, attributes
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
    script = "".join(map(document.source, document.SCRIPTS))
    named = set(re.findall(r'byId\("([\w-]+)"\)', script))
    assert named <= set(ids), named - set(ids)
    assert ("section", "log") in [(tag, a.get("role")) for tag, a in elements.found]
    assert elements.found[1] == ("html", {"lang": "en"}) or elements.found[0][0] == "html"


def test_it_stays_small():
    assert sum(document.source(name).count("\n") for name in SOURCES) < 600
    assert max(map(len, "\n".join(map(document.source, SOURCES)).splitlines())) <= 100
