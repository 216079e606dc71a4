"""The handle of a model that is managed as a whole: run it, move it, ask what it costs, and give it back."""

import dataclasses
import time
from types import TracebackType
from typing import Any

import torch
from torch import nn

from offload_layers._errors import ConfigError
from offload_layers._fact import PlanAndFact
from offload_layers._layers import AutoTorchModule
from offload_layers._machine import Size, vram_limit
from offload_layers._manage import move_buffers, nbytes_on
from offload_layers._placement import parse_device
from offload_layers._plan import Plan
from offload_layers._presented import end_presenting, present
from offload_layers._probe import waiting
from offload_layers._progress import watched
from offload_layers._replace import disable_vram_management
from offload_layers._report import report
from offload_layers._state import State
from offload_layers._verify import Verification, verify

_CPU = torch.device("cpu")


class Offloaded:
    """A model that `offload` manages; ``with`` gives it back plain at the end of the block.

    Attributes:
        model: The model, the same object as before.
        plan: What was planned.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = model
        self.plan = plan
        self._is_removed = False
        self._forward_s: float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, and take the time until its device is done."""
        start = time.perf_counter()
        output = self.model(*args, **kwargs)
        waiting(self.plan.device)()
        self._forward_s = time.perf_counter() - start
        return output

    def report(self) -> PlanAndFact:
        """Return what is where and what it has cost, beside what was predicted."""
        self._managed()
        return PlanAndFact(self.plan, report(self.model), self._forward_s)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Run the model once on these inputs, and compare each layer with the plain one; see `verify`."""
        self._managed()
        return verify(self.model, *args, **kwargs)

    def onload(self) -> None:
        """Bring what the plan keeps in host memory there: the model is needed soon."""
        coming = [(layer, _host_nbytes(layer)) for layer in self._managed()]
        label, nbytes = f"Loading {type(self.model).__name__}", sum(size for _, size in coming)
        for layer in watched(coming, label=label, nbytes=nbytes):
            layer.onload()
        move_buffers(self.model, self.plan.device)

    def offload(self) -> None:
        """Take no memory of the device, nor of the host for what can be read again."""
        for layer in self._managed():
            layer.offload()
        move_buffers(self.model, _CPU)

    def set_vram(self, vram: Size) -> None:
        """Let the model use another amount of the device's memory; what has no room leaves at once."""
        device = self.plan.device
        given = vram_limit(vram, device, self.plan.ram, held=nbytes_on(self.model, device))
        limit = dataclasses.replace(self.plan, vram=given).limit_nbytes
        for layer in self._managed():
            layer._owner().limit = limit
        for layer in self._managed():
            layer._owner().obey_limit()

    def remove(self, device: str | int | torch.device | None = None) -> nn.Module:
        """Give the model back plain, with all its weights in memory.

        Args:
            device: Where they go; by default each stays where it rests, and those on disk come to the host.
        """
        if not self._is_removed:
            target = None if device is None else parse_device(device)
            end_presenting(self.model)
            try:
                disable_vram_management(self.model, target)
            except BaseException:
                present(self.model, self.plan.device)
                raise
            if target is not None:
                move_buffers(self.model, target)
            self._is_removed = True
        return self.model

    def __enter__(self) -> "Offloaded":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _managed(self) -> list[AutoTorchModule]:
        layers = [module for module in self.model.modules() if isinstance(module, AutoTorchModule)]
        if self._is_removed or not layers:
            raise ConfigError(f"{type(self.model).__name__} was given back; call offload() on it again")
        return layers

    def __repr__(self) -> str:
        layers = f"{len(self.plan.layers):,} layers on {self.plan.device}"
        state = "given back" if self._is_removed else layers
        return f"<Offloaded {type(self.model).__name__}: {state}>"


def _host_nbytes(layer: AutoTorchModule) -> int:
    """Return the bytes that going to ONLOAD reads."""
    residency = layer._owner()
    onload = residency.policy.onload
    if onload.is_disk or residency.state is not State.OFFLOAD:
        return 0
    return sum(weight.nbytes_in(onload) for weight in residency.weights if weight.registered.is_meta)
