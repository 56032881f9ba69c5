"""Running: one request in its slot, from the first chunk of its prompt to its last id.

Chooses ids, cuts the text at stop strings and counts. Knows no model and no other request.
"""

import secrets

import torch
from torch import Tensor

from qmix.errors import QmixError
from qmix.generation.stopping import RowText
from qmix.generation.token_selector import TokenSelector
from qmix.serving.request import Ended, Finish, LogProb, Piece, Ticket
from qmix.text.detokenizer import StreamDetokenizer
from qmix.text.tokenizer import LlamaTokenizer


class Running:
    """A request that has a slot.

    Attributes:
        ids: prompt and new ids.
        cached_tokens: of the prompt, taken from what a cache held already.
        new_tokens: ids chosen so far.
    """

    def __init__(
        self,
        ticket: Ticket,
        tokenizer: LlamaTokenizer,
        *,
        context: int,
        device: torch.device,
    ) -> None:
        request = ticket.request
        config = request.config
        self.ticket = ticket
        self.ids = ticket.ids[:]
        self.cached_tokens = 0
        self.new_tokens = 0
        self._budget = min(config.new_tokens(len(self.ids)), context - len(self.ids))
        self._waited_s = ticket.age_s
        self._first_token_s = 0.0
        self._prompt_logprobs: list[LogProb] = []
        self._expert_counts: Tensor | None = None
        generator = None
        if not config.sampling.greedy:
            seed = secrets.randbits(63) if config.seed is None else config.seed
            generator = torch.Generator(device).manual_seed(seed)
        masks = () if request.mask is None else (request.mask,)
        self._selector = TokenSelector(config, (*request.processors, *masks), generator)
        # Ids so far as processors and penalties want them: written once, never copied.
        self._row = torch.empty(1, len(self.ids) + self._budget, dtype=torch.long, device=device)
        self._row[0, : len(self.ids)] = torch.frombuffer(ticket.ids, dtype=torch.long)
        prompt = () if request.starts_new_text else request.ids
        self._text = RowText(
            StreamDetokenizer(tokenizer, prompt=prompt, shown=request.shown_ids),
            config.eos_ids,
            config.stops,
        )

    @property
    def prompt_tokens(self) -> int:
        return len(self.ticket.ids)

    @property
    def left(self) -> int:
        """Ids that may still be chosen."""
        return self._budget - self.new_tokens

    @property
    def ready(self) -> bool:
        """Whether the next id can be chosen without waiting for its mask."""
        mask = self.ticket.request.mask
        return mask is None or mask.ready

    def wait(self) -> None:
        """Until it is ready."""
        if self.ticket.request.mask is not None:
            self.ticket.request.mask.wait()

    def read(self, ids: Tensor, logits: Tensor) -> None:
        """Take the log-probabilities of prompt ids (S,) from the logits (S, V) before each."""
        self._prompt_logprobs += _logprobs(logits, ids, self.ticket.request.top_logprobs or 0)

    def count_experts(self, use: Tensor) -> None:
        """Take which experts computed the position of the next id: 0 or 1, (layers, E)."""
        counts = self._expert_counts
        self._expert_counts = use if counts is None else counts + use

    def choose(self, logits: Tensor) -> Finish | None:
        """Choose the next id from logits (1, V) and tell the caller; how it ended, if it did.

        Raises:
            QmixError: the logits are not finite, or a processor failed.
        """
        count, asked = len(self.ids), self.ticket.request.top_logprobs
        chosen = self._selector.select(logits, self._row[:, :count], None, self.new_tokens)
        new = int(chosen.ids)
        self._row[0, count] = new
        self.ids.append(new)
        self.new_tokens += 1
        self._first_token_s = self._first_token_s or self.ticket.age_s
        last = self.new_tokens == self._budget
        text = self._text.put(new, last=last)
        logprob = None if asked is None else _logprobs(logits, chosen.ids, asked)[0]
        self.ticket.tell(Piece(new, text, logprob))
        if self._text.ended:
            return "stop"
        if last:
            return "length"
        if self.ticket.request.mask is not None:
            self.ticket.request.mask.advance(new)
        return None

    def ended(self, finish: Finish, error: QmixError | None = None) -> Ended:
        """The last event."""
        counts = self._expert_counts
        return Ended(
            finish=finish,
            error=error,
            stop=self._text.stop,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            new_tokens=self.new_tokens,
            prompt_logprobs=tuple(self._prompt_logprobs),
            expert_counts=() if counts is None else tuple(map(tuple, counts.tolist())),
            waited_s=self._waited_s,
            first_token_s=self._first_token_s,
            elapsed_s=self.ticket.age_s,
        )


def _logprobs(logits: Tensor, ids: Tensor, top: int) -> list[LogProb]:
    """Of ids (S,) under logits (S, V)."""
    scores = logits.float().log_softmax(-1)
    of_ids = scores.gather(1, ids.to(scores.device)[:, None])[:, 0].tolist()
    values, best = scores.topk(min(top, scores.shape[1]), -1)
    return [
        LogProb(id_, value, tuple(zip(best_ids, best_values, strict=True)))
        for id_, value, best_ids, best_values in zip(
            ids.tolist(), of_ids, best.tolist(), values.tolist(), strict=True
        )
    ]
