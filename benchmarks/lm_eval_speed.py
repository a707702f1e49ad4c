"""How fast lm-evaluation-harness runs through atd, and through its own `hf` on the same cores.

    python benchmarks/lm_eval_speed.py MODEL --task tests/lm_eval/tasks/choice.yaml
    python benchmarks/lm_eval_speed.py DENSE --task ... --peer PYTHON      hf as well, in turns

MODEL is anything that atd reads; with --peer, a Hugging Face folder of dense weights, and PYTHON
is that of an environment with lm_eval, torch and transformers, which may be another than this one.
Each model runs in a process of its own: a first pass over the requests compiles, the second one is
timed. Tokens are those of the requests, context and continuation, as if each ran by itself. Where
other work runs beside, compare the tokens per second of CPU time, of all cores together.

lm_eval 0.4.13, torch 2.13 and transformers 5.24 were used.
"""
# pyright: reportMissingImports=false

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or .gguf file")
    parser.add_argument("--task", required=True, help="YAML file or name of a task")
    parser.add_argument("--limit", type=int, help="documents of the task; all by default")
    parser.add_argument("--backend", default="auto", help="of atd (auto)")
    parser.add_argument("--peer", metavar="PYTHON", help="the python that runs hf")
    parser.add_argument("--peer-batch", type=int, default=16, help="rows of hf's batches (16)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each model, in turns")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--one", choices=("atd", "hf"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict]] = {"atd": []} | ({"hf": []} if options.peer else {})
    for _ in range(options.rounds):
        for name, runs in found.items():
            runs.append(in_a_process(name, options.peer if name == "hf" else sys.executable))
    rows = [summary(name, runs) for name, runs in found.items()]
    for row in rows:
        print(
            f"{row['name']}: {row['tokens_per_second']:.0f} tokens/s, "
            f"{row['tokens_per_cpu_second']:.0f} per second of CPU, median of {options.rounds}; "
            f"{row['tokens']} tokens of {row['requests']} requests; first pass "
            f"{row['first_pass_seconds']:.1f} s"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


def in_a_process(name: str, python: str) -> dict:
    """Runs `measure` by this python, with this process's arguments."""
    command = [python, __file__, *sys.argv[1:], "--one", name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict:
    """The requests of a task through one model, twice."""
    from lm_eval.api.instance import Instance
    from lm_eval.tasks.manager import TaskManager

    if options.one == "atd":
        from atd.lm_eval.model import AtdLM

        model = AtdLM(options.model, backend=options.backend)
    else:
        from lm_eval.models.huggingface import HFLM

        model = HFLM(options.model, dtype="float32", device="cpu", batch_size=options.peer_batch)
    (task,) = (
        TaskManager(include_defaults=not options.task.endswith(".yaml"))
        .load(options.task)["tasks"]
        .values()
    )
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=options.limit)
    requests: list[Instance] = task.instances
    seconds, of_cpu = [], []
    for _ in range(2):
        start, cpu = time.perf_counter(), time.process_time()
        model.loglikelihood(requests, disable_tqdm=True)
        seconds.append(time.perf_counter() - start)
        of_cpu.append(time.process_time() - cpu)
    tokens = sum(
        len(model.tok_encode(context + more)) for context, more in (r.args for r in requests)
    )
    times = {"seconds": seconds, "cpu_seconds": of_cpu}
    return {"requests": len(requests), "tokens": tokens} | times


def summary(name: str, runs: list[dict]) -> dict:
    """The median figures of a model's processes."""
    first, second = (statistics.median(run["seconds"][i] for run in runs) for i in (0, 1))
    of_cpu = statistics.median(run["cpu_seconds"][1] for run in runs)
    return {
        "name": name,
        "tokens_per_second": runs[0]["tokens"] / second,
        "tokens_per_cpu_second": runs[0]["tokens"] / of_cpu,
        "first_pass_seconds": first,
        "tokens": runs[0]["tokens"],
        "requests": runs[0]["requests"],
    }


if __name__ == "__main__":
    main()
