"""Folders of tiny Mixtrals that other tools wrote, and what those tools read there."""

import shutil

from safetensors.torch import load_file, save_file

from tests.support.models import GOLDEN

COMPRESSED, MODELOPT = "compressed-tensors-0.20.0", "modelopt-0.47.0"
TRANSFORMERS_FP8 = "transformers-fp8-5.23.0"
MLX = GOLDEN / "mlx-0.32.4"


def golden_folder(maker, name):
    return GOLDEN / maker / name


def expected_weights(maker, name):
    """Weights by module; under NAME.float32 what the tool's arithmetic gives in float32."""
    return load_file(GOLDEN / maker / f"{name}-expected.safetensors")


def copied_mlx(name, folder):
    """A copy of one of MLX's folders."""
    shutil.copytree(MLX / name, folder)
    return folder


def edit_tensors(folder, edit):
    """Change the tensors of a folder by `edit`, which gets them by name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
