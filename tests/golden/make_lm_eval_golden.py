"""Makes tests/golden/lm_eval.json: what the `hf` of lm-evaluation-harness says on the tasks in
tests/lm_eval.

    python -m tests.golden.make_lm_eval_golden

Needs torch, transformers (5.24 was used) and lm_eval (0.4.13 was used), and no atd. For each
request, in the order of the tasks' documents: the ids of context and continuation, the
log-likelihood in nats and whether the continuation is greedy; the figures of the tasks; and what
the model writes.
"""
# pyright: reportMissingImports=false

import json
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE / "lm_eval.json"
TASKS = HERE.parent / "lm_eval" / "tasks"
LIMIT = 10  # documents of each task
NAMES = ("choice", "ending", "text", "write")


def main() -> None:
    """Writes the file."""
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.manager import TaskManager

    class Recorded(HFLM):
        """Keeps the requests and their answers."""

        kept: list = []  # noqa: RUF012  one for all is right: there is one

        def _loglikelihood_tokens(self, requests, *args, **options):
            answers = super()._loglikelihood_tokens(requests, *args, **options)
            self.kept += [
                [context, continuation, round(nats, 5), greedy]
                for (_, context, continuation), (nats, greedy) in zip(
                    requests, answers, strict=True
                )
            ]
            return answers

    model = Recorded(pretrained=str(HERE / "stories"), dtype=torch.float32, device="cpu")
    found = simple_evaluate(
        model,
        tasks=[str((TASKS / f"{name}.yaml").relative_to(Path.cwd())) for name in NAMES],
        task_manager=TaskManager(include_defaults=False),
        limit=LIMIT,
        bootstrap_iters=0,
    )
    assert found is not None
    figures = {
        task: {name: value for name, value in of.items() if "," in name and "stderr" not in name}
        for task, of in found["results"].items()
    }
    lines = ",\n".join(map(json.dumps, model.kept))
    written = [sample["resps"][0][0] for sample in found["samples"]["stories_write"]]
    OUT.write_text(
        f'{{"figures": {json.dumps(figures)},\n"written": {json.dumps(written)},\n'
        f'"requests": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
