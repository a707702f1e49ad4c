"""Runs tasks of lm-evaluation-harness on loaded models, as `atd eval --tasks` does."""
# pyright: reportMissingImports=false

import os
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks.manager import TaskManager

from atd.errors import AtdError, BadInput, RunFailed
from atd.lm_eval.model import AtdLM

# Draws behind the standard error of perplexities, and of no other figure. The harness takes
# 100,000, in forked processes, which jax's threads do not bear.
BOOTSTRAP = 100


def open_tasks(names: Sequence[str]) -> TaskManager:
    """Opens tasks, which downloads their data where it is not here yet.

    Args:
        names: of tasks, groups or tags of the harness, and YAML files of tasks.

    Returns what finds the tasks once more.

    Raises BadInput for an unknown task, one whose data cannot be had, and one that fails to open.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_defaults=len(files) < len(names))  # some seconds
    for name in names:
        if name not in files and name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "give the name of one"
            raise BadInput(
                f"--tasks: {name} is no task of lm-evaluation-harness; {hint} "
                "(python -m atd.lm_eval ls tasks lists them), or a YAML file"
            )
        if name in files and not os.path.isfile(name):
            raise BadInput(f"--tasks: {name}: no such file")
        try:
            manager.load(name)
        except ConnectionError as error:
            raise BadInput(
                f"the task {name} needs its data from the network, which cannot be reached "
                f"({error}); run it once with network, which keeps the data in HF_HOME, or give a "
                "YAML file of a task whose data is here"
            ) from error
        except Exception as error:  # tasks are programs of their authors
            raise BadInput(
                f"the task {name} cannot be opened: {type(error).__name__}: {error}"
            ) from error
    return manager


def run_tasks(
    model: AtdLM,
    names: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """Returns the harness's results of opened tasks, by task and figure, and their conditions.

    Args:
        names, manager: what `open_tasks` took and returned.
        num_fewshot: examples in front of each question; None: as the task says.
        limit: the first documents of each task alone; None: all.
        apply_chat_template: whether contexts are put into the model's chat template.

    Raises RunFailed where a task fails.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness's, see BOOTSTRAP
    try:
        found = simple_evaluate(
            model,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    except AtdError:
        raise
    except Exception as error:
        raise RunFailed(
            f"lm-evaluation-harness fails on {', '.join(names)}: {type(error).__name__}: {error}"
        ) from error
    assert found is not None  # it is where there is one process
    kept = ("results", "versions", "n-shot", "n-samples", "higher_is_better")
    return {key: dict(found[key]) for key in kept} | {"lm_eval": version("lm_eval")}


def scores(found: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Returns (figure, its standard error) by (task, name of the figure), of what `run_tasks` gave.

    The harness names a figure "acc,none": "none" is the filter of answers, which is shown where
    there is one.
    """
    table = {}
    for task, figures in found["results"].items():
        for key, value in figures.items():
            name, _, answers = key.partition(",")
            if not answers or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{name}_stderr,{answers}")
            label = name if answers == "none" else f"{name} ({answers})"
            table[task, label] = float(value), error if isinstance(error, float) else None
    return table
