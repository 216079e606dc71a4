"""Random numbers for a block, so that the process's generators stay where they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._vocabulary import RANDOM_WITH_GENERATOR, Function


class Streams:
    """One generator per device; each starts where the global one stands and then moves alone."""

    def __init__(self) -> None:
        self._seed = torch.initial_seed()
        self._generators: dict[torch.device, torch.Generator] = {}

    def seeded_inside(self) -> bool:
        """Whether the constructor called ``torch.manual_seed``: then it wants the global generator."""
        return torch.initial_seed() != self._seed

    def call(
        self, function: Function, arguments: Sequence[Any], keywords: Mapping[str, Any], device: torch.device
    ) -> Any:
        """Call *function*, which draws random numbers on *device*."""
        if keywords.get("generator") is not None:
            return function(*arguments, **keywords)
        generator = self._generator(device)
        if function.__name__ in RANDOM_WITH_GENERATOR:
            return function(*arguments, **{**keywords, "generator": generator})
        if device.type != "cpu":
            with torch.random.fork_rng(device_type=device.type):
                return function(*arguments, **keywords)
        # This one knows the global generator only, so that is moved and put back. A thread that draws
        # meanwhile draws from this stream.
        before = torch.default_generator.get_state()
        try:
            torch.default_generator.set_state(generator.get_state())
            return function(*arguments, **keywords)
        finally:
            generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            on_cpu = device.type == "cpu"
            state = torch.get_rng_state() if on_cpu else getattr(torch, device.type).get_rng_state(device)
            self._generators[device] = torch.Generator(device).set_state(state)
        return self._generators[device]
