"""A model loaded for a chat, by the options of the command line: the first one, or another later.

Knows no terminal but the bar that is shown meanwhile.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from qmix import GenerationConfig, MixtralForCausalLM
from qmix.commands import options
from qmix.commands.chat.local_model import LocalModel, ModelSource
from qmix.commands.chat.saved_chat import ModelIdentity
from qmix.commands.load_bar import load_bar
from qmix.commands.options import REUSE, Reuse
from qmix.formats import open_checkpoint
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.models.auto import load
from qmix.models.heat_record import fingerprint
from qmix.text.chat_format import chat_format

_REHEARSED = 3  # tokens: a prompt, a step as it comes, and one that is recorded


@dataclass(frozen=True)
class ChatLoader:
    """Loads models as the command line says.

    Attributes:
        context: in tokens; a model with fewer positions has those. None: each model's.
        template: see chat_format.
        defaults: of the sampling, where neither the user nor the checkpoint says anything.
        quiet: show no bar.
        reuse: whether ids are drafted, and where caches of conversations are kept.
    """

    options: options.Load
    context: int | None
    template: str | None
    defaults: GenerationConfig
    quiet: bool = False
    reuse: Reuse = REUSE

    def load(self, directory: Path, given: GenerationConfig) -> tuple[LocalModel, GenerationConfig]:
        """Load a model that lies on this machine, ready to answer.

        Args:
            given: what the user has said of the sampling.

        Returns:
            the model; how it is sampled, and what ends its replies.

        Raises:
            QmixError: see qmix.load.
        """
        load_options = self.options.parse(max_context=self.context)
        with load_bar(quiet=self.quiet) as show:
            model, tokenizer = load(directory, load_options=load_options, progress=show)
        form = chat_format(tokenizer, self.template)
        config = given.filled_from(model.generation_config).filled_from(self.defaults)
        identity = ModelIdentity(directory.resolve().name, fingerprint(open_checkpoint(directory)))
        rehearse(model)
        limit = model.config.max_position_embeddings
        local = LocalModel(
            ModelSource(directory, identity),
            model,
            tokenizer,
            chat_format=form,
            context=None if self.context is None else min(self.context, limit),
            prompts=self.reuse.prompts(directory),
        )
        return local, self.reuse.drafting(config.with_ends(form.end_ids), model)


def rehearse(model: MixtralForCausalLM) -> None:
    """Compile what a GPU's first reply needs, and tune it, so that no reply waits for that."""
    if model.device.type != "cuda":
        return
    config = GenerationConfig(max_new_tokens=_REHEARSED, eos_token_id=-1)
    for _ in stream(model, GenerationInputs(torch.zeros(1, 2, dtype=torch.int64), config)):
        pass
