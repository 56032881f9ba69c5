"""Instructions that read and write memory, that wait, and that exchange values between lanes.

Each function takes the machine and an instruction's operands. `find` gives the function of an
opcode.
"""

import re
from functools import cache, partial

import numpy as np

from tests.support.ptx import warp
from tests.support.ptx.operations import OPERATIONS, TYPES

# shared::cta is the shared memory of the thread block, as shared is.
_LOAD = re.compile(
    r"ld\.(global|shared)(?:::cta)?(?:\.c[ags]|\.nc)?(?:\.v([24]))?\.([bsuf])(8|16|32|64)"
)
_STORE = re.compile(r"st\.(global|shared)(?:::cta)?(?:\.v([24]))?\.[bsuf](8|16|32|64)")
_PARAMETER = re.compile(r"ld\.param\.([bsuf](?:16|32|64))")
_ATOMIC = re.compile(r"atom\.global\.gpu\.acq_rel\.(add|min|max)\.([su]32)")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)?")
_TILES = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
_MULTIPLY = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32")
_SHUFFLE = re.compile(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
_REDUCE = re.compile(r"redux\.sync\.(add|min|max|and|or|xor)\.([bsu]32)")


def bits_of_shared_access(opcode):
    """How many bits an instruction reads or writes of shared memory at once, or None."""
    for pattern, bits in ((_LOAD, 4), (_STORE, 3)):
        match = pattern.fullmatch(opcode)
        if match and match[1] == "shared":
            return int(match[bits])
    return None


@cache
def find(opcode):
    """The function that runs an opcode, or None."""
    if opcode in OPERATIONS:
        return partial(_compute, OPERATIONS[opcode])
    if opcode in _PLAIN:
        return _PLAIN[opcode]
    for pattern, function in _PATTERNS:
        if match := pattern.fullmatch(opcode):
            return partial(function, *match.groups())
    return None


def _compute(operation, machine, operands):
    target, *sources = operands
    lanes = machine.lanes
    if isinstance(target, tuple):
        lanes.split(target, *sources)
    elif isinstance(sources[0], tuple):
        lanes.join(target, *sources)
    else:
        values = [lanes.read(*pair) for pair in zip(sources, operation.sources, strict=True)]
        lanes.write(target, operation.function(*values))


def _load(space, vector, letter, bits, machine, operands):
    target, address = operands
    lanes, count = machine.lanes, int(vector or 1)
    targets = target if isinstance(target, tuple) else (target,)
    values = machine.load(space, address, TYPES[f"{letter.replace('f', 'b')}{bits}"], count)
    for place, register in enumerate(targets):
        value = np.ascontiguousarray(lanes.spread(values[:, place]))
        if register is not None and register.width > int(bits):
            value = value.astype(f"{'i' if letter == 's' else 'u'}{register.width // 8}")
        lanes.write(register, value)


def _store(space, vector, bits, machine, operands):
    address, source = operands
    sources = source if isinstance(source, tuple) else (source,)
    assert len(sources) == int(vector or 1)
    lanes = machine.lanes
    values = [lanes.of_active(lanes.demand_bits(part, int(bits))) for part in sources]
    machine.store(space, address, np.stack(values, -1))


def _atomic(name, kind, machine, operands):
    """One lane after the other."""
    target, address, source = operands
    lanes = machine.lanes
    values = lanes.of_active(lanes.demand(source, kind))
    found = machine.memory.atomic(
        machine.addresses(address, 64),
        values,
        OPERATIONS[f"{name}.{kind}"].function,
        lanes.indices,
        machine.clocks,
    )
    lanes.write(target, lanes.spread(found))


def _parameter(kind, machine, operands):
    target, address = operands
    value = machine.parameters[address.base] & ((1 << 8 * TYPES[kind].itemsize) - 1)
    bits = np.array(value, f"u{TYPES[kind].itemsize}")
    if kind[0] == "s" and target.width > 8 * bits.itemsize:
        bits = bits.view(f"i{bits.itemsize}")
    machine.lanes.write(target, bits.astype(f"{bits.dtype.kind}{target.width // 8}"))


def _copy(machine, operands):
    """cp.async: bytes behind the size of the source are zeros, and are not read."""
    target, source, nbytes, *size = operands
    lanes, width = machine.lanes, nbytes.bits
    sizes = np.full(len(lanes.indices), width)
    if size:
        sizes = lanes.of_active(lanes.demand(size[0], "u32")).astype(np.int64)
    assert np.isin(sizes, (0, width)).all(), "a copy of a part"
    values = np.zeros((len(sizes), width), np.uint8)
    used = sizes > 0
    addresses = machine.addresses(source, 64)
    word = min(width, 8)
    if used.any():
        loaded = machine.memory.load(
            addresses[used],
            np.dtype(f"u{word}"),
            width // word,
            lanes.indices[used],
            machine.clocks,
        )
        values[used] = loaded.view(np.uint8)
    machine.shared.store(
        lanes.indices, machine.addresses(target, 32), values.view(f"u{word}"), asynchronous=True
    )


def _commit(machine, _):
    machine.shared.commit(machine.lanes.indices)


def _wait(machine, operands):
    machine.shared.wait(machine.lanes.indices, operands[0].bits)


def _barrier(machine, operands):
    assert [operand.bits for operand in operands] == [0], "a named barrier"
    machine.lanes.check_together(machine.threads, "a barrier")
    machine.clocks.barrier(machine.lanes.indices)


def _warp_barrier(machine, operands):
    assert operands[0].bits & 0xFFFFFFFF == 0xFFFFFFFF, "a barrier of some lanes"
    machine.lanes.check_together(32, "a warp's barrier")
    machine.clocks.barrier(machine.lanes.indices, of_warp=True)


def _tiles(count, transposed, machine, operands):
    """ldmatrix: lanes 8i to 8i + 7 of a warp hold the addresses of tile i's rows."""
    target, address = operands
    count, lanes = int(count), machine.lanes
    lanes.check_together(32, "ldmatrix")
    asking = lanes.indices % 32 < 8 * count
    rows = machine.shared.load(
        lanes.indices[asking],
        machine.addresses(address, 32)[asking],
        np.dtype("u2"),
        8,
        collective=True,
    )
    words = warp.distribute(rows.reshape(-1, count, 8, 8), transposed)
    for register, word in zip(target, words, strict=True):
        lanes.write(register, np.ascontiguousarray(lanes.spread(word.reshape(-1))))


def _multiply(kind, machine, operands):
    target, *sources = operands
    lanes = machine.lanes
    lanes.check_together(32, "mma")
    a, b, c = (
        np.stack([lanes.demand(part, "b32").reshape(-1, 32) for part in source])
        for source in sources
    )
    product = warp.multiply(a, b, c.view(np.float32), kind)
    for register, values in zip(target, product, strict=True):
        lanes.write(register, values.reshape(-1).view(np.uint32))


def _shuffle(mode, machine, operands):
    target, source, operand, clamp, members = operands
    lanes = machine.lanes
    _check_members(lanes, members, "shfl")
    places = warp.sources(
        mode, np.broadcast_to(lanes.demand(operand, "b32"), lanes.count), clamp.bits
    )
    lanes.begin()  # an undefined place was an error
    values = np.broadcast_to(lanes.read(source, "b32"), lanes.count)
    lanes.moved(lambda undefined: undefined[places])
    lanes.write(target, values[places])


def _reduce(name, kind, machine, operands):
    target, source, members = operands
    lanes = machine.lanes
    _check_members(lanes, members, "redux")
    values = np.broadcast_to(lanes.demand(source, kind), lanes.count)
    lanes.write(target, warp.reduce(name, values))


def _check_members(lanes, members, what):
    lanes.check_together(32, what)
    given = lanes.of_active(lanes.demand(members, "b32"))
    assert (given == 0xFFFFFFFF).all(), f"{what} of some lanes"


_PLAIN = {
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait,
    "bar.sync": _barrier,
    "barrier.sync": _barrier,
    "bar.warp.sync": _warp_barrier,
}
_PATTERNS = (
    (_LOAD, _load),
    (_STORE, _store),
    (_ATOMIC, _atomic),
    (_PARAMETER, _parameter),
    (_COPY, _copy),
    (_TILES, _tiles),
    (_MULTIPLY, _multiply),
    (_SHUFFLE, _shuffle),
    (_REDUCE, _reduce),
)
