"""`python -m zerotuning`: the same as the command `zerotuning`."""

import sys

from zerotuning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
