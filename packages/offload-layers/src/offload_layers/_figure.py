"""What all pictures of this package have in common: colours, axes of bytes, and where matplotlib comes from.

matplotlib is imported when a picture is drawn. Its figures are used without ``pyplot``, so that nothing of a
program's own pictures changes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload_layers._errors import ConfigError
from offload_layers._sizes import format_size
from offload_layers._tier import Tier

#: told apart also by those who see no red or green. Source: the palette of Okabe and Ito
GREEN, SKY_BLUE, VERMILION, BLUE, ORANGE = "#009E73", "#56B4E9", "#D55E00", "#0072B2", "#E69F00"
COLOURS = {Tier.DEVICE: GREEN, Tier.HOST: SKY_BLUE, Tier.DISK: VERMILION}
INK, PALE = "#333333", "#D9D9D9"


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'offload-layers[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write *figure* into the file *path*.

    Raises:
        ConfigError: its name ends in no format of pictures that matplotlib writes.
    """
    known = figure.canvas.get_supported_filetypes()
    suffix = Path(path).suffix
    if suffix and suffix[1:].lower() not in known:
        raise ConfigError(f"{path}: no picture is called {suffix}; known are {', '.join(sorted(known))}")
    figure.savefig(path, dpi=150)


def tidy(axes: Any) -> None:
    """Leave out of *axes* what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)


def bytes_axis(axes: Any, top: float) -> None:
    """Let the vertical axis count bytes from 0 to at least *top*, in round steps of one unit."""
    step = _round_step(max(top, 1) / 4)
    ticks = [i * step for i in range(int(max(top, 1) / step) + 2)]
    axes.set_ylim(0, max(top * 1.02, 1))
    axes.set_yticks([t for t in ticks if t <= top * 1.02])
    axes.yaxis.set_major_formatter(lambda value, position: format_size(round(value)))
    axes.grid(axis="y", color=PALE, linewidth=0.6)


def _round_step(least: float) -> float:
    power = 1.0
    while power * 10 <= least:
        power *= 10
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def short_name(name: str, parts: int = 2) -> str:
    """Return the last *parts* of a dotted name, which tell a layer from its neighbours."""
    return ".".join(name.split(".")[-parts:]) or "(the model)"


def title(axes: Any, what: str, details: Sequence[str]) -> None:
    """Write over *axes* what the picture shows, and smaller what was measured."""
    axes.set_title(what, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    axes.annotate(
        " · ".join(details),
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 7),
        textcoords="offset points",
        fontsize=9,
        color=INK,
    )
