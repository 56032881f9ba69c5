"""Chat templates rendered in a process of their own, started at the first one and kept.

Whatever a template does, it ends in a text or in one error, within seconds. Knows nothing of what a
conversation means.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmix.errors import CheckpointError, UsageError
from qmix.text.worker_process import EndedWorkerError, WorkerProcess

REMEDY = "Correct the template, or give another: a name, a file, or inst for [INST]."


class TemplateRenderer:
    """Renders templates; threads wait for each other. A copy starts a process of its own."""

    def __init__(self) -> None:
        self._worker = WorkerProcess(Path(__file__).with_name("template_worker.py"))

    def render(self, template: str, variables: Mapping[str, Any], where: str) -> str:
        """The text that a template makes of its variables.

        Args:
            variables: numbers, strings, lists and dicts; `messages` is one of them.
            where: names the template in errors.

        Raises:
            UsageError: the template refuses the conversation; the error says why.
            CheckpointError: it is no template, fails, or takes too long or too much memory.
            ResourceError: no process can be started.
        """
        try:
            reply = self._worker.answer({"template": template, "variables": dict(variables)})
        except EndedWorkerError as error:
            raise CheckpointError(
                "the chat template fails", where=where, found=error.found, remedy=REMEDY
            ) from None
        if "text" in reply:
            return str(reply["text"])
        if "refused" in reply:
            raise UsageError(
                "the chat template refuses the conversation",
                where=where,
                found=repr(reply["refused"]),
            )
        what = "cannot be parsed" if "syntax" in reply else "fails"
        found = str(reply.get("syntax") or reply.get("failed"))
        raise CheckpointError(f"the chat template {what}", where=where, found=found, remedy=REMEDY)
