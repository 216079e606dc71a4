"""The reader's jobs: done in order, waited for, dropped, and never lost."""

import threading
from collections.abc import Callable

import pytest
from offload_layers._reader import Job, Reader


@pytest.fixture
def reader() -> Reader:
    return Reader()


class Task:
    """Something to do that can be made to wait, and that tells what became of it."""

    def __init__(self, result: str, *, waits: bool = False) -> None:
        self.result = result
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.drops = 0
        if not waits:
            self.may_end.set()
        self.job: Job[str] = Job(self.run, self.drop)

    def run(self) -> str:
        self.begun.set()
        assert self.may_end.wait(20)
        return self.result

    def drop(self) -> None:
        self.drops += 1


def test_jobs_are_done_in_order(reader: Reader) -> None:
    done: list[int] = []

    def note(number: int) -> Callable[[], None]:
        return lambda: done.append(number)

    for number in range(50):
        reader.submit(Job(note(number), lambda: None))
    reader.settle()
    assert done == list(range(50))


def test_a_result_is_waited_for(reader: Reader) -> None:
    task = Task("weights", waits=True)
    reader.submit(task.job)
    assert task.begun.wait(20)
    assert not task.job.is_done
    threading.Timer(0, task.may_end.set).start()
    assert reader.result(task.job) == "weights"
    assert task.drops == 0


def test_what_has_not_begun_is_left_to_the_caller(reader: Reader) -> None:
    first, second = Task("first", waits=True), Task("second")
    reader.submit(first.job)
    reader.submit(second.job)
    assert first.begun.wait(20)
    assert reader.result(second.job) is None
    first.may_end.set()
    reader.settle()
    assert not second.begun.is_set()
    reader.drop(second.job)
    assert second.drops == 1


def test_dropping(reader: Reader) -> None:
    running, queued, done = Task("running", waits=True), Task("queued"), Task("done")
    reader.submit(done.job)
    reader.settle()
    reader.submit(running.job)
    reader.submit(queued.job)
    assert running.begun.wait(20)
    for task in (running, queued, done):
        reader.drop(task.job)
    assert [task.drops for task in (running, queued, done)] == [0, 1, 1]  # memory is there until it is read
    running.may_end.set()
    reader.settle()
    assert running.drops == 1
    assert not queued.begun.is_set()
    assert reader.result(running.job) is None


@pytest.mark.parametrize("error", [OSError, SystemExit, MemoryError])
def test_a_task_that_fails_is_no_result_and_stops_nothing(reader: Reader, error: type[BaseException]) -> None:
    def fail() -> str:
        raise error("the disk is gone")

    job: Job[str] = Job(fail, lambda: None)
    reader.submit(job)
    reader.settle()
    assert reader.result(job) is None
    task = Task("after")
    reader.submit(task.job)
    reader.settle()
    assert reader.result(task.job) == "after"


def test_what_is_running_is_waited_for_until_it_is_dropped(reader: Reader) -> None:
    reader.finish_running()  # nothing is
    task = Task("weights", waits=True)
    reader.submit(task.job)
    assert task.begun.wait(20)
    reader.drop(task.job)
    threading.Timer(0.1, task.may_end.set).start()
    reader.finish_running()
    assert task.drops == 1


def test_a_job_does_not_wait_for_itself(reader: Reader) -> None:
    reader.submit(Job(reader.finish_running, lambda: None))
    reader.settle()
