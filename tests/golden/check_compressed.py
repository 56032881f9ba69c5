"""Whether transformers 5 reads a compressed-tensors checkpoint that qmix wrote: the same logits.

    .oracles/ct/bin/python tests/golden/check_compressed.py DIR

Tried with transformers 5.23.0 and compressed-tensors 0.20.0. Exits 1 at a difference. The model is
held in memory twice in float32: meant for small ones.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent)]

import torch  # noqa: E402
import transformers  # noqa: E402

from qmix.models.causal_lm import MixtralForCausalLM  # noqa: E402
from tests.support import exact  # noqa: E402

KL = 1e-4  # nats a token; transformers multiplies codes and scales in the scales' dtype


def main(directory):
    theirs, report = transformers.MixtralForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    ours = MixtralForCausalLM.from_pretrained(directory, torch_dtype=torch.float32, device="cpu")
    ids = exact.ids(64, ours.config.vocab_size, 3)[None]
    with torch.no_grad():
        expected, found = ours(input_ids=ids).logits, theirs(ids).logits
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    gap = float((found - expected).abs().max())
    wrong = {key: sorted(names)[:3] for key, names in report.items() if names}
    print(f"transformers {transformers.__version__}: not loaded as they are: {wrong}")
    print(
        f"logits: largest difference {gap:.2e} of {float(expected.abs().max()):.1f}, "
        f"KL mean {float(kl.mean()):.1e}, largest {float(kl.max()):.1e} nats"
    )
    return int(bool(wrong) or not float(kl.max()) < KL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
