"""A model loaded for a chat, by the options of the command line: the first one, or another later.

Knows no terminal but the bar that is shown meanwhile.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from qmix import GenerationConfig, LlamaTokenizer, MixtralForCausalLM
from qmix.commands import options
from qmix.commands.chat.saved_chat import ModelIdentity
from qmix.commands.load_bar import load_bar
from qmix.commands.session import Session
from qmix.formats import open_checkpoint
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.models.auto import load
from qmix.models.heat_record import fingerprint
from qmix.text.chat_format import ChatFormat, chat_format

USER = (options.GIVEN, "/set", "/load")  # whose settings outlive a change of the model
_REHEARSED = 3  # tokens: a prompt, a step as it comes, and one that is recorded


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, and which one it is."""

    directory: Path
    identity: ModelIdentity


@dataclass(frozen=True)
class LoadedChat:
    """A model with all that a chat needs of it.

    Attributes:
        config: how it is sampled, and what ends its replies.
    """

    source: ModelSource
    model: MixtralForCausalLM
    tokenizer: LlamaTokenizer
    form: ChatFormat
    config: GenerationConfig

    def session(self, *, context: int | None, system: str | None) -> Session:
        """A conversation without turns.

        Raises:
            UsageError: see Session.
        """
        return Session(
            self.model,
            self.tokenizer,
            self.config,
            chat_format=self.form,
            system=system,
            context=context,
        )


@dataclass(frozen=True)
class ChatLoader:
    """Loads models as the command line says.

    Attributes:
        context: in tokens; None: each model's.
        template: see chat_format.
        defaults: of the sampling, where neither the user nor the checkpoint says anything.
        quiet: show no bar.
    """

    options: options.Load
    context: int | None
    template: str | None
    defaults: GenerationConfig
    quiet: bool = False

    def load(self, directory: Path, given: GenerationConfig) -> LoadedChat:
        """Load a model that lies on this machine, ready to answer.

        Args:
            given: what the user has said of the sampling.

        Raises:
            QmixError: see qmix.load.
        """
        load_options = self.options.parse(max_context=self.context)
        with load_bar(quiet=self.quiet) as show:
            model, tokenizer = load(directory, load_options=load_options, progress=show)
        form = chat_format(tokenizer, self.template)
        config = given.filled_from(model.generation_config).filled_from(self.defaults)
        checkpoint = open_checkpoint(directory)
        rehearse(model)
        return LoadedChat(
            ModelSource(
                directory, ModelIdentity(directory.resolve().name, fingerprint(checkpoint))
            ),
            model,
            tokenizer,
            form,
            config.with_ends(form.end_ids),
        )


def rehearse(model: MixtralForCausalLM) -> None:
    """Compile what a GPU's first reply needs, and tune it, so that no reply waits for that."""
    if model.device.type != "cuda":
        return
    config = GenerationConfig(max_new_tokens=_REHEARSED, eos_token_id=-1)
    for _ in stream(model, GenerationInputs(torch.zeros(1, 2, dtype=torch.int64), config)):
        pass
