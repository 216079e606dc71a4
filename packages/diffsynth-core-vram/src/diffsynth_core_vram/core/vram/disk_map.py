"""``diffsynth.core.vram.disk_map``, served by ``safemap``."""

from safemap import DiskMap

__all__ = ["DiskMap"]
