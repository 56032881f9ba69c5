"""The programs that go on with a checkpoint: which version was examined, where, and how.

A row for each program that `qmix export --for` writes for. Knows no checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Literal

from qmix.formats.names import TensorKind

ExportFormat = Literal["gptq", "compressed-tensors", "awq", "gguf"]
ServerProgram = Literal["vllm", "sglang"]
Program = Literal["vllm", "sglang", "transformers", "llama.cpp"]


@dataclass(frozen=True, kw_only=True)
class ExaminedProgram:
    """One program, as it was when its rules were written down.

    Attributes:
        name: as the program calls itself.
        version: the release that was examined.
        source: where its rules stand.
        tried: whether it was run; if not, its source was read.
        formats: what `qmix export` writes for it, the best first.
        serve: the command that serves a folder, on `{tp}` GPUs if it names them.
        memory_share: of a GPU's memory, what it gives to weights and cache unless told otherwise
            (SGLang computes it from the GPU and the batch: about as much); None if it takes what
            it needs.
        share_option: the option that changes this share.
    """

    name: str
    version: str
    source: str
    tried: bool
    formats: tuple[ExportFormat, ...]
    serve: str
    memory_share: float | None = None
    share_option: str | None = None

    @property
    def release(self) -> str:
        """Name and version, as `qmix inspect` shows them."""
        return f"{self.name} {self.version}"

    def serving(self, folder: object, tp: int = 2) -> str:
        """The command that serves a folder, quoted for a shell.

        Args:
            tp: GPUs that share the model.
        """
        return self.serve.format(folder=quote(str(folder)), tp=tp)


PROGRAMS: Mapping[Program, ExaminedProgram] = {
    "vllm": ExaminedProgram(
        name="vLLM",
        version="0.33",
        source="https://github.com/vllm-project/vllm/tree/v0.33.0/vllm/model_executor: "
        "models/mixtral.py, layers/quantization/{auto_gptq,auto_awq}.py, utils/gptq_utils.py, "
        "compressed_tensors",
        tried=False,
        formats=("gptq", "compressed-tensors", "awq"),
        serve="vllm serve {folder} --tensor-parallel-size {tp}",
        memory_share=0.92,
        share_option="--gpu-memory-utilization",
    ),
    "sglang": ExaminedProgram(
        name="SGLang",
        version="0.5.23",
        source="https://github.com/sgl-project/sglang/tree/v0.5.23/python/sglang/srt: "
        "models/mixtral.py, layers/quantization/{gptq,awq,compressed_tensors,marlin_utils.py}",
        tried=False,
        formats=("gptq", "compressed-tensors", "awq"),
        serve="python -m sglang.launch_server --model-path {folder} --tp-size {tp}",
        memory_share=0.88,
        share_option="--mem-fraction-static",
    ),
    "transformers": ExaminedProgram(
        name="transformers",
        version="5.23",
        source="https://github.com/huggingface/transformers/tree/v5.23.0/src/transformers: "
        "quantizers, models/mixtral; with compressed-tensors 0.20.0",
        tried=True,
        formats=("compressed-tensors",),
        serve="transformers serve {folder}",
    ),
    "llama.cpp": ExaminedProgram(
        name="llama.cpp",
        version="(2026)",
        source="https://github.com/abetlen/llama-cpp-python/tree/v0.3.36",
        tried=True,
        formats=("gguf",),
        serve="llama-server -m {folder}/model.gguf",
    ),
}
# What these programs take in codes; they build routers dense, and most of them the head.
SERVED_KINDS: frozenset[TensorKind] = frozenset(("attention", "expert"))
