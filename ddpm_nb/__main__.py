"""Run the command as `python -m ddpm_nb`."""

import sys

from ddpm_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
