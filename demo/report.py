"""What the demo shows: one table, and one picture of the memory of both processes over time."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measure import Run

logger = logging.getLogger(__name__)

GREY, BLUE, ORANGE = "#7f7f7f", "#1f77b4", "#ff9f40"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def size(value: int | None) -> str:
    return "not counted here" if value is None else f"{value / 1e6:,.0f} MB"


ROWS: list[tuple[str, Callable[[Run], str]]] = [
    ("construction", lambda run: seconds(run.construction_s)),
    ("loading", lambda run: seconds(run.loading_s)),
    ("forward", lambda run: seconds(run.forward_s)),
    ("time to first output", lambda run: seconds(run.first_output_s)),
    ("peak memory, anonymous", lambda run: size(run.peak_anonymous)),
    ("of it, Python and libraries", lambda run: size(run.before.anonymous)),
    ("peak memory, file-mapped", lambda run: size(run.peak_mapped)),
    ("of it, Python and libraries", lambda run: size(run.before.mapped)),
    ("bytes read", lambda run: size(run.bytes_read)),
    ("bytes reached by mapping files", lambda run: size(run.bytes_mapped)),
]


def table(runs: Sequence[Run]) -> str:
    """A table in Markdown, one column per run."""
    lines = [["", *(run.mode for run in runs)]]
    lines += [[label, *(show(run) for run in runs)] for label, show in ROWS]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(cells: list[str]) -> str:
        first, *rest = (
            cell.ljust(widths[0]) if n == 0 else cell.rjust(widths[n]) for n, cell in enumerate(cells)
        )
        return "| " + " | ".join([first, *rest]) + " |"

    return "\n".join(row(cells) for cells in [lines[0], rule, *lines[1:]])


def differences(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> list[str]:
    """How two outputs differ in bits; empty if they do not."""
    if len(first) != len(second):
        return [f"{len(first)} tensors against {len(second)}"]
    found = []
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found.append(f"tensor {number}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
        elif not torch.equal(bits(a), bits(b)):
            largest = (a.double() - b.double()).abs().max().item()
            found.append(f"tensor {number}: values differ by up to {largest:g}")
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0.0 does not equal 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """Write the memory timelines of *runs* to *path*, one below the other, on the same axes."""
    figure = Figure(figsize=(9, 2.4 * len(runs) + 0.6), layout="constrained")
    panels = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    end = max(run.first_output_s for run in runs)
    for run, axes in zip(runs, panels, strict=True):
        start = run.marks["construct"]
        times = [sample.time_s - start for sample in run.during]
        anonymous = [sample.anonymous / 1e9 for sample in run.during]
        mapped = [(sample.mapped or 0) / 1e9 for sample in run.during]
        axes.stackplot(times, anonymous, mapped, colors=[BLUE, ORANGE], labels=["anonymous", "file-mapped"])
        spans = {"construct": run.construction_s, "load": run.loading_s, "forward": run.forward_s}
        for phase, span in spans.items():
            begin = run.marks[phase] - start
            axes.axvline(begin + span, color=GREY, linewidth=0.8, linestyle=":")
            if span > 0.08 * end:  # a shorter one leaves no room for its name
                where = {"x": begin + span / 2, "y": 0.94, "transform": axes.get_xaxis_transform()}
                axes.text(s=phase, ha="center", va="top", **where)
        durations = ", ".join(f"{phase} {seconds(span)}" for phase, span in spans.items())
        axes.set_title(f"{run.mode}: {durations}", loc="left", fontsize=10)
        axes.set_ylabel("resident memory, GB")
    panels[0].set_xlim(0, 1.01 * end)
    panels[0].legend(loc="upper left", fontsize=9)
    panels[-1].set_xlabel("seconds since the libraries were imported")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
