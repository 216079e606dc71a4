"""Let a real DiffSynth-Studio use this implementation of ``diffsynth.core.vram``."""

import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from os.path import dirname
from types import ModuleType

from diffsynth_core_vram import core
from diffsynth_core_vram._served import SERVED

_ROUTED = "diffsynth.core.vram"
_TESTED = ("2.1.12",)  # the session `diffsynth` in noxfile.py runs with each


class _Router:
    """A meta-path finder: one package is found here, and of a few modules some functions are replaced."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _ROUTED:  # its submodules follow from its `__path__`
            return PathFinder.find_spec(name, core.__path__)
        if name not in SERVED:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.origin is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        return spec_from_file_location(name, loader=_Serving(name, spec.origin, SERVED[name]))


class _Serving(SourceFileLoader):
    """Runs a module of DiffSynth-Studio, then replaces in it what this distribution serves."""

    def __init__(self, name: str, path: str, serve: Callable[[ModuleType], None]) -> None:
        super().__init__(name, path)
        self._serve = serve

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._serve(module)


def install() -> None:
    """Let ``import diffsynth`` use this implementation from now on, in this process.

    ``diffsynth.core.vram`` is found here; in the rest of DiffSynth-Studio, ``load_state_dict``,
    ``load_model`` and the few functions that would get in the way are served from here, too. Nothing is
    written to disk. Call it before the first ``import diffsynth``. Where DiffSynth-Studio is not installed it
    changes nothing, since the names are served from here anyway. A second call changes nothing either.

    Raises:
        RuntimeError: DiffSynth-Studio is imported already, with its own ``diffsynth.core.vram``.

    Warns:
        UserWarning: The installed version is not among those that have been tested.
    """
    if _Router in sys.meta_path:
        return
    imported = sys.modules.get("diffsynth")
    if imported is not None and not _is_served_from_here(sys.modules.get(_ROUTED, imported)):
        raise RuntimeError(
            f"diffsynth is imported already, from {getattr(imported, '__file__', None)}, with its own "
            f"{_ROUTED}. Call diffsynth_core_vram.install() before the first `import diffsynth`, or start "
            "the program with `python -m diffsynth_core_vram SCRIPT`."
        )
    _check_version()
    sys.meta_path.insert(0, _Router)


def uninstall() -> None:
    """Stop routing: a later first import of ``diffsynth`` finds what is installed, as it is.

    Modules that are imported already stay as they are.
    """
    if _Router in sys.meta_path:
        sys.meta_path.remove(_Router)


def _is_served_from_here(package: ModuleType) -> bool:
    here = dirname(core.__path__[0])
    return any(entry.startswith(here) for entry in getattr(package, "__path__", ()))


def _check_version() -> None:
    try:
        version = importlib.metadata.version("diffsynth")
    except importlib.metadata.PackageNotFoundError:  # absent, or a checkout that was never installed
        return
    if version not in _TESTED:
        warnings.warn(
            f"diffsynth {version} is installed; diffsynth_core_vram was tested with {', '.join(_TESTED)}. "
            "Compare results before you rely on them, or install a tested version.",
            stacklevel=3,
        )
