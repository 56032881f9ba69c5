"""Small models from a seed, and where the checkout and its trained model lie."""

import shutil
from contextlib import contextmanager

import torch

from qmix.config import MixtralConfig
from qmix.formats import open_checkpoint
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.options import LoadOptions
from qmix.quantize.streaming import quantize_streaming
from qmix.weights.scheme import NF4, Recipe
from tests.support.house import ROOT

TINY = ROOT / "evals" / "tiny"
SHARED = ROOT.parent / "shared"
GOLDEN = ROOT / "tests" / "golden"


def small_config(**changes):
    """Three layers, eight experts, widths whose blocks straddle rows (96 is no multiple of 64)."""
    values = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return MixtralConfig(**{**values, **changes})


def small_model(**changes):
    torch.manual_seed(0)
    return MixtralForCausalLM(small_config(**changes)).eval()


def write_dense(folder, **changes):
    """A small bfloat16 checkpoint with the tiny model's tokenizer."""
    model = small_model(**{"vocab_size": 2048, "eos_token_id": 2, **changes})
    model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    return folder


def quantized(source, out, scheme=NF4, *, method="nf4", **options):
    """The checkpoint `out` with experts and attention of `source` in a scheme."""
    recipe = Recipe.uniform(scheme, attention=True)
    quantize_streaming(source, out, recipe, method=method, **options)
    return out


def ids(length, batch=1, seed=1):
    """Token ids (batch, length) of the small model, none of them special."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def load_in_tiers(directory, device, tiers):
    """A checkpoint's model with its experts in the given tiers instead of planned ones."""
    checkpoint = open_checkpoint(directory)
    return MixtralForCausalLM.from_checkpoint(checkpoint, LoadOptions(device=device), tiers=tiers)


def read_weights(folder):
    """Read every linear layer's weight of a checkpoint."""
    checkpoint = open_checkpoint(folder)
    for tensor in checkpoint.tensors:
        if tensor.linear:
            checkpoint.weight(tensor)


@contextmanager
def threads(count):
    """Torch's threads within the block: sums of many threads are added in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
