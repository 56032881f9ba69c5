"""The page of a comparison shows every figure, and fits its limit of size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qmix.errors import CheckpointError, UsageError
from qmix.evals.quality.comparison import Comparison, ModelResult, ReferenceDistance
from qmix.evals.quality.perplexity import Perplexity, ReferenceScore
from qmix.evals.quality.positions import PositionScore
from qmix.evals.quality.worst_tokens import Prediction, WorstToken
from qmix.evals.report.compare_page import check_count, compare_page
from qmix.evals.report.recorded_speed import read_speeds, speed_section
from qmix.pages import page

LAYERS, EXPERTS = 32, 8


def bits(mixed):
    names = [f"self_attn.{part}_proj" for part in "qkvo"]
    names += [f"block_sparse_moe.experts.{e}.w{w}" for e in range(EXPERTS) for w in (1, 2, 3)]
    return {
        f"model.layers.{layer}.{name}": 8.125 if mixed and (layer + at) % 5 == 0 else 4.25
        for layer in range(LAYERS)
        for at, name in enumerate(names)
    }


def model(index):
    """A model of Mixtral-8x7B's shape with made-up figures."""
    worst = WorstToken(
        window=1,
        position=7,
        kl=2.5,
        before="if a <b> and\n",
        token="</mark>",
        after=" &amp;",
        reference=Prediction(probability=0.5, choice="</mark>", choice_probability=0.5),
        model=Prediction(probability=0.1, choice="x", choice_probability=0.9),
    )
    distance = ReferenceDistance(
        positions=tuple(
            PositionScore(
                start=128 * i,
                stop=128 * i + 128,
                loss=1.4,
                kl=0.01 * index + 0.001 * (i * 7 % 5),
            )
            for i in range(16)
        ),
        layer_errors=tuple(0.02 * index + 0.001 * layer for layer in range(LAYERS)),
        weight_errors={"q_proj": 0.09, "w1": 0.1 + index / 100},
        worst=(worst,) * 8,
    )
    reference = (
        ReferenceScore(
            perplexity=4.1, kl_mean=0.02 / index, kl_median=0.01, kl_p99=0.2, top1_agreement=0.93
        )
        if index
        else None
    )
    return ModelResult(
        path=Path(f"m{index}"),
        name=f"mixtral-{index}",
        nbytes=93_400_000_000 if not index else 24_000_000_000 + index * 700_000_000,
        parameters=46_700_000_000,
        bits=bits(mixed=index == 3),
        score=Perplexity(
            perplexity=4.1 + index / 100,
            stderr=0.03,
            tokens=100_000,
            protocol="windows",
            text_sha256="0" * 64,
            reference=reference,
        ),
        expert_tokens=tuple(
            tuple(1000 + (layer * 13 + e * 29 + index * 5) % 97 for e in range(EXPERTS))
            for layer in range(LAYERS)
        ),
        distance=distance if index else None,
    )


def comparison(count):
    models = tuple(map(model, range(count)))
    return Comparison(models=models, chosen=2, dtype="bfloat16", device="cpu")


@pytest.fixture(scope="module")
def four():
    return page.html(compare_page(comparison(4), "wiki <raw>.txt")).decode()


def test_four_models_of_full_size_fit_two_megabytes(four):
    assert len(four) < 2_000_000


def test_every_section_stands_with_its_figures(four):
    for words in (
        *("Size and divergence", "Size and perplexity", "KL by position in the window"),
        *("Error of the hidden states after each layer", "Error of the weights by kind"),
        *("Worst tokens", "Expert use: A mixtral-0", "Expert use: D less A"),
        *("Bits a weight: D mixtral-3", "wiki &lt;raw&gt;.txt", "4.1300", "0.00667"),
    ):
        assert words in four, words
    assert four.count("<figure>") == four.count("</details>") + 2  # sizes stand in the first table
    assert "Bits a weight: B" not in four  # all alike
    assert "&lt;/mark&gt;" in four


def test_models_without_quantized_weights_or_records_have_fewer_sections():
    two = comparison(2)
    bare = replace(two.models[1].distance, weight_errors={}, worst=())
    other = replace(two.models[1], distance=bare, expert_tokens=two.models[0].expert_tokens)
    drawn = compare_page(replace(two, models=(two.models[0], other)), "t")
    sections = {section.title: section for section in drawn.sections}
    assert sections["Error of the weights"].words == ("No model but A holds quantized weights.",)
    assert not {"Speed", "Bits of each matrix"} & sections.keys()


@pytest.mark.parametrize("count", [1, 9])
def test_too_few_or_too_many_models_are_refused(count):
    with pytest.raises(UsageError, match="2 to 8"):
        check_count(count)


def test_recorded_speeds_are_shown_and_other_documents_refused(tmp_path):
    record = {
        "model": "mixtral-1",
        "device": "NVIDIA X",
        "dtype": "bfloat16",
        "measurements": [
            {"test": "tg128", "batch": 1, "tokens_per_second": 101.25, "deviation": 0.5}
        ],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record))
    (table,) = speed_section(read_speeds(path)).items
    assert table.rows == (("mixtral-1", "tg128", "1", "101.25", "0.50", "bfloat16 on NVIDIA X"),)
    for wrong in ({}, {"measurements": [1]}, {**record, "measurements": [{"test": "x"}]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="not a record of speeds"):
            read_speeds(path)
