"""The public face: qmix.NAME for every public name, and nothing else in dir(qmix)."""

import ast

import qmix
from tests.support.models import ROOT
from tests.support.process import succeeds

PUBLIC = {
    *(
        "load",
        "LoadOptions",
        "AutoConfig",
        "AutoModelForCausalLM",
        "BitsAndBytesConfig",
        "AutoTokenizer",
        "MixtralConfig",
    ),
    *("MixtralModel", "MixtralForCausalLM", "MixtralForSequenceClassification", "KVCache"),
    *("ModelOutput", "MoeModelOutputWithPast", "MoeCausalLMOutputWithPast"),
    *("SequenceClassifierOutputWithPast", "GenerateDecoderOnlyOutput", "GenerationConfig"),
    *("Sampling", "TextStreamer", "TextIteratorStreamer", "LlamaTokenizer", "Message", "errors"),
}


def test_dir_lists_the_public_names_and_dunders_only():
    code = "import qmix, qmix.cli, json; print(json.dumps(dir(qmix)))"  # with submodules imported
    names = ast.literal_eval(succeeds(code))
    assert {name for name in names if not name.startswith("__")} == PUBLIC
    assert {"__all__", "__version__", "__doc__"} <= set(names)


def test_every_public_name_is_there_by_its_own_name():
    assert set(qmix.__all__) == PUBLIC
    for name in PUBLIC - {"errors"}:
        assert getattr(qmix, name).__name__ == name
    assert issubclass(qmix.errors.UsageError, qmix.errors.QmixError)
    assert not hasattr(qmix, "magic")


def test_type_checkers_are_told_the_same_homes():
    tree = ast.parse((ROOT / "qmix" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and "TYPE" in ast.dump(node)]
    told = {alias.asname: node.module for node in block.body for alias in node.names}
    assert told == {**qmix._MODULES, "errors": "qmix"}
