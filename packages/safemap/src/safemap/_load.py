"""``load_state_dict``: every tensor of a checkpoint at once."""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from safemap._map import DiskMap
from safemap._paths import PathLike
from safemap._progress import progress

_log = logging.getLogger("safemap.load")


def load_state_dict(
    file_path: PathLike | Iterable[PathLike],
    torch_dtype: torch.dtype | None = None,
    device: str | int | torch.device = "cpu",
    pin_memory: bool = False,
    verbose: int = 0,
) -> dict[str, Any]:
    """Read every tensor of a checkpoint.

    Args:
        file_path: As for ``DiskMap``.  Of a list, later files win.
        torch_dtype: Every tensor is converted to it while it is read; None keeps what is stored.
        device: Where the tensors go.
        pin_memory: Give tensors in page-locked memory, which devices copy faster.
        verbose: 1 or more shows a progress bar (with ``tqdm``, from ``safemap[progress]``; else log lines).

    Returns:
        Names to tensors.  A pickled file that wraps its state dict under the single key ``state_dict``,
        ``module`` or ``model_state`` is unwrapped; values that are no tensors are passed on as they are.

    Raises:
        The errors of ``DiskMap``.
    """
    with DiskMap(
        file_path, device, torch_dtype, pin_memory=pin_memory, on_duplicate="last", unwrap=True
    ) as disk_map:
        sizes = disk_map.sizes()
        state_dict = {}
        with progress("Loading", sum(sizes.values()), enabled=verbose >= 1, log=_log) as advance:
            for name in disk_map:
                state_dict[name] = disk_map[name]
                advance(sizes.get(name, 0))
    return state_dict
