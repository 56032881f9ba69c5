"""Callers of a scheduler, and what they were told."""

import torch

from qmix.generation.config import GenerationConfig
from qmix.serving.request import Ended, Request, Ticket

PROMPTS = [
    list(range(3, 3 + length)) if length % 2 else list(range(40, 40 + length))
    for length in (1, 5, 17, 2, 9, 30, 12, 7)
]


class Caller:
    """A request and what was told of it."""

    def __init__(self, ids, *, new=12, at=None, **options):
        names = (
            "top_logprobs",
            "mask",
            "prompt_logprobs",
            "expert_counts",
            "processors",
            "deadline_s",
        )
        given = {name: options.pop(name) for name in names if name in options}
        options = {"eos_token_id": -1, **options}
        self.request = Request(tuple(ids), GenerationConfig(max_new_tokens=new, **options), **given)
        self.events = []
        self.ticket = Ticket(self.request, self.events.append)

    @property
    def ids(self):
        return [event.id for event in self.events if not isinstance(event, Ended)]

    @property
    def end(self):
        (end,) = (event for event in self.events if isinstance(event, Ended))
        assert self.events[-1] is end
        return end


def run(scheduler, callers, *, every=1, most=400):
    """Submit a caller every few steps, and step until all is done."""
    waiting = list(callers)
    for step in range(most):
        if waiting and step % every == 0:
            scheduler.submit(waiting.pop(0).ticket)
        scheduler.admit()
        scheduler.step()
        if scheduler.idle and not waiting:
            return
    raise AssertionError("not done")


def alone(model, ids, new=12, **options):
    config = GenerationConfig(max_new_tokens=new, eos_token_id=-1, **options)
    return model.generate(torch.tensor([ids]), config)[0, len(ids) :].tolist()


class SlowMask:
    """Excludes nothing, and is ready at every `every`-th look; a wait makes it so at once."""

    def __init__(self, every):
        self.every, self.looks, self.waits, self.seen = every, 0, 0, []

    @property
    def ready(self):
        self.looks += 1
        return self.looks % self.every == 0

    def wait(self):
        self.waits += 1
        self.looks = -1

    def advance(self, index):
        self.seen.append(index)

    def __call__(self, input_ids, scores):
        return scores
