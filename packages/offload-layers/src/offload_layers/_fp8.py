"""Eight-bit floats on the CPU become sixteen or thirty-two bits by looking them up.

Note [Pairs in a table]
    torch converts eight-bit floats one by one: 0.25 billion a second and thread. A table with the result for
    every *pair* of bytes is made by torch's own conversion, so it is exact, NaN included, whatever the
    thread's mode for denormals. Looking up gives 1.8 billion a second and thread. ``gather`` is the operation
    that does so in parallel: over the rows of a matrix, hence the shapes below. Each piece is small enough to
    stay in the cache between the two steps, and its result is written where it is wanted.

    Source: benchmarks/results.
"""

import functools
import threading

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError

_NAMES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
#: the eight-bit formats that this torch has
FP8 = frozenset(getattr(torch, name) for name in _NAMES if hasattr(torch, name))

_PAIRS = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}
_PIECE = 1 << 19  # elements: with indices and results 3.5 MB
_ROWS = 16  # of one piece: as many threads can look up at once
_WORTH_A_TABLE = 1 << 18  # elements; making a table costs as much as converting 64 Ki of them
_scratch = threading.local()


def is_fast(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Say whether `upcast` is for this: eight bits on the CPU, no gradient, no tensor of a foreign class."""
    return (
        tensor.dtype in FP8
        and dtype != tensor.dtype
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, nn.Parameter)
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def upcast(tensor: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Return *tensor*, of eight-bit floats on the CPU, in *dtype*: a new tensor of the same strides.

    The result is that of ``tensor.to(dtype)`` to the last bit. Gradients do not flow through it.

    Args:
        tensor: Any shape and strides.
        dtype: Any dtype that torch converts to; fast for bfloat16, float16 and float32.
        out: Memory for the result, contiguous; *dtype* and the shape of *tensor* must be its own.

    Raises:
        ConfigError: *out* is not what is described here.
    """
    with torch.no_grad():
        if out is None:
            out = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
        elif out.dtype != dtype or out.shape != tensor.shape or not out.is_contiguous():
            raise ConfigError(
                f"out must be a contiguous {dtype} tensor of shape {tuple(tensor.shape)}; got {out.dtype}, "
                f"shape {tuple(out.shape)}, strides {out.stride()}"
            )
        is_flat = out.stride() == tensor.stride()  # and so both are dense, in the same order
        if tensor.numel() < _WORTH_A_TABLE or dtype not in _PAIRS or not is_flat or out.storage_offset() % 2:
            return out.copy_(tensor)
        _look_up(_flat(tensor), _flat(out))
        return out


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _look_up(codes: Tensor, out: Tensor) -> None:
    """Fill *out* from *codes*, both of one dimension; see Note [Pairs in a table]."""
    pairs = _PAIRS[out.dtype]
    table = _table(codes.dtype, out.dtype).expand(_ROWS, -1)
    whole = len(codes) - len(codes) % (2 * _ROWS)
    for start in range(0, whole, _PIECE):
        piece = codes[start : min(start + _PIECE, whole)]
        if piece.storage_offset() % 2:
            piece = piece.clone()  # an odd address cannot be read in pairs
        index = _indices(len(piece) // 2).copy_(piece.view(torch.uint16)).view(_ROWS, -1)
        result = out[start : start + len(piece)].view(pairs).view(_ROWS, -1)
        torch.gather(table, 1, index, out=result)
    out[whole:].copy_(codes[whole:])


def _indices(length: int) -> Tensor:
    memory: Tensor | None = getattr(_scratch, "memory", None)
    if memory is None:
        memory = _scratch.memory = torch.empty(_PIECE // 2, dtype=torch.int64, device="cpu")
    return memory[:length]


@functools.lru_cache(maxsize=8)
def _table(stored: torch.dtype, wanted: torch.dtype) -> Tensor:
    """Return the converted value of every pair of bytes, indexed by the pair as a 16-bit number."""
    with torch.inference_mode(False):
        every_pair = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.uint16)
        return every_pair.view(stored).to(wanted).view(_PAIRS[wanted])
