"""What people get wrong when they load a model: each mistake has a documented error that names it."""

import json
import shutil

import offload_layers
import pytest
import safemap
import torch
from diffsynth_core_vram import AutoWrappedLinear, CheckpointMismatchError, DiskMap, load_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

CONFIG = CLIPTextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
ON_DISK = {
    f"{role}_{what}": "disk" for role in ("offload", "onload", "preparing") for what in ("dtype", "device")
} | {"computation_dtype": torch.float32, "computation_device": "cpu"}
IN_MEMORY = {"computation_dtype": torch.float32, "computation_device": "cpu"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as on a hub: configuration, index, shards."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    CLIPTextModel(CONFIG).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(published, tmp_path / "model")


@pytest.fixture(params=[None, IN_MEMORY, ON_DISK], ids=["plain", "managed", "disk"])
def load(request):
    """Load the model in one of the three ways."""

    def attempt(path, config=CONFIG):
        module_map = None if request.param is None else {nn.Linear: AutoWrappedLinear}
        return load_model(
            CLIPTextModel, path, {"config": config}, module_map=module_map, vram_config=request.param
        )

    return attempt


def test_nothing_is_wrong(load, folder):
    assert isinstance(load(str(folder)), CLIPTextModel)


def test_missing_file(load, folder):
    path = str(folder / "modle.safetensors")
    with pytest.raises(FileNotFoundError, match=r"modle\.safetensors: no such file") as caught:
        load(path)
    assert isinstance(caught.value, safemap.SafemapError)


def test_missing_file_among_shards(load, folder):
    shards = sorted(map(str, folder.glob("*.safetensors")))
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors: no such file"):
        load([*shards, str(folder / "absent.safetensors")])


def test_folder_without_weights(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder without weights; looked for"):
        load(str(tmp_path))


def test_missing_shard(load, folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=f'the shard "{shard.name}", which holds .* tensors, is missing'
    ):
        load(str(folder))


def test_shard_left_out_of_the_list(load, folder):
    shards = sorted(map(str, folder.glob("*.safetensors")))
    with pytest.raises(
        CheckpointMismatchError, match=r"does not fit CLIPTextModel; it has .*\n +\d+ missing: "
    ):
        load(shards[1:])


@pytest.mark.parametrize(
    "kept", [0, 4, 100, -1], ids=["empty", "half a length", "half a header", "a byte short"]
)
def test_truncated_file(load, folder, kept):
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:kept])
    with pytest.raises(safemap.FormatError, match=shard.name):
        load(str(folder))


def test_file_of_another_kind(load, folder):
    with pytest.raises((safemap.FormatError, ValueError), match=r"config\.json"):
        load(str(folder / "config.json"))


def test_index_that_is_none(load, folder):
    (index,) = folder.glob("*.index.json")
    index.write_text(json.dumps({"weights": {}}))
    with pytest.raises(safemap.FormatError, match='an index must have a "weight_map"'):
        load(str(index))


def test_another_configuration(load, folder):
    wider = CLIPTextConfig(**{**CONFIG.to_dict(), "intermediate_size": 64, "num_hidden_layers": 3})
    with pytest.raises(CheckpointMismatchError) as caught:
        load(str(folder), config=wider)
    assert all(".layers.2." in name for name in caught.value.missing)
    assert all(".mlp." in name for name in caught.value.mismatched)
    assert caught.value.missing
    assert caught.value.mismatched
    assert "((48,), but (64,) in the model)" in str(caught.value)


def test_another_model(published):
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(nn.Linear, str(published), {"in_features": 2, "out_features": 3})
    assert set(caught.value.missing) == {"weight", "bias"}
    assert set(caught.value.unexpected) == CLIPTextModel(CONFIG).state_dict().keys()


def test_unknown_name(published):
    name = "encoder.layers.0.mlp.fc1.wieght"
    with pytest.raises(
        KeyError, match=r"encoder\.layers\.0\.mlp\.fc1\.wieght.*encoder\.layers\.0\.mlp\.fc1\.weight"
    ):
        DiskMap(str(published))[name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"onlaod_device": "cpu"}, r'unknown key .onlaod_device.\. Did you mean "onload_device"\?'),
        ({"computation_device": "cqu"}, "computation_device 'cqu' is no device that torch knows"),
        ({"computation_dtype": "bfloat16"}, "computation_dtype must be a torch.dtype"),
        (
            {"onload_device": "disk", "offload_device": "cpu", "offload_dtype": torch.float32},
            "onload is on disk",
        ),
    ],
    ids=["unknown key", "unknown device", "dtype as text", "disk above memory"],
)
def test_settings(published, settings, message):
    config = {**IN_MEMORY, **settings}
    with pytest.raises(offload_layers.ConfigError, match=message):
        load_model(
            CLIPTextModel,
            str(published),
            {"config": CONFIG},
            module_map={nn.Linear: AutoWrappedLinear},
            vram_config=config,
        )


@pytest.mark.parametrize("limit", ["8GB", [8], -1, float("nan")], ids=str)
def test_limit_that_is_no_number(published, limit):
    with pytest.raises(offload_layers.ConfigError, match="vram_limit must be "):
        load_model(
            CLIPTextModel,
            str(published),
            {"config": CONFIG},
            module_map={nn.Linear: AutoWrappedLinear},
            vram_config=ON_DISK,
            vram_limit=limit,
        )


def test_module_map_that_is_none(published):
    with pytest.raises(
        offload_layers.ConfigError, match="module_map must map module classes to layer classes"
    ):
        load_model(
            CLIPTextModel,
            str(published),
            {"config": CONFIG},
            module_map={"Linear": nn.Linear},
            vram_config=ON_DISK,
        )
