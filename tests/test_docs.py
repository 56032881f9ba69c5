"""The documentation is true: commands run, links lead somewhere, tables and pictures are today's.

A command that is not run stands under a comment `<!-- not run: why -->` in its page, and must at
least name a command, options and files that exist.
"""

import ast
import importlib
import re
import shlex
import shutil
from contextlib import chdir
from dataclasses import dataclass

import pytest
from typer.main import get_command

from qmix import cli
from qmix.config import MixtralConfig
from qmix.errors import CUT_REPLY
from qmix.evals import speed
from tests.support import figures, house, pictures
from tests.support.house import ROOT
from tests.support.process import qmix

PAGES = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
# What the pages call by the names of real checkpoints are tiny ones here; long runs are cut short.
SHORTER = {
    ("quantize", "gptq"): ["--samples", "2", "--seqlen", "32"],
    ("quantize", "auto"): ["--samples", "2", "--seqlen", "32"],
    ("bench", None): ["-r", "1", "-n", "4", "-p", "64"],
    ("bench", "--attention"): ["-r", "1", "-p", "64"],
    ("generate", None): ["--max-new-tokens", "4"],
    ("batch", None): ["--max-new-tokens", "2"],
    ("chat", None): ["--max-new-tokens", "2"],
}
MAKES_OUT = ("quantize", "convert", "export")
FOLDERS = ("qmix", "quantize", "evals", "tests", "docs", ".ci")

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(rf"(?<![\w./~$-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*[\w/]")


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    why: str | None

    @property
    def commands(self):
        """The words of each line, comments and prompts left out."""
        lines = (shlex.split(line, comments=True) for line in self.body.splitlines())
        return [words for words in lines if words]


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    return [Block(m["language"], m["body"], m["why"]) for m in _BLOCK.finditer(text(page))]


def run_blocks(page, language):
    return [one for one in blocks(page) if one.language == language and one.why is None]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny, tiny_nf4):
    """A folder in which the names of the pages' examples exist, tiny."""
    from qmix.text.tokenizer import LlamaTokenizer
    from qmix.weights.scheme import Scheme
    from tests.support import raw_mistral
    from tests.support.lora import write_attention_lora
    from tests.support.models import quantized, small_model, write_dense

    folder = tmp_path_factory.mktemp("desk")
    (folder / "evals").mkdir()
    (folder / "evals" / "tiny").symlink_to(tiny)
    widths = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    small = write_dense(folder / "small", max_position_embeddings=1024, **widths)
    shutil.copy(tiny / "tokenizer_config.json", small)
    names = ("Mixtral-8x7B-v0.1", "Mixtral-8x7B-Instruct-v0.1")
    for name in (*names, *(f"mistralai/{name}" for name in names)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(small)
    shutil.copytree(tiny_nf4, folder / "mixtral-nf4")
    write_attention_lora(folder / "my-lora", widths["hidden_size"])
    scheme = Scheme(kind="int4", group_size=128)
    quantized(tiny, folder / "mixtral-gptq", scheme, method="rtn")
    words = LlamaTokenizer.from_pretrained(tiny)
    raw = folder / "Mixtral-8x7B-v0.1-raw"
    raw_mistral.write(raw, small_model(vocab_size=len(words)), tokenizer=tiny / "tokenizer.model")
    MixtralConfig(max_position_embeddings=32768).save_pretrained(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "Once"}\n')
    for name in ("books.txt", "wiki.test.raw"):
        (folder / name).write_text("Return a list of the names in the current scope. " * 20)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if run_blocks(page, "sh")])
def test_commands_run(page, desk, capsys):
    for block in run_blocks(page, "sh"):
        for words in block.commands:
            run(words, desk)


def run(words, desk):
    """A line of a shell block, within this process; what it prints is for nobody."""
    if "|" in words:
        at = words.index("|")
        assert words[0] == "echo", words
        run_qmix(words[at + 1 :], desk, " ".join(words[1:at]) + "\n")
    elif words[0] == "qmix":
        run_qmix(words, desk)
    elif words[:2] == ["python", "-m"] and words[2].startswith("qmix.evals"):
        module = importlib.import_module(words[2])
        with chdir(desk):
            if "--help" in words:
                with pytest.raises(SystemExit) as done:
                    module.main(words[3:])
                assert done.value.code == 0, words
            else:
                assert not module.main(words[3:]), words
    else:
        pytest.fail(f"nothing runs this: {shlex.join(words)}; say in the page why it is not run")


def run_qmix(words, desk, typed=""):
    command, arguments = words[1], words[2:]
    if command in MAKES_OUT:
        shutil.rmtree(desk / arguments[1], ignore_errors=True)
    kind = next((word for word in arguments if word in ("gptq", "auto", "--attention")), None)
    shorter = SHORTER.get((command, kind), [])
    if command == "chat":  # where nothing is typed, a person would
        typed, codes = typed or "Hello\n", (0, CUT_REPLY)
    else:
        codes = (0,)
    done = qmix(command, *arguments, *shorter, stdin=typed, cwd=desk)
    assert done.returncode in codes, f"{shlex.join(words)}: {done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if run_blocks(page, "python")])
def test_python_runs(page, desk, monkeypatch, capsys):
    names = {}
    monkeypatch.chdir(desk)
    for block in run_blocks(page, "python"):
        if "qmix import hf" in block.body:
            pytest.importorskip("transformers")
        exec(compile(block.body, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_exists_and_says_why(page):
    for block in blocks(page):
        assert block.language in ("sh", "python", "text"), (page, block.body)
        if block.language == "sh":
            for words in block.commands:
                known(words)
        if block.why is not None:
            assert len(block.why) > 20, (page, block.why)
    prose = _BLOCK.sub("", text(page))
    for span in re.findall(r"`((?:qmix|python3?|make) [^`\n]+)`", prose):
        known(shlex.split(span, comments=True))


def known(words):
    """The command, its options, its module or its target exist."""
    if "|" in words:
        words = words[words.index("|") + 1 :]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", text("Makefile"), re.MULTILINE)
        assert words[1] in targets, words
    elif words[0] in ("python", "python3"):
        assert words[1] == "-m", words
        module = words[2]
        if module.startswith("tests."):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        elif module.startswith("qmix"):
            assert module in house.modules(), module
            source = house.modules()[module].read_text()
            for option in words[3:]:
                assert (
                    not option.startswith("--") or option == "--help" or f'"{option}"' in source
                ), words
    elif words[0] == "qmix":
        known_to_qmix(words[1:])


def known_to_qmix(words):
    command = get_command(cli.app)
    options = {"--help", "-h"}
    for word in words:
        if hasattr(command, "commands") and not word.startswith("-"):
            assert word in command.commands, words
            command = command.commands[word]
        options |= {
            name for param in command.params for name in (*param.opts, *param.secondary_opts)
        }
        assert not word.startswith("-") or word == "-" or word in options, (word, words)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in _LINK.findall(text(page)):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), (page, target)
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings]
            assert heading in slugs, (page, target)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    without_links = re.sub(r"https?://\S+|\]\([^)]*\)", "", text(page))
    for name in _PATH.findall(without_links):
        assert (ROOT / name).exists() or name == "evals/tiny", (page, name)


def test_every_promise_of_security_has_its_test():
    promises = re.findall(r"`(tests/[\w./]+)::(\w+)`", text("SECURITY.md"))
    assert len(promises) > 15
    for path, name in promises:
        assert re.search(rf"^def {name}\(", text(path), re.MULTILINE), (path, name)


def test_messages_in_troubleshooting_are_the_programs():
    said = set()
    for path in house.modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    headings = re.findall(r"^### (.+)$", text("docs/troubleshooting.md"), re.MULTILINE)
    quoted = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) > 10
    for message in quoted:
        assert any(message in one for one in said), message


def test_tables_are_those_of_the_records():
    """Of all pages in one process: they share what it takes to write them."""
    stale = [page for page in PAGES if text(page) != figures.written(text(page))]
    assert stale == [], "run: python -m tests.support.figures"


def test_the_readme_claims_no_speed_on_a_gpu_that_no_record_has():
    row = next(
        line for line in text("README.md").splitlines() if line.startswith("| speed on a GPU")
    )
    assert (row.split("|")[2].strip() == "-") == (speed.speed_table() == speed.NOTHING)


def test_the_readme_fits_a_screen():
    lines = [line for line in text("README.md").splitlines() if not line.startswith("![")]
    assert len(lines) <= 60


PICTURES = "run: python -m tests.support.pictures"


def picture(name):
    return (pictures.DOCS / f"{name}.svg").read_text(encoding="utf-8")


def test_the_picture_of_the_rooms_is_of_this_house():
    assert picture("rooms") == pictures.rooms(), PICTURES


def test_the_picture_of_a_plan_says_what_qmix_plan_prints():
    assert pictures.words(picture("plan")) == pictures.words(pictures.plan()), PICTURES


def test_the_picture_of_a_chat_says_what_qmix_chat_prints(tiny_nf4):
    shown, printed = (
        re.sub(r"[\d.,]+(?= tok/s)|(?<=first token )[\d.]+", "#", pictures.words(svg))
        for svg in (picture("chat"), pictures.chat(tiny_nf4))
    )
    assert shown == printed, PICTURES
