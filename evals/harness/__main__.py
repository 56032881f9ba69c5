"""lm_eval's own command line, with the model `qmix`: `python -m qmix.evals.harness --model qmix`.

Releases of lm_eval after 0.4.13 find the model by themselves, as an entry point of this package.
"""

import sys

from qmix.evals.command import exit_code
from qmix.evals.harness.extra import check_extra


def main() -> None:
    """Run lm_eval's command line.

    Raises:
        UnsupportedError: lm_eval is not installed.
    """
    check_extra("python -m qmix.evals.harness")
    from lm_eval.__main__ import cli_evaluate

    import qmix.evals.harness.language_model  # noqa: F401 - registers the model

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(exit_code("harness", main))
