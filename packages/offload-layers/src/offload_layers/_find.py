"""Which modules of a model become layers when nobody says: every module that has parameters of its own."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from offload_layers._layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
)
from offload_layers._source import Source


@dataclass(frozen=True)
class Found:
    """A module that should be managed, and as what."""

    name: str
    module: nn.Module
    face: type[AutoTorchModule]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that belong to this layer."""
        return list(self.module.parameters(recurse=self._covers_children))

    def is_in(self, source: Source | None) -> bool:
        """Whether *source* has values of a parameter of this layer."""
        named = self.module.named_parameters(self.name, recurse=self._covers_children)
        return source is not None and any(name in source for name, _ in named)

    @property
    def _covers_children(self) -> bool:
        return self.face is not AutoWrappedNonRecurseModule


def find_layers(model: nn.Module) -> list[Found]:
    """Return the layers of *model*, each distinct module once, outer ones before inner ones."""
    return list(_walk("", model, set()))


def _walk(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[Found]:
    if module in seen or isinstance(module, torch.jit.ScriptModule):  # a script has no class to extend
        return
    seen.add(module)
    has_own = any(parameter is not None for parameter in module._parameters.values())
    if _is_one(module):
        seen.update(module.modules())
        yield Found(name, module, AutoWrappedModule)
        return
    children = [
        (n, child) for n, child in module.named_children() if next(child.parameters(), None) is not None
    ]
    if has_own and not children:
        seen.update(module.modules())
        yield Found(name, module, AutoWrappedLinear if isinstance(module, nn.Linear) else AutoWrappedModule)
        return
    if has_own:
        yield Found(name, module, AutoWrappedNonRecurseModule)
    for child_name, child in children:
        yield from _walk(f"{name}.{child_name}" if name else child_name, child, seen)


def _is_one(module: nn.Module) -> bool:
    """Whether the module uses the parameters of its inner modules by itself."""
    return isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) or parametrize.is_parametrized(module)
