"""Where the weights of a layer stay between its forwards."""

from enum import Enum


class Tier(Enum):
    """Where bytes can be."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
