"""Makes tests/lm_eval/tasks: tasks of lm-evaluation-harness on made-up stories, without network.

    python -m tests.lm_eval.make_tasks

The YAML files beside the data are written by hand. They name the data from the root of the
repository, where the harness has to run.
"""

import json
import random
from pathlib import Path

from tests import stories

FOLDER = Path(__file__).parent / "tasks"
SEED = 7  # of texts that the packaged model was not trained on


def main() -> None:
    """Writes the data of all tasks."""
    draw = random.Random(SEED).random
    sentences = [sentence(draw) for _ in range(64)]
    write("choice", [choice(i, sentences, draw) for i in range(24)])
    write("ending", [{"context": begin, "ending": f" {end}"} for begin, end in sentences[24:40]])
    write("text", [{"text": stories.text(n, SEED + n)} for n in (200, 900, 1800, 400)])
    write("write", [{"context": begin} for begin, _ in sentences[40:46]])


def sentence(draw) -> tuple[str, str]:
    """The beginning of a story up to some sentence, and that sentence."""
    parts = stories.story(draw).replace("\n", " ").split(". ")
    at = 2 + int(draw() * (len(parts) - 3))
    return ". ".join(parts[:at]) + ".", parts[at].rstrip(".") + "."


def choice(i: int, sentences: list[tuple[str, str]], draw) -> dict:
    """A question with four answers; the wrong ones are sentences of other stories."""
    wrong = [sentences[(i + 1 + int(draw() * 60)) % 64][1] for _ in range(3)]
    answer = int(draw() * 4)
    choices = [*wrong[:answer], sentences[i][1], *wrong[answer:]]
    return {"context": sentences[i][0], "choices": choices, "answer": answer}


def write(name: str, documents: list[dict]) -> None:
    """Writes documents as JSON Lines."""
    lines = (json.dumps(document) + "\n" for document in documents)
    (FOLDER / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
