"""A report as text for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from offload_layers._sizes import format_size

if TYPE_CHECKING:
    from offload_layers._report import LayerReport, Report, Sum

_TITLES = ("", "dtype", "bytes", "hits", "waits", "misses", "moved", "waited")
_EXPLAINED = (
    "hits: weights were ready when the layer was called; waits: on their way; misses: still to be fetched"
)


def table(report: "Report", top: int) -> str:
    """Return the sums by tier, and the *top* layers that were waited for longest."""
    sums = [("all", report.total), *((tier.value, s) for tier, s in report.tiers.items() if s.layers)]
    waited = sorted((x for x in report.layers if x.waited_s > 0), key=lambda x: x.waited_s, reverse=True)
    rows = [
        _TITLES,
        *((f"{name}: {its_sum.layers:,} layers", "", *_counts(its_sum)) for name, its_sum in sums),
        *((f"{x.name or '(the model)'} ({x.tier.value})", x.dtype, *_counts(x)) for x in waited[:top]),
    ]
    lines = _aligned(rows)
    rule = "-" * max(map(len, lines))
    if waited:
        lines.insert(1 + len(sums), rule)
    lines.insert(1, rule)
    if len(waited) > top:
        lines.append(f"... and {len(waited) - top:,} more that were waited for")
    return "\n".join([*_head(report), rule, *lines, rule, _EXPLAINED])


def _head(report: "Report") -> list[str]:
    limit = "no limit" if report.limit_nbytes is None else f"limit {format_size(report.limit_nbytes)}"
    lines = [
        f"{len(report.layers):,} layers compute on {report.device}",
        f"lent there: {format_size(report.lent_nbytes)} now, peak {format_size(report.peak_nbytes)}, {limit}",
    ]
    if report.unmanaged_nbytes:
        lines.append(f"not managed: {format_size(report.unmanaged_nbytes)} of parameters")
    return lines


def _counts(of: "LayerReport | Sum") -> tuple[str, ...]:
    return (
        format_size(of.nbytes),
        f"{of.hits:,}",
        f"{of.waits:,}",
        f"{of.misses:,}",
        format_size(of.moved_nbytes),
        seconds(of.waited_s),
    )


def seconds(amount: float) -> str:
    """Return *amount* seconds with three significant digits at most, in a unit that fits."""
    for unit, per_second in (("s", 1), ("ms", 1e3)):
        if amount * per_second >= 1 or not amount:
            return f"{amount * per_second:.3g} {unit}"
    return f"{amount * 1e6:.3g} us"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 2  # columns of text; numbers are flush right
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
