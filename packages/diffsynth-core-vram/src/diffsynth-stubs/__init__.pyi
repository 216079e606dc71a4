from typing import Any

from diffsynth_core_vram.core import *  # noqa: F403

def __getattr__(name: str) -> Any: ...  # where DiffSynth-Studio is installed, it has more names
