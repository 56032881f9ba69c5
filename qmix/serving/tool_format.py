"""How a model writes calls of tools: what begins and ends them, and the grammar that holds them.

Two conventions are known. Hermes's: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`. And
that of Mistral's tokenizers v2 and v3, one token and a list: `[TOOL_CALLS] [{"name": ..., ...}]`. A
template that has neither, or takes no tools, is told of Hermes's in plain text; see tool_prompt.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmix.serving import grammar
from qmix.serving.tools import ToolUse
from qmix.text.tokenizer import LlamaTokenizer

_TAKES_TOOLS = re.compile(r"\btools\b")
# A text to the first opener; lazy: nothing but a call follows it.
_TEXT = "/(.|\\n)*/"


@dataclass(frozen=True)
class CallFormat:
    """A convention.

    Attributes:
        opener: stands before the calls.
        opener_id: its token, if it is one that a text cannot hold; None: it is text.
        closer: stands behind each call; "": all are one JSON list.
        in_template: the checkpoint's template shows tools; otherwise text describes them.
    """

    opener: str
    closer: str
    in_template: bool
    opener_id: int | None = None

    def grammar(self, use: ToolUse, schema: Mapping[str, Any] | None) -> str:
        """The grammar of a reply that may, or must, call tools.

        Args:
            schema: what a reply without a call holds to; None: any text.
        """
        lines = [
            "%llguidance {}",
            f"start: {self._start(use, schema)}",
            f"calls: {self._calls(use)}",
        ]
        lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(use.callable))))
        for index, tool in enumerate(use.callable):
            head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
            lines.append(f'call_{index}: {head} {grammar.inline(use.schema(tool))} "}}"')
        if not use.required and schema is None and self.opener_id is None:
            lines.append(f"opened[lazy]: TEXT {json.dumps(self.opener)}")
        lines.append(f"TEXT: {_TEXT}")
        return grammar.of_lark("\n".join(lines))

    def _start(self, use: ToolUse, schema: Mapping[str, Any] | None) -> str:
        opener = json.dumps(self.opener) if self.opener_id is None else f"<[{self.opener_id}]>"
        called = f'" "? {opener} calls'
        if use.required:
            return called
        if schema is not None:
            return f"{grammar.inline(schema)} | {called}"
        if self.opener_id is None:
            return "TEXT | opened calls"
        return f"TEXT | TEXT {opener} calls"

    def _calls(self, use: ToolUse) -> str:
        """What follows the first opener."""
        if not self.closer:
            more = ' (", " call)*' if use.several else ""
            return f'" "? "[" call{more} "]"'
        one = f'"\\n"? call "\\n"? {json.dumps(self.closer)}'
        more = f' ("\\n"? {json.dumps(self.opener)} {one})*' if use.several else ""
        return one + more


def call_format(template: str, tokenizer: LlamaTokenizer) -> CallFormat:
    """The convention of a template, which may be none.

    Args:
        template: Jinja text, or the name of a format without one.
    """
    takes_tools = bool(_TAKES_TOOLS.search(template))
    for opener, closer in (("[TOOL_CALLS]", ""), ("<tool_call>", "</tool_call>")):
        if takes_tools and opener in template:
            index = tokenizer.get_vocab().get(opener)
            control = index is not None and index in tokenizer.pieces.controls
            return CallFormat(opener, closer, True, index if control else None)
    return CallFormat("<tool_call>", "</tool_call>", False)
