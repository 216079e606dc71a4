from collections.abc import Callable

import pytest
import torch
from offload_layers import ConfigError, Placement, Policy
from offload_layers._placement import DISK, parse_device, parse_limit

CPU = torch.device("cpu")


@pytest.mark.parametrize("same", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)], ids=repr)
def test_every_spelling_of_a_device_is_one_device(same: object) -> None:
    assert parse_device(same) == CPU


@pytest.mark.parametrize("same", ["cuda:0", torch.device("cuda", 0)], ids=repr)
def test_an_accelerator_has_an_index(same: object) -> None:
    assert parse_device(same) == torch.device("cuda", 0)
    assert parse_device("cuda").index is not None


def test_a_missing_setting_is_that_of_the_computation() -> None:
    policy = Policy.from_config({"computation_dtype": torch.bfloat16, "computation_device": "cpu"})
    assert policy.offload == policy.onload == policy.preparing == Placement(CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "where"), [("disk", "disk"), ("disk", None), (None, "disk"), (torch.float32, "disk")]
)
def test_disk_in_either_setting_is_on_disk(dtype: object, where: object) -> None:
    policy = Policy.from_config(
        {"offload_dtype": dtype, "offload_device": where, "computation_device": "cpu"}
    )
    assert policy.offload == DISK


def test_a_dtype_is_for_floating_point_weights_only() -> None:
    placement = Placement(CPU, torch.bfloat16)
    assert placement.dtype_for(torch.float32) is torch.bfloat16
    assert placement.dtype_for(torch.int64) is torch.int64
    assert placement.holds(torch.zeros(1, dtype=torch.bool))


BAD: dict[str, tuple[dict[str, object], str]] = {
    "misspelt key": (
        {"onlaod_device": "cpu"},
        "vram_config has an unknown key 'onlaod_device'. Did you mean \"onload_device\"?",
    ),
    "no computation device": (
        {"offload_device": "cpu"},
        "computation_device is missing or on disk; name the device that computes, e.g. 'cuda'",
    ),
    "computation on disk": (
        {"computation_device": "disk"},
        "computation_device is missing or on disk; name the device that computes, e.g. 'cuda'",
    ),
    "dtype as a string": (
        {"offload_dtype": "bfloat16", "computation_device": "cpu"},
        "offload_dtype must be a torch.dtype, \"disk\" or None; got 'bfloat16'",
    ),
    "disk dtype on a real device": (
        {"offload_dtype": "disk", "offload_device": "cpu", "computation_device": "cpu"},
        'offload_dtype is "disk", but offload_device is \'cpu\'; set both to "disk", or a dtype',
    ),
    "meta device": (
        {"offload_device": "meta", "computation_device": "cpu"},
        'offload_device is "meta", which holds no values; to keep weights on disk write "disk"',
    ),
    "no device": (
        {"computation_device": 1.5},
        'computation_device must be a device such as "cuda", 0 or torch.device("cpu"); got 1.5',
    ),
    "back to disk": (
        {"onload_device": "disk", "computation_device": "cpu", "computation_dtype": torch.float32},
        "onload is on disk, but offload is on cpu float32: a layer that gets closer to computation cannot "
        'go back to disk. Set onload_device to "cpu", or offload_device to "disk"',
    ),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=list(BAD))
def test_a_configuration_that_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Policy.from_config(settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_a_device_is_named_as_its_tensors_name_it(name: str) -> None:
    assert parse_device(name) == torch.device("mps", 0)


def test_an_unknown_device_is_refused_with_torchs_reason() -> None:
    with pytest.raises(ConfigError, match=r"offload_device 'gpu' is no device that torch knows: .*gpu"):
        Policy.from_config({"offload_device": "gpu", "computation_device": "cpu"})


@pytest.mark.parametrize(
    ("limit", "nbytes"), [(None, None), (0, 0), (1, 1 << 30), (0.5, 1 << 29), (float("inf"), None)]
)
def test_a_limit_is_gib(limit: float | None, nbytes: int | None) -> None:
    assert parse_limit(limit) == nbytes


@pytest.mark.parametrize("limit", ["8", "8GB", -1, float("nan"), True, [8]], ids=repr)
def test_a_limit_that_is_no_number_is_refused(limit: object) -> None:
    with pytest.raises(ConfigError, match="vram_limit must be"):
        parse_limit(limit)


def test_a_placement_reads_well(make_config: Callable[..., dict[str, object]]) -> None:
    assert str(Placement(CPU, torch.bfloat16)) == "cpu bfloat16"
    assert str(Placement(CPU)) == "cpu as stored"
    assert str(DISK) == "disk"
