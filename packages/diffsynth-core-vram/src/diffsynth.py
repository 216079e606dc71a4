"""The import name ``diffsynth`` where DiffSynth-Studio is not installed.

Python prefers a package directory to a module file of the same name in the same folder, so a real
``diffsynth/`` beside this file hides it, and the two distributions share no file.  A real package that
lies elsewhere (an editable install, a user or system ``site-packages``) is looked up here, and wins too.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from os.path import dirname, realpath


def _real_package() -> ModuleSpec | None:
    """The specification of DiffSynth-Studio's package, wherever an importer finds one."""
    here = realpath(dirname(__file__))
    elsewhere = [entry for entry in sys.path if realpath(entry) != here]
    # One path entry at a time: a second copy of this module file must not hide a package behind it.
    for finder in sys.meta_path:
        for path in [[entry] for entry in elsewhere] if finder is PathFinder else [None]:
            spec = finder.find_spec(__name__, path)
            # A folder without __init__.py has no loader: any folder named diffsynth would do.
            if spec is not None and spec.loader is not None and spec.submodule_search_locations:
                return spec
    return None


_spec = _real_package()
if _spec is not None and _spec.loader is not None:
    sys.modules[__name__] = _module = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
else:
    import diffsynth_core_vram

    __path__ = list(diffsynth_core_vram.__path__)
    from diffsynth_core_vram.core import *  # noqa: F403
