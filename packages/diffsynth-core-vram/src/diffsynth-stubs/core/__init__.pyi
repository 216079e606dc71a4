from typing import Any

from diffsynth_core_vram.core import *  # noqa: F403

def __getattr__(name: str) -> Any: ...  # the rest is DiffSynth-Studio's, where it is installed
