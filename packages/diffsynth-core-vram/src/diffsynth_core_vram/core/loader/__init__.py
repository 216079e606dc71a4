"""``diffsynth.core.loader``: checkpoints and models from local files (no download)."""

from diffsynth_core_vram.core.loader.file import load_state_dict
from diffsynth_core_vram.core.loader.model import load_model

__all__ = ["load_model", "load_state_dict"]
