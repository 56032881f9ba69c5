"""What the steps of the acceptance command share: a device, the widths, a clock, and the model.

In a rehearsal the device is the CPU, the widths are tiny, and Triton's interpreter runs the
kernels, so that every line of a step runs without a GPU. Knows no step.
"""

import gc
import os
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from qmix.config import MixtralConfig
from qmix.evals.steps.graph_timing import CUDA_CLOCK, HOST_CLOCK, Clock
from qmix.evals.timing import bandwidth, random_model
from qmix.evals.timing.bench import BenchTest
from qmix.evals.training import tiny_model
from qmix.generation.tuner import rows_for
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.quantization import BitsAndBytesConfig
from qmix.nn.decoder import Decoder
from qmix.nn.linear import Linear

_FREE_PART = 0.85  # of the device's free memory, for the weights of a model


class NotHereError(Exception):
    """A step cannot run on this machine; the argument says what is missing."""


@dataclass(frozen=True)
class Widths:
    """The shapes of everything that is measured, and in how many copies.

    Attributes:
        turns: copies of the weights that take turns, because one layer's chosen experts (182 MB
            for a token) would partly stay in the 50 MB cache of an H100.
        most_tokens: no measurement has more tokens, columns of the cache or rows than this allows.
    """

    config: MixtralConfig
    dtype: torch.dtype
    turns: int
    repetitions: int
    most_tokens: int

    @property
    def expert_weights(self) -> int:
        """Number of weights of an expert."""
        return 3 * self.config.hidden_size * self.config.intermediate_size


# Mixtral-8x7B, with positions for 32k of context and the tokens after it.
MIXTRAL = Widths(MixtralConfig(max_position_embeddings=65536), torch.bfloat16, 4, 3, 1 << 20)
_REHEARSED = Widths(
    MixtralConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        max_position_embeddings=64,
    ),
    torch.float32,  # the interpreter multiplies bfloat16 wrongly
    turns=1,
    repetitions=1,
    most_tokens=4,
)


class ChosenTunings:
    """The tunings that steps of this command found, by number of rows; else the defaults."""

    def __init__(self) -> None:
        self.by_rows: dict[int, StepTuning] = {}

    def of(self, model: Decoder, head: Linear, batch: int) -> StepTuning:
        """The tuning of a step with `batch` rows."""
        return self.by_rows.get(rows_for(batch) or batch, UNTUNED)


class Setting:
    """A device and what is measured on it.

    Attributes:
        can_launch: whether the kernels run here.
        clock: of the device.
    """

    def __init__(
        self, device: torch.device, widths: Widths, clock: Clock, *, is_rehearsal: bool = False
    ) -> None:
        self.device, self.widths, self.clock = device, widths, clock
        self.is_rehearsal = is_rehearsal
        self.can_launch = is_rehearsal or device.type == "cuda"
        self._model: MixtralForCausalLM | None = None
        self._weights = ""
        self._tunings: dict[str, ChosenTunings] = {}

    @classmethod
    def real(cls) -> "Setting":
        """This machine's GPU, or its CPU, on which few steps run."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(device, MIXTRAL, CUDA_CLOCK if device.type == "cuda" else HOST_CLOCK)

    @classmethod
    def rehearsed(cls) -> "Setting":
        """The CPU in place of a GPU; TRITON_INTERPRET must be 1."""
        assert os.environ.get("TRITON_INTERPRET") == "1"
        return cls(torch.device("cpu"), _REHEARSED, HOST_CLOCK, is_rehearsal=True)

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes a second of a copy in the device's memory: the bound of all that reads weights."""
        return bandwidth.copy_bandwidth(self.device, (1 << 20) if self.is_rehearsal else None)

    def holds(self, weights: str) -> bool:
        """Whether the model with these weights is made already."""
        return self._model is not None and self._weights == weights

    def model(self, weights: str) -> MixtralForCausalLM:
        """The whole model with random weights, `nf4` or `int4`; kept until another is wanted.

        On a device that does not hold all of its layers it has as many as fit. A rehearsal takes
        the tiny model, since the packed layout has no kernels on a CPU.
        """
        if self._model is None or not self.holds(weights):
            self.release()
            if self.is_rehearsal:
                self._model = MixtralForCausalLM.from_pretrained(
                    tiny_model.directory(),
                    device=self.device,
                    quantization_config=BitsAndBytesConfig(load_in_4bit=True),
                )
            else:
                self._model = self.packed_model(weights)
            self._weights = weights
            self._model.static_decoders.tuner = self.tunings(weights)
        return self._model

    def tunings(self, weights: str) -> ChosenTunings:
        """How decode steps with these weights are launched. Nothing is searched for unasked."""
        return self._tunings.setdefault(weights, ChosenTunings())

    def packed_model(self, weights: str, layers: int | None = None) -> MixtralForCausalLM:
        """A model in the packed layout, made on the device; `layers` of it, or what fits."""
        config, tile_format = self.widths.config, random_model.FORMATS[weights]
        most = config.num_hidden_layers if layers is None else layers
        config = config.replace(num_hidden_layers=min(most, self._layers_that_fit(weights)))
        return random_model.build_random_model(
            config, tile_format, self.device, dtype=self.widths.dtype
        )

    def release(self) -> None:
        """Free the model's memory."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def test(self, test: BenchTest) -> BenchTest:
        """The test, or in a rehearsal a short one of its kind."""
        most = self.widths.most_tokens
        return replace(
            test,
            tokens=min(test.tokens, most),
            depth=min(test.depth, most),
            batch=min(test.batch, most),
        )

    def _layers_that_fit(self, weights: str) -> int:
        config = self.widths.config
        if self.device.type != "cuda":
            return config.num_hidden_layers
        free, _ = torch.cuda.mem_get_info(self.device)
        bits = 4.26 if weights == "nf4" else 4.13
        layer = config.num_local_experts * self.widths.expert_weights * bits / 8 * 1.02
        return max(1, int(_FREE_PART * free / layer))
