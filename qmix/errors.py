"""Every error a user can cause: what went wrong, where, expected, found, and what to do.

Each kind carries the exit code of the command line. Knows nothing of torch or of files.

Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input or checkpoint, 4 resources, 5 quality gate failed,
6 a reply was cut short, 75 interrupted but resumable, 130 Ctrl-C, 141 the reader of stdout left.
"""

from qmix.printable import escaped

CTRL_C = 130  # the exit code after Ctrl-C
CUT_REPLY = 6  # a chat's exit code where a reply ended before the model ended it


class QmixError(Exception):
    """An error with its remedy.

    Args:
        what: the failure in a few words, without a trailing full stop.
        where: file, tensor, field or option it happened in.
        expected: the accepted form.
        found: the offending value, as found.
        remedy: one sentence: what to do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected is not None:
            head += f"; expected {self.expected}"
        if self.found is not None:
            head += f"; found {self.found}"
        # One line, and nothing in a file name or a header may drive the terminal.
        return escaped(f"{head}. {self.remedy}" if self.remedy else head)

    def to_dict(self) -> dict[str, object]:
        """The error as a JSON document."""
        fields = {
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
        }
        texts = {name: None if field is None else str(field) for name, field in fields.items()}
        return {"error": self.what, **texts, "exit_code": self.exit_code}

    def at(self, where: str, kind: "type[QmixError] | None" = None) -> "QmixError":
        """The same error at another place.

        Args:
            kind: its class; None: that of this error.
        """
        return (kind or type(self))(
            self.what,
            where=where,
            expected=self.expected,
            found=self.found,
            remedy=self.remedy,
        )


class UsageError(QmixError, ValueError):
    """An argument or option is out of its range, or two of them contradict each other."""

    exit_code = 2


def wrong_value(where: str, expected: object, found: object) -> UsageError:
    """The error for an argument that is not accepted."""
    return UsageError("wrong value", where=where, expected=expected, found=repr(found)[:80])


def wrong_type(where: str, expected: str, found: object) -> UsageError:
    """The error for an argument of another type."""
    return UsageError("wrong type", where=where, expected=expected, found=type(found).__name__)


class CheckpointError(QmixError):
    """A file is missing, damaged or inconsistent."""

    exit_code = 3


class UnsupportedError(QmixError):
    """The input is well-formed, and qmix does not do this."""

    exit_code = 3


class ConfigError(CheckpointError, ValueError):
    """A configuration value is absurd or contradicts another."""


class ResourceError(QmixError):
    """It does not fit: disk, host memory or device memory."""

    exit_code = 4


class LostDeviceError(ResourceError):
    """The GPU failed: nothing that this process keeps there can be used any more."""


def of_device(error: RuntimeError) -> ResourceError | None:
    """The error of a GPU that failed in the middle of its work; None if this is another one.

    Args:
        error: torch's, which begins with the runtime's own words.
    """
    said = str(error).partition("\n")[0]
    if not said.startswith(("CUDA error", "HIP error")):
        return None
    if "out of memory" in said:
        return ResourceError(
            "the GPU has no memory left",
            found=said,
            remedy="Give a smaller vram or a shorter context, or close the programs that use it.",
        )
    return LostDeviceError(
        "the GPU failed, and this process cannot use it any more",
        found=said,
        remedy="Start again. If it fails again, look at nvidia-smi and the system's log (Xid), and "
        "try QMIX_BACKEND=torch: if that helps, report it with the output of qmix doctor.",
    )


class WriteError(ResourceError, OSError):
    """A file cannot be written: a full or broken disk, one mounted read-only, a lost mount."""


class QualityError(QmixError):
    """A quality gate failed."""

    exit_code = 5


class InterruptedRunError(QmixError):
    """The run was interrupted and can be resumed."""

    exit_code = 75
