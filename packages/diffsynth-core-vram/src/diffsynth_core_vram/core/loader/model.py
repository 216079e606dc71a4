"""``diffsynth.core.loader.model``, served by this distribution's ``load_model``."""

from diffsynth_core_vram._load_model import load_model

__all__ = ["load_model"]
