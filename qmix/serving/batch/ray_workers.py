"""Lines answered by workers of a Ray cluster, one model each; what Ray loses it does again.

Ray Data keeps the order and restarts workers. Knows no file of results.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from qmix.errors import QmixError
from qmix.serving import ray_cluster
from qmix.serving.batch.prompt_lines import PromptLine
from qmix.serving.batch.worker import Worker, WorkerSettings

# Lines that a worker gets at a time, and does again if it is lost.
_LINES = 16


def answers_of_workers(
    lines: Iterable[PromptLine], settings: WorkerSettings, workers: int
) -> Iterator[dict[str, Any]]:
    """The result of each line, in order.

    Each worker takes a GPU where the cluster has any; see ray_cluster for which cluster.

    Args:
        workers: models at a time; the cluster must have room for them.

    Raises:
        QmixError: there is no cluster, or its workers failed.
    """
    import ray

    ray_cluster.join()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # which the import has set
    rows = [{"number": line.number, "data": line.data} for line in lines]
    answered = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _LINES)).map_batches(
        _Answering,
        fn_constructor_args=(settings,),
        batch_size=_LINES,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=int(ray_cluster.has_gpus()),
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
