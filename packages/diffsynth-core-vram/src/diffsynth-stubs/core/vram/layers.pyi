from diffsynth_core_vram.core.vram.layers import *  # noqa: F403
