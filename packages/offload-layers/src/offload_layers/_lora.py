"""Low-rank adapters that are added while a layer computes, without touching its weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Merger = Callable[[Tensor, Tensor], Tensor]


class LoRAHotLoadMixin:
    """Lists of low-rank factors to which adapters are appended, and from which they are cleared.

    Attributes:
        lora_A_weights: One ``(rank, in_features)`` tensor per adapter.
        lora_B_weights: One ``(out_features, rank)`` tensor per adapter.
        lora_merger: None to add the adapters' outputs, or a function of the layer's output and of the
            stacked outputs ``(adapters, ..., out_features)`` that returns the merged output.
    """

    lora_A_weights: list[Tensor]
    lora_B_weights: list[Tensor]
    lora_merger: Merger | None

    def init_lora_hotload(self) -> None:
        """Start without adapters."""
        self.lora_A_weights = []
        self.lora_B_weights = []
        self.lora_merger = None

    def end_lora_hotload(self) -> None:
        """Drop all adapters, and the lists themselves."""
        for name in ("lora_A_weights", "lora_B_weights", "lora_merger"):
            delattr(self, name)

    def lora_forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Return *out* ``(..., out_features)`` with the adapters' outputs for *x* ``(..., in_features)``."""
        pairs = zip(self.lora_A_weights, self.lora_B_weights, strict=True)
        outputs = (
            x @ a.T.to(device=x.device, dtype=x.dtype) @ b.T.to(device=x.device, dtype=x.dtype)
            for a, b in pairs
        )
        if self.lora_merger is not None:
            return self.lora_merger(out, torch.stack(list(outputs)))
        for output in outputs:
            out = out + output
        return out


def with_adapters(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a layer with adapters, given the one without."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        if not self.__dict__["lora_A_weights"]:
            return out
        return self.lora_forward(args[0] if args else next(iter(kwargs.values())), out)

    return forward
