"""Conversations in JSON files."""

import json

import pytest

from atd.checkpoint.conversation import read_conversation, write_conversation
from atd.errors import BadInput

SAID = [{"role": "user", "content": "Ça va?\n"}, {"role": "assistant", "content": "😀"}]


def test_what_was_written_is_read(tmp_path):
    file = tmp_path / "talk.json"
    write_conversation(file, "model", SAID)
    assert read_conversation(file) == ("model", SAID)
    write_conversation(file, "other", SAID[:1])
    assert read_conversation(file) == ("other", SAID[:1])


def test_fields_of_others_are_left_out(tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"messages": [SAID[0] | {"id": 3}], "made": "elsewhere"}))
    assert read_conversation(file) == ("", SAID[:1])


def test_other_files_are_not_replaced(tmp_path):
    file = tmp_path / "notes.json"
    file.write_text('{"notes": []}')
    with pytest.raises(BadInput, match=r"notes\.json: is there and no conversation"):
        write_conversation(file, "model", SAID)
    assert file.read_text() == '{"notes": []}'
    with pytest.raises(BadInput, match="does not exist"):
        write_conversation(tmp_path / "no" / "talk.json", "model", SAID)
    with pytest.raises(BadInput, match="is there and no conversation"):
        write_conversation(tmp_path, "model", SAID)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"messages": {}}',
        '{"model": 3, "messages": []}',
        '{"messages": ["Hello"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": [], "content": ""}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
    ],
)
def test_what_is_no_conversation(tmp_path, content):
    file = tmp_path / "talk.json"
    file.write_text(content)
    with pytest.raises(BadInput, match=r"talk\.json: no conversation"):
        read_conversation(file)
