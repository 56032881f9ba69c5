"""The planner against reality: the bytes predicted from headers, and those of a loaded model.

`python -m qmix.evals.footprint DIR [--ctx N]` loads the checkpoint on the CPU, fills its cache, and
prints both figures beside the process's resident memory. Every storage counts once. The exit code
is 5 if prediction and measurement differ by more than 2 %. Knows nothing of time.
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

from qmix.errors import QualityError
from qmix.evals.command import exit_code
from qmix.evals.timing.bench import fill_cache
from qmix.formats.metadata import read_metadata
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.stored import StoredModule
from qmix.planning.plan import plan
from qmix.planning.process_memory import resident_bytes
from qmix.planning.stored_model import StoredModel

_TOLERANCE = 0.02  # relative
_WEIGHT_ITEMS = ("experts", "attention", "embeddings", "head", "router and norms")


@dataclass(frozen=True, kw_only=True)
class FootprintComparison:
    """Bytes, predicted and measured.

    Attributes:
        resident: growth of the process's resident memory while the model was loaded and the cache
            filled; None where the system does not report it.
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
        """Relative error of the prediction for weights and cache together."""
        return (self.predicted_weights + self.predicted_cache) / (self.weights + self.cache) - 1

    def __str__(self) -> str:
        lines = [
            f"{self.model}, context {self.context}",
            _line("weights", self.predicted_weights, self.weights),
            _line("KV cache", self.predicted_cache, self.cache),
            f"together  {100 * self.error:+.4f} %",
        ]
        if self.resident is not None:
            ratio = (self.predicted_weights + self.predicted_cache) / max(self.resident, 1) - 1
            lines.append(
                f"resident  {self.resident / 1e6:12,.3f} MB more; predicted {100 * ratio:+.2f} %"
            )
        return "\n".join(lines) + "\n"


def compare_footprint(
    directory: Path, context: int = 512, dtype: str | None = None
) -> FootprintComparison:
    """Load a checkpoint on the CPU with a full cache, and count its bytes.

    Raises:
        QmixError: the checkpoint is damaged, or does not fit.
    """
    model = StoredModel.of(read_metadata(directory), dtype)
    predicted = plan(model, gpu=False, context=context).host_memory
    gc.collect()
    before = resident_bytes()
    loaded = MixtralForCausalLM.from_pretrained(directory, device="cpu", dtype=dtype)
    cache = loaded.new_cache(1, context)
    fill_cache(cache, context)
    after = resident_bytes()
    return FootprintComparison(
        model=model.name,
        context=context,
        predicted_weights=sum(predicted[part] for part in _WEIGHT_ITEMS),
        weights=storage_bytes(loaded),
        predicted_cache=predicted["KV cache"],
        cache=cache.nbytes,
        resident=None if before is None or after is None else after - before,
    )


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all storages behind a model's weights, packed ones included."""
    storages: dict[int, int] = {}
    for module in model.modules():
        stored = isinstance(module, StoredModule)
        weights = [module.stored] if stored else list(module.parameters(recurse=False))
        for tensor in (tensor for weight in weights for tensor in _tensors(weight)):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors of a weight, including those of its parts."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _line(name: str, predicted: int, measured: int) -> str:
    return f"{name:9} {predicted / 1e6:12,.3f} MB predicted {measured / 1e6:12,.3f} measured"


def _print(directory: Path, context: int, *, as_json: bool) -> int:
    with torch.no_grad():
        comparison = compare_footprint(directory, context)
    document = {**asdict(comparison), "error": comparison.error}
    sys.stdout.write(json.dumps(document) + "\n" if as_json else str(comparison))
    return 0 if abs(comparison.error) <= _TOLERANCE else QualityError.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.footprint", description=__doc__)
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    parser.add_argument("--ctx", type=int, default=512, help="tokens of the cache (512)")
    parser.add_argument("--json", action="store_true", help="print JSON, not text")
    options = parser.parse_args(arguments)
    return exit_code(
        "footprint", lambda: _print(options.directory, options.ctx, as_json=options.json)
    )


if __name__ == "__main__":
    sys.exit(main())
