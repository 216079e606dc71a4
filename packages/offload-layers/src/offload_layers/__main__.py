"""``python -m offload_layers``: the command line."""

import sys

from offload_layers._cli import main

if __name__ == "__main__":
    sys.exit(main())
