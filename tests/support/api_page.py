"""Write qmix/API.md from the docstrings of the public names.

    python -m tests.support.api_page

Reads source files and imports no torch: the page is the same whatever is installed. test_api_page
keeps it in step.
"""

import ast
import re
import textwrap

import qmix
from tests.support.house import ROOT

PAGE = ROOT / "qmix" / "API.md"
INPUTS = ROOT / "qmix" / "models" / "inputs.py"

# Section -> file -> public names, in reading order.
CONTENTS = {
    "Loading": {
        "qmix/models/auto.py": ["load", "AutoModelForCausalLM", "AutoConfig", "AutoTokenizer"],
        "qmix/models/options.py": ["LoadOptions"],
        "qmix/models/quantization.py": ["BitsAndBytesConfig"],
        "qmix/models/pretrained.py": ["PreTrainedModel"],
        "qmix/config.py": ["MixtralConfig"],
    },
    "Models": {
        "qmix/models/mixtral.py": ["MixtralModel"],
        "qmix/models/causal_lm.py": ["MixtralForCausalLM"],
        "qmix/models/classifier.py": ["MixtralForSequenceClassification"],
        "qmix/nn/losses.py": ["load_balancing_loss"],
    },
    "Outputs": {
        "qmix/nn/outputs.py": [
            "ModelOutput",
            "MoeModelOutputWithPast",
            "MoeCausalLMOutputWithPast",
            "SequenceClassifierOutputWithPast",
            "GenerateDecoderOnlyOutput",
        ],
    },
    "The cache": {"qmix/nn/cache.py": ["KVCache"]},
    "Generation": {
        "qmix/generation/config.py": ["GenerationConfig"],
        "qmix/generation/sampling.py": ["Sampling"],
        "qmix/generation/logits_processors.py": ["LogitsProcessor"],
        "qmix/generation/stopping.py": ["StoppingCriterion"],
        "qmix/generation/streamers.py": ["Streamer", "TextStreamer", "TextIteratorStreamer"],
    },
    "Text": {
        "qmix/text/tokenizer.py": ["LlamaTokenizer"],
        "qmix/text/text_encoder.py": ["TextEncoder"],
        "qmix/text/chat_encoder.py": ["ChatEncoder"],
        "qmix/text/token_table.py": ["TokenTable"],
        "qmix/text/batch_encoding.py": ["BatchEncoding"],
        "qmix/text/chat_template.py": ["Message", "encode"],
    },
    "transformers": {"qmix/hf.py": ["adapt", "tokenizer"]},
    "Errors": {
        "qmix/errors.py": [
            "QmixError",
            "UsageError",
            "CheckpointError",
            "UnsupportedError",
            "ConfigError",
            "ResourceError",
            "QualityError",
            "InterruptedRunError",
        ],
    },
}

INTRODUCTION = (
    "# qmix: the Python API",
    "",
    "Written by `python -m tests.support.api_page` from the docstrings; change those. The models'",
    "interface is that of",
    "[Hugging Face's Mixtral](https://huggingface.co/docs/transformers/v4.38.1/en/model_doc/mixtral).",
    "",
)

_SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:")
_ENTRY = re.compile(r"([A-Za-z_][\w, ]*): (.*)")


def page():
    """The whole page."""
    index, body = [], []
    for section, files in CONTENTS.items():
        index += ["", f"**{section}**", ""]
        body += ["", f"## {section}"]
        for path, node in definitions(files):
            index.append(f"- [`{path}`](#{anchor(path)}): {summary(node)}")
            body += ["", f"### `{path}`", *described(node)]
    return "\n".join([*INTRODUCTION, *legend(), *index, *body]) + "\n"


def legend():
    """The shape letters, as the layers' room gives them."""
    text = ast.get_docstring(ast.parse((ROOT / "qmix" / "nn" / "__init__.py").read_text()))
    table, last = text[text.index("    B  ") :].split("\n\n", 1)
    return ["Shape letters:", "", "```text", *textwrap.dedent(table).split("\n"), "```", "", last]


def definitions(files):
    """(dotted path that a user writes, definition) of each name, in reading order."""
    for file, names in files.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = {node.name: node for node in tree.body if hasattr(node, "name")}
        module = file.removesuffix(".py").replace("/", ".")
        for name in names:
            yield f"{'qmix' if name in qmix.__all__ else module}.{name}", found[name]


def anchor(heading):
    """GitHub's link to a heading."""
    return "".join(letter for letter in heading.lower() if letter.isalnum() or letter in "-_")


def summary(node):
    """The first sentence of a docstring, in one line."""
    paragraph = ast.get_docstring(node).partition("\n\n")[0]
    return re.split(r"(?<=\.)\s(?=[A-Z`])", paragraph.replace("\n", " "))[0]


def described(node):
    """One public name: signature, docstring, and a class's public methods."""
    if isinstance(node, ast.FunctionDef):
        yield from ("", *signature(node, node.name), "", *prose(node))
        return
    bases = [ast.unparse(base) for base in node.bases]
    if bases:
        yield from ("", f"Bases: {', '.join(f'`{base}`' for base in bases)}")
    yield from ("", *prose(node))
    fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
    if fields:
        yield from ("", "```python", *fields, "```")
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    for method in methods:
        kinds = {ast.unparse(mark) for mark in method.decorator_list}
        if "overload" in kinds or (method.name.startswith("_") and method.name != "__init__"):
            continue
        if method.name == "__init__" and not fields:
            yield from ("", *signature(method, node.name))
        if method.name != "__init__" and ast.get_docstring(method):
            yield from ("", f"#### `{node.name}.{method.name}`", "")
            if "property" not in kinds:
                yield from (*signature(method, method.name), "")
            yield from prose(method)


def signature(node, name):
    """The signature as a code block, an argument a line where it is long."""
    arguments = ast.parse(ast.unparse(node)).body[0].args
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "takes":
            arguments = taken(mark.args[0].id)
    for group in (arguments.posonlyargs, arguments.args):
        if group and group[0].arg in ("self", "cls"):
            del group[0]
    result = f" -> {ast.unparse(node.returns)}" if node.returns and name == node.name else ""
    line = f"{name}({ast.unparse(arguments)}){result}"
    if len(line) > 96:
        words = split(ast.unparse(arguments))
        line = "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){result}"])
    return ["```python", line, "```"]


def taken(name):
    """The arguments of a method that `takes` the fields of a class of qmix/models/inputs.py."""
    classes = {
        part.name: part for part in ast.parse(INPUTS.read_text()).body if hasattr(part, "name")
    }
    fields, node = [], classes[name]
    while True:
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)] + fields
        if not node.bases:
            declared = ", ".join(ast.unparse(field) for field in fields)
            return ast.parse(f"def forward({declared}): ...").body[0].args
        node = classes[node.bases[0].id]


def split(arguments):
    """A list of arguments at its commas, those inside brackets left alone."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(arguments):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(arguments[start:at].strip())
            start = at + 1
    return [*parts, arguments[start:].strip()]


def prose(node):
    """A docstring as Markdown: entries of Args, Attributes, Raises and Returns become lists."""
    text = ast.get_docstring(node)
    assert text, f"{node.name} is public and has no docstring"
    lines, inside = [], False
    for line in text.split("\n"):
        if line in _SECTIONS:
            inside = True
            lines += [f"**{line[:-1]}**", ""]
        elif inside and line.startswith("    "):
            entry = _ENTRY.fullmatch(line.strip()) if line[4] != " " else None
            if entry:
                lines.append(f"- `{entry[1]}`: {entry[2]}")
            else:
                lines.append(("  " if line[4] == " " else "- ") + line.strip())
        else:
            inside = inside and not line
            lines.append(line)
    return textwrap.dedent("\n".join(lines)).rstrip().split("\n")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
