"""What the interpreter refuses to do. Every fault names the line of the PTX text."""


class Fault(Exception):
    """A program does what a GPU would not define, or what the interpreter does not know."""


class UnknownInstruction(Fault):
    """An opcode, operand or directive that the interpreter does not know."""


class Uninitialised(Fault):
    """A register or shared memory is read that nothing wrote."""


class OutOfBounds(Fault):
    """An address lies outside the tensors of the launch, or outside its shared memory."""


class Misaligned(Fault):
    """An address is no multiple of the access's width."""


class Unwaited(Fault):
    """Shared memory is used before the asynchronous copy into it was waited for."""


class Race(Fault):
    """Two threads use the same memory, one of them writes, and no barrier lies between."""


class Divergence(Fault):
    """A barrier or an instruction of a whole warp is reached by some of its threads only."""
