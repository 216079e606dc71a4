"""Wheels and virtual environments, made without a network."""

import base64
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _write_wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes]) -> Path:
    """Write a wheel as an index would serve it: files, METADATA, WHEEL and RECORD with their hashes."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,\n"]).encode()
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in contents.items():
            archive.writestr(path, data)
    return wheel


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="session")
def our_files() -> dict[str, bytes]:
    """What the wheel of this distribution holds, laid out as pyproject.toml tells the build backend."""
    target = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    (source,) = target["sources"]
    files = {}
    for included in target["only-include"]:
        path = ROOT / included
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                files[file.relative_to(ROOT / source).as_posix()] = file.read_bytes()
    return files


#: DiffSynth-Studio as far as it matters here: a package directory with its own ``core.vram``
REAL_FILES = {
    "diffsynth/__init__.py": "from .core import *",
    "diffsynth/version.py": "__version__ = '2.1.12'",
    "diffsynth/configs/__init__.py": "",
    "diffsynth/core/__init__.py": "from .loader import *\nfrom .vram import *",
    "diffsynth/core/loader/__init__.py": "from .file import load_state_dict\nfrom .model import load_model",
    "diffsynth/core/loader/file.py": """
        def load_state_dict(): return 'real'
        def load_state_dict_from_bin(file_path, torch_dtype=None, device="cpu"): return [file_path, device]
        def convert_state_dict_to_keys_dict(state_dict): return ["keys", state_dict]
        def load_keys_dict_from_bin(file_path): return 'real'
    """,
    "diffsynth/core/loader/model.py": """
        from ..vram.initialization import skip_model_initialization
        from ..vram.disk_map import DiskMap
        from ..vram.layers import enable_vram_management
        import os
        def is_deepspeed_zero3_enabled(): return 'ZERO3' in os.environ
        def load_model(): return 'real'
    """,
    "diffsynth/core/vram/__init__.py": """
        from .initialization import skip_model_initialization
        from .layers import *
    """,
    "diffsynth/core/vram/initialization.py": "def skip_model_initialization(): return 'real'",
    "diffsynth/core/vram/disk_map.py": "class DiskMap: pass",
    "diffsynth/core/vram/layers.py": """
        from .disk_map import DiskMap
        class AutoTorchModule: pass
        class AutoWrappedLinear(AutoTorchModule): pass
        def enable_vram_management(): return 'real'
    """,
    "diffsynth/models/__init__.py": "",
    "diffsynth/models/model_loader.py": """
        from ..core.loader import load_model
        from ..core.vram.layers import AutoWrappedLinear as AutoWrappedModule
        VRAM_MANAGEMENT_MODULE_MAPS = {
            "models.Mapped": {"layers.Linear": "ours.Linear", "layers.Gone": "ours.Module"},
            "models.Versioned": {},
        }
        VERSION_CHECKER_MAPS = {"models.Versioned": lambda: {"layers.New": "ours.Module"}}
        class ModelPool:
            def import_model_class(self, name):
                if name == "layers.Gone": raise AttributeError("no attribute 'Gone'")
                return name
            def need_to_enable_vram_management(self, config): return config["offload_dtype"] is not None
            def fetch_module_map(self, model_class, config): return 'real'
    """,
    "diffsynth/diffusion/__init__.py": "",
    "diffsynth/diffusion/base_pipeline.py": """
        from ..core import load_state_dict
        class BasePipeline:
            def load_models_to_device(self, model_names): return 'real'
    """,
}


@pytest.fixture(scope="session")
def real_files() -> dict[str, bytes]:
    """The files of a stand-in for DiffSynth-Studio."""
    return {path: textwrap.dedent(text).encode() for path, text in REAL_FILES.items()}


@dataclass(frozen=True)
class Wheels:
    ours: Path
    real: Path


@pytest.fixture(scope="session")
def wheels(
    tmp_path_factory: pytest.TempPathFactory, our_files: dict[str, bytes], real_files: dict[str, bytes]
) -> Wheels:
    """Wheels of this distribution and of the stand-in for DiffSynth-Studio."""
    folder = tmp_path_factory.mktemp("wheels")
    ours = _write_wheel(folder, PYPROJECT["project"]["name"], PYPROJECT["project"]["version"], our_files)
    return Wheels(ours, _write_wheel(folder, "diffsynth", "2.1.12", real_files))


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hollow stand-ins for what this distribution depends on: any name is there, at no cost.

    Which ``diffsynth`` is found does not depend on them, and importing the true ones takes seconds.
    """
    folder = tmp_path_factory.mktemp("dependencies")
    hollow = textwrap.dedent("""
        from functools import cache
        from unittest.mock import MagicMock
        @cache
        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock(name=name)
    """)
    for requirement in PYPROJECT["project"]["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0].replace("-", "_")
        (folder / f"{name}.py").write_text(hollow)
    return folder


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip, which a pip from outside installs into."""

    folder: Path
    dependencies: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def site_packages(self) -> Path:
        """Where wheels are installed."""
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def copy_to(self, folder: Path) -> "Environment":
        """Return an independent copy."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return dataclasses.replace(self, folder=folder, variables=dict(self.variables))

    def install(self, wheel: Path) -> None:
        """Let pip install *wheel*."""
        self._pip("install", "--no-deps", "--no-index", "--no-compile", wheel)

    def uninstall(self, name: str) -> None:
        """Let pip uninstall the distribution *name*."""
        self._pip("uninstall", "--yes", name)

    def unpack(self, wheel: Path, folder: Path | None = None) -> None:
        """Put the files of *wheel* where pip would, quickly; pip could not uninstall them."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder or self.site_packages)

    def start(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python to its end, whatever that is."""
        command = [self.folder / "bin" / "python", *arguments]
        return subprocess.run(
            command, env=self._environ(), capture_output=True, text=True, cwd=cwd or self.folder, check=False
        )

    def run(self, code: str, *, cwd: Path | None = None) -> str:
        """Run *code*, which must succeed; return what it printed."""
        done = self.start("-c", textwrap.dedent(code), cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _pip(self, *arguments: str | Path) -> None:
        python = self.folder / "bin" / "python"
        command = [sys.executable, "-m", "pip", "--python", python, "--isolated", "--quiet", *arguments]
        done = subprocess.run(command, env=self._environ(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _environ(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))
        }
        ours = {"PYTHONPATH": str(self.dependencies), "PYTHONDONTWRITEBYTECODE": "1"}
        return {**inherited, **ours, **self.variables}


@pytest.fixture(scope="session")
def empty_environment(tmp_path_factory: pytest.TempPathFactory, dependencies: Path) -> Environment:
    """A virtual environment with nothing in it, to be copied."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    return Environment(folder, dependencies)


@pytest.fixture
def environment(empty_environment: Environment, tmp_path: Path) -> Environment:
    """A virtual environment with nothing in it."""
    return empty_environment.copy_to(tmp_path / "venv")
