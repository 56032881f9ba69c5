"""Every scored token of a text: its loss, and how far a model is from a reference there.

Shape letters: N scored tokens. Knows nothing of averages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.evals.quality.layer_streaming import Scorer
from qmix.evals.quality.windows import ScoringWindows

_POSITIONS = 512  # compared at a time: 66 MB of float32 log-probabilities at V = 32000


@dataclass(frozen=True, eq=False)
class Divergences:
    """A model beside a reference, token by token.

    Attributes:
        reference_losses: the reference's loss of each token, float32 (N,).
        kl: KL(reference || model) in nats of the distribution of each token, float32 (N,).
        agreed: whether both find the same token most likely, bool (N,).
    """

    reference_losses: Tensor
    kl: Tensor
    agreed: Tensor


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The scored tokens of all windows, in order.

    Attributes:
        window, position: where each token stands, int64 (N,).
        losses: negative log-likelihoods in nats, float32 (N,).
        greedy: whether the model finds the text's token most likely, bool (N,).
        divergences: None without a reference.
    """

    window: Tensor
    position: Tensor
    losses: Tensor
    greedy: Tensor
    divergences: Divergences | None


def token_scores(
    windows: ScoringWindows, scorer: Scorer, reference: Scorer | None = None
) -> TokenScores:
    """Score every target of the windows; both models have run all layers."""
    losses, greedy, reference_losses, kl, agreed = [], [], [], [], []
    for index, row in enumerate(windows.ids):
        places = windows.scored[index].nonzero()[:, 0]
        for start in range(0, len(places), _POSITIONS):
            positions = places[start : start + _POSITIONS]
            targets = row[positions]
            predicted = scorer.log_probabilities(index, positions - 1).cpu()
            losses.append(-predicted.gather(1, targets[:, None])[:, 0])
            greedy.append(predicted.argmax(-1) == targets)
            if reference is None:
                continue
            expected = reference.log_probabilities(index, positions - 1).cpu()
            reference_losses.append(-expected.gather(1, targets[:, None])[:, 0])
            kl.append((expected.exp() * (expected - predicted)).sum(-1))
            agreed.append(expected.argmax(-1) == predicted.argmax(-1))
    window, position = windows.scored.nonzero(as_tuple=True)
    compared = None
    if reference is not None:
        compared = Divergences(torch.cat(reference_losses), torch.cat(kl), torch.cat(agreed))
    return TokenScores(window, position, torch.cat(losses), torch.cat(greedy), compared)
