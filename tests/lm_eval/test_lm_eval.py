"""Models of atd's in lm-evaluation-harness: the figures of its own `hf` on the same tasks, the
conventions around contexts and stop strings, and the commands.
"""
# pyright: reportMissingImports=false

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atd.checkpoint.reader import open_tokenizer
from atd.errors import BadInput
from atd.models.model import load
from atd.runtime.compare import read_tokens
from atd.runtime.evaluate import evaluate
from tests.golden.write_gguf import GOLDEN

ROOT = Path(__file__).parents[2]
TASKS = "tests/lm_eval/tasks"
WHY = "lm_eval is not here (extra eval)"


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The package, which keeps its data in a temporary folder."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    return pytest.importorskip("lm_eval", reason=WHY)


@pytest.fixture(scope="module")
def words():
    return open_tokenizer(GOLDEN / "stories")


@pytest.fixture(scope="module")
def weights():
    return load(GOLDEN / "stories")


@pytest.fixture
def stories(harness, weights, words):
    from atd.lm_eval.model import AtdLM

    return AtdLM(weights, tokenizer=words)


def asked(*arguments) -> list:
    """Requests as the harness makes them."""
    return [SimpleNamespace(args=args) for args in arguments]


def read_lines(name: str) -> list[str]:
    return (ROOT / TASKS / f"{name}.jsonl").read_text().splitlines()


def run(model, *names: str, **options) -> dict:
    from atd.lm_eval.tasks import open_tasks, run_tasks

    files = [f"{TASKS}/{name}.yaml" for name in names]
    return run_tasks(model, files, open_tasks(files), **options)


# --- the figures ----------------------------------------------------------------------------------


def test_figures_are_those_of_hf(stories, monkeypatch):
    from atd.lm_eval.tasks import scores

    monkeypatch.chdir(ROOT)
    golden = json.loads((GOLDEN / "lm_eval.json").read_text())
    found = run(stories, "choice", "ending", "text", "write", limit=10)
    for (task, name), (value, _) in scores(found).items():
        assert value == pytest.approx(golden["figures"][task][f"{name},none"], rel=1e-4)
    assert len(scores(found)) == sum(map(len, golden["figures"].values()))


def test_answers_are_those_of_hf(stories, monkeypatch):
    monkeypatch.chdir(ROOT)
    golden = json.loads((GOLDEN / "lm_eval.json").read_text())
    texts = [json.loads(line)["context"] for line in read_lines("write")]
    how = {"until": [". T", " was ", "\n\n"], "max_gen_toks": 48, "do_sample": False}
    assert stories.generate_until(asked(*((text, how) for text in texts))) == golden["written"]


def test_rolling_agrees_with_perplexity(stories, weights, words, small):
    stories.adds_bos = False  # else BOS stands behind BOS, as with hf
    tokens = read_tokens(small.sample, words, 300)
    text = words.decode(tokens)
    tokens = words.encode(text)
    found = evaluate(weights, tokens, context=len(tokens) + 1, bos_id=words.bos_id)
    (total,) = stories.loglikelihood_rolling(asked((text,)))
    assert math.exp(-total / found.positions) == pytest.approx(found.perplexity, rel=1e-5)


def test_rolling_windows_predict_each_token_once(stories, small, words):
    text = small.sample.read_text()[:700]
    stories.max_length = 64
    (total,) = stories.loglikelihood_rolling(asked((text,)))
    ids = words.encode(text, bos=stories.adds_bos).tolist()
    starts = range(0, len(ids), 64)
    windows = [([([1, *ids])[start]], ids[start : start + 64]) for start in starts[:-1]]
    last = len(ids) % 64 or 64  # a last window is filled up from the left
    windows.append(([1, *ids][-65:-last], ids[-last:]))
    scores = stories._loglikelihood_tokens([(None, *window) for window in windows])
    assert total == pytest.approx(sum(score for score, _ in scores), abs=1e-3)
    assert stories.loglikelihood_rolling(asked(("",)))[0] <= 0


# --- conventions ----------------------------------------------------------------------------------


def test_an_empty_context_is_bos(stories, words):
    (score,) = stories.loglikelihood(asked(("", "Once upon a time")))
    ids = words.encode("Once upon a time").tolist()
    assert score == stories._loglikelihood_tokens([(None, [words.bos_id], ids)])[0]


def test_without_bos_and_eos_there_is_no_empty_context(harness, weights, words):
    from atd.lm_eval.model import AtdLM

    bare = replace(words, bos_id=None, eos_ids=(), adds_bos=False)
    with pytest.raises(BadInput, match="no BOS and no EOS token"):
        AtdLM(weights, tokenizer=bare).loglikelihood(asked(("", "Once")))
    AtdLM(weights, tokenizer=bare, prefix_token_id=3).loglikelihood(asked(("", "Once")))


def test_bos_stands_in_front_once(stories, words):
    assert stories.adds_bos
    assert stories.tok_encode("Once")[0] == words.bos_id
    assert stories.tok_encode("<s>Once").count(words.bos_id) == 1
    assert words.bos_id not in stories.tok_encode("Once", add_special_tokens=False)


def test_long_contexts_are_cut_from_the_left_with_a_warning(stories, caplog):
    context, more = list(range(3, 40)), [50, 51, 52]
    stories.max_length = 16
    with caplog.at_level("WARNING"):
        (score,) = stories._loglikelihood_tokens([(None, context, more)])
    assert "1 of 1 requests are longer than the model's context of 16" in caplog.text
    stories.max_length = 64
    assert stories._loglikelihood_tokens([(None, context[-14:], more)])[0] == score


def test_continuations_longer_than_the_context_are_refused(stories):
    stories.max_length = 16
    with pytest.raises(BadInput, match="17 tokens is longer than the model's context of 16"):
        stories._loglikelihood_tokens([(None, [1], list(range(3, 20)))])
    with pytest.raises(BadInput, match="no token of its own"):
        stories._loglikelihood_tokens([(("Once", ""), [1], [])])


def test_answers_are_kept_for_use_cache(stories):
    kept = []
    stories.cache_hook = SimpleNamespace(add_partial=lambda *entry: kept.append(entry))
    (score,) = stories.loglikelihood(asked(("Once", " upon")))
    how = {"until": ["x"], "max_gen_toks": 2}
    (text,) = stories.generate_until(asked(("Once", how)))
    assert kept == [
        ("loglikelihood", ("Once", " upon"), score),
        ("generate_until", ("Once", how), text),
    ]


# --- generation -----------------------------------------------------------------------------------


def written(stories, contexts, **options) -> list[str]:
    how = {"max_gen_toks": 24, "until": []} | options
    return stories.generate_until(asked(*((context, how) for context in contexts)))


def test_stop_strings_are_found_across_tokens(stories, words):
    (whole,) = written(stories, ["Once upon a time"])
    ends = {len(words.decode(words.encode(whole)[:n])) for n in range(99)}
    for start in range(4, 12):  # strings that begin and end inside tokens, too
        stop = whole[start : start + 5]
        expected = whole[: whole.index(stop)]
        assert written(stories, ["Once upon a time"], until=[stop]) == [expected]
    assert not {4, 5, 6, 7, 8, 9, 10, 11} <= ends  # so some of them do


def test_each_text_of_a_batch_stops_on_its_own(stories):
    contexts = ["Once upon a time", "Tim", "The little bird was so happy that", "A"]
    texts = written(stories, contexts)
    stop = texts[0][5:8]
    expected = [text.split(stop)[0] for text in texts]
    assert written(stories, contexts, until=stop) == expected
    assert [written(stories, [c], until=stop)[0] for c in contexts] == expected


def test_groups_of_options_are_apart_and_in_order(stories):
    short, long = {"max_gen_toks": 3, "until": []}, {"max_gen_toks": 12, "until": []}
    both = stories.generate_until(asked(("Once", short), ("Tim", long), ("Tim", short)))
    (once,), (tim,) = written(stories, ["Once"], **short), written(stories, ["Tim"], **long)
    assert both[:2] == [once, tim]
    assert tim.startswith(both[2])


def test_samples_have_a_seed(stories):
    options = {"do_sample": True, "temperature": 1.0, "top_k": 20}
    twice = [written(stories, ["Once"] * 3, **options) for _ in range(2)]
    assert twice[0] == twice[1]
    assert len(set(twice[0])) > 1


def test_options_that_atd_has_not_are_refused(stories):
    with pytest.raises(BadInput, match="without the option num_beams"):
        written(stories, ["Once"], num_beams=4)
    written(stories, ["Once"], num_beams=1, max_gen_toks=1)


def test_prompts_leave_room_for_the_answer(stories, caplog):
    stories.max_length = 32
    with caplog.at_level("WARNING"):
        cut, same = written(stories, ["Tim was sad. " * 9 + "Once", "Tim was sad."], max_gen_toks=8)
    assert "is cut from the left to 24" in caplog.text
    assert cut != same
    with pytest.raises(BadInput, match="max_gen_toks 32 leaves no room for a prompt"):
        written(stories, ["Once"], max_gen_toks=32)


# --- chat -----------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if loop.first }}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{{ '[assistant] ' if add_generation_prompt }}"
)


def test_chat_templates(stories, words):
    said = [{"role": "user", "content": "Tell a story."}]
    with pytest.raises(BadInput, match="the model has no chat template"):
        stories.chat_template(True)
    stories.words = replace(words, chat_template=TEMPLATE)
    assert stories.chat_template(True) == TEMPLATE
    assert stories.chat_template(False) is None
    assert stories.apply_chat_template(said) == "<s>[user] Tell a story.\n[assistant] "
    begun = [*said, {"role": "assistant", "content": "Once upon"}]
    text = stories.apply_chat_template(begun, add_generation_prompt=False)
    assert text == "<s>[user] Tell a story.\n[assistant] Once upon"
    assert "/" not in stories.tokenizer_name


def test_tasks_in_a_chat_template(stories, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    stories.words = replace(words, chat_template=TEMPLATE)
    plain = run(stories, "choice", limit=3)["results"]["stories_choice"]
    chat = run(stories, "choice", limit=3, apply_chat_template=True, num_fewshot=1)
    assert chat["n-shot"] == {"stories_choice": 1}
    assert set(chat["results"]["stories_choice"]) == set(plain)


# --- options of the model -------------------------------------------------------------------------


def test_options_of_the_model(harness, weights, words):
    from atd.lm_eval.model import AtdLM

    model = AtdLM.create_from_arg_string(
        f"pretrained={GOLDEN / 'stories'},backend=xla,max_length=32", {"batch_size": 1}
    )
    assert (model.model.backend, model.max_length, model.rows) == ("xla", 32, None)
    assert AtdLM(weights, tokenizer=words, batch_size="4", device="cuda:0").rows == 4
    refused: dict[str, tuple[str, Any]] = {
        "batch_size is many": ("batch_size", "many"),
        "batch_size is 0": ("batch_size", 0),
        "max_length is 513; expected 1 to 512": ("max_length", 513),
        "no device 'nosuch'": ("device", "nosuch"),
    }
    for message, (option, value) in refused.items():
        with pytest.raises(BadInput, match=message):
            AtdLM(weights, tokenizer=words, **{option: value})
    with pytest.raises(BadInput, match="needs a tokenizer"):
        AtdLM(weights)


# --- the commands ---------------------------------------------------------------------------------


def test_a_converted_model_next_to_its_dense_one(harness, atd, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out, figures = tmp_path / "out", tmp_path / "f.json"
    assert atd("convert", GOLDEN / "stories", out, "--recipe", "datafree2")[0] == 0
    tasks = f"{TASKS}/choice.yaml,{TASKS}/ending.yaml"
    options = ("--against", GOLDEN / "stories", "--limit", 3, "--json", figures, "--quiet")
    code, shown, error = atd("eval", out, "--tasks", tasks, *options)
    assert (code, error) == (0, "")
    for part in ("stories_choice", "acc_norm", "perplexity", "16.00 bits/weight", "out", "±"):
        assert part in shown
    models = json.loads(figures.read_text())["models"]
    assert list(models) == [str(out), str(GOLDEN / "stories")]
    assert models[str(out)]["n-samples"]["stories_choice"]["effective"] == 3


def test_tasks_that_cannot_be_opened(harness, atd, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path(TASKS, "choice.yaml").read_text()
    broken, away = tmp_path / "broken.yaml", tmp_path / "away.yaml"
    broken.write_text(text.replace("choice.jsonl", "nosuch.jsonl"))
    away.write_text(text.replace("dataset_path: json", "dataset_path: user/nosuch"))
    for task, message in (
        (tmp_path / "nosuch.yaml", "nosuch.yaml: no such file"),
        (broken, "broken.yaml cannot be opened: FileNotFoundError"),
        (away, "needs its data from the network, which cannot be reached"),
    ):
        code, _, error = atd("eval", GOLDEN / "stories", "--tasks", task)
        assert code == 2
        assert message in error.splitlines()[-1]


@pytest.mark.slow
def test_an_unknown_task(harness, atd):
    code, _, error = atd("eval", GOLDEN / "stories", "--tasks", "arc_eazy")
    assert code == 2
    assert "arc_eazy is no task of lm-evaluation-harness; did you mean 'arc_easy'?" in error


@pytest.mark.slow
def test_the_command_of_the_harness(harness):
    def harness_run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "atd.lm_eval", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    folder = f"pretrained={GOLDEN / 'stories'},backend=auto"
    options = ("--tasks", f"{TASKS}/choice.yaml", "--limit", "2")
    done = harness_run("--model", "atd", "--model_args", folder, *options)
    assert done.returncode == 0, done.stderr
    assert "|stories_choice|" in done.stdout
    done = harness_run("--model", "atd", "--model_args", "pretrained=nosuch", *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: nosuch")


def test_without_the_harness_the_commands_say_what_to_install(atd, monkeypatch):
    import atd.lm_eval as room

    monkeypatch.setattr(room, "find_spec", lambda name: None)
    code, _, error = atd("eval", GOLDEN / "stories", "--tasks", "arc_easy")
    assert code == 2
    assert error.endswith("not installed: pip install 'atd-jax[eval]'\n")


def test_options_of_tasks_and_texts_do_not_mix(atd):
    model = GOLDEN / "stories"
    for options, message in (
        ((), "give a text to evaluate on (--data TEXT), or tasks (--tasks NAMES)"),
        (("--tasks", "a", "--tokens", 4, "--card"), "--tokens, --card: not with --tasks"),
        (("--tasks", "a", "--data", "README.md"), "--data: not with --tasks"),
        (("--data", "README.md", "--limit", 4), "--limit: not with --data"),
        (("--tasks", "a", "--limit", 0), "--limit must be at least 1"),
    ):
        code, _, error = atd("eval", model, *options)
        assert (code, message in error) == (2, True), error
