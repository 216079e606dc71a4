from diffsynth_core_vram.core.vram import *  # noqa: F403
