"""What was predicted, beside what it was."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from offload_layers._plan import Plan
from offload_layers._report import Report
from offload_layers._sizes import format_size


@dataclass(frozen=True)
class PlanAndFact:
    """A plan, and what has become of it.

    Attributes:
        plan: What was planned.
        report: What is where, and what it has cost.
        forward_s: Seconds of the last forward that was run through the handle; None if there was none.
    """

    plan: Plan
    report: Report
    forward_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, texts and lists."""
        return {
            "plan": self.plan.to_dict(),
            "report": self.report.to_dict(),
            "forward_s": self.forward_s,
        }

    def __str__(self) -> str:
        lines = [
            str(self.report),
            f"peak on {self.plan.device}: predicted {format_size(self.plan.peak_device_nbytes)}, was "
            f"{format_size(self.report.peak_nbytes)}",
        ]
        prediction = self.plan.predict()
        predicted = "" if prediction is None else f"predicted {prediction.total_s:.3g} s, "
        if self.forward_s is not None:
            lines.append(f"forward: {predicted}the last one took {self.forward_s:.3g} s")
        elif predicted:
            lines.append(f"forward: {predicted}none was run through the handle yet")
        return "\n".join(lines)

    def with_rows(self, rows: int) -> "PlanAndFact":
        """Return the same with the prediction for another number of rows."""
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, rows=rows, work=None))
