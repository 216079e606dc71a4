"""Random numbers for a block, so that the process's generators stay where they are."""

from typing import Any

import torch

from ._call import Call
from ._functions import RANDOM


class Streams:
    """One generator per device; each starts where the global one stands and then moves alone."""

    def __init__(self) -> None:
        self._seed = torch.initial_seed()
        self._generators: dict[torch.device, torch.Generator] = {}

    def seeded_inside(self) -> bool:
        """Whether the constructor called ``torch.manual_seed``: then it wants the global generator."""
        return torch.initial_seed() != self._seed

    def run(self, call: Call, device: torch.device) -> Any:
        """Make the *call*; what it draws on *device* does not come from the global generator."""
        if call.name not in RANDOM or call.keywords.get("generator") is not None or device.type == "meta":
            return call.run()
        generator = self._generator(device)
        try:
            return call.run(generator=generator)
        except TypeError:  # it takes no generator
            pass
        if device.type != "cpu":
            with torch.random.fork_rng(device_type=device.type):
                return call.run()
        # The global generator is moved and put back. A thread that draws meanwhile draws from this stream.
        before = torch.get_rng_state()
        try:
            torch.set_rng_state(generator.get_state())
            return call.run()
        finally:
            generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            on_cpu = device.type == "cpu"
            state = torch.get_rng_state() if on_cpu else getattr(torch, device.type).get_rng_state(device)
            self._generators[device] = torch.Generator(device).set_state(state)
        return self._generators[device]
