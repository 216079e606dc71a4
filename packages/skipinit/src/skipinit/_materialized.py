"""Which tensors of a model still wait for their values, and the error for whoever forgot to load them."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ._errors import UnmaterializedError

NAMES_SHOWN = 8


def _named_tensors(model: nn.Module | Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(model, nn.Module):
        yield from model.named_parameters(remove_duplicate=False)
        yield from model.named_buffers(remove_duplicate=False)
    else:
        yield from ((name, value) for name, value in model.items() if isinstance(value, torch.Tensor))


def unmaterialized(model: nn.Module | Mapping[str, object]) -> list[str]:
    """The dotted names of the parameters and buffers that are still on the meta device.

    Args:
        model: A module, or a state dict.

    Returns:
        Names in the order of ``named_parameters()``, then of ``named_buffers()``. A tensor that is registered
        under several names is listed under each.
    """
    return [name for name, tensor in _named_tensors(model) if tensor.is_meta]


def check_materialized(model: nn.Module | Mapping[str, object], *_hook_arguments: object) -> None:
    """Raise unless every parameter and buffer of *model* has a value.

    torch itself is no reliable guard: some operations on mixed devices, such as ``torch.mm(cpu, meta)``,
    succeed and give a result without values, and ``torch.save`` writes a file without weights.

    The signature fits ``model.register_forward_pre_hook(check_materialized)`` and
    ``model.register_state_dict_pre_hook(check_materialized)``, for whoever wants the check made at every
    call.

    Args:
        model: A module, or the state dict that is about to be saved.

    Raises:
        UnmaterializedError: with the names.
    """
    names = unmaterialized(model)
    if not names:
        return
    total = sum(1 for _ in _named_tensors(model))
    listed = ", ".join(f'"{name}"' for name in names[:NAMES_SHOWN])
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    raise UnmaterializedError(
        f"{type(model).__name__}: {len(names):,} of {total:,} tensors have no values: {listed}{more}.\n"
        "    Load a checkpoint that has these names with load_state_dict(state_dict, assign=True) before the "
        "model is run or saved."
    )
