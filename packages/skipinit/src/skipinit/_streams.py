"""Random numbers for a block, so that the process's generators stay where they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._vocabulary import RANDOM_WITH_GENERATOR, Function

Stream = dict[torch.device, torch.Generator]


def _global_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.default_generator.get_state()
    state: torch.Tensor = getattr(torch, device.type).get_rng_state(device)
    return state


class Streams:
    """The random streams of one block.

    A stream starts where the global generator stands and then moves by itself. The block itself never moves the
    global generator, so a change of it means that the constructor called ``torch.manual_seed``: then a new stream
    starts there, and a buffer drawn right after has the value that a plain construction gives it.
    """

    def __init__(self) -> None:
        self.current: Stream = {}
        self._seen = _global_state(torch.device("cpu"))

    def follow_reseeding(self) -> bool:
        """Whether the global generator was moved since the last look; if so, a new stream starts."""
        state = _global_state(torch.device("cpu"))
        if torch.equal(state, self._seen):
            return False
        self._seen, self.current = state, {}
        return True

    def call(
        self,
        function: Function,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        *,
        device: torch.device,
        stream: Stream | None = None,
    ) -> Any:
        """Call *function*, which draws random numbers on *device*, with those of *stream* (default: the current)."""
        if keywords.get("generator") is not None:
            return function(*arguments, **keywords)
        stream = self.current if stream is None else stream
        generator = stream.get(device)
        if generator is None:
            generator = stream[device] = torch.Generator(device)
            generator.set_state(_global_state(device))
        if function.__name__ in RANDOM_WITH_GENERATOR:
            return function(*arguments, **{**keywords, "generator": generator})
        # These know the global generator only, so it is moved and put back. Another thread that draws in between
        # draws from this stream.
        before = torch.default_generator.get_state()
        try:
            torch.default_generator.set_state(generator.get_state() if device.type == "cpu" else before)
            return function(*arguments, **keywords)
        finally:
            if device.type == "cpu":
                generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)
