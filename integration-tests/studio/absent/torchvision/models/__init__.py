"""Names of model classes, to derive from."""

from torchvision.models.inception import inception_v3

__all__ = ["inception_v3"]
