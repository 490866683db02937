"""Run the command as `python -m ddpm_nb`, and as `ddpm-nb`."""

import sys


def run():
    """Run the command; Ctrl-C while its modules are read ends in a line, too."""
    try:
        from ddpm_nb.cli import main
    except KeyboardInterrupt:
        print("ddpm-nb: interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
