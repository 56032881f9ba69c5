"""tests.support.ptx itself: what it refuses, and instructions against their definitions."""

import numpy as np
import pytest
import torch

from tests.support.ptx import errors, warp
from tests.support.ptx.machine import run
from tests.support.ptx.memory import GlobalMemory
from tests.support.ptx.packed import narrow
from tests.support.ptx.source import parse

HEADER = """
.visible .entry probe(
    .param .u64 .ptr .global .align 1 probe_param_0,
    .param .u64 .ptr .global .align 1 probe_param_1
)
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [probe_param_0];
    ld.param.b64 %rd2, [probe_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 16;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r2, %r1, 4;
"""
# %rd4 and %rd5 are 16 bytes a thread of the two tensors, %r2 of shared memory.
FILL = "st.shared.b32 [%r2], %r1;\n"
COPY = "cp.async.cg.shared.global [%r2], [%rd4], 16;\n"


def execute(body, source=None, *, threads=64, blocks=1, shared=1024):
    """The second tensor, uint32 [threads, 4], after the body has run."""
    source = np.arange(threads * 4, dtype=np.uint32) if source is None else source
    target = np.zeros((threads, 4), np.uint32)
    program = parse(HEADER + body + "\nret;\n}\n")
    memory = GlobalMemory([(part.ctypes.data, part.nbytes) for part in (source, target)])
    bits = {"probe_param_0": source.ctypes.data, "probe_param_1": target.ctypes.data}
    run(program, (blocks, 1, 1), threads, bits, memory, shared)
    return target


REFUSED = {
    "an opcode": (errors.UnknownInstructionError, "wgmma.fence.sync.aligned;"),
    "a modifier": (errors.UnknownInstructionError, "add.sat.s32 %r3, %r1, %r1;"),
    "a register of another width": (errors.UnknownInstructionError, "add.s32 %rd6, %r1, %r1;"),
    "a register": (errors.UninitialisedError, "add.s32 %r4, %r3, 1; st.global.b32 [%rd5], %r4;"),
    "a register of half the lanes": (
        errors.UninitialisedError,
        "setp.lt.u32 %p1, %r1, 7; @%p1 mov.b32 %r3, 1; st.global.b32 [%rd5], %r3;",
    ),
    "a predicate": (errors.UninitialisedError, "@%p1 st.global.b32 [%rd5], %r1;"),
    "an address": (errors.UninitialisedError, "st.global.b32 [%rd6], %r1;"),
    "shared memory": (errors.UninitialisedError, "ld.shared.b32 %r3, [%r2];"),
    "before a tensor": (errors.OutOfBoundsError, "ld.global.b32 %r3, [%rd4+-16];"),
    "behind a tensor": (errors.OutOfBoundsError, "ld.global.b32 %r3, [%rd4+16];"),
    "half behind a tensor": (errors.MisalignedError, "ld.global.v2.b32 {%r3, %r4}, [%rd4+12];"),
    "behind shared memory": (errors.OutOfBoundsError, "st.shared.b32 [%r2+16], %r1;"),
    "before shared memory": (errors.OutOfBoundsError, "st.shared.b32 [%r2+-16], %r1;"),
    "a misaligned vector": (
        errors.MisalignedError,
        "ld.global.v4.b32 {%r3,%r4,%r5,%r6}, [%rd4+4];",
    ),
    "a copy without a wait": (errors.UnwaitedError, COPY + "ld.shared.b32 %r3, [%r2];"),
    "a copy without a group": (
        errors.UnwaitedError,
        COPY + "cp.async.wait_group 0; ld.shared.b32 %r3, [%r2];",
    ),
    "a wait for the group before": (
        errors.UnwaitedError,
        COPY + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r3, [%r2];",
    ),
    "a copy of another thread": (
        errors.RaceError,
        COPY + "cp.async.commit_group; cp.async.wait_group 0; xor.b32 %r3, %r2, 16;"
        "ld.shared.b32 %r4, [%r3];",
    ),
    "a barrier before the wait": (
        errors.RaceError,
        COPY + "cp.async.commit_group; bar.sync 0; cp.async.wait_group 0; xor.b32 %r3, %r2, 16;"
        "ld.shared.b32 %r4, [%r3];",
    ),
    "a write without a barrier": (
        errors.RaceError,
        FILL + "xor.b32 %r3, %r2, 16; ld.shared.b32 %r4, [%r3];",
    ),
    "a warp's barrier between warps": (
        errors.RaceError,
        FILL + "bar.warp.sync -1; xor.b32 %r3, %r2, 512; ld.shared.b32 %r4, [%r3];",
    ),
    "a write of what is being read": (
        errors.RaceError,
        FILL + "bar.sync 0; xor.b32 %r3, %r2, 16; ld.shared.b32 %r4, [%r3];" + FILL,
    ),
    "two writers": (errors.RaceError, "st.global.b32 [%rd2], %r1;"),
    "what another thread stored": (
        errors.RaceError,
        "st.global.b32 [%rd5], %r1; xor.b32 %r3, %r1, 1; mul.wide.u32 %rd6, %r3, 16;"
        "add.s64 %rd7, %rd2, %rd6; ld.global.b32 %r4, [%rd7];",
    ),
    "a barrier of half a block": (
        errors.DivergenceError,
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L1; bar.sync 0;\n$L1:",
    ),
    "a shuffle of half a warp": (
        errors.DivergenceError,
        "setp.lt.u32 %p1, %r1, 16; @%p1 bra $L1; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;\n$L1:",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    error, body = REFUSED[what]
    with pytest.raises(error, match="line"):
        execute(body)


ALLOWED = {
    "own copy": COPY + "cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r3, [%r2];",
    "another's copy": COPY + "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    "xor.b32 %r4, %r2, 16; ld.shared.b32 %r3, [%r4];",
    "another's write": FILL + "bar.sync 0; xor.b32 %r4, %r2, 16; ld.shared.b32 %r3, [%r4];",
    "in a warp": FILL + "bar.warp.sync -1; xor.b32 %r4, %r2, 16; ld.shared.b32 %r3, [%r4];",
    "an undefined value that is dropped": "selp.b32 %r4, %r1, %r9, %p2;",
    "lanes that end": "setp.lt.u32 %p1, %r1, 16; @%p1 ret; mov.b32 %r3, 1;",
    "a loop": "mov.b32 %r3, %r1;\n$L1: add.s32 %r3, %r3, 8; setp.lt.s32 %p1, %r3, 64; @%p1 bra $L1;",
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_is_allowed(what):
    execute(ALLOWED[what])


ARRIVE = """
    mov.u32 %r10, %ctaid.x;
    mov.b32 %r11, 1;
    add.s32 %r12, %r1, 4;
    mul.wide.u32 %rd6, %r10, 4;
    add.s64 %rd7, %rd5, %rd6;
    st.global.b32 [%rd7], %r12;
    BEFORE
    setp.eq.b32 %p1, %r1, 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r13, [%rd2+1016], %r11;
    @%p1 st.shared.b32 [%r2], %r13;
    bar.sync 0;
    mov.b32 %r14, 0;
    ld.shared.b32 %r15, [%r14];
    setp.eq.b32 %p2, %r15, 0;
    @%p2 ret;
    ld.global.b32 %r16, [%rd5];
    ld.global.b32 %r17, [%rd5+4];
    add.s32 %r18, %r16, %r17;
    st.global.b32 [%rd5+AT], %r18;
"""


def test_the_last_block_may_read_what_was_released():
    body = ARRIVE.replace("AT", "12")
    # The counter is the third word of the last thread.
    found = execute(body.replace("BEFORE", "bar.sync 0;"), blocks=2)
    assert (found[:, 3] == 2 * (np.arange(64) + 4)).all()
    with pytest.raises(errors.RaceError, match="global memory"):
        execute(body.replace("BEFORE", ""), blocks=2)


def computed(body, *sources):
    """%r3 of each thread, which has a word of each source in %r20, %r21, ..."""
    words = np.zeros((64, 4), np.uint32)
    for place, source in enumerate(sources):
        words[:, place] = source
    names = ", ".join(f"%r{20 + place}" for place in range(4))
    load = f"ld.global.v4.b32 {{{names}}}, [%rd4];"
    return execute(load + body + "st.global.b32 [%rd5], %r3;", words.reshape(-1))[:, 0]


def words(seed):
    return np.random.default_rng(seed).integers(0, 2**32, 64, dtype=np.uint32)


def test_permutation():
    a, b, selector = words(1), words(2), words(3)
    found = computed("prmt.b32 %r3, %r20, %r21, %r22;", a, b, selector)
    for x, y, chosen, result in zip(
        *(part.tolist() for part in (a, b, selector, found)), strict=True
    ):
        both = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        picked = [
            255 * (both[n & 7] >> 7) if n & 8 else both[n & 7]
            for n in (chosen >> shift & 15 for shift in (0, 4, 8, 12))
        ]
        assert result == int.from_bytes(bytes(picked), "little")


@pytest.mark.parametrize("table", [0xEA, 0x96, 0x01, 0xFF])
def test_logic(table):
    a, b, c = words(1), words(2), words(3)
    found = computed(f"lop3.b32 %r3, %r20, %r21, %r22, {table};", a, b, c)
    for bit in range(32):
        x, y, z = ((part >> bit) & 1 for part in (a, b, c))
        assert ((found >> bit & 1) == (table >> (4 * x + 2 * y + z) & 1)).all()


@pytest.mark.parametrize(("start", "length"), [(0, 4), (4, 8), (28, 8), (31, 1), (0, 32), (5, 0)])
def test_fields(start, length):
    value, into = words(1), words(2)
    unsigned = computed(f"bfe.u32 %r3, %r20, {start}, {length};", value)
    signed = computed(f"bfe.s32 %r3, %r20, {start}, {length};", value)
    inserted = computed(f"bfi.b32 %r3, %r20, %r21, {start}, {length};", value, into)
    for x, y, *found in zip(value, into, unsigned, signed.view(np.int32), inserted, strict=True):
        x, y, mask = int(x), int(y), (1 << length) - 1
        field = x >> start & mask
        top = x >> min(start + length - 1, 31) & 1 if length else 0
        width = min(length, 32 - start)
        assert found[0] == field
        assert found[1] == field % (1 << width) - (top << width)
        assert found[2] == (y & ~(mask << start) | (x & mask) << start) % 2**32


def test_integers_divide_towards_zero_and_shifts_end():
    a, b = words(1).view(np.int32), (words(2) >> 20).astype(np.int32) - 2048
    b[b == 0] = 3
    meant = [int(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    as_words = (a.view(np.uint32), b.view(np.uint32))
    assert computed("div.s32 %r3, %r20, %r21;", *as_words).view(np.int32).tolist() == meant
    rest = [x - q * y for x, y, q in zip(a.tolist(), b.tolist(), meant, strict=True)]
    assert computed("rem.s32 %r3, %r20, %r21;", *as_words).view(np.int32).tolist() == rest
    assert not computed("shl.b32 %r3, %r20, 32;", as_words[0]).any()
    assert not computed("shr.u32 %r3, %r20, 40;", as_words[0]).any()
    signs = computed("shr.s32 %r3, %r20, 40;", as_words[0]).view(np.int32)
    assert (signs == (a >> 31)).all()


def test_conversions_round_as_torch_does():
    values = (words(1) >> 4 << 4).view(np.float32)
    values = np.concatenate((values, np.float32([1 + 2**-8, 1 + 3 * 2**-8, np.inf, np.nan])))
    meant = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(values)
    assert (narrow(values)[number] == meant[number]).all()
    numbers = np.float32([2.5, -2.5, 3e9, -3e9, np.nan, 0.9, -0.9, 1e-40])
    given = np.resize(numbers, 64).view(np.uint32)
    found = computed("cvt.rzi.s32.f32 %r3, %r20;", given).view(np.int32)[:8]
    assert found.tolist() == [2, -2, 2**31 - 1, -(2**31), 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("mode", "operand", "clamp", "meant"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 <= 31 else lane),
        ("idx", 9, 31, lambda lane: 9),
        ("up", 1, 24 << 8, lambda lane: lane - 1 if lane % 8 else lane),  # segments of 8
        ("down", 2, 24 << 8 | 31, lambda lane: lane + 2 if lane % 8 < 6 else lane),
    ],
)
def test_shuffles(mode, operand, clamp, meant):
    found = computed(f"shfl.sync.{mode}.b32 %r3, %r1, {operand}, {clamp}, -1;")
    assert found.tolist() == [thread // 32 * 32 + meant(thread % 32) for thread in range(64)]


def test_the_fragments_of_a_matrix_product():
    """Element by element, as "Matrix fragments for mma.m16n8k16" places them."""
    draw = np.random.default_rng(1)
    a, b = (draw.integers(-8, 8, shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    c = draw.integers(-8, 8, (16, 8)).astype(np.float32)
    registers = [np.zeros((n, 1, 32, 2), np.float16) for n in (4, 2)]
    sums = np.zeros((4, 1, 32), np.float32)
    places = {}
    for lane in range(32):
        group, thread = lane >> 2, lane & 3
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            registers[0][i // 2, 0, lane, i & 1] = a[row, column]
        for i in range(4):
            registers[1][i // 2, 0, lane, i & 1] = b[thread * 2 + (i & 1) + 8 * (i >= 2), group]
            places[i, lane] = (group + 8 * (i >= 2), thread * 2 + (i & 1))
            sums[i, 0, lane] = c[places[i, lane]]
    words = (part.view(np.uint32)[..., 0] for part in registers)
    found = warp.multiply(*words, sums, "f16")
    product = a.astype(np.float32) @ b.astype(np.float32) + c
    for (i, lane), place in places.items():
        assert found[i, 0, lane] == product[place]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_fragments_of_a_tile(transposed):
    rows = np.arange(2 * 4 * 64, dtype=np.uint16).reshape(2, 4, 8, 8)
    found = warp.distribute(rows, transposed)
    for tile in range(4):
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            pair = [
                rows[1, tile, column + i, row] if transposed else rows[1, tile, row, column + i]
                for i in (0, 1)
            ]
            assert found[tile, 1, lane] == int(pair[0]) | int(pair[1]) << 16
