"""Write the golden values of one transformers version: logits-VERSION.safetensors beside this file.

    python tests/golden/make_logits.py             # in an environment with that transformers
    python tests/golden/make_logits.py --compare   # the largest difference between the versions
    make goldens                                   # both, in environments that it sets up

Kept as oracle: transformers 4.38.1, 4.47.1 and 5.23.0 (torch 2.13 CPU), eager attention, float32.
Weights and inputs come from tests/support/exact.py, bit for bit, so that no checkpoint is kept.

4.38.1 computes the auxiliary loss under a mask as if every token had two experts (twice the right
value for one, an exception for three; corrected in transformers' PR 29363): those values are left
out of its file.
"""

import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from tests.support import exact  # noqa: E402


def load(config, seed):
    """The model as this transformers version reads it from a classic checkpoint directory."""
    from transformers import MixtralForCausalLM

    tensors = exact.weights(exact.mixtral_shapes(config), seed)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        model, info = MixtralForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"not loaded cleanly: {wrong}")
    count = sum(p.numel() for p in model.parameters())
    if count != sum(t.numel() for t in tensors.values()):
        raise SystemExit("parameters are missing")
    return model.eval()


def version():
    import transformers

    return transformers.__version__


def uncached_greedy(model, prompt):
    """Greedy ids without a cache, and the smallest lead of a chosen id over the second best."""
    row = prompt
    lead = float("inf")
    for _ in range(exact.NEW_TOKENS):
        best = model(input_ids=row, use_cache=False).logits[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        row = torch.cat([row, best.indices[None, :1]], dim=1)
    return row, lead


@torch.no_grad()
def values(config, seed):
    """The golden tensors of one model."""
    model = load(config, seed)
    given, labels, prompt, (batch, mask, batch_labels) = exact.golden_inputs(seed)
    out = model(input_ids=given, output_router_logits=True, labels=labels)
    greedy = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=exact.NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    uncached, lead = uncached_greedy(model, prompt)
    if not torch.equal(greedy, uncached):
        raise SystemExit("cached and uncached greedy ids differ")
    found = {
        "logits": out.logits[0].float(),
        "greedy": greedy[0].to(torch.uint8),
        "loss": out.loss,
        "aux_loss": out.aux_loss,
    }
    if version() != "4.38.1" or config["num_experts_per_tok"] == 2:
        padded = model(
            input_ids=batch, attention_mask=mask, labels=batch_labels, output_router_logits=True
        )
        found |= {"batch_loss": padded.loss, "batch_aux_loss": padded.aux_loss}
    if seed < exact.ROUTER_CASES:
        found["router_logits"] = torch.stack(out.router_logits)
    return {key: value.contiguous() for key, value in found.items()}, lead


def make():
    tensors = {}
    leads = {}
    cases = exact.golden_cases()
    for seed, (name, config) in enumerate(cases.items()):
        found, leads[name] = values(config, seed)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    file = HERE / f"logits-{version()}.safetensors"
    about = {
        "cases": json.dumps(cases),
        "transformers": version(),
        "torch": torch.__version__,
    }
    save_file(tensors, file, metadata=about)
    closest = min(leads, key=leads.__getitem__)
    print(f"{file.name}: {len(cases)} models, {len(tensors)} tensors, {file.stat().st_size} B")
    print(f"smallest lead of a greedy choice: {leads[closest]:.6f} ({closest})")


def compare():
    files = sorted(HERE.glob("logits-*.safetensors"))
    for one, other in pairwise(files):
        with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
            if a.metadata()["cases"] != b.metadata()["cases"]:
                raise SystemExit("the two files describe different models")
        left, right = load_file(one), load_file(other)
        print(f"{one.name} against {other.name}:")
        both = left.keys() & right.keys()
        for kind in sorted({key.rsplit(".", 1)[1] for key in both}):
            keys = [key for key in both if key.endswith(f".{kind}")]
            gap = max(float((left[key].double() - right[key].double()).abs().max()) for key in keys)
            print(f"  {kind}: {len(keys)} tensors, max difference {gap:.3g}")


if __name__ == "__main__":
    compare() if "--compare" in sys.argv[1:] else make()
