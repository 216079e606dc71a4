from diffsynth_core_vram.core.loader.model import *  # noqa: F403
