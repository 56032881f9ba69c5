"""What the quantization settings of all layouts share: typed fields, compared with the tensors.

The tensors decide how a weight is read. Settings that say something else belong to another
checkpoint, or one of the two is damaged: each such field is refused by name. Fields that only
describe how a checkpoint was made are not looked at. Knows no layout and reads no data.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qmix.errors import CheckpointError, UnsupportedError
from qmix.weights.scheme import Scheme

_OTHERS = "The settings are another checkpoint's, or edited: fetch them again with the tensors."


@dataclass(frozen=True, kw_only=True)
class PackedModule:
    """What the headers say of one packed weight.

    Attributes:
        name: of the module in the files.
        names: that, and the module's other spellings.
        scheme: as far as headers tell.
        shape: (N, K).
        groups: scales of an output, or blocks of the whole weight.
        has_g_idx: whether each input's group is stored.
        scale_shape: of the stored scales; () if there is one, or none.
    """

    name: str
    names: tuple[str, ...]
    scheme: Scheme
    shape: tuple[int, int]
    groups: int
    has_g_idx: bool = False
    scale_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Settings:
    """One object of the settings.

    Attributes:
        fields: by name.
        where: the file, for errors.
        path: of an inner object: the fields that lead to it, each with a full stop.
    """

    fields: Mapping[str, Any]
    where: str
    path: str = ""

    def place(self, field: str) -> str:
        """The file and the field, for errors."""
        return f"{self.where}: {self.path}{field[:120]}"

    def get(self, field: str, default: Any = None) -> Any:
        """The value of a field; `default` if it is missing or null."""
        value = self.fields.get(field)
        return default if value is None else value

    def wrong(self, field: str, expected: object) -> CheckpointError:
        """The error of a value that the field never has."""
        found = repr(self.fields.get(field))[:80]
        return CheckpointError(
            "wrong value", where=self.place(field), expected=expected, found=found
        )

    def contradiction(
        self, field: str, expected: object, module: str, found: object = None
    ) -> CheckpointError:
        """The error of a field that the tensors of `module` contradict."""
        value = self.fields.get(field) if found is None else found
        return CheckpointError(
            "contradicts the tensors",
            where=self.place(field),
            expected=f"{expected}, as {module} is stored",
            found=repr(value)[:80],
            remedy=_OTHERS,
        )

    def unread(self, field: str, what: str, expected: object) -> UnsupportedError:
        """The error of a field that asks for what qmix does not compute."""
        return UnsupportedError(
            what,
            where=self.place(field),
            expected=expected,
            found=repr(self.fields.get(field))[:80],
            remedy="Quantize the original checkpoint with qmix quantize.",
        )

    def check_method(self, name: str, owner: str) -> None:
        """Check `quant_method`, if there is one; `owner` is the layout in the possessive.

        Raises:
            CheckpointError: it names another method.
        """
        if self.get("quant_method", name) != name:
            raise CheckpointError(
                f"the tensors are {owner}, but quant_method names another method",
                where=self.where,
                expected=repr(name),
                found=repr(self.fields["quant_method"])[:80],
                remedy=_OTHERS,
            )

    def flag(self, field: str) -> bool | None:
        """A field that is true or false; None if it is missing or null."""
        value = self.get(field)
        if value is not None and type(value) is not bool:
            raise CheckpointError(
                "wrong type",
                where=self.place(field),
                expected="true or false",
                found=repr(value)[:80],
            )
        return value

    def strings(self, field: str) -> tuple[str, ...]:
        """A field that is a list of strings; empty if it is missing or null."""
        value = self.get(field, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(field, "a list of strings")
        return tuple(value)

    def inner(self, field: str) -> "Settings | None":
        """A field that is an object; None if it is missing or null."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(field, "an object or null")
        return Settings(value, self.where, f"{self.path}{field[:80]}.")


def check_packing(settings: Settings) -> None:
    """Check what GPTQ's and AWQ's settings say of how codes are packed.

    Raises:
        CheckpointError: codes that are not packed into 32-bit words; a flag of a wrong type.
    """
    if settings.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise settings.wrong("pack_dtype", "'int32', as the tensors are")
    settings.flag("desc_act")


def check_head(settings: Settings, modules: Iterable[PackedModule]) -> None:
    """Check GPTQ's or AWQ's `lm_head` against the head's tensors.

    Raises:
        CheckpointError: it is true and the head is not packed, or it is false and the head is.
    """
    packed = any(module.name == "lm_head" for module in modules)
    asked = settings.flag("lm_head")
    if asked is not None and asked != packed:
        raise settings.contradiction("lm_head", str(packed).lower(), "lm_head")


def check_dense(settings: Settings, field: str, modules: Iterable[PackedModule]) -> None:
    """Check that no module is packed which the settings say is not.

    A name stands for the modules that it names in full, or by a whole part of their names.

    Raises:
        CheckpointError: a packed module is named.
    """
    dense = settings.strings(field)
    for module in modules:
        for name in dense:
            if _names(name, module.name):
                raise settings.contradiction(
                    field, f"no name of {module.name}", module.name, found=name
                )


def _names(name: str, module: str) -> bool:
    """Whether every version of transformers takes `name` for `module` or a module around it."""
    parts: Collection[str] = module.split(".")
    return name in parts or module == name or module.startswith(f"{name}.")
