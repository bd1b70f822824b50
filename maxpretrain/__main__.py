"""`python -m maxpretrain`, the same as the `maxpretrain` command."""

import sys

from maxpretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
