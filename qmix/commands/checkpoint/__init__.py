"""Commands on a checkpoint's files: inspect, verify, export, convert. No model is run."""

from collections.abc import Callable

# What the next step works on, the steps or bytes done, and all of them.
Progress = Callable[[str, int, int], None]
