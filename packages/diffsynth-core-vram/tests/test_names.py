"""Every documented name, under every documented module."""

import ast
import importlib
import importlib.metadata
from pathlib import Path

import offload_layers
import pytest
import safemap
import skipinit

LAYERS = [
    "AutoTorchModule",
    "AutoWrappedLinear",
    "AutoWrappedModule",
    "AutoWrappedNonRecurseModule",
    "AutoWrappedQuantizedModule",
    "LoRAHotLoadMixin",
    "enable_vram_management",
    "enable_vram_management_recursively",
    "fill_vram_config",
]
VRAM = [*LAYERS, "DiskMap", "skip_model_initialization"]
CORE = [*VRAM, "load_model", "load_state_dict"]
DOCUMENTED = {
    "": CORE,
    ".core": CORE,
    ".core.loader": ["load_model", "load_state_dict"],
    ".core.loader.file": ["load_state_dict"],
    ".core.loader.model": ["load_model"],
    ".core.vram": VRAM,
    ".core.vram.disk_map": ["DiskMap"],
    ".core.vram.initialization": ["skip_model_initialization"],
    ".core.vram.layers": LAYERS,
}
STUBS = Path(__file__).parents[1] / "src" / "diffsynth-stubs"

real_is_installed = any(
    distribution.metadata["Name"] == "diffsynth" for distribution in importlib.metadata.distributions()
)


@pytest.mark.parametrize(
    "top",
    [
        "diffsynth_core_vram",
        pytest.param(
            "diffsynth", marks=pytest.mark.skipif(real_is_installed, reason="the real diffsynth answers")
        ),
    ],
)
@pytest.mark.parametrize("module", DOCUMENTED)
def test_names_are_the_packages_own(top, module):
    found = importlib.import_module(top + module)
    for name in DOCUMENTED[module]:
        owner = next((p for p in (skipinit, safemap, offload_layers) if hasattr(p, name)), None)
        expected = getattr(owner or importlib.import_module("diffsynth_core_vram._load_model"), name)
        assert getattr(found, name) is expected, name


@pytest.mark.parametrize("module", DOCUMENTED)
def test_star_import_gives_exactly_the_documented_names(module):
    own = ["CheckpointMismatchError", "install", "offload", "uninstall"] if module == "" else []
    assert set(importlib.import_module(f"diffsynth_core_vram{module}").__all__) == {*DOCUMENTED[module], *own}


@pytest.mark.parametrize("module", DOCUMENTED)
def test_type_checkers_see_the_same_modules(module):
    """Each stub of ``diffsynth`` takes its names from the module of this distribution that serves it."""
    path = STUBS.joinpath(*module.split("."))
    stub = path / "__init__.pyi" if path.is_dir() else path.with_suffix(".pyi")
    imported = [
        node.module for node in ast.walk(ast.parse(stub.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    served_by = "diffsynth_core_vram" + (module or ".core")
    assert served_by in imported


def test_no_stub_without_a_module():
    paths = {path.relative_to(STUBS).with_suffix("").as_posix() for path in STUBS.rglob("*.pyi")}
    stubs = {f"/{path}".removesuffix("/__init__").replace("/", ".") for path in paths}
    assert stubs == DOCUMENTED.keys()
    assert (STUBS / "py.typed").read_text() == "partial\n"  # the real package has the other modules
