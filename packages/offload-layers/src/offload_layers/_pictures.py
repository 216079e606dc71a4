"""The pictures of what was measured: where the layers are, and the device's memory over time."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from offload_layers import _figure
from offload_layers._sizes import format_size
from offload_layers._table import seconds
from offload_layers._tier import Tier

if TYPE_CHECKING:
    from offload_layers._report import LayerReport, Report
    from offload_layers._timeline import Interval, Timeline

_NAMES = 12  # labels that fit under the layers
_NAMED_SHARE = 0.05  # of the recording: calls that are long enough for a name
_DEEPEST = 3  # levels of calls inside of calls that are drawn


def plot_report(report: "Report", path: str | os.PathLike[str]) -> None:
    """Draw *report* into the file *path*: bytes by tier over the layers, and below what was waited for."""
    figure = _figure.new_figure(10, 5)
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    _draw_layers(above, report)
    _draw_waits(below, report.layers)
    for axes in (above, below):
        _figure.tidy(axes)
    below.set_xlim(-0.6, len(report.layers) - 0.4)
    below.set_xlabel("layers in the order of their calls", color=_figure.INK)
    _name_layers(below, report.layers)
    above.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)
    total = report.total
    _figure.title(
        above,
        f"Where the weights are, {report.device}",
        [
            f"{format_size(total.moved_nbytes)} moved",
            f"{seconds(total.waited_s)} waited",
            f"{total.hits:,} hits, {total.waits:,} waits, {total.misses:,} misses",
        ],
    )
    _figure.save(figure, path)


def plot_timeline(timeline: "Timeline", path: str | os.PathLike[str]) -> None:
    """Draw *timeline* into the file *path*: memory of the device and of the host, and the calls of layers."""
    depth = min(_DEEPEST, 1 + max((interval.depth for interval in timeline.intervals), default=0))
    has_host = timeline.host_peak_nbytes > 0
    figure = _figure.new_figure(10, 4.2 + 0.4 * depth + 1.2 * has_host)
    heights = [7, *([2] if has_host else []), 1 + depth]
    above, *between, below = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    unit, per_second = ("s", 1.0) if timeline.duration_s >= 2 else ("ms", 1e3)
    _draw_memory(above, timeline, per_second)
    for axes in between:
        _draw_host(axes, timeline, per_second)
    _draw_calls(below, timeline, depth, per_second)
    for axes in (above, *between, below):
        _figure.tidy(axes)
    below.set_xlim(0, per_second * timeline.duration_s or 1)
    below.set_xlabel(f"time on the host, {unit}", color=_figure.INK)
    above.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=9)
    below.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    _figure.title(
        above,
        f"Memory that layers hold on {timeline.device}",
        [
            f"peak {format_size(timeline.peak_nbytes)}",
            f"{len(timeline.intervals):,} calls in {seconds(timeline.duration_s)}",
            f"{seconds(timeline.waited_s)} waited",
        ],
    )
    _figure.save(figure, path)


def _bars(axes: Any, at: Sequence[int], spans: Sequence[tuple[float, float]], **style: Any) -> None:
    """Draw vertical bars in one shape: each for itself would take seconds for thousands of layers."""
    from matplotlib.collections import PolyCollection

    corners = [
        [(x - 0.42, low), (x - 0.42, high), (x + 0.42, high), (x + 0.42, low)]
        for x, (low, high) in zip(at, spans, strict=True)
    ]
    axes.add_collection(PolyCollection(corners, linewidths=0, **style))
    axes.autoscale_view()


def _draw_layers(axes: Any, report: "Report") -> None:
    top = max((layer.nbytes for layer in report.layers), default=1)
    for tier, total in report.tiers.items():
        if total.layers:
            at = [i for i, layer in enumerate(report.layers) if layer.tier is tier]
            colour = _figure.COLOURS[tier]
            label = f"{tier.value}: {total.layers:,} layers, {format_size(total.nbytes)}"
            _bars(axes, at, [(0, report.layers[i].nbytes) for i in at], facecolors=colour, label=label)
            # the colour of layers that are too small to be seen
            _bars(axes, at, [(-0.08 * top, -0.03 * top) for _ in at], facecolors=colour)
    _figure.bytes_axis(axes, top)
    axes.set_ylim(bottom=-0.1 * top)
    axes.set_ylabel("weights of a layer", color=_figure.INK)


def _draw_waits(axes: Any, layers: Sequence["LayerReport"]) -> None:
    waiting = [i for i, layer in enumerate(layers) if layer.waited_s > 0]
    _bars(axes, waiting, [(0, 1e3 * layers[i].waited_s) for i in waiting], facecolors=_figure.INK)
    axes.set_ylabel("waited, ms", color=_figure.INK)
    axes.grid(axis="y", color=_figure.PALE, linewidth=0.6)
    axes.set_ylim(bottom=0)
    if not waiting:
        axes.set_yticks([0])
        middle = {"xy": (0.5, 0.5), "xycoords": "axes fraction", "ha": "center", "va": "center"}
        axes.annotate("no layer has waited", color=_figure.INK, **middle)


def _name_layers(axes: Any, layers: Sequence["LayerReport"]) -> None:
    step = -(-len(layers) // _NAMES)
    at = range(0, len(layers), max(step, 1))
    names = [_figure.short_name(layers[i].name, 3) for i in at]
    axes.set_xticks(list(at), names, rotation=25, ha="right", rotation_mode="anchor", fontsize=8)


def _draw_memory(axes: Any, timeline: "Timeline", per_second: float) -> None:
    times = [per_second * sample.time_s for sample in timeline.samples]
    residents = [sample.resident_nbytes for sample in timeline.samples]
    lent = [sample.lent_nbytes for sample in timeline.samples]
    green, orange = _figure.COLOURS[Tier.DEVICE], _figure.ORANGE
    axes.fill_between(times, residents, step="post", color=green, linewidth=0, label="layers that stay")
    axes.fill_between(
        times, residents, lent, step="post", color=orange, linewidth=0, label="layers that pass through"
    )
    top = timeline.peak_nbytes
    if timeline.limit_nbytes is not None and timeline.limit_nbytes < 3 * top:
        top = max(top, timeline.limit_nbytes)
        label = f"limit {format_size(timeline.limit_nbytes)}"
        axes.axhline(
            timeline.limit_nbytes, color=_figure.INK, linestyle=(0, (5, 3)), linewidth=1.4, label=label
        )
    _figure.bytes_axis(axes, 1.05 * top)


def _draw_host(axes: Any, timeline: "Timeline", per_second: float) -> None:
    times = [per_second * sample.time_s for sample in timeline.samples]
    waiting = [sample.host_nbytes for sample in timeline.samples]
    label = f"waiting in host memory, at most {format_size(timeline.host_peak_nbytes)}"
    axes.fill_between(times, waiting, step="post", color=_figure.COLOURS[Tier.HOST], linewidth=0, label=label)
    _figure.bytes_axis(axes, 1.05 * timeline.host_peak_nbytes)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)


def _draw_calls(axes: Any, timeline: "Timeline", depth: int, per_second: float) -> None:
    drawn = [interval for interval in timeline.intervals if interval.depth < depth]
    for level in range(depth):
        calls = [i for i in drawn if i.depth == level]
        waits = [i for i in calls if i.waited_s > 0]
        spans = [(per_second * i.begin_s, per_second * (i.end_s - i.begin_s)) for i in calls]
        _spans(axes, spans, level, _figure.BLUE, "computing", linewidth=0.4)
        spans = [(per_second * i.begin_s, per_second * i.waited_s) for i in waits]
        _spans(axes, spans, level, _figure.VERMILION, "waiting for weights", linewidth=0)
    for interval in drawn:
        computing_s = interval.end_s - interval.begin_s - interval.waited_s
        if computing_s > _NAMED_SHARE * timeline.duration_s:
            middle = per_second * (interval.end_s - computing_s / 2)
            _write_name(axes, interval, middle)
    axes.set_ylim(depth - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("calls", color=_figure.INK)


def _spans(
    axes: Any, spans: Sequence[tuple[float, float]], level: int, colour: str, what: str, *, linewidth: float
) -> None:
    label = None if level else what  # once in the legend
    axes.broken_barh(
        spans, (level - 0.4, 0.8), facecolors=colour, edgecolors="white", linewidth=linewidth, label=label
    )


def _write_name(axes: Any, interval: "Interval", middle: float) -> None:
    axes.annotate(
        _figure.short_name(interval.name),
        (middle, interval.depth),
        ha="center",
        va="center",
        fontsize=7,
        color="white",
        annotation_clip=True,
    )
