"""The planner against reality: bytes that were predicted from headers, and bytes that a loaded model holds.

`python -m qmix.evals.footprint DIR [--ctx N]` loads the checkpoint on the CPU, fills its cache, and
prints both beside the process's resident memory. Counts storages, each once.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qmix.errors import QmixError
from qmix.evals.timing import bench
from qmix.formats.metadata import read_metadata
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.linear import Linear
from qmix.planning.plan import plan
from qmix.planning.stored_model import StoredModel

_PARTS = ("experts", "attention", "embeddings", "head", "router and norms")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Bytes, predicted and measured.

    Attributes:
        resident: what the process's resident memory grew by while the model was loaded and the cache
            filled; None where the system does not tell.
    """

    model: str
    context: int
    predicted_weights: int
    weights: int
    predicted_cache: int
    cache: int
    resident: int | None

    @property
    def error(self) -> float:
        """Of weights and cache together, relative to what was measured."""
        return (self.predicted_weights + self.predicted_cache) / (self.weights + self.cache) - 1

    def __str__(self) -> str:
        lines = [
            f"{self.model}, context {self.context}",
            f"weights   {self.predicted_weights / 1e6:12,.3f} MB predicted {self.weights / 1e6:12,.3f} measured",
            f"KV cache  {self.predicted_cache / 1e6:12,.3f} MB predicted {self.cache / 1e6:12,.3f} measured",
            f"together  {100 * self.error:+.4f} %",
        ]
        if self.resident is not None:
            ratio = (self.predicted_weights + self.predicted_cache) / max(self.resident, 1) - 1
            lines.append(
                f"resident  {self.resident / 1e6:12,.3f} MB grown; predicted {100 * ratio:+.2f} %"
            )
        return "\n".join(lines) + "\n"


def compare(directory: Path, context: int = 512, dtype: str | None = None) -> Comparison:
    """Load a checkpoint on the CPU with a full cache, and count.

    Raises:
        QmixError: the checkpoint is damaged, or does not fit.
    """
    model = StoredModel.of(read_metadata(directory), dtype)
    predicted = plan(model, gpu=False, context=context).host_memory
    gc.collect()
    before = _resident()
    loaded = MixtralForCausalLM.from_pretrained(directory, device="cpu", dtype=dtype)
    cache = loaded.new_cache(1, context)
    bench.fill_cache(cache, context)
    after = _resident()
    return Comparison(
        model=model.name,
        context=context,
        predicted_weights=sum(predicted[part] for part in _PARTS),
        weights=held(loaded),
        predicted_cache=predicted["KV cache"],
        cache=cache.nbytes,
        resident=None if before is None or after is None else after - before,
    )


def held(model: nn.Module) -> int:
    """Bytes of all storages behind a model's weights, packed ones included."""
    found: dict[int, int] = {}
    for module in model.modules():
        own = [module.stored] if isinstance(module, Linear) else list(module.parameters(False))
        for tensor in (tensor for one in own for tensor in _tensors(one)):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors of a weight, of what it is made of included."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _resident() -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024 if "VmRSS" in lines else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.footprint", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        with torch.no_grad():
            found = compare(options.directory, options.ctx)
    except QmixError as error:
        sys.stderr.write(f"footprint: {error}\n")
        return error.exit_code
    document = {**asdict(found), "error": found.error}
    sys.stdout.write(json.dumps(document) + "\n" if options.json else str(found))
    return 0 if abs(found.error) <= 0.02 else 5


if __name__ == "__main__":
    sys.exit(main())
