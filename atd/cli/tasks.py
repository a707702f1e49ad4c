"""`atd eval MODEL --tasks`: tasks of lm-evaluation-harness on one model, or on two side by side."""

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from atd.cli.options import say_assumed
from atd.errors import BadInput

if TYPE_CHECKING:
    from jax.sharding import Mesh


def evaluate_tasks(
    models: Sequence[Path],
    names: Sequence[str],
    *,
    num_fewshot: int | None,
    limit: int | None,
    apply_chat_template: bool,
    context: int | None,
    batch: int | None,
    bos: bool,
    backend: str,
    dtype: str,
    kv: Literal["model", "int8"],
    activations: Literal["model", "float", "int8"],
    mesh: "Mesh | None",
    tokenizer: Path | None,
    ignore_extra: bool,
    json: Path | None,
    quiet: bool,
) -> None:
    """Runs the tasks on each model in turn, and prints one table.

    Options are those of the command; activations are those of the first model.
    """
    from atd.checkpoint.files import write_json
    from atd.checkpoint.reader import open_tokenizer
    from atd.lm_eval import check_installed
    from atd.models import frontend
    from atd.reports.progress import shown
    from atd.reports.tables import TaskScores, console, task_table
    from atd.runtime.compare import load_checkpoint

    check_installed()
    from atd.lm_eval.model import AtdLM
    from atd.lm_eval.tasks import open_tasks, run_tasks, scores

    words = [open_tokenizer(tokenizer or path) for path in models]
    for path, of in zip(models, words, strict=True):
        say_assumed(of, quiet)
        frontend.open(path, ignore_extra=ignore_extra)
        if apply_chat_template and of.chat_template is None:
            raise BadInput(
                f"{of.name}: the model has no chat template; "
                "leave out --apply-chat-template (it is a base model, most likely)"
            )
    with _of_the_harness(quiet):
        manager = open_tasks(names)
    rows, figures = [], {}
    for path, of in zip(models, words, strict=True):
        with shown(quiet=quiet) as (_, progress):
            loaded = load_checkpoint(
                path,
                backend=backend,
                dtype=dtype,
                kv=kv if path == models[0] else "model",
                activations=activations if path == models[0] else "model",
                ignore_extra=ignore_extra,
                mesh=mesh,
                progress=progress,
            )
        model = AtdLM(
            loaded.model,
            tokenizer=of,
            batch_size=batch or "auto",
            max_length=context,
            add_bos_token=bos or None,
        )
        with _of_the_harness(quiet):
            found = run_tasks(
                model,
                names,
                manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=apply_chat_template,
            )
        sizes = {"bits_per_weight": loaded.bits_per_weight, "bytes": loaded.nbytes}
        figures[str(path)] = sizes | found
        rows.append(TaskScores(loaded.name, loaded.bits_per_weight, loaded.nbytes, scores(found)))
    if json:
        settings = {"limit": limit, "apply_chat_template": apply_chat_template, "bos": bos}
        write_json(json, settings | {"context": context, "models": figures})
    console.print(task_table(rows))


@contextmanager
def _of_the_harness(quiet: bool) -> Iterator[None]:
    """Has what the harness prints go to stderr, or nowhere."""
    with redirect_stderr(io.StringIO()) if quiet else nullcontext(), redirect_stdout(sys.stderr):
        yield
