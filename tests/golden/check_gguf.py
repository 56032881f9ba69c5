"""Compare qmix's logits on evals/tiny in GGUF with llama.cpp's; exit 1 if they differ.

    .oracles/gguf/bin/python tests/golden/make_gguf.py --tiny OUT IDS...
    .venv/bin/python tests/golden/check_gguf.py OUT

KL(qmix || llama.cpp) in nats a token, as median, mean and largest: with the file's weights in
float32, and with the file as it is, where llama.cpp rounds activations to 8 bits; beside it how far
that takes llama.cpp from itself. The median of the first must stay below 1e-5. Its mean does not
decide: one token between two experts, whose router's logits differ by 2e-4, takes it to 1e-4.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from qmix.models.causal_lm import MixtralForCausalLM

MOST = 1e-5


def divergence(reference, other):
    """(median, mean, largest) of the tokens' KL."""
    exact, changed = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    each = (exact.exp() * (exact - changed)).sum(-1)
    return float(each.median()), float(each.mean()), float(each.max())


def main(folder):
    failed = False
    for path in sorted(folder.glob("*.safetensors")):
        golden = load_file(path)
        file = path.with_suffix(".gguf")
        model = MixtralForCausalLM.from_pretrained(file, dtype="float32", device="cpu")
        with torch.no_grad():
            ours = model(golden["prompt"][None]).logits[0]
        exact, as_run = divergence(ours, golden["exact"]), divergence(ours, golden["logits"])
        itself = divergence(golden["exact"], golden["logits"])
        failed |= not exact[0] < MOST
        columns = {"in float32": exact, "as it is": as_run, "llama.cpp alone": itself}
        for what, figures in columns.items():
            print(f"{path.stem:7} {what:16}", *(f"{figure:.1e}" for figure in figures))
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
