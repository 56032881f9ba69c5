"""The kernels on small inputs, beside torch on the same device: what a load asks first."""

from collections.abc import Iterator

from qmix.evals.steps.setting import NotHereError, Setting
from qmix.kernels.gpu import probe
from qmix.kernels.gpu.self_check import first_miss
from qmix.weights.scheme import Scheme

_SCHEMES = (
    None,
    Scheme(kind="nf4"),
    Scheme(kind="int4"),
    Scheme(kind="int4", symmetric=False),
    Scheme(kind="int2", group_size=64),
    Scheme(kind="int3"),
    Scheme(kind="int8"),
    Scheme(kind="int6", group_size=16),
    Scheme(kind="e2m1", block_size=16),
)


def results(setting: Setting) -> Iterator[dict[str, object]]:
    """One result for the kernels that read no weights, then one for each kind of weights.

    Raises:
        NotHereError: the kernels are not for this GPU.
    """
    if setting.device.type == "cuda":
        refusal = probe.card(setting.device).refusal()
        if refusal is not None:
            raise NotHereError(str(refusal))
    for scheme in _SCHEMES[:1] if setting.is_rehearsal else _SCHEMES:
        result: dict[str, object] = {
            "kernels": "without weights" if scheme is None else str(scheme)
        }
        miss = first_miss(setting.device, setting.widths.dtype, scheme)
        if miss is not None:
            result["failed"] = f"{miss.what}: an error of {miss.error:.1%} of the largest value"
        yield result
