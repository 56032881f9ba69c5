"""GenerationConfig: when to stop and how to choose, checked field by field.

Knows no models and no text.
"""

import copy
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UsageError, wrong_value
from qmix.files import atomic_file, regular_file
from qmix.generation import stated_defaults
from qmix.generation.sampling import Sampling
from qmix.hub.remote import HubOptions
from qmix.hub.source import resolve

MAX_NEW_TOKENS = 1 << 24
_MAX_ID = (1 << 31) - 1
FILE = "generation_config.json"
CALLER = "the caller"  # who gave a field, unless somebody else is named

_LEAST = (  # integers, each with its smallest value
    ("max_new_tokens", 1),
    ("max_length", 1),
    ("min_new_tokens", 0),
    ("no_repeat_ngram_size", 0),
    ("num_return_sequences", 1),
    ("prefill_chunk_size", 1),
    ("prompt_lookup_num_tokens", 1),
)
_SPECIAL_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")
_FLAGS = (
    "do_sample",
    "use_cache",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
)


@dataclass(kw_only=True, repr=False)
class GenerationConfig:
    """When to stop and how to choose; the names are Hugging Face's, and `seed` is ours.

    None stands for a field's default, except in top_k. A field may be assigned and is checked then;
    what contradicts another field is found when the configuration is used.

    Attributes:
        max_new_tokens: how many new tokens at most; None: see max_length.
        max_length: how many tokens at most, the prompt included. Without either limit: 20 new ones.
        min_new_tokens: end-of-sequence ids are excluded before this many new tokens.
        do_sample: False is greedy. True samples, with top_k 50 unless given (Hugging Face's
            default).
        temperature, top_k, top_p, min_p: see Sampling; temperature 0 is greedy, top_k None turns
            that filter off.
        repetition_penalty: see Sampling.
        no_repeat_ngram_size: no sequence of this many ids occurs twice in prompt and new ids; 0 is
            off.
        bad_words_ids: sequences of ids that are never completed; an end-of-sequence id by itself
            is not excluded.
        seed: for sampling; None takes torch's global generator.
        stop_strings: a row ends once its new text contains one of these; its ids keep the string,
            a stream of text leaves it out.
        eos_token_id: ids that end a row, -1 for none; None: the model's own, or none.
        pad_token_id: fills rows that ended before others; default: the first eos id, else 0.
        bos_token_id: the checkpoint's; generation does not use it.
        num_return_sequences: samples per row; more than one needs do_sample.
        num_beams: must be 1; there is no beam search here.
        use_cache: False computes the whole context anew for every token.
        prefill_chunk_size: prompt columns that are computed at once; default 512, on a GPU 4096.
        prompt_lookup_num_tokens: ids that are drafted at most, from what followed the newest ids
            where they stood before, and verified in one pass; more than 15 are 15. How many are
            drafted is measured. For one row without padding; None drafts nothing.
        return_dict_in_generate: return an output with the ids and what the next two ask for.
        output_scores, output_logits: a (B, V) tensor per step, after and before all processors.

    Raises:
        UsageError: a value outside its range, by name; beam search.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    seed: int | None = None
    stop_strings: str | Sequence[str] | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    use_cache: bool = True
    prefill_chunk_size: int | None = None
    prompt_lookup_num_tokens: int | None = None
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False

    def __new__(cls, **given: Any) -> "GenerationConfig":
        """Remember what was given, also where the value is the default."""
        self = super().__new__(cls)
        self.__dict__["given"] = {n: CALLER for n in given if given[n] is not None}
        return self

    def __post_init__(self) -> None:
        self.__dict__["_complete"] = True
        self._check_alone()
        self._check_together()

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign one field.

        Raises:
            UsageError: an unknown field, or a value outside its range; nothing is changed.
        """
        if "_complete" not in self.__dict__:  # the constructor's own assignments
            self.__dict__[name] = value
            return
        _check_known([name])
        changed = copy.copy(self)
        changed.__dict__[name] = value
        changed._check_alone()
        self.__dict__[name] = changed.__dict__[name]
        self.__dict__["given"] = {**self.given, name: CALLER}

    def _check_alone(self) -> None:
        """Put defaults for None, and check each field by itself."""
        for field in fields(self):
            if getattr(self, field.name) is None and field.name != "top_k":
                self.__dict__[field.name] = field.default
        for name, least in _LEAST:
            self._check_whole(name, least)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise wrong_value(name, "True or False", getattr(self, name))
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 1 << 64):
            raise UsageError(
                "out of range", where="seed", expected="0 to 2^64 - 1", found=repr(self.seed)
            )
        stops = self.stop_strings
        if not (stops is None or isinstance(stops, (str, list, tuple))) or not all(
            isinstance(stop, str) and stop for stop in self.stops
        ):
            raise wrong_value("stop_strings", "a string or several, none of them empty", stops)
        if self.num_beams != 1:
            raise UsageError(
                "there is no beam search",
                where="num_beams",
                expected=1,
                found=repr(self.num_beams)[:80],
                remedy="qmix.hf.adapt(model) lets transformers search with beams.",
            )
        self._check_ids()
        _ = self._sampling_if_asked  # checked even if do_sample is False

    given: ClassVar[Mapping[str, str]]  # an instance's own: who gave each field that was given

    def _check_ids(self) -> None:
        for name in _SPECIAL_IDS:
            value = getattr(self, name)
            if value is None:
                continue
            several = name == "eos_token_id" and isinstance(value, (list, tuple))
            if not all(_is_id(index, least=-1) for index in (value if several else [value])):
                raise UsageError(
                    "not a token id",
                    where=name,
                    expected=f"an integer from 0 to {_MAX_ID} (-1: none)",
                    found=repr(value)[:80],
                )
        words = self.bad_words_ids
        if words is not None and not (
            isinstance(words, (list, tuple)) and all(_is_word(word) for word in words)
        ):
            raise wrong_value("bad_words_ids", "lists of token ids, none of them empty", words)

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None:  # only where that is the default
            return
        if type(value) is not int or not least <= value <= MAX_NEW_TOKENS:
            raise UsageError(
                "out of range",
                where=name,
                expected=f"{least} to {MAX_NEW_TOKENS}",
                found=repr(value)[:80],
            )

    def _check_together(self) -> None:
        if self.num_return_sequences > 1 and not self.do_sample:
            raise UsageError(
                "greedy copies of a row would all be the same",
                where="num_return_sequences",
                expected="1, or do_sample=True",
                found=self.num_return_sequences,
            )
        for name in ("output_scores", "output_logits"):
            if getattr(self, name) and not self.return_dict_in_generate:
                raise UsageError(
                    "a plain tensor of ids cannot carry this output",
                    where=name,
                    remedy="Pass return_dict_in_generate=True too.",
                )

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen; greedy unless do_sample."""
        if not self.do_sample:
            return Sampling(repetition_penalty=self.repetition_penalty)
        return self._sampling_if_asked

    @property
    def _sampling_if_asked(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else (*self.stop_strings,)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids."""
        value = () if self.eos_token_id is None else self.eos_token_id
        ids = (value,) if isinstance(value, int) else value
        return tuple(index for index in ids if index >= 0)

    @property
    def pad_id(self) -> int:
        """The id that fills rows that ended before others."""
        if self.pad_token_id is not None and self.pad_token_id >= 0:
            return self.pad_token_id
        return self.eos_ids[0] if self.eos_ids else 0

    @classmethod
    def from_model_config(
        cls, config: MixtralConfig, directory: Path | None = None
    ) -> "GenerationConfig":
        """What a checkpoint states: in generation_config.json, and its special ids in config.json.

        Entries that qmix does not know are named in a warning if they would change the text.

        Raises:
            CheckpointError: generation_config.json is damaged, or a value in it out of range.
        """
        own = cls(
            eos_token_id=config.eos_token_ids or None,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
        ).attributed("config.json")
        path = directory / FILE if directory is not None else None
        if path is None or not regular_file.exists(path):
            return own
        return own._read(path)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> "GenerationConfig":
        """What the generation_config.json of a checkpoint states.

        Args:
            options: fields to change, and the hub's options (revision, token, ...).

        Raises:
            CheckpointError: there is none, or it is damaged.
            UsageError: an unknown option, or a value outside its range.
        """
        hub = HubOptions.taken(options)
        path = resolve(directory, need="config", options=hub) / FILE
        return cls()._read(path).updated(options)

    def _read(self, path: Path) -> "GenerationConfig":
        """A copy with what a generation_config.json states."""
        try:
            return self.updated(stated_defaults.read(path), by=path.name)
        except UsageError as error:
            raise error.at(f"{path}: {error.where}", CheckpointError) from None

    def filled_from(self, other: "GenerationConfig") -> "GenerationConfig":
        """A copy in which the fields that were not given here are those given to `other`."""
        missing = {n: by for n, by in other.given.items() if n not in self.given}
        filled = self.updated({n: getattr(other, n) for n in missing})
        filled.__dict__["given"] = {**missing, **self.given}
        return filled

    def with_ends(self, ids: Sequence[int]) -> "GenerationConfig":
        """A copy with more ids that end the text."""
        new = [index for index in ids if index not in self.eos_ids]
        return self.updated({"eos_token_id": [*self.eos_ids, *new]}) if new else self

    def given_by(self, givers: Collection[str]) -> "GenerationConfig":
        """A configuration of those fields alone that these have given."""
        kept = {name: by for name, by in self.given.items() if by in givers}
        config = GenerationConfig(**{name: getattr(self, name) for name in kept})
        config.__dict__["given"] = kept
        return config

    def attributed(self, by: str) -> "GenerationConfig":
        """A copy that says who gave its fields."""
        named = copy.copy(self)
        named.__dict__["given"] = dict.fromkeys(self.given, by)
        return named

    def updated(self, changes: Mapping[str, Any], *, by: str = CALLER) -> "GenerationConfig":
        """A copy with these fields changed.

        Args:
            by: who changes them, as `given` says afterwards.

        Raises:
            UsageError: an unknown field, or a value outside its range.
        """
        _check_known(changes)
        changed = replace(self, **changes)
        changed.__dict__["given"] = {**self.given, **dict.fromkeys(changes, by)}
        return changed

    def update(self, **changes: Any) -> None:
        """Assign several fields, checked together.

        Raises:
            UsageError: an unknown field, or a value outside its range; nothing is changed.
        """
        self.__dict__.update(self.updated(changes).__dict__)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write generation_config.json into `directory`, which is created if necessary.

        Raises:
            WriteError: the directory or the file cannot be written.
        """
        strict_json.write(atomic_file.made_folder(directory) / FILE, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields that were given, as generation_config.json holds them."""
        values = asdict(self)
        return {name: values[name] for name in sorted(self.given)}

    def __repr__(self) -> str:
        return f"GenerationConfig {json.dumps(self.to_dict(), indent=2, default=repr)}"

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens may follow a prompt of this many columns.

        Raises:
            UsageError: the prompt alone reaches max_length.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return 20
        if self.max_length <= prompt_length:
            raise UsageError(
                "the prompt leaves no room for new tokens",
                where="max_length",
                expected=f"more than the prompt's {prompt_length} tokens",
                found=self.max_length,
            )
        return self.max_length - prompt_length


def _check_known(names: Iterable[str]) -> None:
    known = sorted(field.name for field in fields(GenerationConfig))
    for name in names:
        if name not in known:
            raise UsageError(f"generate has no option {name!r}", expected=", ".join(known))


def _is_word(word: object) -> bool:
    return isinstance(word, (list, tuple)) and bool(word) and all(map(_is_id, word))


def _is_id(index: object, least: int = 0) -> bool:
    return type(index) is int and least <= index <= _MAX_ID


# How `qmix generate` and `qmix batch` go on where neither user nor checkpoint says.
CONTINUATION = GenerationConfig(do_sample=False, top_k=0, max_new_tokens=256).attributed("qmix")
