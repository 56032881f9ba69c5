"""The losses by hand, and the values of transformers 4.47.1 and 5.23.0 for one seed."""

import pytest
import torch

from qmix.errors import UsageError
from qmix.nn.losses import (
    classification_loss,
    load_balancing_loss,
    next_token_loss,
    problem_type_of,
)


@pytest.mark.parametrize(
    ("k", "whole", "masked"),
    [(1, 1.05311, 1.03876), (2, 2.08486, 2.06648), (3, 3.14056, 3.12087)],
)
def test_the_balance_of_random_gates_is_that_of_transformers(k, whole, masked):
    """3 layers, 2 rows of 7, 8 experts, three tokens masked (4.38.1: k = 2 only)."""
    torch.manual_seed(0)
    gates = tuple(torch.randn(14, 8) for _ in range(3))
    attention_mask = torch.ones(2, 7)
    attention_mask[0, :3] = 0
    assert abs(float(load_balancing_loss(gates, k)) - whole) < 1e-5
    assert abs(float(load_balancing_loss(gates, k, attention_mask)) - masked) < 1e-5


def test_a_thousand_pads_do_not_move_the_balance():
    torch.manual_seed(0)
    gates = tuple(torch.randn(20, 8) for _ in range(2))
    padded = tuple(torch.cat((torch.randn(1000, 8), gate)) for gate in gates)
    attention_mask = torch.cat((torch.zeros(1, 1000), torch.ones(1, 20)), 1)
    found, expected = load_balancing_loss(padded, 2, attention_mask), load_balancing_loss(gates, 2)
    assert torch.allclose(found, expected, rtol=1e-4)
    assert not torch.allclose(load_balancing_loss(padded, 2), expected, rtol=1e-3)


def test_one_expert_for_all_costs_the_number_of_experts():
    gate = torch.full((10, 8), -50.0)
    gate[:, 3] = 50.0
    assert abs(float(load_balancing_loss((gate,), 1)) - 8) < 1e-4


def test_a_label_is_predicted_by_the_position_before_it():
    logits = torch.full((1, 4, 5), -100.0)
    labels = torch.tensor([[0, 3, 1, 4]])
    for place, label in enumerate((3, 1, 4)):
        logits[0, place, label] = 100.0
    assert float(next_token_loss(logits, labels)) == 0
    logits[0, 1] = 0.0  # this one is a guess among five
    expected = torch.tensor(5.0).log() / 3
    assert torch.allclose(next_token_loss(logits, labels), expected)
    labels[0, 2] = -100
    assert float(next_token_loss(logits, labels)) == 0


@pytest.mark.parametrize("wrong", [5, -1, -101])
def test_labels_outside_the_vocabulary_are_refused(wrong):
    with pytest.raises(UsageError, match=f"labels.*{wrong}"):
        next_token_loss(torch.zeros(1, 3, 5), torch.tensor([[0, wrong, 1]]))


def test_problems_are_told_by_number_and_dtype():
    ids, weights = torch.tensor([1]), torch.tensor([[1.0, 0.0]])
    assert problem_type_of(None, 1, ids) == "regression"
    assert problem_type_of(None, 2, ids) == "single_label_classification"
    assert problem_type_of(None, 2, weights) == "multi_label_classification"
    assert problem_type_of("regression", 2, weights) == "regression"
    with pytest.raises(UsageError, match="problem_type"):
        problem_type_of("guessing", 2, ids)


def test_class_losses_by_hand():
    logits = torch.tensor([[0.0, 0.0], [100.0, -100.0]])
    single = classification_loss("single_label_classification", logits, torch.tensor([1, 0]))
    assert torch.allclose(single, torch.tensor(2.0).log() / 2)
    ignored = classification_loss("single_label_classification", logits, torch.tensor([-100, 0]))
    assert float(ignored) == 0
    squared = classification_loss("regression", logits[:1], torch.tensor([[1.0, 3.0]]))
    assert float(squared) == 5
    binary = classification_loss(
        "multi_label_classification", logits, torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    )
    assert torch.allclose(binary, torch.tensor(2.0).log() / 2)
