"""The losses of the reference page: next token, load balance, classes.

Shape letters: B batch, S sequence, V vocabulary, E experts, C labels. Knows no modules.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.errors import UsageError

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, S, V) against the labels (B, S) one place further on.

    -100 is left out; if nothing is left the mean is NaN, as in transformers.

    Raises:
        UsageError: another shape than the logits', no whole numbers, or a label outside the
            vocabulary.
    """
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

    f_e is the share of tokens that chose e among their top k (summing to k), P_e the mean router
    probability: k at perfect balance.

    Args:
        router_logits: raw, one (B * S, E) a layer.
        attention_mask: (B, S), 0 at padding.
    """
    logits = torch.cat([layer.float() for layer in router_logits])
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities)
    chosen = chosen.scatter(1, probabilities.topk(num_experts_per_tok, -1).indices, 1.0)
    if attention_mask is not None:
        valid = attention_mask.reshape(-1).repeat(len(router_logits)).to(probabilities)[:, None]
        share = (chosen * valid).sum(0) / valid.sum()
        mean = (probabilities * valid).sum(0) / valid.sum()
    else:
        share, mean = chosen.mean(0), probabilities.mean(0)
    return logits.shape[-1] * (share * mean).sum()


def problem_of(declared: object, num_labels: int, labels: Tensor) -> ProblemType:
    """What kind of labels these are: the config's problem_type, else by their number and dtype.

    One label: regression. Several: whole numbers name one class a row, floats weigh each class.

    Raises:
        UsageError: a problem_type that is none of the three.
    """
    for known in get_args(ProblemType):
        if declared == known:
            kind: ProblemType = known
            return kind
    if declared is not None:
        raise UsageError(
            "no such problem",
            where="config.problem_type",
            expected=", ".join(get_args(ProblemType)),
            found=repr(declared)[:80],
        )
    if num_labels == 1:
        return "regression"
    several = labels.is_floating_point()
    return "multi_label_classification" if several else "single_label_classification"


def classification_loss(problem: ProblemType, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of logits (B, C): mean squared error, cross-entropy or binary cross-entropy.

    Args:
        labels: floats (B,) or (B, C) for a regression; ids (B,) of one class a row; floats (B, C).

    Raises:
        UsageError: labels of another shape, or a class that does not exist.
    """
    labels = labels.to(logits.device)
    rows, classes = logits.shape
    if problem == "single_label_classification":
        _check_size(labels, rows, "[batch]")
        return F.cross_entropy(logits, _targets(labels, classes))
    _check_size(labels, rows * classes, f"[batch, {classes}]")
    if problem == "regression":
        return F.mse_loss(logits, labels.view(rows, classes).to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.view(rows, classes).to(logits.dtype))


def _check_size(labels: Tensor, size: int, expected: str) -> None:
    if labels.numel() != size:
        raise UsageError("wrong shape", where="labels", expected=expected, found=list(labels.shape))


def _targets(labels: Tensor, classes: int) -> Tensor:
    """The labels in a row, int64, checked."""
    if labels.is_floating_point() or labels.is_complex():
        raise UsageError(
            "wrong dtype", where="labels", expected="whole numbers", found=labels.dtype
        )
    targets = labels.flatten().long()
    if targets.is_cuda or not targets.numel():  # on a GPU the check would wait for it
        return targets
    low, high = int(targets.masked_fill(targets == -100, 0).min()), int(targets.max())
    if low < 0 or high >= classes:
        raise UsageError(
            "no such label",
            where="labels",
            expected=f"0 to {classes - 1}, or -100 to leave one out",
            found=low if low < 0 else high,
        )
    return targets
