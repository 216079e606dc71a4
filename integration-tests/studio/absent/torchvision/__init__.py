"""What DiffSynth-Studio imports of torchvision: names, and what its model classes run."""

from torchvision import models, transforms

__all__ = ["models", "transforms"]
