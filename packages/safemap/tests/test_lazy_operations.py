"""One row for each kind of operation that converters are made of: equal to eager, and what it reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safemap import DiskMap
from safemap.testing import assert_same
from torch import Tensor
from torch.nn import functional as F

StateDict = dict[str, Tensor]
WHOLE = 24 * 4  # bytes of one stored tensor


def tensors() -> StateDict:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(6, 4, generator=generator) for name in ("a", "b", "c")}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, save: Callable[..., str]) -> str:
    path: Path = tmp_path_factory.mktemp("operations")
    return save(path / "model.safetensors", tensors())


def _assign(s: StateDict) -> Tensor:
    s["a"][2:4] = s["b"][:2]
    return s["a"]


def _columns(s: StateDict) -> Tensor:
    s["a"][:, 1] = s["b"][:, 0]
    return s["a"]


def _masked(s: StateDict) -> Tensor:
    s["a"][torch.arange(6) > 3] = 0
    return s["a"]


def _scattered(s: StateDict) -> Tensor:
    s["a"].index_copy_(0, torch.tensor([5, 0]), s["b"][:2])
    return s["a"]


def _loop(s: StateDict) -> Tensor:
    stacked = s["a"].new_empty(3, 6, 4)
    for i, name in enumerate("abc"):
        stacked[i].copy_(s[name])
    return stacked


def _complex(s: StateDict) -> Tensor:
    return torch.view_as_complex(s["a"].view(6, 2, 2))


#: name -> function of the state dict, bytes of the file that the result takes
TABLE: dict[str, tuple[Callable[[StateDict], Any], int]] = {
    # views of one tensor
    "same": (lambda s: s["a"], WHOLE),
    "reshape": (lambda s: s["a"].reshape(2, 3, 4), WHOLE),
    "flatten": (lambda s: s["a"].flatten(), WHOLE),
    "unsqueeze": (lambda s: s["a"][None, ..., None], WHOLE),
    "transpose": (lambda s: s["a"].T, WHOLE),
    "permute": (lambda s: s["a"].view(2, 3, 4).permute(2, 0, 1), WHOLE),
    "rows": (lambda s: s["a"][1:3], 2 * 16),
    "one row": (lambda s: s["a"][4], 16),
    "element": (lambda s: s["a"][4, 1], 4),
    "columns": (lambda s: s["a"][:, 1:3], 6 * 8),
    "steps": (lambda s: s["a"][::2], 3 * 16),
    "chunk": (lambda s: s["a"].chunk(3)[1], 2 * 16),
    "split": (lambda s: s["a"].split([1, 5])[1], 5 * 16),
    "split of columns": (lambda s: s["a"].split(2, dim=1)[1], 6 * 8),
    "unbind": (lambda s: s["a"].unbind()[2], 16),
    "empty": (lambda s: s["a"][6:], 0),
    "expand": (lambda s: s["a"][:1].expand(5, 4), 16),
    "bits": (lambda s: s["a"].view(torch.int32)[3], 16),
    "diagonal": (lambda s: s["a"].diagonal(), 4 * 4),
    # bytes put together
    "concatenation": (lambda s: torch.cat([s["a"], s["b"], s["c"]]), 3 * WHOLE),
    "concatenation of columns": (lambda s: torch.cat([s["a"], s["b"]], dim=1), 2 * WHOLE),
    "concatenation of parts": (lambda s: torch.cat([s["a"][3:], s["a"][:3]]), WHOLE),
    "part of a concatenation": (lambda s: torch.cat([s["a"], s["b"]])[5:7], 2 * 16),
    "stack": (lambda s: torch.stack([s["a"], s["b"]]), 2 * WHOLE),
    "stack in the middle": (lambda s: torch.stack([s["a"], s["b"]], dim=1), 2 * WHOLE),
    "interleaved heads": (
        lambda s: torch.cat([s[n].reshape(3, 2, 4) for n in "abc"], dim=1).reshape(-1, 4),
        3 * WHOLE,
    ),
    "rotary order": (lambda s: s["a"].view(1, 2, 3, 4).transpose(1, 2).reshape(6, 4), WHOLE),
    "contiguous": (lambda s: s["a"].T.contiguous(), WHOLE),
    "clone": (lambda s: s["a"][2:].clone(), 4 * 16),
    "padded with zeros": (lambda s: torch.cat([s["a"], s["a"].new_zeros(2, 4)]), WHOLE),
    "zeros": (lambda s: torch.zeros(3, 4, dtype=s["a"].dtype), 0),
    "like": (lambda s: torch.full_like(s["a"], 3), 0),
    "filled in a loop": (_loop, 3 * WHOLE),
    "rows assigned": (_assign, 4 * 16 + 2 * 16),
    "columns assigned": (_columns, 6 * 12 + 6 * 4),
    # recorded
    "cast": (lambda s: s["a"].to(torch.bfloat16), WHOLE),
    "cast of a part": (lambda s: s["a"][:2].double(), 2 * 16),
    "arithmetic": (lambda s: (s["a"] + 1) * s["b"] - s["a"].mean(), 2 * WHOLE),
    "product": (lambda s: s["a"] @ s["b"].T, 2 * WHOLE),
    "einsum": (lambda s: torch.einsum("ij,kj->ik", s["a"], s["b"]), 2 * WHOLE),
    "norm": (lambda s: s["a"] / s["a"].norm(dim=1, keepdim=True), WHOLE),
    "exponential": (lambda s: torch.exp(s["a"]).log1p(), WHOLE),
    "clamp in place": (lambda s: s["a"].clamp_(0.2, 0.8), WHOLE),
    "flip": (lambda s: s["a"].flip(0), WHOLE),
    "roll": (lambda s: torch.roll(s["a"], 1, 0), WHOLE),
    "rows by index": (lambda s: s["a"][torch.tensor([3, 0])], WHOLE),
    "masked": (_masked, WHOLE),
    "scattered": (_scattered, WHOLE + 2 * 16),
    "where": (lambda s: torch.where(s["a"] > 0.5, s["a"], s["b"]), 2 * WHOLE),
    "repeat": (lambda s: s["a"].repeat(2, 1), WHOLE),
    "repeat interleave": (lambda s: s["a"].repeat_interleave(2, dim=0), WHOLE),
    "pad": (lambda s: F.pad(s["a"], (0, 1)), WHOLE),
    "interpolate": (lambda s: F.interpolate(s["a"][None], size=8), WHOLE),
    "sort": (lambda s: s["a"].sort(dim=0).indices, WHOLE),
    "complex": (_complex, WHOLE),
    "conjugate": (lambda s: _complex(s).conj(), WHOLE),
    "adjoint times itself": (lambda s: _complex(s).mH @ _complex(s), WHOLE),
    "imaginary part of a conjugate": (lambda s: _complex(s).conj().imag, WHOLE),
    "part of a conjugate": (lambda s: _complex(s).conj()[1:3, 0], WHOLE),
    "conjugate of a repeated row": (lambda s: _complex(s)[:1].expand(3, 2, 2).conj(), 16),
    "conjugate of columns": (lambda s: _complex(s)[:, :1].conj(), 6 * 8),
    "filled with a negative zero": (lambda s: s["a"].fill_(-0.0), 0),
    "mean of a stack": (lambda s: torch.stack([s["a"], s["b"]]).mean(0), 2 * WHOLE),
    "part of a sum": (lambda s: (s["a"] + s["b"])[1:2], 2 * WHOLE),
}


@pytest.mark.parametrize("name", TABLE)
def test_it_equals_eager_and_costs_what_it_needs(name: str, file: str) -> None:
    operation, nbytes = TABLE[name]
    expected = operation(tensors())
    with DiskMap(file, state_dict_converter=lambda s: {"x": operation(s)}, converter_read_limit=0) as lazy:
        found = lazy["x"]
        assert_same(found, expected)
        info = lazy.info("x")
        assert (info.dtype, info.shape, info.nbytes) == (expected.dtype, expected.shape, nbytes)
        assert_same(lazy.read_into("x", torch.empty(expected.shape, dtype=expected.dtype)), expected)
        if expected.dim():
            assert_same(lazy.slice("x")[1:4], expected[1:4])
        assert found.untyped_storage().nbytes() <= found.nbytes + 64, "it keeps more memory than it needs"
