"""Start a worker, watch its marks and its memory, and say what happened."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from job import DemoError, Job
from memory import Sample, resident
from tqdm import tqdm

WORKER = Path(__file__).with_name("worker.py")
INTERVAL_S = 0.005
Mark = dict[str, Any]
MARKS = ["construct", "load", "forward", "done", "saved"]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What one worker did.

    Attributes:
        mode: The mode of its job.
        marks: The time at which each phase began, on the clock of the samples.
        samples: Its memory from the import of libraries to its end.
        bytes_read: Bytes taken from files by reading, from ``construct`` to ``done``; None if not counted.
        bytes_mapped: Bytes of files reached through mappings instead, in the same time; None if not counted.
    """

    mode: str
    marks: dict[str, float]
    samples: list[Sample]
    bytes_read: int | None
    bytes_mapped: int | None

    @property
    def construction_s(self) -> float:
        return self.marks["load"] - self.marks["construct"]

    @property
    def loading_s(self) -> float:
        return self.marks["forward"] - self.marks["load"]

    @property
    def forward_s(self) -> float:
        return self.marks["done"] - self.marks["forward"]

    @property
    def first_output_s(self) -> float:
        return self.marks["done"] - self.marks["construct"]

    @property
    def before(self) -> Sample:
        """Memory when the libraries were imported and nothing else had happened."""
        return [sample for sample in self.samples if sample.time_s <= self.marks["construct"]][-1]

    @property
    def during(self) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if self.marks["construct"] <= sample.time_s <= self.marks["done"]
        ]

    @property
    def peak_anonymous(self) -> int:
        return max(sample.anonymous for sample in self.during)

    @property
    def peak_mapped(self) -> int | None:
        mapped = [sample.mapped for sample in self.during if sample.mapped is not None]
        return max(mapped, default=None)


def measure(job: Job) -> Run:
    """Run *job* in a process of its own, with a progress bar.

    Raises:
        DemoError: The worker reported a mistake of the user's, or broke down (its last words are shown).
    """
    with tempfile.TemporaryFile("w+") as messages:
        command = [sys.executable, str(WORKER), job.dumps()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        try:
            marks, samples = _watch(job.mode, process)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            messages.seek(0)
            raise DemoError(f"{job.mode} run: {_last_words(process.returncode, marks, messages.read())}")
    at = {mark["mark"]: Sample(**mark["sample"]) for mark in marks}
    samples = sorted([*samples, *at.values()], key=lambda sample: sample.time_s)
    times = {name: sample.time_s for name, sample in at.items()}
    end = marks[-1]
    return Run(job.mode, times, samples, end.get("bytes_read"), end.get("bytes_mapped"))


def _watch(mode: str, process: "subprocess.Popen[str]") -> tuple[list[Mark], list[Sample]]:
    """Collect the marks and the memory of a worker until it ends."""
    marks: list[Mark] = []
    samples: list[Sample] = []
    reader = threading.Thread(target=_collect, args=(process.stdout, marks), daemon=True)
    reader.start()
    looks = {"bar_format": "{desc} {bar} {elapsed}{postfix}", "leave": False, "disable": None}
    with tqdm(total=len(MARKS), miniters=0, mininterval=0.1, **looks) as bar:
        while process.poll() is None:
            sample = resident(process.pid)
            if sample is not None:
                samples.append(sample)
                bar.set_postfix_str(f"{sample.anonymous / 1e9:.2f} GB", refresh=False)
            bar.set_description(f"{mode}: {marks[-1]['mark'] if marks else 'import'}", refresh=False)
            bar.update(len(marks) - bar.n)
            time.sleep(INTERVAL_S)
    reader.join()
    return marks, samples


def _collect(lines: IO[str], marks: list[Mark]) -> None:
    marks.extend(json.loads(line) for line in lines)


def _last_words(code: int, marks: list[Mark], messages: str) -> str:
    phase = marks[-1]["mark"] if marks else "import"
    if phase == "failed":
        return str(marks[-1]["message"])
    if code == -9:
        return f"the system killed it in phase {phase!r}, in all likelihood for want of memory"
    tail = "\n".join(messages.strip().splitlines()[-12:])
    return f"ended with code {code} in phase {phase!r}:\n{tail}"
