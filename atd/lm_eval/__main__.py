"""The harness's own command line, which knows the model "atd" here."""

import runpy
import sys

from atd.errors import AtdError
from atd.host import keep_compiled, one_blas_thread
from atd.lm_eval import check_installed


def main() -> None:
    """Runs the harness with the arguments of the process; errors of atd's are one message."""
    one_blas_thread()
    keep_compiled()
    try:
        check_installed()
        import atd.lm_eval.model  # noqa: F401  registers it

        runpy.run_module("lm_eval", run_name="__main__")
    except AtdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
