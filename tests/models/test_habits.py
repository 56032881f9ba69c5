"""Lines of model cards and tutorials about the model, its config and its loader."""

import warnings

import pytest
import torch

import qmix
from qmix.errors import QmixError, ResourceError, UnsupportedError, UsageError
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support.models import TINY, ids, small_config, small_model

CARD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = "mistralai/Mixtral-8x7B-Instruct-v0.1"
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(
    model_id, torch_dtype=torch.bfloat16, device_map="auto", load_in_4bit=True
)

messages = [{"role": "user", "content": "What is your favourite condiment?"}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt").to(model.device)

outputs = model.generate(inputs, max_new_tokens=20, do_sample=True)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""


def test_a_model_cards_block_runs_with_only_the_import_changed(capsys):
    code = CARD.replace("from transformers import", "from qmix import")
    code = code.replace("mistralai/Mixtral-8x7B-Instruct-v0.1", str(TINY))
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert "favourite condiment?" in capsys.readouterr().out
    assert names["model"].is_quantized
    assert names["outputs"].shape[1] > 5


def test_figures_of_a_model_count_what_packed_weights_stand_for(tiny_nf4):
    dense = MixtralForCausalLM.from_pretrained(TINY, device="cpu", dtype="bfloat16")
    packed = MixtralForCausalLM.from_pretrained(tiny_nf4, device="cpu")
    assert dense.num_parameters() == sum(p.numel() for p in dense.parameters())
    assert packed.num_parameters() == dense.num_parameters()
    embedding = dense.get_input_embeddings().weight.numel()
    assert packed.num_parameters(exclude_embeddings=True) == dense.num_parameters() - embedding
    assert dense.get_memory_footprint() == 2 * dense.num_parameters()
    assert packed.get_memory_footprint() < 0.45 * dense.get_memory_footprint()
    assert packed.num_parameters(only_trainable=True) < dense.num_parameters(only_trainable=True)
    assert (packed.is_quantized, dense.is_quantized) == (True, False)
    assert packed.hf_device_map == {"": "cpu"}
    assert packed.dtype == torch.bfloat16
    tied = small_model(num_hidden_layers=1, tie_word_embeddings=True)
    assert tied.num_parameters() == sum(p.numel() for p in tied.parameters())


def test_auto_config_reads_sets_and_is_taken_by_the_loader():
    config = qmix.AutoConfig.from_pretrained(TINY, use_cache=False, revision="main")
    assert isinstance(config, qmix.MixtralConfig)
    assert not config.use_cache
    config.sliding_window = 8
    model = qmix.AutoModelForCausalLM.from_pretrained(TINY, config=config, device="cpu")
    assert (model.config.sliding_window, model.config.use_cache) == (8, False)
    with pytest.raises(UsageError, match="another num_hidden_layers"):
        MixtralForCausalLM.from_pretrained(TINY, config=config.replace(num_hidden_layers=9))
    with pytest.raises(UsageError, match="no option 'colour'"):
        qmix.AutoConfig.from_pretrained(TINY, colour="red")


def test_a_model_from_scratch():
    model = qmix.AutoModelForCausalLM.from_config(
        small_config(), torch_dtype=torch.float16, attn_implementation="eager"
    )
    assert model.model.attn_implementation == "eager"
    assert model.dtype == torch.float16
    assert isinstance(model, MixtralForCausalLM)
    assert MixtralForCausalLM(small_config()).can_generate()
    assert model.get_output_embeddings() is model.lm_head
    assert model.resize_token_embeddings(128) is model.get_input_embeddings()
    with pytest.raises(UnsupportedError, match="vocabulary"):
        model.resize_token_embeddings(129)
    with pytest.raises(UsageError, match="no option 'seed'"):
        qmix.AutoModelForCausalLM.from_config(small_config(), seed=4)


def test_code_of_a_checkpoint_is_never_run_and_that_is_said():
    with pytest.warns(UserWarning, match="never runs code"):
        MixtralForCausalLM.from_pretrained(TINY, trust_remote_code=True, device="cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            MixtralForCausalLM.from_pretrained(TINY, trust_remote_code=True, device="cpu")
    assert len(said) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_moving_to_a_gpu_that_is_not_there_is_one_of_our_errors():
    model = small_model(num_hidden_layers=1)
    for move in (lambda: model.to("cuda"), model.cuda, lambda: model.to("cuda:1", torch.float16)):
        with pytest.raises(ResourceError, match="no CUDA device"):
            move()
    assert model.device.type == "cpu"
    assert model(ids(3)).logits.isfinite().all()


def test_nothing_is_uploaded(tmp_path):
    model = small_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "a", safe_serialization=True, max_shard_size="5GB")
    for options, named in (
        ({"push_to_hub": True}, "uploads nothing.*hf upload"),
        ({"safe_serialization": False}, "safetensors only"),
        ({"max_shard_size": "many"}, "max_shard_size"),
        ({"colour": "red"}, "no option 'colour'"),
    ):
        with pytest.raises(QmixError, match=named):
            model.save_pretrained(tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()
    with pytest.raises(UnsupportedError, match=r"push_to_hub.*hf upload"):
        model.push_to_hub("me/mine")


def test_what_only_transformers_models_have_says_where_to_find_it():
    model = small_model(num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match=r"gradient_checkpointing_enable.*hf\.adapt"):
        model.gradient_checkpointing_enable()
    assert not hasattr(model, "gradient_checkpointing_enable")
    with pytest.raises(AttributeError, match="colour"):
        _ = model.colour


def test_a_prompt_may_be_text_messages_or_ids():
    model, tokenizer = qmix.load(TINY, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False}
    text = "".join(model.stream("Return the", **options))
    prompt = tokenizer("Return the", return_tensors="pt")
    for same in (prompt["input_ids"], prompt["input_ids"][0], tokenizer.encode("Return the")):
        assert "".join(model.stream(same, **options)) == text
    assert "".join(model.stream([{"role": "user", "content": "Return"}], **options))
    with pytest.raises(UsageError, match="a text, messages or ids"):
        next(model.stream(4))
    expected = model.generate(**prompt, **options)
    for given in ({"input_ids": prompt}, {"inputs": prompt}, {"inputs": prompt["input_ids"]}):
        assert torch.equal(model.generate(**given, **options), expected)
    with pytest.raises(UsageError, match="inputs"):
        model.generate(ids(3), inputs=ids(3))
