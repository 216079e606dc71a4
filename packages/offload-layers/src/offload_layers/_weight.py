"""One parameter of a managed layer, and every place of the model where it is registered.

A weight that is in place for computation is also an ordinary attribute of its modules, so that reading
``linear.weight`` costs nothing. While it is elsewhere that attribute is absent, and the descriptor which
the module's class has for the name is asked instead (see ``_managed``).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from offload_layers._errors import MissingTensorError
from offload_layers._placement import Placement
from offload_layers._source import Source, check_shape
from offload_layers._transfer import convert, parameter_like


@dataclass(frozen=True)
class Slot:
    """A name in a module's ``_parameters``."""

    module: nn.Module
    attribute: str


class Weight:
    """A parameter that a residency owns: its name in the source and its slots in the model."""

    def __init__(self, name: str, slots: list[Slot]) -> None:
        self.name = name
        self.slots = slots
        self._covered: nn.Parameter | None = None  # what is registered at rest, while a staged copy is

    @property
    def registered(self) -> nn.Parameter:
        """The parameter that the model holds at rest; on the device meta while it is on disk only."""
        if self._covered is not None:
            return self._covered
        slot = self.slots[0]
        parameter = slot.module._parameters[slot.attribute]
        assert parameter is not None, self.name
        return parameter

    def register(self, parameter: nn.Parameter) -> None:
        """Let the model hold *parameter*."""
        for slot in self.slots:
            slot.module._parameters[slot.attribute] = parameter

    def expose(self, tensor: Tensor) -> None:
        """Make *tensor* what reading the attribute gives."""
        for slot in self.slots:
            slot.module.__dict__[slot.attribute] = tensor

    def stage(self, tensor: Tensor) -> None:
        """Let the model hold *tensor* while it computes, as the plain model would."""
        self._covered = self.registered
        self.expose(tensor)
        for slot in self.slots:
            slot.module._parameters[slot.attribute] = tensor  # type: ignore[assignment]  # not always a leaf

    def hide(self) -> None:
        """Leave reading the attribute to the class's descriptor."""
        for slot in self.slots:
            slot.module.__dict__.pop(slot.attribute, None)
        if self._covered is not None:
            self.register(self._covered)
            self._covered = None

    def nbytes_in(self, placement: Placement) -> int:
        """Bytes that this weight takes in *placement*."""
        registered = self.registered
        return registered.numel() * placement.dtype_for(registered.dtype).itemsize

    def copy_to(self, placement: Placement, source: Source | None) -> nn.Parameter:
        """Return the parameter in *placement*, read from the source if the model has no values of it."""
        registered = self.registered
        if placement.holds(registered):
            return registered
        values = self._read(source) if registered.is_meta else registered.detach()
        return parameter_like(registered, convert(values, placement))

    def computable(self, placement: Placement, source: Source | None, *, differentiable: bool) -> Tensor:
        """Return the weight in *placement* for one computation.

        With *differentiable*, gradients flow back to the registered parameter. A weight on disk has
        nowhere to keep a gradient, and gets none.
        """
        registered = self.registered
        if not differentiable or registered.is_meta or not registered.requires_grad:
            copy = self.copy_to(placement, source)
            return copy.requires_grad_(False) if differentiable and registered.is_meta else copy
        return convert(registered, placement)

    def _read(self, source: Source | None) -> Tensor:
        if source is None:
            raise MissingTensorError(
                f'parameter "{self.name}" has no values and no disk map to read them from. Load the model '
                "with load_state_dict(..., assign=True), or pass disk_map."
            )
        tensor = source[self.name]
        check_shape(self.name, tuple(tensor.shape), self.registered.shape)
        return tensor

    def __repr__(self) -> str:
        return f'<Weight "{self.name}" {tuple(self.registered.shape)}>'
