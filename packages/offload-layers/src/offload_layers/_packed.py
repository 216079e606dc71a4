"""Weights in a format of their own: packed integers, scales, tensor subclasses, with what hangs on them.

They move between the tiers and are never converted: not by a placement's dtype, and not by gradients. What
``Tensor.to`` does to them is up to their class.
"""

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._changes import WatchedParameter
from offload_layers._errors import MissingTensorError
from offload_layers._placement import Placement, Policy
from offload_layers._source import Source, offered, owning, read_tensor
from offload_layers._transfer import convert, parameter_like
from offload_layers._weight import Weight


class PackedWeight(Weight):
    """A parameter or a buffer that keeps its dtype and its class wherever it is."""

    stored_nbytes = 0  # bytes in the source, for one that is on disk

    def nbytes_in(self, placement: Placement) -> int:
        """Bytes that the weight takes, with what hangs on it."""
        registered = self.registered
        return self.stored_nbytes if registered.is_meta else nbytes(registered)

    def on_disk(self, source: Source | None) -> tuple[torch.dtype, int]:
        """Return dtype and bytes of the weight on disk, or what it was seen to be made into."""
        return self.as_read or (self.registered.dtype, self.stored_nbytes)

    def nbytes_from(self, registered: nn.Parameter) -> int:
        """Bytes that a copy moves which was made from *registered*, with what hangs on it."""
        if registered.is_meta:
            return 0 if self.as_read is None else self.as_read[1]
        return nbytes(registered)

    def copy_to(self, placement: Placement, source: Source | None) -> nn.Parameter:
        """Return the weight on the placement's device."""
        values = self.read(source) if self.registered.is_meta else self.registered
        return moved(values, placement.device)  # type: ignore[return-value]  # or a buffer, which is no parameter

    def computable(self, placement: Placement, source: Source | None, *, differentiable: bool) -> Tensor:
        """Return the weight on the placement's device; no gradients flow to it."""
        return self.copy_to(placement, source)

    def is_as_read_in(self, placement: Placement) -> bool:
        """Say no: it is made from several tensors of the source."""
        return False

    def keeps_change_of(self, copy: Tensor) -> bool:
        """Say no for tensors of a class of their own: libraries lay them out anew when they compute."""
        return type(copy) in (Tensor, nn.Parameter, WatchedParameter)

    def read(self, source: Source | None) -> Tensor:
        """Return what the source gives, whose shape is no other tensor's business."""
        if source is None:
            raise MissingTensorError(
                f'"{self.name}" has no values and no disk map to read them from. Quantize the model or load '
                "it before it is managed, or pass disk_map."
            )
        tensor = read_tensor(source, self.name)
        if self.as_read is None:
            self.as_read = tensor.dtype, nbytes(tensor)
        return tensor

    def home(self, policy: Policy, source: Source | None) -> nn.Parameter:
        """Return what the model holds of the weight at rest."""
        is_stored = source is not None and self.name in source
        if not policy.offload.is_disk:
            values = (
                self.read(source)
                if self.registered.is_meta or (is_stored and self.is_buffer)
                else self.registered
            )
            return moved(values, policy.offload.device)  # type: ignore[return-value]  # or a buffer
        if self.registered.is_meta and not is_stored:
            self.read(source)
        if not is_stored:
            return self.registered  # not in the checkpoint, but in the model: its values stay in memory
        self.stored_nbytes = source.nbytes_of(self.name) if isinstance(source, PackedSource) else 0
        return self._stand_in()  # type: ignore[return-value]  # or a buffer, which is no parameter

    def _stand_in(self) -> nn.Parameter | Tensor:
        registered = self.registered
        if registered.is_meta and type(registered) in (Tensor, nn.Parameter):
            return registered.detach() if self.is_buffer else registered.requires_grad_(False)
        empty = torch.empty(registered.shape, dtype=registered.dtype, device="meta")
        return empty if self.is_buffer else nn.Parameter(empty, requires_grad=False)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return *tensor* on *device*: itself if it is there, else a copy of the same class."""
    if tensor.device == device:
        return tensor
    with torch.no_grad():
        if type(tensor) is Tensor:
            return convert(tensor, Placement(device))
        if type(tensor) is nn.Parameter:
            return parameter_like(tensor, convert(tensor.detach(), Placement(device)))
        # some classes move what hangs on them in place, which would leave the original torn apart
        original = tensor if type(tensor).to is Tensor.to else _apart(tensor)
        there = original.to(device=device)
    if isinstance(tensor, nn.Parameter) and not isinstance(there, nn.Parameter):
        there = nn.Parameter(there, requires_grad=False)
    for name, value in vars(tensor).items():
        vars(there).setdefault(name, value)
    return there


def _apart(tensor: Tensor) -> Tensor:
    """Return a copy of *tensor* with copies of what hangs on it."""
    twin = copy.deepcopy(
        tensor
    )  # of a parameter it leaves out what hangs there, unless the class does better
    for name, value in vars(tensor).items():
        if name not in vars(twin):
            setattr(twin, name, copy.deepcopy(value))
    return twin


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of *tensor*, of the tensors that it wraps and of those that hang on it."""
    wrapped = getattr(tensor, "__tensor_flatten__", None)
    if wrapped is not None:
        return sum(nbytes(getattr(tensor, name)) for name in wrapped()[0])
    hanging = 0
    for value in vars(tensor).values():
        parts = [value, *(vars(value).values() if hasattr(value, "__dict__") else ())]
        hanging += sum(nbytes(part) for part in parts if isinstance(part, Tensor) and part is not tensor)
    return tensor.numel() * tensor.element_size() + hanging


class PackedSource(Mapping[str, Tensor]):
    """The weights of one quantized layer, made from what a checkpoint has under the layer's name.

    A layer's tensors are made together, so the first that is asked for brings them all; the others wait for
    their turn, those of one layer per thread at most.

    Args:
        source: The checkpoint.
        prefix: The layer's name with a dot.
        shell: The layer without values; it knows how to take those of a checkpoint.
        unflatten: Turns tensors of a checkpoint into those of the layer, both under their full names.
    """

    is_of_one_layer = True

    def __init__(
        self,
        source: Source,
        prefix: str,
        shell: nn.Module,
        unflatten: Callable[[dict[str, Tensor]], Mapping[str, Any]],
    ) -> None:
        self.keys_in_source = [name for name in source if name.startswith(prefix)]
        if not self.keys_in_source:
            raise MissingTensorError(
                f'the disk map has no tensor under "{prefix}", which quantized layer "{prefix[:-1]}" needs. '
                "Pass the checkpoint of this model."
            )
        self._source = source
        self._prefix = prefix
        self._shell = shell
        self._unflatten = unflatten
        self._blank = [(part, dict(part._parameters), dict(part._buffers)) for part in shell.modules()]
        self._names = [name for name, tensor in self._held() if tensor is not None or name in source]
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Tensor:
        waiting: dict[str, Tensor] = getattr(_WAITING, "tensors", {})
        if getattr(_WAITING, "owner", None) is not self or name not in waiting:
            waiting = self._make()
            _WAITING.owner, _WAITING.tensors = self, waiting
        try:
            tensor = waiting.pop(name)
        except KeyError:
            raise MissingTensorError(
                f'quantized layer "{self._prefix[:-1]}" needs "{name}", which is not made from what the disk '
                f"map has: {', '.join(self.keys_in_source)}"
            ) from None
        if not waiting:
            _WAITING.owner = None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def prefetch(self, names: list[str]) -> None:
        """Bring everything closer that the layer is made of, whatever the *names* of its tensors."""
        ask = offered(self._source, "prefetch")
        if ask is not None:
            ask(self.keys_in_source)

    def with_threads(self, threads: int) -> "PackedSource":
        """Return the same source, reading with so many threads if the checkpoint's can."""
        with_threads = offered(self._source, "with_threads")
        if with_threads is None:
            return self
        twin = copy.copy(self)
        twin._source = with_threads(threads)
        return twin

    def owned(self) -> "PackedSource":
        """Return the same source, made from tensors in memory of their own if there can be such."""
        twin = copy.copy(self)
        twin._source = owning(self._source)
        return twin

    def nbytes_of(self, name: str) -> int:
        """Return the bytes that the checkpoint has of the layer, all under its first name."""
        if name != self._names[0]:
            return 0
        info = offered(self._source, "info")
        if info is not None:
            infos = [info(key) for key in self.keys_in_source]
            return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)
        return sum(nbytes(self._source[key]) for key in self.keys_in_source)

    def _make(self) -> dict[str, Tensor]:
        """Return the layer's tensors by their full names."""
        rebuilt = self._unflatten({key: self._source[key] for key in self.keys_in_source})
        state = {name.removeprefix(self._prefix): value for name, value in rebuilt.items()}
        with self._lock, torch.inference_mode(False):
            try:
                self._shell.load_state_dict(state, assign=True)
                made = {name: tensor for name, tensor in self._held() if tensor is not None}
            except RuntimeError as error:
                raise MissingTensorError(
                    f'quantized layer "{self._prefix[:-1]}" cannot be made from the disk map: {error}'
                ) from error
            finally:
                for part, parameters, buffers in self._blank:
                    part._parameters.clear()
                    part._parameters.update(parameters)
                    part._buffers.clear()
                    part._buffers.update(buffers)
        return {name: tensor.requires_grad_(False) for name, tensor in made.items() if not tensor.is_meta}

    def _held(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield full name and value of each parameter and persistent buffer of the shell."""
        for path, part in self._shell.named_modules():
            start = f"{self._prefix}{path}." if path else self._prefix
            for name, parameter in part._parameters.items():
                yield start + name, parameter
            for name, buffer in part._buffers.items():
                if name not in part._non_persistent_buffers_set:
                    yield start + name, buffer


_WAITING = threading.local()  # .owner, .tensors
