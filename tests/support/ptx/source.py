"""PTX text as blocks of instructions. Knows the grammar, and no meaning of any instruction."""

import re
from dataclasses import dataclass

from tests.support.ptx.errors import UnknownInstructionError

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\((.*?)\)(.*?)\n\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\b.*?(\w+)\s*(?:,|$)", re.MULTILINE)
_PREFIXED = re.compile(r"(%?[A-Za-z]\w*?)<(\d+)>")
_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
_WIDTHS |= {f"{sign}{bits}": bits for sign in "su" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Register:
    """A register of every lane: its place among all registers, its bits (1 of a predicate)."""

    index: int
    width: int
    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant, as the bits of an integer; `is_float` where it was written as a float."""

    bits: int
    is_float: bool = False


@dataclass(frozen=True)
class Special:
    """A register that the machine sets, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Address:
    """The sum of a base, which may be a register, a parameter's name or none, and an offset."""

    base: object
    offset: int


@dataclass(frozen=True)
class Label:
    """Where a branch goes."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """One instruction. `guard` is None or a predicate and the value that it must have."""

    opcode: str
    operands: tuple
    guard: tuple[Register, bool] | None
    line: int
    text: str

    def __str__(self):
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        parameters: name and bits of each, in order.
        blocks: instructions; all but the last one of a block run in sequence.
        labels: the block that a label starts.
        registers: how many there are.
    """

    name: str
    parameters: tuple[tuple[str, int], ...]
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]
    registers: int


class _Scope:
    """Names of registers: those of the kernel, and those of the braces that are open."""

    def __init__(self):
        self.count = 0
        self.levels = [({}, {})]  # prefixes and single names -> width; names -> Register

    def declare(self, text):
        width, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()
        declared, known = self.levels[-1]
        for name in names.split(","):
            prefixed = _PREFIXED.fullmatch(name.strip())
            declared[prefixed[1] + "#" if prefixed else name.strip()] = _WIDTHS[width]
            known.pop(name.strip(), None)

    def find(self, name):
        """The register of a name, or None."""
        for declared, known in reversed(self.levels):
            if name in known:
                return known[name]
            width = declared.get(name) or declared.get(name.rstrip("0123456789") + "#")
            if width:
                known[name] = Register(self.count, width, name)
                self.count += 1
                return known[name]
        return None


def parse(text):
    """The one kernel of a PTX text.

    Raises:
        UnknownInstructionError: something in it is not understood.
    """
    entry = _ENTRY.search(text)
    if entry is None:
        raise UnknownInstructionError("no kernel")
    parameters = tuple((name, _WIDTHS[kind]) for kind, name in _PARAMETER.findall(entry[2]))
    scope, blocks, labels = _Scope(), [[]], {}
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", text))
    for line, statement in _statements(text, entry.end()):
        if statement == "{":
            scope.levels.append(({}, {}))
        elif statement == "}":
            scope.levels.pop()
            if not scope.levels:
                break
        elif statement.endswith(":"):
            if statement[:-1] in targets:  # the others are there for debuggers
                if blocks[-1]:
                    blocks.append([])
                labels[statement[:-1]] = len(blocks) - 1
        elif statement.startswith(".reg"):
            scope.declare(statement)
        elif not statement.startswith((".loc", ".pragma")):
            instruction = _instruction(statement, line, scope, dict(parameters))
            blocks[-1].append(instruction)
            if instruction.opcode in ("bra", "bra.uni", "ret", "exit"):
                blocks.append([])
    return Program(entry[1], parameters, tuple(map(tuple, blocks)), labels, scope.count)


def _statements(text, start):
    """Line number and text of labels, braces of a scope, directives and instructions."""
    pending, first = "", 0
    number = text.count("\n", 0, start) + 1
    for offset, whole in enumerate(text[start:].split("\n")):
        rest = whole.partition("//")[0].strip()
        while rest:
            if not pending:
                first = number + offset
                if rest[0] in "{}":
                    yield first, rest[0]
                    rest = rest[1:].lstrip()
                    continue
                if rest.startswith(".loc"):
                    break
                if label := re.match(r"[$\w]+:", rest):
                    yield first, label[0]
                    rest = rest[label.end() :].lstrip()
                    continue
            head, semicolon, rest = rest.partition(";")
            pending += " " + head
            if semicolon:
                if pending.strip():
                    yield first, pending.strip()
                pending, rest = "", rest.lstrip()


def _instruction(statement, line, scope, parameters):
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise UnknownInstructionError(f"line {line}: {statement}")
    negated, predicate, opcode, rest = match.groups()
    text = " ".join(statement.split())
    guard = None
    if predicate:
        guard = (_operand(predicate, scope, parameters, text, line), not negated)
    operands = tuple(_operand(part.strip(), scope, parameters, text, line) for part in _split(rest))
    return Instruction(opcode, operands, guard, line, text)


def _split(text):
    """The operands between commas, which those in braces and brackets are not."""
    depth, part = 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            yield part
            part = ""
        else:
            part += letter
    if part.strip():
        yield part


def _operand(text, scope, parameters, whole, line):
    """A register, constant, address, label, or a tuple of operands; None for `_`."""
    if text == "_":
        return None
    if text[0] == "{":
        return tuple(
            _operand(part.strip(), scope, parameters, whole, line) for part in _split(text[1:-1])
        )
    if text[0] == "[":
        base, sign, offset = re.fullmatch(
            r"\[\s*([%$\w]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", text
        ).groups()
        base = base if base in parameters else _operand(base, scope, parameters, whole, line)
        return Address(base, int((sign or "+") + "1") * int(offset or "0", 0))
    if register := scope.find(text):
        return register
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match[1] or match[2], 16), True)
    if _NUMBER.fullmatch(text):
        return Immediate(int(text.rstrip("U"), 0))
    if text == "global_smem":  # Triton's one array of shared memory starts at address 0
        return Immediate(0)
    if text.startswith("$"):
        return Label(text)
    if text.startswith("%"):
        return Special(text)
    raise UnknownInstructionError(f"line {line}: {whole} (operand {text})")
