"""Makes `python -m atd.convert_adaptive` the command `atd convert`, and offers its function."""

from atd.pipeline.convert import convert

__all__ = ["convert"]

if __name__ == "__main__":
    from atd.cli.main import main

    main(prefix=("convert",))
