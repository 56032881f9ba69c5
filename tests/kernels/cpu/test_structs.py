"""The structures of the C interface: csrc/structs.h and ctypes_structs.py say the same."""

import ctypes
import re

import pytest

from qmix.instruction_sets import supported
from qmix.kernels.cpu import build
from qmix.kernels.cpu import ctypes_structs as structs
from tests.support.cpu_kernels import available

HEADER = build.SOURCE.with_name("structs.h").read_text(encoding="utf-8")
SCALARS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def declared():
    """The structures of the header: name -> [(field, ctypes type)], by its words alone."""
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", HEADER, re.M | re.S):
        fields = []
        for line in body.splitlines():
            code = line.split("//")[0].strip()
            kind, star, field, length = re.fullmatch(
                r"(?:const )?(\w+)(\*?) (\w+)(?:\[(\d+)\])?;", code
            ).groups()
            base = ctypes.c_void_p if star else SCALARS.get(kind) or getattr(structs, kind)
            fields.append((field, base * int(length) if length else base))
        found[name] = fields
    return found


def test_the_header_and_the_mirror_have_the_same_fields():
    mirror = {kind.__name__: list(kind._fields_) for kind in structs.STRUCTURES}
    assert list(mirror) == list(declared())
    assert mirror == declared()


def test_the_compiled_sizes_are_those_of_the_mirror():
    if not available():
        pytest.skip("no compiler")
    sizes = (ctypes.c_int64 * len(structs.STRUCTURES))()
    build.load(supported())[0].qmix_struct_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(kind) for kind in structs.STRUCTURES]
