"""A model class of DiffSynth-Studio in a small configuration: built, saved, called."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from shrink import Sizes, shrunk
from torch import Tensor, nn

Call = Callable[[Any, Callable[..., Tensor]], Any]  # a model, and a function that draws tensors


@dataclass(frozen=True)
class Case:
    """A model class, how it is built small, and one call of it."""

    path: str  # below diffsynth.models
    call: Call
    config: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Sizes] = field(default_factory=dict)  # what the constructors have written in them
    dtype: torch.dtype = torch.bfloat16

    @property
    def model_class(self) -> str:
        """The name under which DiffSynth-Studio knows the class."""
        return f"diffsynth.models.{self.path}"

    @contextmanager
    def small(self) -> Iterator[type[nn.Module]]:
        """Give the class, which is built small while the block lasts."""
        module_name, name = self.model_class.rsplit(".", 1)
        module = importlib.import_module(module_name)
        with shrunk(module, self.sizes):
            yield getattr(module, name)

    def build(self) -> nn.Module:
        """Build the plain model, with the same random weights every time."""
        torch.manual_seed(0)
        with self.small() as model_class:
            model = model_class(**self.config)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():  # norms and zero-initialised layers would hide mistakes
                nn.init.normal_(parameter, std=0.05)
                if name.endswith("running_var"):
                    parameter.data.abs_()
                parameter.data = parameter.data.to(self.dtype)
        return model.eval()

    def run(self, model: nn.Module) -> Tensor:
        """Call *model* once, always with the same inputs."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        with torch.no_grad():
            out = self.call(model, draw)
        result = torch.cat([tensor.flatten() for tensor in _tensors(out)])
        assert result.isfinite().all()
        assert result.float().std() > 1e-3, "an output without information proves nothing"
        return result


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for part in out:
            yield from _tensors(part)
