"""A checkpoint as llama.cpp quantizes it: GGUF files that are scored beside ours.

llama-cpp-python runs in an interpreter of its own (`llama_quantize`). Knows nothing of scores.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qmix.errors import ResourceError
from qmix.evals.quality import llama_quantize
from qmix.evals.quality.importance import importance
from qmix.quantize.calibrated.windows import Calibration

# llama.cpp wants an imatrix for IQ3_XXS and what has fewer bits.
KINDS = (
    *("Q4_K_M", "Q4_K_M+imatrix", "Q4_0", "IQ4_XS+imatrix"),
    *("Q3_K_M", "Q3_K_M+imatrix", "Q3_K_S+imatrix", "IQ3_S+imatrix", "IQ3_XXS+imatrix"),
    "Q2_K+imatrix",
)


def quantized(
    python: Path,
    source: Path,
    scratch: Path,
    calibration: Calibration,
    kinds: Sequence[str] = KINDS,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, ...]:
    """One GGUF file of each kind, in `scratch`.

    Args:
        python: an interpreter that has llama-cpp-python.
        source: a checkpoint in 16 bits, whose widths are multiples of 256.
        calibration: what importance is measured on, where a kind takes it.
        say: called with what is done now.

    Raises:
        ResourceError: the interpreter does not run, or has no llama-cpp-python.
    """
    exact = scratch / "exact"
    export = (sys.executable, "-m", "qmix", "export", str(source), str(exact), "--format", "gguf")
    subprocess.run(export, check=True, capture_output=True)
    weights = importance(source, calibration.ids)
    np.savez(scratch / "importance.npz", **{name: weights[name].numpy() for name in weights})  # type: ignore[arg-type]
    files = (exact / "model.gguf", scratch / "importance.npz", scratch)
    command = [str(python), llama_quantize.__file__, *map(str, files), *kinds]
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                say(f"llama.cpp: {line.rstrip()}")
            _, errors = process.communicate()
    except OSError as error:
        raise _unavailable(python, str(error)) from error
    if process.returncode:
        raise _unavailable(python, errors.strip().rpartition("\n")[2])
    return tuple(scratch / f"{kind}.gguf" for kind in kinds)


def _unavailable(python: Path, why: str) -> ResourceError:
    return ResourceError(
        "llama.cpp quantizes nothing here",
        where=str(python),
        found=why,
        remedy="Give an interpreter with it: pip install llama-cpp-python.",
    )
