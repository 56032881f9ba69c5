"""The tables of docs/serving.md: every field that the API takes, ignores or refuses.

    python -m tests.support.serving_page    # writes them again from the code

tests/serving/http/test_serving_page.py keeps the page in step.
"""

import json
from dataclasses import MISSING, fields

from qmix.serving.http import chat_request, completion_request, messages_request, token_request
from tests.support.house import ROOT

PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- fields: python -m tests.support.serving_page -->", "<!-- end of fields -->"
REQUESTS = (
    ("/v1/chat/completions", chat_request.ChatRequest, chat_request.OTHERS),
    ("/v1/messages", messages_request.MessagesRequest, messages_request.OTHERS),
    ("/v1/completions", completion_request.CompletionRequest, completion_request.OTHERS),
    ("/tokenize", token_request.TokenizeRequest, token_request.OTHERS),
    ("/detokenize", token_request.DetokenizeRequest, token_request.OTHERS),
)


def tables():
    """A table for each endpoint."""
    parts = []
    for path, request, others in REQUESTS:
        rows = [f"### {path}", "", "| field | | |", "|---|---|---|"]
        rows += [
            f"| `{f.name}` | taken | {f.metadata['note']}{_default(f)} |" for f in fields(request)
        ]
        rows += [f"| `{name}` | ignored | {why} |" for name, why in others.ignored.items()]
        rows += [f"| `{name}` | refused | {_why(each)} |" for name, each in others.refused.items()]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _default(field):
    has = field.default is not MISSING and field.default not in (None, (), False, 0.0)
    return f" Default {field.default}." if has else ""


def _why(refused):
    text = refused.why[0].upper() + refused.why[1:] + "."
    neutral = ", ".join(f"`{json.dumps(value)}`" for value in refused.neutral)
    return f"{text} Taken as {neutral}." if neutral else text


def written(text):
    """The page with its tables as they are now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
