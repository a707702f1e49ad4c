"""Runs lm-evaluation-harness on models of atd's: `atd eval MODEL --tasks ...`, and its own command.

    python -m atd.lm_eval --model atd --model_args pretrained=OUT,backend=auto --tasks arc_easy

The harness finds no model by itself: `import atd.lm_eval.model` registers "atd" for what
`lm_eval.simple_evaluate` takes. Needs lm_eval, `pip install "atd-jax[eval]"`, and no torch.
"""

from importlib.util import find_spec

from atd.errors import BadInput


def check_installed() -> None:
    """Raises BadInput where lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        raise BadInput(
            "tasks are run by lm-evaluation-harness, which is not installed: "
            "pip install 'atd-jax[eval]'"
        )
