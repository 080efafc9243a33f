"""`python -m neon.cli`, which torchrun starts."""

import sys

from neon.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
