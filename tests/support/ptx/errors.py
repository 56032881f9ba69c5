"""What the interpreter refuses to do. Every error names the line of the PTX text."""


class PtxError(Exception):
    """A program does what a GPU would not define, or what the interpreter does not know."""


class UnknownInstructionError(PtxError):
    """An opcode, operand or directive that the interpreter does not know."""


class UninitialisedError(PtxError):
    """A register or shared memory is read that nothing wrote."""


class OutOfBoundsError(PtxError):
    """An address lies outside the tensors of the launch, or outside its shared memory."""


class MisalignedError(PtxError):
    """An address is no multiple of the access's width."""


class UnwaitedError(PtxError):
    """Shared memory is used before the asynchronous copy into it was waited for."""


class RaceError(PtxError):
    """Two threads use the same memory, one of them writes, and no barrier lies between."""


class DivergenceError(PtxError):
    """A barrier or an instruction of a whole warp is reached by some of its threads only."""
