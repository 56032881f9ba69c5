"""Whether the packages of the extra `lm-eval` are installed. Imports none of them."""

from importlib.util import find_spec

from qmix.errors import UnsupportedError

_PACKAGES = ("lm_eval", "transformers", "accelerate")


def check_extra(what: str) -> None:
    """
    Raises:
        UnsupportedError: a package is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"{what} needs {', '.join(missing)}",
            remedy="Run: pip install 'qmix-runtime[lm-eval]'",
        )
