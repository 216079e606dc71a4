"""Report, recording and self-check of a real transformer, whose weights come from a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from offload_layers import Offloaded, Tier, offload, recording, report, reset_counters
from safemap import DiskMap
from safetensors.torch import save_file

LIMIT = 300_000


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def inputs() -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 4, generator=numbers),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=numbers),
        "pooled_projections": torch.randn(1, 32, generator=numbers),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[Offloaded]:
    save_file(flux().state_dict(), tmp_path / "flux.safetensors")
    with torch.no_grad(), DiskMap(tmp_path / "flux.safetensors") as source:
        yield offload(flux(), device="cpu", ram=LIMIT, source=source)


def test_every_layer_agrees_with_the_plain_one(handle: Offloaded, inputs: dict[str, Any]) -> None:
    expected = flux()(**inputs).sample
    for _ in range(2):
        found = handle.verify(**inputs)
        assert found.is_equal, found
        assert found.unchecked == ()
        assert found.layers_checked == len(report(handle.model).layers)
    assert torch.equal(handle(**inputs).sample, expected)


def test_counts_and_times_of_a_forward(handle: Offloaded, inputs: dict[str, Any]) -> None:
    for _ in range(3):
        handle(**inputs)
    reset_counters(handle.model)
    with recording(handle.model) as timeline:
        handle(**inputs)
    found = report(handle.model)
    on_disk = found.tiers[Tier.DISK]
    assert on_disk.layers > 0
    assert found.tiers[Tier.DEVICE].layers > 0
    assert found.total.hits + found.total.waits + found.total.misses >= on_disk.layers
    assert found.total.moved_nbytes >= on_disk.nbytes
    assert found.peak_nbytes == timeline.peak_nbytes
    assert {interval.name for interval in timeline.intervals} == {layer.name for layer in found.layers}
