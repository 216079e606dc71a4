"""A plan in words."""

from typing import TYPE_CHECKING

from offload_layers._layer_sizes import together
from offload_layers._sizes import format_size
from offload_layers._tier import Tier
from offload_layers._tier_choice import limiting

if TYPE_CHECKING:
    from offload_layers._plan import Plan

#: bytes of more memory for which it is said what they would give
_MORE = (2 * 10**9, 4 * 10**9, 8 * 10**9)


def describe(plan: "Plan") -> str:
    """Say what will be where, and what a forward will take."""
    total = together([layer.size for layer in plan.layers], lambda part: part.stored_nbytes)
    lines = [
        f"{len(plan.layers):,} layers, {format_size(total)}, computing on {plan.device} with "
        f"{format_size(plan.vram)} of its memory"
        + ("" if plan.device.type == "cpu" else f" and {format_size(plan.ram)} of the host's")
    ]
    for tier in Tier:
        count = sum(layer.tier is tier for layer in plan.layers)
        if count:
            lines.append(f"  {tier.value:<7}{count:>6,} layers  {format_size(plan.nbytes_on(tier)):>9}")
    lines.append(f"  peak   {format_size(plan.peak_device_nbytes)} of weights on {plan.device}")
    if plan.work is not None:
        lines[-1] += f", {format_size(plan.work.activations_nbytes)} of activations beside them"
    if plan.peak_host_nbytes:
        lines[-1] += f", {format_size(plan.peak_host_nbytes)} in host memory"
    prediction = plan.predict()
    if prediction is not None:
        lines.append(
            f"  one forward {plan.of_what}: {prediction.total_s:.3g} s (computation "
            f"{prediction.compute_s:.3g} s, bus {prediction.bus_s:.3g} s, disk {prediction.disk_s:.3g} s)"
        )
        lines += _more(plan)
    return "\n".join(lines)


def _more(plan: "Plan") -> list[str]:
    """Say what more memory would give, where it would give at least a twentieth."""
    now, lines = plan.predict(), []
    assert now is not None
    is_one = plan.device.type == "cpu"
    kinds = [limiting(plan.device, plan.vram, plan.ram)] if is_one else ["vram", "ram"]
    for more in _MORE:
        for what in kinds:
            then = plan.with_more(**{what: more}).predict()
            assert then is not None
            if then.total_s < 0.95 * now.total_s:
                lines.append(
                    f"  {what} +{format_size(more)}: {now.total_s:.3g} -> {then.total_s:.3g} s a forward"
                )
    return lines
