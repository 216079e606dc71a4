from diffsynth_core_vram.core.vram.initialization import *  # noqa: F403
