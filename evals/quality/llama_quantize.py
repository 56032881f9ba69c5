"""llama.cpp's side of `qmix.evals.accuracy --llama`: a script for the interpreter that has it.

`PYTHON llama_quantize.py SRC.gguf IMPORTANCE.npz OUT KIND...` writes OUT/KIND.gguf for each KIND,
a type of file as llama-quantize names it. `KIND+imatrix` uses IMPORTANCE: by tensor, the mean
square of each input. Embeddings and head stay in 16 bits, as in the others' files. It prints its
version, a line for each file, and nothing else. Knows nothing of qmix.
"""

import ctypes
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

_SIXTEEN_BITS = 1  # GGML_TYPE_F16
_IMPORTANCE = "+imatrix"


def quantize(api: Any, source: Path, target: Path, kind: str, importance: Any) -> None:
    """Write one file.

    Args:
        importance: an array of llama_model_imatrix_data that ends with a null name, or None.
    """
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.output_tensor_type = params.token_embedding_type = _SIXTEEN_BITS
    params.nthread = 1
    if importance is not None:
        params.imatrix = importance
    names = (str(source).encode(), str(target).encode())
    if api.llama_model_quantize(*names, ctypes.byref(params)):
        sys.exit(f"llama.cpp does not write {kind}")


def importance_of(api: Any, file: Path) -> Any:
    """What `quantize` wants, of the arrays of a file; they must live as long as it."""
    entries = api.llama_model_imatrix_data
    with np.load(file) as arrays:
        found = {name: np.ascontiguousarray(arrays[name], np.float32) for name in arrays}
    array = (entries * (len(found) + 1))()
    for entry, (name, values) in zip(array, found.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    array.arrays = found
    return array


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    package: Any = importlib.import_module("llama_cpp")
    source, importance, out = map(Path, arguments[:3])
    quiet = package.llama_cpp.llama_log_callback(lambda level, text, data: None)
    package.llama_log_set(quiet, None)
    _say(package.__version__)
    weights = importance_of(package.llama_cpp, importance)
    for name in arguments[3:]:
        kind = name.removesuffix(_IMPORTANCE)
        weighted = weights if kind != name else None
        quantize(package.llama_cpp, source, out / f"{name}.gguf", kind, weighted)
        _say(name)


if __name__ == "__main__":
    main(sys.argv[1:])
