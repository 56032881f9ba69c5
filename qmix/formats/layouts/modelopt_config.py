"""ModelOpt's settings, checked against the tensors: config.json's or hf_quant_config.json.

Both are written by ModelOpt's export (0.47: torch/export/quant_utils.py, convert_hf_config.py); the
latter has its fields one level deeper. Knows nothing of files.
"""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qmix.formats.layouts.settings import PackedModule, Settings

FILE = "hf_quant_config.json"
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_MIXED = "MIXED_PRECISION"
_BLOCK = 16
_MAX_PATTERNS = 64  # with wildcards that are not at the end; ModelOpt writes none


@dataclass(frozen=True)
class ModelOptConfig:
    """The settings, read.

    Attributes:
        settings: the fields; those of hf_quant_config.json from below `quantization`.
        algorithm: of every module; MIXED_PRECISION if `layers` names them; None without settings.
        layers: the algorithm of each module by its name, of mixed precision only.
        ignored: names of modules that are not quantized, with wildcards.
        field: the field that lists them.
    """

    settings: Settings
    algorithm: str | None
    layers: Mapping[str, str]
    ignored: tuple[str, ...]
    field: str

    def confirm(self, modules: Collection[PackedModule], dense: Collection[Sequence[str]]) -> None:
        """Check the settings against the packed modules.

        Args:
            dense: the dense modules, each by its name in the files and its other spellings; without
                routers.

        Raises:
            CheckpointError: a field that the tensors contradict.
        """
        if self.algorithm is None:
            return
        for module in modules:
            self._confirm_module(module)
        for names in dense:
            if self.algorithm != _MIXED and names[0] != "lm_head" and not self._ignores(names):
                expected = f"{names[0]} among them"
                raise self.settings.contradiction(self.field, expected, names[0])

    def _confirm_module(self, module: PackedModule) -> None:
        if self._ignores(module.names):
            expected = f"nothing that matches {module.name}"
            raise self.settings.contradiction(self.field, expected, module.name)
        algorithm, field = self.algorithm, "quant_algo"
        if algorithm == _MIXED:
            field = "quantized_layers"
            named = (self.layers[name] for name in module.names if name in self.layers)
            algorithm = next(named, "nothing")
        fitting = _NVFP4 if module.scheme.kind == "e2m1" else _FP8
        if algorithm not in fitting:
            raise self.settings.contradiction(field, repr(fitting[0]), module.name, algorithm)
        size = self.settings.get("group_size")
        if module.scheme.kind == "e2m1" and self.algorithm != _MIXED and size not in (None, _BLOCK):
            raise self.settings.contradiction("group_size", _BLOCK, module.name)

    def _ignores(self, names: Sequence[str]) -> bool:
        """Whether a module, by any of its names, is among those that are not quantized."""
        exact, prefixes, patterns = self._matching
        return any(
            name in exact
            or name.startswith(prefixes)
            or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            for name in names
        )

    @cached_property
    def _matching(self) -> tuple[frozenset[str], tuple[str, ...], tuple[str, ...]]:
        """Names, beginnings of names, and other patterns."""
        plain = [name for name in self.ignored if not _wild(name)]
        starts = [name[:-1] for name in self.ignored if name[-1:] == "*" and not _wild(name[:-1])]
        others = [name for name in self.ignored if _wild(name[:-1])]
        if len(others) > _MAX_PATTERNS or any(len(name) > 200 for name in others):
            what = "so many patterns of names are not read"
            raise self.settings.unread(self.field, what, f"at most {_MAX_PATTERNS}")
        return frozenset(plain), tuple(starts), tuple(others)


def read(document: Mapping[str, Any] | None, where: str) -> ModelOptConfig:
    """The settings.

    Args:
        document: config.json's `quantization_config`, or hf_quant_config.json; None without both.
        where: the file, for errors.

    Raises:
        CheckpointError: settings of another method, or a field of a wrong type.
        UnsupportedError: an algorithm that is not read.
    """
    settings = Settings(document if document is not None else {}, where)
    if document is None:
        return ModelOptConfig(settings, None, {}, (), "ignore")
    settings.check_method("modelopt", "ModelOpt's")
    settings = settings.inner("quantization") or settings
    field = "exclude_modules" if "exclude_modules" in settings.fields else "ignore"
    algorithm = settings.get("quant_algo")
    if not isinstance(algorithm, str):
        raise settings.wrong("quant_algo", f"one of {', '.join((*_NVFP4, *_FP8, _MIXED))}")
    algorithm = algorithm.upper()
    if algorithm not in (*_NVFP4, *_FP8, _MIXED):
        what = f"ModelOpt's {algorithm[:40]} is not read"
        raise settings.unread("quant_algo", what, f"one of {', '.join((*_NVFP4, *_FP8, _MIXED))}")
    layers = settings.inner("quantized_layers")
    by_name: dict[str, str] = {}
    for name in layers.fields if layers else ():
        assert layers is not None
        layer = layers.inner(name)
        if layer is None or not isinstance(layer.get("quant_algo"), str):
            raise layers.wrong(name, "an object with quant_algo")
        by_name[name] = str(layer.get("quant_algo")).upper()
    return ModelOptConfig(settings, algorithm, by_name, settings.strings(field), field)


def confirm(
    config: ModelOptConfig, modules: Collection[PackedModule], dense: Collection[Sequence[str]]
) -> None:
    """Check the settings against the packed modules; see ModelOptConfig.confirm."""
    config.confirm(modules, dense)


def _wild(name: str) -> bool:
    return any(character in name for character in "*?[")
