"""atd generate: one prompt and many, the files it reads and writes, what it refuses."""

import json

import pytest

PROMPTS = [{"prompt": "Once upon a time"}, {"text": "Lily"}, {"prompt": "The dog", "text": "no"}]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n\n")
    return file


def test_prompts_of_a_file_are_continued_as_each_alone(atd, stories260k, prompts, tmp_path):
    sizes = ("--max-new-tokens", 16, "--batch", 2, "--chunk", 4)
    out = tmp_path / "texts.jsonl"
    code, printed, err = atd("generate", stories260k, "--file", prompts, "--json", out, *sizes)
    assert code == 0, err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Once upon a time", "Lily", "The dog"]
    for number, row in enumerate(rows, 1):
        assert (row["tokens"], row["finish"]) == (16, "length")
        assert f"[{number}] {row['prompt']}{row['text']}\n" in printed
    alone = atd("generate", stories260k, "--prompt", "The dog", *sizes, "--quiet")
    assert alone == (0, f"The dog{rows[2]['text']}\n", "")


def test_a_single_text_goes_into_a_file_too(atd, stories260k, tmp_path):
    out = tmp_path / "text.jsonl"
    _, printed, _ = atd("generate", stories260k, "--max-new-tokens", 4, "--json", out)
    row = json.loads(out.read_text())
    assert printed == f"Once upon a time{row['text']}\n"


def test_the_end_of_sequence_token_ends_a_text(atd, stories260k, tmp_path, monkeypatch):
    out = tmp_path / "text.jsonl"

    def told(model, prompt, *, on_token, **options):
        for token in (403, 2):
            on_token(token)
        return [403, 2]

    monkeypatch.setattr("atd.runtime.generate.generate", told)
    assert "</s>" not in atd("generate", stories260k, "--json", out)[1]
    row = json.loads(out.read_text())
    assert (row["finish"], row["tokens"]) == ("stop", 2)
    assert "</s>" not in row["text"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            '{"prompt": "a"}\n{"story": "b"}\n',
            "line 2 of JSON Lines has the fields story; expected",
        ),
        ('{"prompt": 3}\n', "line 1 of JSON Lines has the fields prompt; expected a string in a"),
        ("Once upon a time\n", "line 1 of JSON Lines has no object"),
        ("\n \n", "is empty"),
        ('{"prompt": "a"}\n{"prompt": "' + "Lily " * 600 + '"}', "prompt 2: the prompt has"),
    ],
)
def test_files_that_are_refused(atd, stories260k, tmp_path, refused, monkeypatch, lines, words):
    def loaded(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("atd.models.model.Model.__init__", loaded)
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines)
    refused(atd("generate", stories260k, "--file", file), "prompts.jsonl", words)


def test_an_empty_prompt_needs_a_bos(atd, stories260k, tmp_path, refused):
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((stories260k / "tokenizer.json").read_bytes())
    (other / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": ""}\n')
    words = ("prompts.jsonl: prompt 1: the prompt is empty; give at least one token",)
    refused(atd("generate", stories260k, "--tokenizer", other, "--file", file), *words)


def test_options_that_exclude_each_other(atd, stories260k, prompts, tmp_path, refused):
    both = ("--file", prompts, "--prompt", "a")
    refused(atd("generate", stories260k, *both), "give --prompt or --file, not both")
    same = ("--file", prompts, "--json", tmp_path / "." / prompts.name)
    refused(atd("generate", stories260k, *same), "is the file of the prompts; give another name")
    refused(atd("generate", stories260k, "--batch", 0), "--batch must be at least 1")
    refused(atd("generate", stories260k, "--chunk", 0), "--chunk must be at least 1")
    refused(atd("generate", stories260k, "--json", tmp_path), "is a folder")
