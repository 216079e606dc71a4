"""Every rank goes on, or every rank stops: what one of them ran into is told to all."""

from typing import Generic, TypeVar

import torch.distributed as dist

from safemap._errors import SafemapError

T = TypeVar("T")


class ShardedLoadError(SafemapError, RuntimeError):
    """Loading failed on another rank, so nothing was assigned on this one either."""


class Ranks(Generic[T]):
    """The ranks of a process group, or this process alone where torch.distributed is not in use."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.is_alone = not (dist.is_available() and dist.is_initialized())
        self.group = group
        self.rank = 0 if self.is_alone else dist.get_rank(group)
        self.size = 1 if self.is_alone else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the process group; call load_sharded on its ranks only")

    def agree(self, error: Exception | None, value: T) -> list[T]:
        """Return the values of all ranks in order; collective.

        Raises:
            Exception: *error*, on a rank that has one.
            ShardedLoadError: another rank has one, or is gone.
        """
        message = None if error is None else f"{type(error).__name__}: {error}"
        told = [(message, value)]
        if not self.is_alone:
            told = [(None, value)] * self.size
            try:
                dist.all_gather_object(told, (message, value), group=self.group)
            except RuntimeError as lost:  # gloo notices a lost connection; others wait for their timeout
                raise (error or self._lost(lost)) from lost
        if error is not None:
            raise error
        failed = [(rank, text) for rank, (text, _) in enumerate(told) if text is not None]
        if failed:
            others = f" ({len(failed) - 1} more ranks failed too)" if len(failed) > 1 else ""
            raise ShardedLoadError(
                f"rank {failed[0][0]} of {self.size} could not load, so nothing was assigned on any rank"
                f"{others}. {failed[0][1]}"
            )
        return [value for _, value in told]

    def _lost(self, error: RuntimeError) -> ShardedLoadError:
        reason = str(error).partition("\n")[0]
        return ShardedLoadError(
            f"a rank has ended, or was too slow, while a model was being loaded, so nothing was assigned on "
            f"rank {self.rank} of {self.size}. See what the other ranks have printed. ({reason})"
        )
