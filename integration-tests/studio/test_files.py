"""Real model classes from every kind of file: shards, pickles, names and layouts that a converter changes."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from configurations import CONFIGURATIONS, limit_of
from safetensors.torch import save_file
from studio_case import Case
from studio_cases import CASES
from torch import Tensor, nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

Write = Callable[[dict[str, Tensor], Path], Any]


def shards(state: dict[str, Tensor], folder: Path) -> list[str]:
    names = list(state)
    paths = [folder / f"model-0000{i}-of-00003.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        save_file({name: state[name] for name in names[i::3]}, path)
    return [str(path) for path in paths]


def pickled(state: dict[str, Tensor], folder: Path) -> str:
    torch.save(state, folder / "model.bin")
    return str(folder / "model.bin")


def pickled_under_a_key(state: dict[str, Tensor], folder: Path) -> str:
    torch.save({"state_dict": state}, folder / "model.pth")
    return str(folder / "model.pth")


def one_file(state: dict[str, Tensor], folder: Path) -> str:
    save_file(state, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def stacked(state: dict[str, Tensor], folder: Path) -> str:
    """Every pair of a weight and a bias in one tensor, under other names, as fused projections are."""
    out = {}
    for name, tensor in state.items():
        weight = name.removesuffix(".bias") + ".weight"
        if name.endswith(".bias") and weight in state and state[weight].ndim == 2:
            continue
        bias = name.removesuffix(".weight") + ".bias"
        if name.endswith(".weight") and bias in state and tensor.ndim == 2:
            fused = torch.cat([tensor, state[bias][:, None]], 1)
            out[f"net.{name.removesuffix('.weight')}.fused"] = fused.contiguous()
        else:
            out[f"net.{name}"] = tensor
    return one_file(out, folder)


def unstack(state_dict: Any) -> dict[str, Tensor]:
    """The converter for it: tensor operations, and names that change."""
    out = {}
    for name in state_dict:
        new = name.removeprefix("net.")
        if name.endswith(".fused"):
            fused = state_dict[name]
            out[new.removesuffix("fused") + "weight"] = fused[:, :-1].contiguous()
            out[new.removesuffix("fused") + "bias"] = fused[:, -1].contiguous()
        else:
            out[new] = state_dict[name]
    return out


def unwrap(state_dict: Any) -> Any:
    """A converter of DiffSynth-Studio's kind for a pickle that has its tensors under a key."""
    return dict(state_dict["state_dict"].items())


KINDS: dict[str, tuple[Write, Any]] = {
    "shards": (shards, None),
    "bin": (pickled, None),
    "bin, wrapped": (pickled_under_a_key, None),
    "bin, wrapped, converter": (pickled_under_a_key, unwrap),
    "converter": (stacked, unstack),
}


@pytest.fixture(scope="module", autouse=True)
def converters() -> Any:
    """A place where DiffSynth-Studio finds the converters by a dotted name."""
    module = ModuleType("converters_of_this_test")
    module.unstack, module.unwrap = unstack, unwrap  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module.__name__
    del sys.modules[module.__name__]


@pytest.mark.parametrize("configuration", ["none", "cpu offload", "disk", "disk, preparing"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen-image", "wan", "flux2-vae", "sdxl-clip"])
def test_loads_from(
    name: str, kind: str, configuration: str, pool: Any, tmp_path: Path, converters: str
) -> None:
    case: Case = CASES[name]
    write, converter = KINDS[kind]
    plain = case.build()
    path = write(plain.state_dict(), tmp_path)
    config = {"model_class": case.model_class, "extra_kwargs": dict(case.config)}
    if converter is not None:
        config["state_dict_converter"] = f"{converters}.{converter.__name__}"
    nbytes = sum(p.nbytes for p in plain.parameters())
    with case.small():
        model: nn.Module = pool.load_model_file(
            config,
            path,
            CONFIGURATIONS[configuration](case.dtype),
            vram_limit=limit_of(configuration, nbytes),
        )
    assert torch.equal(case.run(model), case.run(plain))


def test_files_are_recognised_as_the_original_recognises_them(original: Any, tmp_path: Path) -> None:
    from diffsynth.core.loader import file
    from diffsynth.core.loader.file import hash_model_file

    state = CASES["qwen-image"].build().state_dict()
    safetensors = hash_model_file(one_file(state, tmp_path))
    assert hash_model_file(pickled(state, tmp_path)) == safetensors
    assert hash_model_file(pickled_under_a_key(state, tmp_path)) == safetensors
    assert hash_model_file(shards(state, tmp_path)) == safetensors
    nested = {"a": {"b": torch.zeros(3)}, "c": torch.zeros(2)}
    path = pickled(nested, tmp_path)
    assert hash_model_file(path) == file.hash_state_dict_keys(nested)
