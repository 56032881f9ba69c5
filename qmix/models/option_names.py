"""The names of dtypes and devices as people write them, so that a wrong one is refused at once.

Knows no torch, and so not which devices there are.
"""

import re

from qmix.errors import UsageError

_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
}
AUTO = "auto"
_DEVICE = re.compile(r"(cpu|cuda|gpu)(:\d+)?", re.ASCII | re.IGNORECASE)


def dtype_name(text: str) -> str:
    """torch's name of a floating dtype, which may be written short or with `torch.`; or AUTO.

    Raises:
        UsageError: another name.
    """
    name = text.removeprefix("torch.")
    found = AUTO if name == AUTO else _DTYPES.get(name.lower())
    if found is None:
        raise UsageError(
            "no such dtype",
            where="dtype",
            expected=f"one of {', '.join(dict.fromkeys(_DTYPES.values()))}",
            found=name[:80],
        )
    return found


def device_name(text: str) -> str:
    """torch's name of a device; "gpu" stands for "cuda".

    Raises:
        UsageError: another name.
    """
    found = _DEVICE.fullmatch(text)
    if found is None:
        raise no_device(text)
    kind = found[1].lower()
    return ("cuda" if kind == "gpu" else kind) + (found[2] or "")


def no_device(found: object) -> UsageError:
    """The error of something that is no name of a device."""
    return UsageError(
        "no such device", where="device", expected="cpu or cuda", found=repr(found)[:80]
    )
