"""Write what one transformers version returns beside logits: page-VERSION.safetensors.

    python tests/golden/make_page.py       # in an environment with that transformers
    make goldens                           # all versions, in environments that it sets up

Hidden states, attentions, padded batches, masks of four axes, fields of the config, sequence
classification. Weights and inputs come from tests/support/exact.py, bit for bit. What a version
cannot do is left out of its file: head_dim came after 4.47.1, masks of four axes and
`output_router_logits` of a classifier after 4.38.1.
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from make_logits import load, version  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tests.support import exact  # noqa: E402


def classifier(config, seed, **changes):
    """The sequence classifier over the same decoder."""
    from transformers import MixtralForSequenceClassification

    tensors = exact.weights(exact.mixtral_shapes(config), seed)
    tensors.pop("lm_head.weight")
    tensors["score.weight"] = exact.score_weight(seed)[: changes.get("num_labels", exact.LABELS)]
    config = {
        **config,
        "architectures": ["MixtralForSequenceClassification"],
        "num_labels": exact.LABELS,
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        return MixtralForSequenceClassification.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager"
        ).eval()


def classes(config, seed):
    """Logits and losses of the three kinds of labels.

    Losses of three rows: in the fourth a pad stands inside the text, and the versions read
    different positions.
    """
    batch, mask = exact.page_batch(seed)
    one, weighed, several = (labels[:3] for labels in exact.page_labels())
    three = {"input_ids": batch[:3], "attention_mask": mask[:3]}
    model = classifier(config, seed)
    found = {"classes": model(input_ids=batch, attention_mask=mask).logits}
    found["class_loss"] = model(**three, labels=one).loss
    model = classifier(config, seed)
    found["several_loss"] = model(**three, labels=several).loss
    model = classifier(config, seed, num_labels=1)
    found["regression"] = model(**three).logits
    found["regression_loss"] = model(**three, labels=weighed).loss
    alone = classifier(config, seed, pad_token_id=None)
    found["classes_without_pad"] = alone(input_ids=batch[2:3]).logits
    embeds = model.get_input_embeddings()(batch[2:3])
    found["regression_of_embeds"] = model(inputs_embeds=embeds).logits
    return found


def details(model, seed):
    """All outputs of one forward, and padded batches with positions of their own."""
    given, *_ = exact.golden_inputs(seed)
    out = model(input_ids=given, output_hidden_states=True, output_attentions=True)
    batch, mask = exact.page_batch(seed)
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    padded = model(input_ids=batch, attention_mask=mask, position_ids=places).logits
    found = {
        "hidden_states": torch.stack(out.hidden_states),
        "attentions": torch.stack(out.attentions),
        "padded": padded.masked_fill(mask[..., None] == 0, 0.0),
    }
    if version() != "4.38.1":
        seen = exact.page_pairs()
        added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        found["pairs"] = model(input_ids=given, attention_mask=added).logits
    return found


@torch.no_grad()
def make():
    tensors = {}
    cases = exact.page_cases()
    for seed, (name, config) in enumerate(cases.items(), exact.PAGE_SEED):
        if name == "head_dim" and not version().startswith("5."):
            continue
        model = load(config, seed)
        given, *_ = exact.golden_inputs(seed)
        found = {"logits": model(input_ids=given).logits[0].float()}
        if name in exact.DETAILED:
            found |= details(model, seed) | classes(config, seed)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in found.items()}
    file = HERE / f"page-{version()}.safetensors"
    about = {"cases": json.dumps(cases), "transformers": version(), "torch": torch.__version__}
    save_file(tensors, file, metadata=about)
    print(f"{file.name}: {len(tensors)} tensors, {file.stat().st_size} B")


if __name__ == "__main__":
    make()
