"""The losses of Hugging Face's Mixtral: next token, load balance, classes.

Knows no modules. Shape letters: see qmix.nn.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.errors import UsageError, wrong_type
from qmix.nn.process import capturing

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, S, V) against labels (B, S), each of the next position.

    Labels of -100 are ignored; if all are, the mean is NaN, as in transformers.

    Raises:
        UsageError: labels of another shape than the logits, of another dtype than an integer, or
            outside the vocabulary.
    """
    check_labels(labels)
    if labels.shape != logits.shape[:2]:
        raise UsageError(
            "wrong shape", where="labels", expected=list(logits.shape[:2]), found=list(labels.shape)
        )
    targets = _targets(labels[:, 1:].to(logits.device), logits.shape[-1])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets)


def load_balancing_loss(
    router_logits: tuple[Tensor, ...],
    num_experts_per_tok: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """`E * sum_e f_e P_e` over all layers' tokens (Switch Transformer, arXiv 2101.03961, eq. 4).

    f_e is the fraction of tokens that have e among their top k experts (the fractions sum to k),
    P_e the mean router probability. At perfect balance the loss is k.

    Args:
        router_logits: before the softmax, one (B * S, E) per layer.
        num_experts_per_tok: k.
        attention_mask: (B, S), 0 at padding; None: no padding.
    """
    logits = torch.cat([layer.float() for layer in router_logits])
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities)
    chosen = chosen.scatter(1, probabilities.topk(num_experts_per_tok, -1).indices, 1.0)
    if attention_mask is not None:
        valid = attention_mask.reshape(-1).repeat(len(router_logits)).to(probabilities)[:, None]
        fractions = (chosen * valid).sum(0) / valid.sum()
        mean = (probabilities * valid).sum(0) / valid.sum()
    else:
        fractions, mean = chosen.mean(0), probabilities.mean(0)
    return logits.shape[-1] * (fractions * mean).sum()


def problem_type_of(declared: object, num_labels: int, labels: Tensor) -> ProblemType:
    """The config's problem_type; without one, what the number and dtype of the labels say.

    One label: regression. Several: integers name one class per row, floats weigh each class.

    Args:
        declared: the config's problem_type, or None.

    Raises:
        UsageError: a problem_type that is none of the three; labels that are not a tensor.
    """
    check_labels(labels)
    for known in get_args(ProblemType):
        if declared == known:
            problem_type: ProblemType = known
            return problem_type
    if declared is not None:
        raise UsageError(
            "unknown problem_type",
            where="config.problem_type",
            expected=", ".join(get_args(ProblemType)),
            found=repr(declared)[:80],
        )
    if num_labels == 1:
        return "regression"
    if labels.is_floating_point():
        return "multi_label_classification"
    return "single_label_classification"


def classification_loss(problem_type: ProblemType, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of logits (B, C): mean squared error, cross-entropy or binary cross-entropy.

    Args:
        labels: for a regression floats (B,) or (B, C); for a single label integers (B,), one class
            per row; for multiple labels floats (B, C).

    Raises:
        UsageError: labels of another shape, or a class that does not exist.
    """
    check_labels(labels)
    labels = labels.to(logits.device)
    rows, classes = logits.shape
    if problem_type == "single_label_classification":
        _check_size(labels, rows, "[batch]")
        return F.cross_entropy(logits, _targets(labels, classes))
    _check_size(labels, rows * classes, f"[batch, {classes}]")
    if problem_type == "regression":
        return F.mse_loss(logits, labels.view(rows, classes).to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.view(rows, classes).to(logits.dtype))


def check_labels(labels: object) -> None:
    """Refuse labels that are not a tensor.

    Raises:
        UsageError: another type.
    """
    if not isinstance(labels, Tensor):
        raise wrong_type("labels", "a tensor", labels)


def _check_size(labels: Tensor, size: int, expected: str) -> None:
    if labels.numel() != size:
        raise UsageError("wrong shape", where="labels", expected=expected, found=list(labels.shape))


def _targets(labels: Tensor, classes: int) -> Tensor:
    """The labels, int64, flattened and checked."""
    if labels.is_floating_point() or labels.is_complex():
        raise UsageError("wrong dtype", where="labels", expected="integers", found=labels.dtype)
    targets = labels.flatten().long()
    if not targets.numel() or capturing(targets):
        return targets
    low, high = int(targets.masked_fill(targets == -100, 0).min()), int(targets.max())
    if low < 0 or high >= classes:
        raise UsageError(
            "no such label",
            where="labels",
            expected=f"0 to {classes - 1}, or -100 to ignore one",
            found=low if low < 0 else high,
        )
    return targets
