"""A long prompt is prefilled in chunks: it never allocates S x S or S x vocabulary at once."""

import sys

import pytest

from tests.support.models import TINY
from tests.support.process import succeeds

TOKENS = 16_384

# In a process of its own, because a peak never falls.
SCRIPT = """
import resource, sys, warnings
import torch
from qmix import MixtralForCausalLM

warnings.simplefilter("ignore")  # the prompt passes the tiny model's positions
window = int(sys.argv[3]) or None
model = MixtralForCausalLM.from_pretrained(
    sys.argv[1], device="cpu", dtype="float32", sliding_window=window
)
ids = torch.randint(3, 2000, (1, int(sys.argv[2])), generator=torch.Generator().manual_seed(0))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
model.generate(ids[:, :512], max_new_tokens=2)
before = peak()
out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
print(peak() - before, out.past_key_values.nbytes >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize(
    ("window", "most_mib"), [pytest.param(None, 200, marks=pytest.mark.soak), (1024, 64)]
)
def test_the_peak_of_a_16k_prefill_is_bounded(window, most_mib):
    """Scores of all pairs would be 8 GiB, logits of all positions 128 MiB; the cache is 24 MiB."""
    printed = succeeds(SCRIPT, TINY, TOKENS, window or 0, environment={"OMP_NUM_THREADS": "1"})
    grew, cache = map(int, printed.split())
    print(f"window {window}: peak {grew} MiB over a short prompt's, cache {cache} MiB")
    assert cache == (24 if window is None else 1)
    assert grew < most_mib
