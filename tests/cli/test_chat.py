"""atd chat, by lines on stdin: turns, commands, Ctrl-C, what it refuses."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atd.checkpoint.text_stream import TextStream

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('users begin') }}{% endif %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}"
)


@pytest.fixture(scope="module")
def talking(packaged, tmp_path_factory):
    """The packaged model, with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "talking"
    shutil.copytree(packaged.folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def chat(atd, talking, monkeypatch):
    """chat(lines, options...) -> (exit code, stdout, stderr)."""

    def run(*lines: str, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return atd("chat", talking, "--max-new-tokens", 10, *options)

    return run


def test_turns_and_a_conversation_that_is_kept(chat, tmp_path):
    file = tmp_path / "talk.json"
    save = f"/save {file}"
    code, out, err = chat("Once upon a time", "", "Then", save, save, options=("--system", "Tell."))
    assert code == 0, err
    kept = json.loads(file.read_text())
    assert kept["model"] == "talking"
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [message["role"] for message in kept["messages"]] == roles
    said = [m["content"] for m in kept["messages"] if m["role"] == "assistant"]
    assert out == "".join(f"{text}\n" for text in said)
    first, second = (line for line in err.splitlines() if line.startswith("["))
    assert "[10 tokens, cut off at --max-new-tokens or the context; the first after" in first
    assert "tokens/s" in second
    read, tokens = second.split("; ")[2].split(" tokens")[0].split(" of ")
    assert int(read) < int(tokens) / 2

    options = ("--system", "Tell.", "--quiet")
    code, again, err = chat("Once upon a time", "/reset", f"/load {file}", "And", options=options)
    assert (code, err) == (0, "")
    assert again.startswith(f"{said[0]}\n")
    whole = chat("Once upon a time", "Then", "And", options=options)[1]
    assert again.splitlines()[1] == whole.splitlines()[2]


def test_a_conversation_with_another_model_is_told(chat, tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"model": "other", "messages": []}))
    code, _, err = chat(f"/load {file}", "/help", "/exit", "never read")
    assert code == 0
    assert f"note: {file} is a conversation with other, and this is talking" in err


def test_an_interrupt_stops_the_answer_and_not_the_program(chat, monkeypatch):
    add, seen = TextStream.add, []

    def interrupted(self, token):
        seen.append(token)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return add(self, token)

    monkeypatch.setattr(TextStream, "add", interrupted)
    code, out, err = chat("Once upon a time", "Lily")
    first, second = (line for line in err.splitlines() if line.startswith("["))
    assert code == 0
    assert first.startswith("[3 tokens, stopped; the first after")
    assert second.startswith("[10 tokens, cut off")
    assert out.count("\n") == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sav x", "there is no command '/sav'; did you mean '/save'?"),
        ("/load", "/load needs the name of a file: /load FILE"),
        ("/reset all", "/reset takes nothing behind it, and not 'all'"),
        ("/load nowhere.json", "nowhere.json: cannot be read"),
        ("/load broken.json", "broken.json: no valid JSON object"),
        ("/load list.json", "list.json: no valid JSON object: expected an object, found list"),
        ("/load other.json", "other.json: no conversation: expected the fields model and messages"),
        ("/load roles.json", "roles.json: no conversation: message 2 has no role (system, user"),
        ("/load order.json", "its chat template refuses this conversation: users begin"),
        ("/save other.json", "other.json: is there and no conversation; choose another name"),
        ("/save no/talk.json", "does not exist"),
        ("Lily " * 600, "leaves no room in the model's context of 512"),
        ("caf\udce9", "not valid Unicode at character 3"),
    ],
)
def test_what_is_refused(chat, refused, tmp_path, monkeypatch, line, words):
    def message(role):
        return {"role": role, "content": ""}

    monkeypatch.chdir(tmp_path)
    files = {
        "broken": '{"model": ',
        "list": "[]",
        "other": '{"model": "talking"}',
        "roles": json.dumps({"messages": [message("user"), message("wizard")]}),
        "order": json.dumps({"messages": [message("assistant")]}),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content)
    monkeypatch.setattr("atd.cli.chat.Terminal._note", lambda *_: None)
    refused(chat(line, options=("--quiet",)), words)


def test_models_that_cannot_chat_are_refused_before_they_are_read(
    atd, stories260k, talking, tmp_path, refused, monkeypatch
):
    def loaded(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("atd.models.model.Model.__init__", loaded)
    refused(atd("chat", stories260k), "no chat template", "atd generate --prompt", "--tokenizer")
    refused(atd("chat", talking, "--max-new-tokens", 0), "--max-new-tokens must be at least 1")
    refused(atd("chat", talking, "--top-p", 2), "top_p is 2")
    refused(atd("chat", talking, "--system", "Lily " * 600), "leaves no room")
    strict = shutil.copytree(talking, tmp_path / "strict")
    (strict / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    refused(atd("chat", strict, "--system", "a"), "refuses this conversation: no system message")


@pytest.mark.slow
def test_on_a_terminal_errors_and_interrupts_do_not_end_it(talking):
    ours, theirs = pty.openpty()
    call = [sys.executable, "-m", "atd", "chat", str(talking), "--max-new-tokens", "8"]
    with subprocess.Popen(
        call, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True
    ) as run:
        os.close(theirs)
        seen = ""

        def wait_for(words: str) -> None:
            nonlocal seen
            until = time.monotonic() + 120
            while words not in seen and time.monotonic() < until:
                seen += os.read(ours, 4096).decode()
            assert words in seen
            seen = seen.partition(words)[2]

        wait_for("/help lists the commands")
        wait_for("> ")
        os.write(ours, b"/nothing\n")
        wait_for("there is no command '/nothing'")
        wait_for("> ")
        os.kill(run.pid, signal.SIGINT)
        wait_for("/exit or Ctrl-D ends the program")
        os.write(ours, b"Once upon a time\n")
        wait_for("tokens/s")
        wait_for("> ")
        os.write(ours, b"\x04")
        assert run.wait(30) == 0
        os.close(ours)
