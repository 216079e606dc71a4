from diffsynth_core_vram.core.vram.disk_map import *  # noqa: F403
