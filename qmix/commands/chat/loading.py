"""A model loaded for a chat, by the options of the command line: the first one, or another later.

Knows no terminal. torch is imported with the first model, so that a chat asks before it is there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.commands import options
from qmix.commands.chat.saved_chat import ModelIdentity
from qmix.commands.load_bar import Progress
from qmix.commands.options import REUSE, Reuse
from qmix.generation.config import GenerationConfig

if TYPE_CHECKING:
    from qmix.commands.chat.local_model import LocalModel
    from qmix.models.causal_lm import MixtralForCausalLM

_REHEARSED = 3  # tokens: a prompt, a step as it comes, and one that is recorded


@dataclass(frozen=True)
class ChatLoader:
    """Loads models as the command line says.

    Attributes:
        context: in tokens; a model with fewer positions has those. None: see options.Load.context.
        template: see chat_format.
        defaults: of the sampling, where neither the user nor the checkpoint says anything.
        reuse: whether ids are drafted, and where caches of conversations are kept.
    """

    options: options.Load
    context: int | None
    template: str | None
    defaults: GenerationConfig
    reuse: Reuse = REUSE

    def load(
        self, directory: Path, given: GenerationConfig, progress: Progress | None = None
    ) -> tuple["LocalModel", GenerationConfig]:
        """Load a model that lies on this machine, ready to answer.

        Args:
            given: what the user has said of the sampling.
            progress: see qmix.load.

        Returns:
            the model; how it is sampled, and what ends its replies.

        Raises:
            QmixError: see qmix.load.
        """
        from qmix.commands.chat.local_model import LocalModel, ModelSource
        from qmix.formats import open_checkpoint
        from qmix.formats.metadata import read_metadata
        from qmix.models.auto import load
        from qmix.models.heat_record import fingerprint
        from qmix.text.chat_format import chat_format

        positions = read_metadata(directory).config.max_position_embeddings
        asked = None if self.context is None else min(self.context, positions)
        load_options = self.options.parse(max_context=asked)
        prompts = self.reuse.prompts(directory)  # what is wrong with the folder is said first
        model, tokenizer = load(directory, load_options=load_options, progress=progress)
        form = chat_format(tokenizer, self.template)
        config = given.filled_from(model.generation_config).filled_from(self.defaults)
        identity = ModelIdentity(directory.resolve().name, fingerprint(open_checkpoint(directory)))
        rehearse(model)
        context = self.options.context(asked)
        local = LocalModel(
            ModelSource(directory, identity),
            model,
            tokenizer,
            chat_format=form,
            context=None if context is None else min(context, positions),
            prompts=prompts,
        )
        return local, self.reuse.drafting(config.with_ends(form.end_ids), model)


def rehearse(model: "MixtralForCausalLM") -> None:
    """Compile what a GPU's first reply needs, and tune it, so that no reply waits for that."""
    import torch

    from qmix.generation.inputs import GenerationInputs
    from qmix.generation.loop import stream

    if model.device.type != "cuda":
        return
    config = GenerationConfig(max_new_tokens=_REHEARSED, eos_token_id=-1)
    for _ in stream(model, GenerationInputs(torch.zeros(1, 2, dtype=torch.int64), config)):
        pass
