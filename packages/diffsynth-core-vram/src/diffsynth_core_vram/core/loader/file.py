"""``diffsynth.core.loader.file``, served by ``safemap``."""

from safemap import load_state_dict

__all__ = ["load_state_dict"]
