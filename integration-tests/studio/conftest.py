"""The real DiffSynth-Studio on this implementation; ``nox -s diffsynth`` installs what these tests need."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffsynth_core_vram
import pytest
from torch import nn

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))  # tests are imported by path, and share modules

collect_ignore_glob = []
try:
    importlib.metadata.version("diffsynth")
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob.append("test_*.py")
else:
    import stand_ins  # noqa: F401

    diffsynth_core_vram.install()


@pytest.fixture(scope="session")
def original() -> Iterator[Any]:
    """DiffSynth-Studio's own ``core.vram``, beside ours: the same files under another name."""
    import diffsynth.core

    folder = Path(diffsynth.core.__file__).parent / "vram"
    name = "diffsynth.core.original_vram"  # its relative imports find what they found as diffsynth.core.vram
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for loaded in [n for n in sys.modules if n.startswith(name)]:
        del sys.modules[loaded]


@pytest.fixture(scope="session")
def pool() -> Any:
    """Loads models with their own module maps, as every pipeline does."""
    from diffsynth.models.model_loader import ModelPool

    return ModelPool()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], str]:
    """Save a model as files are published: a tied parameter under its first name only."""
    from safetensors.torch import save_file

    def save(model: nn.Module) -> str:
        seen: dict[tuple[int, ...], str] = {}
        state = {}
        for name, tensor in model.state_dict().items():
            key = (tensor.data_ptr(), *tensor.shape)
            if key not in seen or not tensor.numel():
                seen[key] = name
                state[name] = tensor.contiguous()
        path = tmp_path / "model.safetensors"
        save_file(state, path)
        return str(path)

    return save


@pytest.fixture(scope="session")
def original_load_model(original: Any) -> Callable[..., nn.Module]:
    """DiffSynth-Studio's own ``load_model``, on its own ``core.vram``."""
    import diffsynth.core.loader

    name = "diffsynth.core.loader.original_model"
    path = Path(diffsynth.core.loader.__file__).parent / "model.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for function in ("skip_model_initialization", "DiskMap", "enable_vram_management"):
        setattr(module, function, getattr(original, function))
    return module.load_model  # type: ignore[no-any-return]
