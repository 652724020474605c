"""`python -m pensar`: the command line without its script."""

import sys

from pensar.cli import main

if __name__ == "__main__":
    sys.exit(main())
