"""RemoteModel: a ChatModel behind a server that speaks OpenAI's API.

A server of qmix tells more than others: tokens, prompts, probabilities, experts. What a server does
not tell is refused by name. Knows no HTTP and no terminal.
"""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from qmix.commands.chat import settings
from qmix.commands.chat.chat_model import Answer, Prompt, ServerError, TokenChoice, Turn
from qmix.commands.chat.reply_stats import Finish, ReplyStats
from qmix.commands.chat.saved_chat import ModelIdentity
from qmix.commands.chat.server import Document, Server
from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig

_ALTERNATIVES = 5
# Settings by OpenAI's names; top_k, min_p and repetition_penalty are what other servers added.
_FIELDS: Mapping[str, str] = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "seed": "seed",
    "max_new_tokens": "max_tokens",
    "stop_strings": "stop",
}
# Stand for what the server decides; they are never sent.
_ITS_OWN: Mapping[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": None,
    "seed": None,
}
_FINISHES: Mapping[str, Finish] = {"stop": "stop", "length": "length"}


def filled(given: GenerationConfig) -> GenerationConfig:
    """What the user has said of the sampling; all else is the server's to choose."""
    return given.filled_from(GenerationConfig().updated(_ITS_OWN, by=settings.SERVER))


class RemoteModel:
    """One model of a server. See ChatModel.

    Args:
        name: which of its models; None: the only one.

    Raises:
        ServerError: nobody answers, or in another language.
        UsageError: it has no such model, or several; it wants a key.
    """

    template = None  # the server's, which does not say

    def __init__(self, server: Server, name: str | None = None) -> None:
        self.server = server
        described = _chosen(server.models(), name, server.url)
        self.identity = ModelIdentity(described["id"], "")
        length = described.get("max_model_len")
        self.context = length if type(length) is int and length > 0 else None
        self.is_qmix = described.get("owned_by") == "qmix"
        self.wants_choices = self.is_qmix
        self.wants_experts = False  # costs a GPU its recorded steps: only once somebody looks
        self.wants_usage = True  # until it turns out that it refuses to tell, as Mistral's API does
        self._tokenizes = True  # until it turns out that it does not

    def facts(self) -> tuple[str, ...]:
        """See ChatModel."""
        context = "unknown" if self.context is None else f"{self.context:,}"
        name = self.identity.name  # llama.cpp's servers give the path of a file
        shown = name.rpartition("/")[2] if name.startswith("/") else name
        return (shown or name, self.server.url, f"context {context}")

    def prompt(self, system: str | None, turns: Sequence[Turn]) -> Prompt:
        """See ChatModel. The ids of a reply that goes on are not known, but their number is."""
        begun = turns[-1].answer[turns[-1].hidden :]
        messages = self.messages(system, turns)
        ids = self._ids(messages=messages[: len(messages) - bool(begun)])
        tokens = None if ids is None else len(ids) + len(begun)
        return Prompt(system, tuple(turns), () if begun else ids or (), tokens)

    def reply(self, prompt: Prompt, config: GenerationConfig) -> "RemoteReply":
        """See ChatModel."""
        return RemoteReply(self, prompt, config)

    def text(self, answer: Answer) -> str:
        """See ChatModel."""
        return "".join(map(str, answer))

    def answer(self, text: str) -> Answer:
        """See ChatModel."""
        return (text,)

    def length(self, answer: Answer) -> int | None:
        """See ChatModel."""
        return self.count(self.text(answer))

    def tokens(self, text: str) -> list[tuple[str, int]]:
        """See ChatModel."""
        asked = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        found = self._tokenized(**asked)
        pieces = None if found is None else found.get("token_strs")
        if found is None or not isinstance(pieces, list):
            raise UsageError("the server does not tell the tokens of a text")
        return list(zip(map(str, pieces), found["tokens"], strict=False))

    def count(self, text: str) -> int | None:
        """See ChatModel."""
        ids = self._ids(prompt=text, add_special_tokens=False)
        return None if ids is None else len(ids)

    def prompt_text(self, prompt: Prompt) -> str:
        """See ChatModel."""
        body = {"model": self.identity.name, "tokens": prompt.ids}
        found = self.server.answer("/detokenize", body) if prompt.ids else None
        if found is None or not isinstance(found.get("prompt"), str):
            raise UsageError("the server does not tell what it made of this prompt")
        text: str = found["prompt"]
        return text

    def bound(self, stats: ReplyStats) -> None:
        """See ChatModel: its memory is another machine's."""

    def keep_cache(self) -> int:
        """See ChatModel: the server's caches are its own."""
        return 0

    def release(self) -> None:
        """See ChatModel: whoever made the server closes it."""

    def messages(self, system: str | None, turns: Sequence[Turn]) -> list[dict[str, str]]:
        """A conversation as the API takes it, with what there is of the last answer."""
        found = [("system", system)] if system else []
        for turn in turns:
            found += [("user", turn.user), ("assistant", self.text(turn.answer[turn.hidden :]))]
        if not turns[-1].answer[turns[-1].hidden :]:
            found.pop()
        return [{"role": role, "content": text} for role, text in found]

    def _ids(self, **asked: Any) -> tuple[int, ...] | None:
        found = self._tokenized(**asked)
        return None if found is None else tuple(found["tokens"])

    def _tokenized(self, **asked: Any) -> Document | None:
        """What /tokenize says, as vLLM has it; None if it is not there."""
        if not self._tokenizes:
            return None
        found = self.server.answer("/tokenize", {"model": self.identity.name, **asked})
        ids = None if found is None else found.get("tokens")
        if found is None or not isinstance(ids, list) or found.get("count") != len(ids):
            self._tokenizes = False
            return None
        return found


class RemoteReply:
    """See Reply. Leaving its iteration closes the connection, and the server stops."""

    choices_are = "before temperature and filters"

    def __init__(self, model: RemoteModel, prompt: Prompt, config: GenerationConfig) -> None:
        self.prompt = prompt
        self._model = model
        self._config = config
        self._texts: list[str] = []
        self._choices: list[TokenChoice] = []
        self._experts: list[list[int]] | None = None
        self._usage: Mapping[str, Any] = {}
        self._finish: str | None = None
        self._first_token_s = self._elapsed_s = 0.0

    def __iter__(self) -> Iterator[str]:
        """See Reply.

        Raises:
            ServerError: nobody answers, or not to the end.
            UsageError: the server refuses the request.
        """
        begun = time.monotonic()
        try:
            with closing(self._chunks()) as chunks:
                for chunk in chunks:
                    text = self._taken(chunk)
                    if text:
                        self._first_token_s = self._first_token_s or time.monotonic() - begun
                        self._texts.append(text)
                        yield text
        except ServerError as error:
            raise self._kept(error) from None
        finally:
            self._elapsed_s = time.monotonic() - begun
        if self._finish is None:
            what = "the reply ended in the middle" if self._texts else "the server sent no reply"
            raise self._kept(ServerError(what, where=self._model.server.url))

    @property
    def answer(self) -> Answer:
        """See Reply."""
        return tuple(self._texts)

    def stats(self) -> ReplyStats:
        """See Reply."""
        details = self._usage.get("prompt_tokens_details") or {}
        prompt = _number(self._usage.get("prompt_tokens"), self.prompt.tokens)
        new = _number(self._usage.get("completion_tokens"), None) or len(self._texts)
        used, limit = None if prompt is None else prompt + new, self._model.context
        finish: Finish = _FINISHES.get(self._finish or "", "stopped")
        if finish == "length" and used is not None and limit is not None and used >= limit:
            finish = "context"
        return ReplyStats(
            prompt_tokens=prompt,
            cached_tokens=_number(details.get("cached_tokens"), None),
            new_tokens=new,
            first_token_s=self._first_token_s,
            elapsed_s=self._elapsed_s,
            context_tokens=used,
            context_limit=limit,
            finish=finish,
        )

    def choices(self) -> list[TokenChoice]:
        """See Reply."""
        if self._texts and not self._choices:
            if self._model.wants_choices:
                raise UsageError("the server does not tell probabilities")
            self._model.wants_choices = True
            raise _not_asked("the probabilities of this reply")
        return self._choices

    def expert_counts(self) -> list[list[int]]:
        """See Reply."""
        if self._experts is None:
            if not self._model.is_qmix:
                raise UsageError("the server does not tell which experts wrote a reply")
            self._model.wants_experts = True
            raise _not_asked("the experts of this reply")
        return self._experts

    def _chunks(self) -> Generator[Document, None, None]:
        """The reply as it comes; without its usage, where the server refuses to be asked for it."""
        model = self._model
        try:
            yield from model.server.chunks(self._body())
        except UsageError as refused:
            if not model.wants_usage or "stream_options" not in str(refused.found):
                raise
            model.wants_usage = False
            yield from model.server.chunks(self._body())

    def _body(self) -> dict[str, Any]:
        """The request, with those settings that somebody here gave."""
        model, config = self._model, self._config
        values = {
            _FIELDS[name]: getattr(config, name)
            for name, by in config.given.items()
            if name in _FIELDS and by != settings.SERVER and getattr(config, name) is not None
        }
        if not config.do_sample:
            values["temperature"] = 0
        body = {
            "model": model.identity.name,
            "messages": model.messages(self.prompt.system, self.prompt.turns),
            "stream": True,
            **values,
        }
        if model.wants_usage:
            body["stream_options"] = {"include_usage": True}
        if body["messages"][-1]["role"] == "assistant":
            body["continue_final_message"] = True
            if not model.is_qmix:
                body["add_generation_prompt"] = False  # vLLM wants it said
        if model.wants_choices:
            body |= {"logprobs": True, "top_logprobs": _ALTERNATIVES}
        if model.wants_experts:
            body["expert_counts"] = True
        return body

    def _taken(self, chunk: Document) -> str:
        """The text of a chunk; the rest is kept.

        Raises:
            ServerError: the chunk is not one of the API's.
        """
        try:
            self._usage = chunk.get("usage") or self._usage
            if not chunk.get("choices"):
                return ""
            choice = chunk["choices"][0]
            self._finish = choice.get("finish_reason") or self._finish
            self._experts = choice.get("expert_counts") or self._experts
            for entry in (choice.get("logprobs") or {}).get("content") or ():
                self._choices.append(_token_choice(entry))
            return str(choice.get("delta", {}).get("content") or "")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise ServerError(
                "the server sent a chunk that is none", where=self._model.server.url
            ) from None

    def _kept(self, error: ServerError) -> ServerError:
        """The error, and what has become of the conversation."""
        remedy = "The conversation is as it was."
        if self._texts:
            remedy = "What came of the reply is kept; /continue or /regen asks again."
        elif self._model.context is None:
            remedy += " Does it fit the server's context?"
        return ServerError(error.what, where=error.where, found=error.found, remedy=remedy)


def _chosen(models: Sequence[Document], name: str | None, url: str) -> Document:
    names = [each["id"] for each in models]
    if name is None and len(models) == 1:
        return models[0]
    if name in names:
        return models[names.index(name)]
    raise UsageError(
        "no such model" if name is not None else "which of its models?",
        where=url,
        expected="--model with one of " + ", ".join(names)[:400] if names else "a model",
        found="none" if not names else name,
    )


def _token_choice(entry: Document) -> TokenChoice:
    top = entry.get("top_logprobs") or ()
    others = [(_piece(each["token"]), math.exp(each["logprob"])) for each in top]
    piece = _piece(entry["token"])
    return TokenChoice(
        piece, math.exp(entry["logprob"]), tuple(each for each in others if each[0] != piece)
    )


def _piece(text: Any) -> str:
    """A token with its spaces as a vocabulary writes them."""
    return str(text).replace(" ", "▁")


def _not_asked(what: str) -> UsageError:
    return UsageError(
        f"{what} were not asked for", remedy="They are from the next one on; /regen asks again."
    )


def _number(value: Any, otherwise: int | None) -> int | None:
    return value if type(value) is int and value >= 0 else otherwise
