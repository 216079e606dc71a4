"""``python -m safemap``: the command line."""

import sys

from safemap._cli import main

if __name__ == "__main__":
    sys.exit(main())
