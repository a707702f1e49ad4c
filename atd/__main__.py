"""Makes `python -m atd` the command `atd`."""

from atd.cli.main import main

if __name__ == "__main__":
    main()
