"""`python -m atd.convert_adaptive` is `atd convert`; `convert` is that of `atd.pipeline.convert`."""

from atd.pipeline.convert import convert

__all__ = ["convert"]

if __name__ == "__main__":
    from atd.cli.main import main

    main(prefix=("convert",))
