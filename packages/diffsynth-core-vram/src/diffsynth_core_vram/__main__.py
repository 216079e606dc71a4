"""``python -m diffsynth_core_vram SCRIPT [ARGUMENT ...]``: run a script on this ``diffsynth.core.vram``."""

import argparse
import os
import runpy
import sys

from diffsynth_core_vram import install


def main() -> None:
    """Route ``diffsynth.core.vram`` here, then run the script as Python itself would."""
    parser = argparse.ArgumentParser(
        prog="python -m diffsynth_core_vram",
        description="Run a script for which diffsynth.core.vram is served by this distribution.",
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="given to the script")
    given = parser.parse_args()
    if not os.path.exists(given.script):
        parser.error(f"no such file: {given.script!r}, from the folder {os.getcwd()!r}")
    install()
    sys.argv = [given.script, *given.arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(given.script))  # `-m` has put the current folder there
    runpy.run_path(given.script, run_name="__main__")


if __name__ == "__main__":
    main()
