"""The order, the watchdog and the budget, with a worker and a clock that are made up."""

import pytest

from qmix.evals.acceptance.journal import Journal
from qmix.evals.acceptance.record import AcceptanceRecord
from qmix.evals.acceptance.step import STEPS, Step
from qmix.evals.acceptance.supervisor import START_SECONDS, Supervisor, WorkerGoneError

BUDGET = 540.0
SECONDS = 5.0  # what a step takes in this rehearsal, and what a start takes


class Device:
    """A machine whose clock advances as its workers work; some steps fail.

    Attributes:
        faults: from the name of a step to how it fails: raise, hang, die, or die silently at start.
        starts: how many workers there were.
    """

    def __init__(self, faults=None):
        self.now, self.starts, self.alive = 1000.0, 0, 0
        self.faults = faults or {}

    def clock(self):
        return self.now

    def start(self):
        self.starts += 1
        self.alive += 1
        assert self.alive == 1, "one worker at a time"
        return FakeWorker(self)


class FakeWorker:
    def __init__(self, device):
        self.device, self.step = device, None
        self.messages = [(SECONDS, {"machine": {"gpu": "Fake", "versions": {}}})]

    def request(self, step):
        assert not self.messages
        fault = self.device.faults.get(step)
        self.messages = [(1.0, {"result": {"name": step}})]
        fine = {"end": "ok", "error": None, "fatal": False}
        if fault == "raise":
            self.messages.append((1.0, {"end": "failed", "error": "ValueError: x", "fatal": False}))
        elif fault == "lose":
            self.messages.append((1.0, {"end": "failed", "error": "CUDA error", "fatal": True}))
        elif fault == "die":
            self.messages.append((1.0, WorkerGoneError("signal 11")))
        elif fault == "hang":
            self.messages.append((float("inf"), fine))
        else:
            self.messages.append((SECONDS - 1.0, fine))

    def receive(self, seconds):
        after, message = self.messages.pop(0)
        self.device.now += min(after, seconds)
        if after > seconds:
            return None
        if isinstance(message, WorkerGoneError):
            raise message
        return message

    def end(self):
        self.device.alive -= 1
        return "what it said"


def run(tmp_path, device, steps=STEPS, budget=BUDGET):
    journal = Journal(tmp_path)
    supervisor = Supervisor(device.start, journal, budget, clock=device.clock)
    begun = device.now
    left_out = supervisor.run(steps)
    assert device.now - begun <= budget
    assert device.alive == 0
    return journal, left_out


def test_one_worker_runs_all_steps_in_their_order(tmp_path):
    device = Device()
    journal, left_out = run(tmp_path, device)
    assert list(journal.outcomes) == [step.name for step in STEPS]
    assert {found.status for found in journal.outcomes.values()} == {"ok"}
    assert device.starts == 1
    assert left_out == []
    assert journal.machine["gpu"] == "Fake"


@pytest.mark.parametrize(
    ("fault", "status"),
    [("raise", "failed"), ("lose", "failed"), ("die", "failed"), ("hang", "timeout")],
)
def test_each_step_in_turn_fails_and_costs_itself(tmp_path, fault, status):
    for index, step in enumerate(STEPS):
        device = Device({step.name: fault})
        journal, left_out = run(tmp_path / f"{index}", device)
        statuses = {name: found.status for name, found in journal.outcomes.items()}
        assert statuses.pop(step.name) == status
        assert set(statuses.values()) == {"ok"}
        assert len(statuses) == len(STEPS) - 1
        assert left_out == []
        assert journal.outcomes[step.name].results == [{"name": step.name}]
        another = fault != "raise" and index + 1 < len(STEPS)
        assert device.starts == 1 + another


def test_all_steps_hang_and_the_budget_is_kept(tmp_path):
    device = Device({step.name: "hang" for step in STEPS})
    begun = device.now
    journal, left_out = run(tmp_path, device)
    assert device.now - begun > BUDGET - START_SECONDS
    assert [step.name for step in left_out] == [s.name for s in STEPS][len(journal.outcomes) :]
    assert left_out


def test_a_worker_that_does_not_start_is_tried_twice(tmp_path):
    class Broken(FakeWorker):
        def receive(self, seconds):
            self.device.now += SECONDS
            raise WorkerGoneError("ModuleNotFoundError: torch")

    device = Device()
    make = device.start
    device.start = lambda: make() and Broken(device)
    journal, left_out = run(tmp_path, device)
    errors = [found.error for found in journal.outcomes.values()]
    assert errors == ["ModuleNotFoundError: torch"] * 2
    assert device.starts == 2
    assert left_out == list(STEPS[2:])


def test_results_are_in_the_file_before_the_step_ends(tmp_path):
    seen = []

    class Watched(Device):
        def start(self):
            worker = super().start()
            receive = worker.receive

            def receiving(seconds):
                seen.append((tmp_path / "results.jsonl").read_text().count('"result"'))
                return receive(seconds)

            worker.receive = receiving
            return worker

    run(tmp_path, Watched(), [Step("a", "m", 9), Step("b", "m", 9)])
    assert seen == [0, 0, 1, 1, 2]


def test_a_command_that_is_ended_is_continued_from_its_journal(tmp_path):
    class Ended(BaseException):
        pass

    class Dying(FakeWorker):
        def receive(self, seconds):
            if not self.messages[0][1].get("machine") and self.messages[0][1].get("end"):
                raise Ended
            return super().receive(seconds)

    device = Device()
    make = device.start
    device.start = lambda: make() and Dying(device)
    journal = Journal(tmp_path)
    with pytest.raises(Ended):
        Supervisor(device.start, journal, BUDGET, clock=device.clock).run(STEPS[:2])
    assert device.alive == 0
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"step": "cut sho')
    again = Journal(tmp_path)
    found = again.outcomes[STEPS[0].name]
    assert (found.status, found.results) == ("interrupted", [{"name": STEPS[0].name}])
    journal, _ = run(tmp_path, Device(), STEPS[:2])
    assert [found.status for found in journal.outcomes.values()] == ["ok", "ok"]
    assert [len(found.results) for found in journal.outcomes.values()] == [1, 1]
    record = AcceptanceRecord("c", "2026-01-01", None, None, {}, None, 1.0)
    record.steps.update(journal.outcomes)
    assert record.write(tmp_path).is_file()
