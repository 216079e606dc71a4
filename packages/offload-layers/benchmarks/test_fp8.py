"""What converting weights from eight bits costs: our way beside torch's, and beside a copy as the floor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from offload_layers._fp8 import upcast
from torch import Tensor

SIZE = 16 << 20  # elements; far more than the caches hold


def torchs(stored: Tensor, out: Tensor) -> None:
    out.copy_(stored)


def ours(stored: Tensor, out: Tensor) -> None:
    upcast(stored, out.dtype, out=out)


def floor(stored: Tensor, out: Tensor) -> None:
    out.copy_(torch.empty(0, dtype=out.dtype).set_(out.untyped_storage(), SIZE, (SIZE,)))


WAYS = {"ours": ours, "torch's": torchs, "floor: a copy in the wanted dtype": floor}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_upcast(
    benchmark: Any, way: str, wanted: torch.dtype, threads: int, request: pytest.FixtureRequest
) -> None:
    benchmark.group = f"16 Mi elements from float8_e4m3fn to {wanted}, threads: {threads}"
    convert: Callable[[Tensor, Tensor], None] = WAYS[way]
    stored = (torch.randn(SIZE) * 0.03).to(torch.float8_e4m3fn)
    out = torch.ones(2 * SIZE, dtype=wanted)[:SIZE]  # touched: what is measured is the conversion
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    benchmark.pedantic(convert, (stored, out), rounds=9, warmup_rounds=1)
