"""The picture of a plan: every layer in order, as high as its bytes, in the colour of its tier."""

import os
from typing import TYPE_CHECKING, Any

from offload_layers._figure import COLOURS, new_figure, save
from offload_layers._sizes import format_size
from offload_layers._tier import Tier

if TYPE_CHECKING:
    from offload_layers._plan import Plan


def plot_plan(plan: "Plan", path: str | os.PathLike[str]) -> None:
    """Draw *plan* into the file *path*."""
    figure = new_figure(10, 3.6)
    axes: Any = figure.add_subplot()
    for tier in Tier:
        chosen = [(i, layer) for i, layer in enumerate(plan.layers) if layer.tier is tier]
        if chosen:
            axes.bar(
                [i for i, _ in chosen],
                [layer.size.stored_nbytes / 1e6 for _, layer in chosen],
                width=1.0,
                color=COLOURS[tier],
                label=f"{tier.value}: {len(chosen):,} layers, {format_size(plan.nbytes_on(tier))}",
            )
    axes.set_xlim(-0.5, len(plan.layers) - 0.5)
    axes.set_xlabel("layer, in order")
    axes.set_ylabel("weights, MB")
    axes.spines[["top", "right"]].set_visible(False)
    prediction = plan.predict()
    seconds = "" if prediction is None else f", {prediction.total_s:.3g} s a forward {plan.of_what}"
    axes.set_title(
        f"Where the weights stay on {plan.device} with {format_size(plan.vram)}{seconds}", loc="left"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    save(figure, path)
