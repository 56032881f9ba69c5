"""The tiny model's configuration and training plan: with the text, all that its weights depend on.

Knows nothing of the loop that follows the plan.
"""

import math
from dataclasses import dataclass

from qmix.config import MixtralConfig
from qmix.evals.training.train_tokenizer import BOS, EOS, VOCABULARY

CONFIG = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rope_theta=1e4,  # at 1e6 most of the 16 rotary pairs would not turn within 1024 positions
    initializer_range=0.04,
    router_aux_loss_coef=0.02,
    bos_token_id=BOS,
    eos_token_id=EOS,
    dtype="bfloat16",
)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How the model is trained.

    Attributes:
        batch: windows of a step; 4 at half the steps ended 0.4 nats worse after 0.5 M tokens.
        window: tokens of a window.
        chat_share: the share of tokens that are questions and answers in the [INST] format.
        report_every, score_every: steps between two reports, and between two scores.
    """

    steps: int = 3000
    seed: int = 0
    batch: int = 2
    window: int = CONFIG.max_position_embeddings
    peak_rate: float = 2e-3
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    chat_share: float = 0.15
    report_every: int = 50
    score_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate: a linear warm-up, then a cosine down to a hundredth of the peak."""
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
