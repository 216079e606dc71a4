"""Low-rank adapters that are added while a layer computes, without touching its weights."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from offload_layers._errors import ConfigError
from offload_layers._managed import ManagedModule
from offload_layers._merge import Merge, merge, unmerge
from offload_layers._packed import PackedWeight
from offload_layers._residency import Residency
from offload_layers._weight import Weight

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
        """Drop all adapters that are not merged, and the lists themselves."""
        for name in ("lora_A_weights", "lora_B_weights", "lora_merger", "_merge"):
            self.__dict__.pop(name, None)

    def add_lora(self, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """Add ``weight * b @ a`` to the layer while it computes, beside the adapters that there are.

        Args:
            a: ``(rank, in_features)``. If it is a factor that trains, *weight* must be 1.
            b: ``(out_features, rank)``.
            weight: Strength of this adapter.

        Raises:
            ConfigError: the shapes are not those of an adapter for this layer.
        """
        layer = cast(Any, self)
        if (
            a.dim() != 2
            or b.dim() != 2
            or (b.shape[0], a.shape[1], a.shape[0])
            != (
                layer.out_features,
                layer.in_features,
                b.shape[1],
            )
        ):
            raise ConfigError(
                f'an adapter for layer "{layer.name}" has shapes (rank, {layer.in_features}) and '
                f"({layer.out_features}, rank); got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        owner = self._lora_owner()
        device, scaled = owner.policy.computation.device, a if weight == 1 else a * weight
        brought = owner.budget.retrying(
            lambda: (scaled.to(device), b.to(device)),
            layer=owner.name,
            doing="bringing an adapter of",
            make_room=owner.make_room,
        )
        self.lora_A_weights.append(brought[0])
        self.lora_B_weights.append(brought[1])
        self._account()

    def clear_lora(self) -> None:
        """Drop all adapters that are not merged into the weight."""
        self.lora_A_weights.clear()
        self.lora_B_weights.clear()
        self._account()

    def merge_lora(self) -> None:
        """Move the adapters into the weight, on top of those that are there already.

        The weight may be anywhere; see ``_merge`` for where it is taken from when they are moved out again.

        Raises:
            ConfigError: the layer is quantized, or computes its weight from other parameters, or the adapters
                have a merger of their own.
        """
        weight = self._mergeable()
        new = tuple(zip(self.lora_A_weights, self.lora_B_weights, strict=True))
        if not new:
            return
        before: Merge | None = self.__dict__.get("_merge")
        if before is not None:
            unmerge(self._lora_owner(), weight, before)  # each sum is made from the weight itself
            del self.__dict__["_merge"]
        earlier = before.adapters if before is not None else ()
        self.__dict__["_merge"] = merge(self._lora_owner(), weight, earlier + new)
        self.clear_lora()

    def unmerge_lora(self) -> None:
        """Give the weight its own bits back; its adapters are beside it again.

        Raises:
            ConfigError: the weight was changed meanwhile.
        """
        merged: Merge | None = self.__dict__.get("_merge")
        if merged is None:
            return
        unmerge(self._lora_owner(), self._mergeable(), merged)
        del self.__dict__["_merge"]
        self.lora_A_weights[:0] = [a for a, _ in merged.adapters]
        self.lora_B_weights[:0] = [b for _, b in merged.adapters]
        self._account()

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

    def _lora_owner(self) -> Residency:
        return cast(ManagedModule, self)._owner()

    def _mergeable(self) -> Weight:
        layer = cast(Any, self)
        weight: Weight | None = layer._own_weights().get("weight")
        if weight is None:
            raise ConfigError(
                f'layer "{layer.name}" computes its weight from other parameters; adapters cannot be merged '
                "into it, leave them beside it"
            )
        if isinstance(weight, PackedWeight):
            raise ConfigError(
                f'adapters cannot be merged into the quantized weight "{weight.name}"; leave them beside it'
            )
        if self.lora_merger is not None:
            raise ConfigError(
                f'the adapters of layer "{layer.name}" are merged by lora_merger, which needs their outputs; '
                "they cannot be merged into the weight"
            )
        return weight

    def _account(self) -> None:
        """Borrow the bytes of the adapters that are on the compute device; the lists may change anytime."""
        residency = self._lora_owner()
        device = residency.policy.computation.device
        residency.hold_beside(
            sum(
                tensor.numel() * tensor.element_size()
                for tensors in (self.lora_A_weights, self.lora_B_weights)
                for tensor in tensors
                if tensor.device == device
            )
        )


def with_adapters(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a layer with adapters, given the one without."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = self.__dict__.get("lora_A_weights")
        if not adapters:
            if adapters is not None and self.__dict__["_residency"].holds_beside:
                self._account()  # the lists were cleared from outside
            return plain(self, *args, **kwargs)
        self._account()
        out = plain(self, *args, **kwargs)
        return self.lora_forward(args[0] if args else next(iter(kwargs.values())), out)

    return forward
