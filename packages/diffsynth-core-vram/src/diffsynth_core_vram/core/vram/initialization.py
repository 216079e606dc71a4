"""``diffsynth.core.vram.initialization``, served by ``skipinit``."""

from skipinit import skip_model_initialization

__all__ = ["skip_model_initialization"]
