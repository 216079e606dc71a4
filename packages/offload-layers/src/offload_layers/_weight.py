"""One parameter of a managed layer, and every place of the model where it is registered.

A weight that is in place for computation is also an ordinary attribute of its modules, so that reading
``linear.weight`` costs nothing. While it is elsewhere that attribute is absent, and the descriptor which
the module's class has for the name is asked instead (see ``_managed``).
"""

import weakref

import torch
from torch import Tensor, nn

from offload_layers._device import Device, device_of
from offload_layers._errors import MissingTensorError
from offload_layers._placement import Placement
from offload_layers._source import Source, check_shape, offered, read_tensor, stored_dtype
from offload_layers._transfer import cast_there, convert, parameter_like


class Slot:
    """A name in a module, which is not kept alive: a model that nobody else holds is freed at once."""

    __slots__ = ("_module", "is_buffer", "name")

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = weakref.ref(module)
        self.name = name
        self.is_buffer = name in module._buffers

    @property
    def module(self) -> nn.Module:
        """The module."""
        module = self._module()
        assert module is not None, f"the module that held {self.name!r} is gone"
        return module

    @property
    def tensor(self) -> Tensor | None:
        """What the module holds under the name."""
        module = self._module()  # in one step, here and below: each call of a layer does this several times
        assert module is not None, self.name
        return (module._buffers if self.is_buffer else module._parameters)[self.name]

    @tensor.setter
    def tensor(self, tensor: Tensor) -> None:
        module = self._module()
        assert module is not None, self.name
        (module._buffers if self.is_buffer else module._parameters)[self.name] = tensor  # type: ignore[assignment]

    @property
    def attribute(self) -> Tensor | None:
        """What reading the attribute gives without a question."""
        module = self._module()
        assert module is not None, self.name
        return module.__dict__.get(self.name)

    @attribute.setter
    def attribute(self, tensor: Tensor | None) -> None:
        module = self._module()
        assert module is not None, self.name
        if tensor is None:
            module.__dict__.pop(self.name, None)
        else:
            module.__dict__[self.name] = tensor

    @property
    def alive(self) -> nn.Module | None:
        """The module, or None if it is garbage."""
        return self._module()


class Weight:
    """A parameter that a residency owns: its name in the source and its slots in the model."""

    def __init__(self, name: str, slots: list[Slot]) -> None:
        self.name = name
        self.slots = slots
        self.was_moved = False  # its values at home were, to page-locked memory
        self._covered: nn.Parameter | None = None  # what is registered at rest, while a staged copy is
        self.as_read: tuple[torch.dtype, int] | None = None  # dtype and bytes in the source that there is now

    @property
    def registered(self) -> nn.Parameter:
        """The parameter that the model holds at rest; on the device meta while it is on disk only."""
        covered = self._covered
        return covered if covered is not None else self.slots[0].tensor  # type: ignore[return-value]  # as `held`

    @property
    def held(self) -> nn.Parameter:
        """The parameter that the model holds now, be it for the time of a computation."""
        parameter = self.slots[0].tensor
        assert parameter is not None, self.name
        return parameter  # type: ignore[return-value]  # or a buffer, which is no parameter

    @property
    def is_buffer(self) -> bool:
        """Whether the model holds it as a buffer."""
        return self.slots[0].is_buffer

    @property
    def exposed(self) -> Tensor | None:
        """What reading the attribute gives without a transfer."""
        return self.slots[0].attribute

    def register(self, parameter: nn.Parameter) -> None:
        """Let the model hold *parameter*."""
        for slot in self.slots:
            slot.tensor = parameter

    def rest_on(self, parameter: nn.Parameter) -> None:
        """Let the model hold *parameter* at rest, be it after the computation that goes on."""
        if self._covered is None:
            self.register(parameter)
        else:
            self._covered = parameter

    def expose(self, tensor: Tensor) -> None:
        """Make *tensor* what reading the attribute gives."""
        for slot in self.slots:
            slot.attribute = tensor

    @property
    def staged(self) -> Tensor | None:
        """What the model holds for the time of a computation."""
        return None if self._covered is None else self.held

    def stage(self, tensor: Tensor) -> None:
        """Let the model hold *tensor* while it computes, as the plain model would."""
        self._covered = self.registered
        for slot in self.slots:
            slot.tensor = tensor  # no leaf when gradients must flow back

    def conceal(self) -> None:
        """Leave reading the attribute to the descriptor."""
        for slot in self.slots:
            slot.attribute = None

    def hide(self) -> None:
        """Let the model hold what it holds at rest, and leave reading the attribute to the descriptor."""
        covered, self._covered = self._covered, None
        for slot in self.slots:
            slot.attribute = None
            if covered is not None:
                slot.tensor = covered

    def nbytes_in(self, placement: Placement) -> int:
        """Bytes that this weight takes in *placement*."""
        registered = self.registered
        return registered.numel() * placement.dtype_for(registered.dtype).itemsize

    def on_disk(self, source: Source | None) -> tuple[torch.dtype, int]:
        """Return dtype and bytes of the weight in the source, as far as it tells without reading."""
        if self.as_read is not None:
            return self.as_read
        dtype, numel = self.registered.dtype, self.registered.numel()
        dtype = dtype if source is None else stored_dtype(source, self.name, dtype)
        return dtype, numel * dtype.itemsize

    def nbytes_from(self, registered: nn.Parameter) -> int:
        """Bytes that a copy moves which was made from *registered*, as they are stored."""
        if registered.is_meta:
            return 0 if self.as_read is None else self.as_read[1]
        return registered.numel() * registered.element_size()

    def copy_to(self, placement: Placement, source: Source | None) -> nn.Parameter:
        """Return the parameter in *placement*, read from the source if the model has no values of it."""
        registered = self.registered
        if placement.holds(registered):
            return registered
        if not registered.is_meta:
            return parameter_like(registered, convert(registered.detach(), placement))
        device = device_of(placement.device)
        there = None if device.is_host else self._receive(device, source)
        if there is not None:
            return parameter_like(registered, cast_there(there, placement))
        return parameter_like(registered, convert(self.read(source), placement))

    def _receive(self, device: Device, source: Source | None) -> Tensor | None:
        """Let the source read to where *device* copies from, if both can: the same values as from `read`.

        In which dtype a source gives a weight is known when it has been read once.
        """
        read_into = offered(source, "read_into")
        if read_into is None or self.as_read is None:
            return None
        return device.receive(self.registered.shape, self.as_read[0], lambda out: read_into(self.name, out))

    def is_as_read_in(self, placement: Placement) -> bool:
        """Whether a copy in *placement* is no copy at all: the very tensor that the source gives."""
        if not self.registered.is_meta or self.as_read is None or placement.device.type != "cpu":
            return False
        return placement.dtype_for(self.as_read[0]) == self.as_read[0]

    def keeps_change_of(self, copy: Tensor) -> bool:
        """Say whether what is changed in a copy of the weight is to be kept when the copy goes."""
        return True

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

    def read(self, source: Source | None) -> Tensor:
        """Return the values in the source, as they are stored there."""
        if source is None:
            raise MissingTensorError(
                f'parameter "{self.name}" has no values and no disk map to read them from. Load the model '
                "with load_state_dict(..., assign=True), or pass disk_map."
            )
        tensor = read_tensor(source, self.name)
        check_shape(self.name, tuple(tensor.shape), self.registered.shape)
        if self.as_read is None:
            self.as_read = tensor.dtype, tensor.nbytes
        return tensor

    def __repr__(self) -> str:
        return f'<Weight "{self.name}" {tuple(self.registered.shape)}>'
