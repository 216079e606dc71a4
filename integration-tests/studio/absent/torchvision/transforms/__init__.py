"""Transforms of pictures: `Normalize` works, since a model class uses it; the others are names."""

import enum

import torch
from torch import Tensor

from torchvision.transforms import functional


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Normalize(torch.nn.Module):
    def __init__(self, mean, std, inplace=False):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, picture: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(v, dtype=picture.dtype)[:, None, None] for v in (self.mean, self.std))
        return (picture - mean) / std


class _Absent:
    def __init__(self, *args, **kwargs):
        self.transforms = args[0] if args and isinstance(args[0], list) else []

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"the stand-in for torchvision has no {type(self).__name__}")


class CenterCrop(_Absent): ...


class Compose(_Absent): ...


class GaussianBlur(_Absent): ...


class Lambda(_Absent): ...


class Resize(_Absent): ...


class ToTensor(_Absent): ...


__all__ = [
    "CenterCrop", "Compose", "GaussianBlur", "InterpolationMode", "Lambda", "Normalize", "Resize", "ToTensor",
    "functional",
]  # fmt: skip
