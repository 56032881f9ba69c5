"""lm_eval's tasks of local files, scored by qmix models, and how two models differ on them.

Knows nothing of printing.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.evals.harness.extra import check_extra
from qmix.evals.quality.bootstrap import Estimate, estimate
from qmix.evals.quality.window_scores import perplexity_ratio

# What a document adds to a metric: a figure whose mean counts, or a log-likelihood and its weight.
_Document = float | tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class MetricScore:
    """A metric of a task.

    Attributes:
        value, stderr: as lm_eval gives them; no stderr where it has none.
        documents: what each document adds; empty where documents add none.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: tuple[_Document, ...]

    @property
    def is_perplexity(self) -> bool:
        """Whether documents add log-likelihoods with weights."""
        return bool(self.documents) and not isinstance(self.documents[0], float)

    def to_dict(self) -> dict[str, Any]:
        """The figures as a JSON document."""
        figures = {"task": self.task, "metric": self.metric, "value": self.value}
        return {**figures, "stderr": self.stderr, "documents": len(self.documents)}


def run_tasks(
    model: Path,
    files: Sequence[Path],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    kv: str | None = None,
) -> tuple[MetricScore, ...]:
    """Score a checkpoint by the tasks of YAML files.

    Args:
        files: lm_eval's task files. Data files in them are looked for beside them, then here.
        limit: documents of a task at most.
        dtype, device, backend, kv: as of `qmix.LoadOptions`.

    Raises:
        UnsupportedError: lm_eval is not installed.
        CheckpointError: a task file or the checkpoint cannot be read.
    """
    check_extra("qmix eval --tasks")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from qmix.evals.harness.language_model import QmixLM

    with _quiet():
        manager = TaskManager(include_defaults=False)
        tasks = [task for path in files for task in _tasks(manager, path)]
        found = simple_evaluate(
            QmixLM(
                str(model),
                dtype=dtype,
                device=device,
                backend=backend,
                kv=kv,
                batch_size=batch_size,
            ),
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=1000,
        )
    return tuple(
        score
        for name, figures in found["results"].items()
        for score in _scores(name, figures, found)
    )


def _tasks(manager: Any, path: Path) -> list[Any]:
    """The tasks of a file, with their documents.

    Raises:
        CheckpointError: it is no task file, or its data cannot be found.
    """
    whole = path.resolve()
    if not whole.is_file():
        raise CheckpointError("no such file", where=str(path), expected="a task file of lm_eval")
    problem: Exception | None = None
    for folder in (whole.parent, Path.cwd()):
        try:
            with chdir(folder):
                return list(manager.load([str(whole)])["tasks"].values())
        except Exception as error:  # noqa: BLE001 - YAML's, lm_eval's and datasets' own
            problem = problem or error
    said = next(iter(str(problem).splitlines()), "") or type(problem).__name__
    raise CheckpointError("not a task of lm_eval", where=str(path), found=said[:200])


def _scores(
    task: str, figures: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[MetricScore]:
    for key, value in figures.items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{kept}")
            samples = found["samples"].get(task, [])
            yield MetricScore(
                task=task,
                metric=metric if kept == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, float | int) else None,
                documents=_documents(metric, kept, samples),
            )


def _documents(
    metric: str, kept: str, samples: Sequence[Mapping[str, Any]]
) -> tuple[_Document, ...]:
    """What each document adds, in their order."""
    mine = sorted(
        (each for each in samples if each["filter"] == kept and metric in each),
        key=lambda each: int(each["doc_id"]),
    )
    values = [each[metric] for each in mine]
    if all(isinstance(each, bool | int | float) for each in values):
        return tuple(map(float, values))
    if all(isinstance(each, tuple | list) and len(each) == 2 for each in values):
        return tuple((float(each[0]), float(each[1])) for each in values)
    return ()


def paired(model: MetricScore, other: MetricScore) -> Estimate | None:
    """How a model differs from another on the same documents; None where documents add none.

    A mean is subtracted. Of log-likelihoods with weights it is the ratio of the perplexities.
    """
    if not model.documents or len(model.documents) != len(other.documents):
        return None
    ours, theirs = _columns(model), _columns(other)
    statistic = perplexity_ratio if model.is_perplexity else _mean_difference
    return estimate(torch.cat((ours, theirs[:, 1:]), 1), statistic)


def _columns(score: MetricScore) -> Tensor:
    """Weights beside losses, or ones beside figures, float64 (documents, 2)."""
    rows = [
        (1.0, each) if isinstance(each, float) else (each[1], -each[0]) for each in score.documents
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _mean_difference(total: Tensor) -> Tensor:
    """Of sums (..., 3): units, and two models' figures."""
    return (total[..., 1] - total[..., 2]) / total[..., 0]


@contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval's warnings of what is meant here are not shown: that the model is loaded already."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
