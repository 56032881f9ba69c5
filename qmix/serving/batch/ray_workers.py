"""Lines answered by workers of a Ray cluster, one model each; what Ray loses it does again.

Ray Data keeps the order and restarts workers. Knows no file of results.
"""

import logging
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from qmix.errors import QmixError, UnsupportedError
from qmix.serving.batch.prompt_lines import PromptLine
from qmix.serving.batch.worker import Worker, WorkerSettings

# Lines that a worker gets at a time, and does again if it is lost.
_LINES = 16


def check_extra() -> None:
    """
    Raises:
        UnsupportedError: Ray is missing.
    """
    if find_spec("ray") is None:
        raise UnsupportedError("--ray needs ray", remedy="Run: pip install 'qmix-runtime[ray]'")


def answers_of_workers(
    lines: Iterable[PromptLine], settings: WorkerSettings, workers: int
) -> Iterator[dict[str, Any]]:
    """The result of each line, in order.

    Joins the cluster that RAY_ADDRESS names, or else starts one on this machine. Each worker takes
    a GPU where the cluster has any.

    Args:
        workers: models at a time; the cluster must have room for them.
    """
    import ray

    ray.init(
        ignore_reinit_error=True,
        log_to_driver=False,
        include_dashboard=False,
        logging_level=logging.ERROR,
    )
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"number": line.number, "data": line.data} for line in lines]
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    answered = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _LINES)).map_batches(
        _Answering,
        fn_constructor_args=(settings,),
        batch_size=_LINES,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
    )
    try:
        for row in answered.iter_rows():
            yield row["result"]
    except ray.exceptions.RayError as error:
        raise QmixError("Ray's workers failed", found=str(error).strip()[-400:]) from error


class _Answering:
    """What Ray builds once in each worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._worker = Worker(settings)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        numbers, data = rows["number"].tolist(), rows["data"].tolist()
        lines = [PromptLine(*pair) for pair in zip(numbers, data, strict=True)]
        return {"result": list(self._worker.answers(lines))}
