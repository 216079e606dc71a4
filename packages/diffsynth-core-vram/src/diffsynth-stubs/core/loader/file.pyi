from diffsynth_core_vram.core.loader.file import *  # noqa: F403
