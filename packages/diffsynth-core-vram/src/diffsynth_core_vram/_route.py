"""Let a real DiffSynth-Studio use this implementation of ``diffsynth.core.vram``."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from os.path import dirname
from types import ModuleType

from diffsynth_core_vram import core

_ROUTED = "diffsynth.core.vram"


class _Router:
    """A meta-path finder for one name; the submodules follow from the package's ``__path__``."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, core.__path__) if name == _ROUTED else None


def install() -> None:
    """Make ``import diffsynth.core.vram`` find this implementation from now on, in this process.

    Call it before the first ``import diffsynth``.  Where DiffSynth-Studio is not installed it changes
    nothing, since the names are served from here anyway.  A second call changes nothing either.

    Raises:
        RuntimeError: DiffSynth-Studio is imported already, with its own ``diffsynth.core.vram``.
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
    sys.meta_path.insert(0, _Router)


def uninstall() -> None:
    """Stop routing: a later first import of ``diffsynth.core.vram`` finds what is installed.

    Modules that are imported already stay as they are.
    """
    if _Router in sys.meta_path:
        sys.meta_path.remove(_Router)


def _is_served_from_here(package: ModuleType) -> bool:
    here = dirname(core.__path__[0])
    return any(entry.startswith(here) for entry in getattr(package, "__path__", ()))
