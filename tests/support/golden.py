"""Folders of tiny Mixtrals that other tools wrote, and what those tools read there."""

from safetensors.torch import load_file

from tests.support.models import GOLDEN

COMPRESSED, MODELOPT = "compressed-tensors-0.20.0", "modelopt-0.47.0"
TRANSFORMERS_FP8 = "transformers-fp8-5.23.0"


def golden_folder(maker, name):
    return GOLDEN / maker / name


def expected_weights(maker, name):
    """Weights by module; under NAME.float32 what the tool's arithmetic gives in float32."""
    return load_file(GOLDEN / maker / f"{name}-expected.safetensors")
