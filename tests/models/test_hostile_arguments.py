"""Arguments of the Python API, given what they cannot take: refused as documented, in a second."""

import pytest
import torch

import qmix
from qmix import GenerationConfig, MixtralConfig, TextStreamer
from qmix.errors import QmixError, UsageError
from qmix.models.classifier import MixtralForSequenceClassification
from qmix.models.options import LoadOptions
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, small_model
from tests.support.promptness import within

IDS = torch.tensor([[1, 5, 6, 7]])
NAN, INF = float("nan"), float("inf")
MASK = torch.ones(1, 4)

IDS_LIKE = {
    "int16": IDS.short(),
    "int8": IDS.char(),
    "uint8": IDS.byte(),
    "bool": IDS.bool(),
    "float": IDS.float(),
    "NaN": IDS * NAN,
    "complex": IDS.cfloat(),
    "1-D": IDS[0],
    "3-D": IDS[None],
    "0-D": IDS.sum(),
    "empty": IDS[:, :0],
    "no row": IDS[:0],
    "negative": -IDS,
    "beyond the vocabulary": IDS + (1 << 40),
    "list": [[1, 2]],
    "string": "hello",
    "bytes": b"hello",
    "number": 5,
    "huge": 10**400,
    "dict": {},
    "meta": IDS.to("meta"),
    "sparse": IDS.to_sparse(),
}
MASKS = {
    "NaN": MASK * NAN,
    "infinity": MASK * INF,
    "additive": torch.tensor([[-INF, 0.0, 0.0, 0.0]]),
    "negative": -MASK.long(),
    "two": 2 * MASK.long(),
    "complex": MASK.cfloat(),
    "all padding": 0 * MASK,
    "short": MASK[:, :3],
    "3-D": MASK[None],
    "5-D": MASK[None, None, None],
    "4-D NaN": torch.full((1, 1, 4, 4), NAN),
    "4-D infinity": torch.full((1, 1, 4, 4), INF),
    "4-D integers": torch.ones(1, 1, 4, 4, dtype=torch.long),
    "list": [[1, 1, 1, 1]],
    "string": "1111",
    "number": 1,
}
# Of these a decoder takes none, too, but a generation has its own way to say nothing is masked.
WRONG = {
    "string": "a",
    "list": [],
    "dict": {},
    "object": object(),
    "huge": 10**400,
    "2^70": 1 << 70,
    "negative": -5,
    "NaN": NAN,
    "float": 1.5,
    "bytes": b"\xff",
    "surrogate": "\ud800",
    "tensor": torch.tensor([NAN]),
}


def survives(work):
    """Do it, or refuse it as documented, in less than a second of this process."""
    said = None
    with within(1):
        try:
            work()
        except (QmixError, TypeError, ValueError) as error:
            said = error
    assert not isinstance(said, UnicodeError), said
    assert "unhashable" not in str(said), said


def refused(work):
    with pytest.raises((QmixError, TypeError)):
        work()


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=2048, num_hidden_layers=1, eos_token_id=2)


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("name", IDS_LIKE)
def test_odd_ids_are_refused_by_forward_and_generate(model, name):
    for call in (model, model.model):
        refused(lambda call=call: call(IDS_LIKE[name]))
    refused(lambda: model.generate(IDS_LIKE[name], max_new_tokens=2))


@pytest.mark.parametrize("name", MASKS)
def test_odd_masks_are_refused(model, name):
    if name not in ("all padding",):
        refused(lambda: model(IDS, attention_mask=MASKS[name]))
    refused(lambda: model.generate(IDS, attention_mask=MASKS[name], max_new_tokens=2))


def test_int32_ids_do_all_that_int64_ids_do(model):
    options = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "max_new_tokens": 4}
    expected = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS.int(), **options), expected)
    assert torch.equal(model(IDS.int()).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "positions",
    [
        *(IDS.float(), IDS * NAN, -IDS, IDS + (1 << 40), IDS.short(), IDS.bool(), IDS[0]),
        *([[0, 1, 2, 3]], "0", 3),
    ],
    ids=lambda value: getattr(value, "dtype", type(value).__name__),
)
def test_odd_positions_are_refused(model, positions):
    refused(lambda: model(IDS, position_ids=positions))


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    "argument",
    [
        *("labels", "past_key_values", "inputs_embeds", "position_ids", "attention_mask"),
        *("logits_to_keep", "use_cache", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "return_dict", "no_such_argument"),
    ],
)
@pytest.mark.filterwarnings("ignore:sdpa attention returns no weights")
def test_forward_survives_any_argument(model, argument, name):
    survives(lambda: model(IDS, **{argument: WRONG[name]}))


@pytest.mark.parametrize("labels", [IDS.tolist(), IDS[0], IDS.sum()], ids=["list", "1-D", "0-D"])
@pytest.mark.parametrize("logits_to_keep", [0, 2, torch.tensor([1, 3])], ids=["all", "2", "two"])
def test_odd_labels_are_refused_whatever_logits_are_kept(model, labels, logits_to_keep):
    with pytest.raises(UsageError, match="labels"):
        model(IDS, labels=labels, logits_to_keep=logits_to_keep)


@pytest.mark.parametrize("name", WRONG)
def test_generate_and_its_config_survive_any_argument(model, name):
    for field in (*GenerationConfig.__dataclass_fields__, "no_such_option"):
        survives(lambda field=field: GenerationConfig(**{field: WRONG[name]}))
        options = {"max_new_tokens": 2, field: WRONG[name]}
        survives(lambda options=options: model.generate(IDS, **options))
    for argument in (
        *("generation_config", "attention_mask", "inputs_embeds", "past_key_values", "tokenizer"),
        *("streamer", "logits_processor", "stopping_criteria"),
    ):
        options = {"max_new_tokens": 2, argument: WRONG[name]}
        survives(lambda options=options: model.generate(IDS, **options))


@pytest.mark.parametrize("name", WRONG)
def test_a_config_survives_any_field(name):
    for field in (*MixtralConfig.__dataclass_fields__, "rope_parameters", "num_labels", "odd"):
        survives(lambda field=field: MixtralConfig(**{field: WRONG[name]}))


@pytest.mark.parametrize("name", WRONG)
def test_loading_survives_any_argument(name):
    for field in ("dtype", "device", "vram", "ram", "max_context"):
        survives(lambda field=field: LoadOptions(**{field: WRONG[name]}))
    for argument in (
        *("torch_dtype", "device_map", "attn_implementation", "load_options", "max_context"),
        *("sliding_window", "num_experts_per_tok", "rope_theta", "no_such_option", "vram"),
    ):
        survives(lambda argument=argument: qmix.load(TINY, **{argument: WRONG[name]}))


@pytest.mark.parametrize(
    "path",
    [*WRONG.values(), "a\0b", "A" * 300, "A/" * 3000, "", ".", "/dev/null", "/dev/zero", None],
    ids=lambda value: repr(value)[:12],
)
def test_a_path_that_leads_nowhere_is_an_error_of_ours(path):
    for load in (
        qmix.load,
        qmix.AutoModelForCausalLM.from_pretrained,
        LlamaTokenizer.from_pretrained,
        MixtralConfig.from_pretrained,
    ):
        with pytest.raises((QmixError, TypeError)):
            load(path)


@pytest.mark.parametrize("name", WRONG)
def test_a_tokenizer_survives_any_argument(tokenizer, name):
    wrong = WRONG[name]
    for work in (
        lambda: tokenizer(wrong),
        lambda: tokenizer([wrong]),
        lambda: tokenizer.encode(wrong),
        lambda: tokenizer.decode(wrong),
        lambda: tokenizer.decode([wrong]),
        lambda: tokenizer.batch_decode(wrong),
        lambda: tokenizer.batch_decode([wrong]),
        lambda: tokenizer.convert_ids_to_tokens(wrong),
        lambda: tokenizer.convert_tokens_to_ids(wrong),
        lambda: tokenizer.convert_tokens_to_ids([wrong]),
        lambda: tokenizer.apply_chat_template(wrong),
        lambda: tokenizer.apply_chat_template([wrong]),
        lambda: tokenizer.apply_chat_template([{"role": "user", "content": wrong}]),
        lambda: tokenizer.apply_chat_template([{"role": wrong, "content": "a"}]),
        lambda: tokenizer.apply_chat_template([Message("user", "a", wrong)]),
        lambda: tokenizer("a", padding=wrong),
        lambda: tokenizer("a", truncation=wrong),
        lambda: tokenizer("a", max_length=wrong),
        lambda: tokenizer("a", return_tensors=wrong),
        lambda: LlamaTokenizer(wrong),
        lambda: LlamaTokenizer.from_pretrained(TINY, padding_side=wrong),
        lambda: LlamaTokenizer.from_pretrained(TINY, eos_token=wrong),
        lambda: LlamaTokenizer.from_pretrained(TINY, add_bos_token=wrong),
        lambda: setattr(tokenizer, "pad_token", wrong),
        lambda: TextStreamer(tokenizer).put(wrong),
    ):
        survives(work)
    tokenizer.pad_token = None


@pytest.mark.parametrize("name", WRONG)
def test_a_classifier_survives_any_argument(name):
    config = small_model(num_hidden_layers=1).config.replace(num_labels=3, pad_token_id=0)
    classifier = MixtralForSequenceClassification(config)
    for argument in ("labels", "position_ids", "return_dict"):
        survives(lambda argument=argument: classifier(IDS, **{argument: WRONG[name]}))
