"""What a chat says before its first prompt. Knows a model as a ChatModel only."""

from qmix.commands.chat import settings
from qmix.commands.chat.chat_model import ChatModel
from qmix.generation.config import GenerationConfig


def start_line(model: ChatModel, config: GenerationConfig, width: int = 80) -> str:
    """What the model is and where, and the temperature.

    Args:
        width: of the terminal, in columns; the line is broken between its parts.
    """
    first, *others = (*model.facts(), _temperature(config))
    lines = [first]
    for part in others:
        longer = f"{lines[-1]} · {part}"
        lines[-1:] = [longer] if len(longer) <= width else [lines[-1], f"  {part}"]
    return "\n".join(lines)


def _temperature(config: GenerationConfig) -> str:
    """The temperature, and who says so."""
    by = config.given.get("temperature", "the default")
    if not config.do_sample:
        by = config.given.get("do_sample", by)
    if by == settings.SERVER:
        return "temperature by the server"
    by = "qmix's default" if by in ("qmix", "the default") else f"from {by}"
    if not config.do_sample:
        return f"temperature 0 (greedy, {by})"
    return f"temperature {config.temperature:g} ({by})"
