"""lm_eval's tasks of this repository, and its requests. Needs lm_eval."""

from contextlib import chdir

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from tests.support.house import ROOT

FOLDER = ROOT / "evals" / "tasks"
FILES = (FOLDER / "qmix_choice.yaml", FOLDER / "qmix_words.yaml")


def evaluated(model, limit=None):
    """The metrics of every task, and what each document adds, by a model of lm_eval."""
    manager = TaskManager(include_defaults=False)
    with chdir(FOLDER):
        tasks = [task for path in FILES for task in manager.load([str(path)])["tasks"].values()]
    found = simple_evaluate(
        model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=100
    )
    metrics = {
        f"{task} {name}": value
        for task, figures in found["results"].items()
        for name, value in figures.items()
        if isinstance(value, float)
    }
    likelihoods = {
        task: [each["filtered_resps"] for each in samples]
        for task, samples in found["samples"].items()
    }
    return metrics, likelihoods


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def flat(value):
    """All numbers of nested lists, in order; a truth counts as one."""
    if isinstance(value, list | tuple):
        return [number for each in value for number in flat(each)]
    return [float(value)]
