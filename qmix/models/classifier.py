"""MixtralForSequenceClassification: a linear layer on one position of each row.

Knows no bits and no files. Shape letters as in qmix.nn.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.kernels.backend import preferred
from qmix.models.inputs import ClassifierInputs, takes
from qmix.models.mixtral import MixtralModel
from qmix.models.pretrained import PreTrainedModel
from qmix.nn.linear import Linear, initialise
from qmix.nn.losses import classification_loss, problem_type_of
from qmix.nn.outputs import SequenceClassifierOutputWithPast


class MixtralForSequenceClassification(PreTrainedModel):
    """The decoder with a linear layer on one position of each row.

    That position is the rightmost id that is not the config's pad_token_id, or 0 in a row of
    padding alone. Without a pad_token_id, and for inputs_embeds, it is the last of the row.
    (transformers 4.38.1 takes the position before the first pad, which differs where a pad id
    stands inside the text.) The number of classes is the config's num_labels.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MixtralModel(config)
        self.score = Linear(config.hidden_size, config.num_labels)
        initialise(self.score, config)

    def initialise_missing(self, device: torch.device, dtype: torch.dtype) -> None:
        """Initialise the classes at random, with a warning, for a checkpoint that has none."""
        weight = self.score.weight
        if weight is None or not weight.is_meta:
            return
        warnings.warn(
            "the checkpoint has no score.weight: the classes are random until they are trained",
            stacklevel=2,
        )
        self.score.weight = nn.Parameter(torch.empty(weight.shape, device=device, dtype=dtype))
        initialise(self.score, self.config)

    @takes(ClassifierInputs)
    def forward(
        self, inputs: ClassifierInputs
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """One pass over (B, S) new positions; arguments as in MixtralModel.forward.

        Args:
            labels: (B,) class ids, or floats (B,) or (B, C). The config's problem_type chooses the
                loss. Without one, a single label means regression (mean squared error), class ids
                mean cross-entropy and floats binary cross-entropy; the config keeps that choice.

        Raises:
            UsageError: as MixtralModel.forward; several rows without a pad_token_id; labels that
                do not fit.
        """
        out = self.model(**inputs.for_decoder())
        hidden = out.last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        with preferred(self.model.backend):
            logits = self.score(hidden[rows, self._last(inputs.input_ids, hidden)]).float()
        loss = None
        if inputs.labels is not None:
            declared = getattr(self.config, "problem_type", None)
            problem_type = problem_type_of(declared, self.config.num_labels, inputs.labels)
            if declared is None:
                self.config.update({"problem_type": problem_type})
            loss = classification_loss(problem_type, logits, inputs.labels)
        return self._returned(
            inputs.return_dict,
            SequenceClassifierOutputWithPast(
                loss=loss,
                logits=logits,
                past_key_values=out.past_key_values,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                router_logits=out.router_logits,
            ),
        )

    def _last(self, input_ids: Tensor | None, hidden: Tensor) -> Tensor:
        """The position in each row from which the classes are read, (B,)."""
        batch, new = hidden.shape[:2]
        pad = self.config.pad_token_id
        if pad is None or pad < 0:
            if batch > 1:
                raise UsageError(
                    "the last position of several rows is unknown without a padding id",
                    where="config.pad_token_id",
                    remedy="Load the model with pad_token_id=, or pass one row at a time.",
                )
        elif input_ids is not None:
            positions = torch.arange(new, device=hidden.device)
            return (positions * (input_ids.to(hidden.device) != pad)).argmax(-1)
        return torch.full((batch,), new - 1, device=hidden.device)
