"""Reading texts."""

import pytest

from atd.checkpoint.files import read_text
from atd.errors import BadInput


def test_read_text_reads_as_text_mode_and_says_what_is_wrong(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("é\r\nb\rc\n".encode())
    assert read_text(path) == path.read_text(encoding="utf-8") == "é\nb\nc\n"
    path.write_bytes(b"\xef\xbb\xbfa\n")
    assert read_text(path) == "a\n"
    path.write_bytes(b"one\ntw\xffo\n")
    with pytest.raises(BadInput, match=r"byte 0xff at offset 6 \(line 2\)"):
        read_text(path)
    path.write_bytes(b" \n")
    with pytest.raises(BadInput, match="is empty"):
        read_text(path)
    with pytest.raises(BadInput, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(BadInput, match="no such file"):
        read_text(tmp_path / "absent.txt")


def test_json_lines_are_their_texts(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "One.\\n", "id": 1}\n\n{"text": "Two\u2028."}\n')
    assert read_text(path) == "One.\n\nTwo\u2028."
    for text in ("[1] A note, and {more}.\n", "{% for %}\n", "[\n", "[1]\nA note.\n"):
        path.write_text(text)
        assert read_text(path) == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b'{"text": "a"}\n{"prompt": "b", "id": 2}\n',
            "line 2 of JSON Lines has the fields prompt",
        ),
        (b'{"text": "a"}\n{"text": 3}\n', "line 2 of JSON Lines has the fields text"),
        (b'{"text": "a"}\n{"text"\n', "line 2 of JSON Lines has no object"),
        (b'[{"text": "a"}]', "is JSON, not text"),
        (b'["a"]\n["b"]\n', "is JSON, not text"),
        (b'{\n"text": "a"\n}', "is JSON, not text"),
        (b"PAR1\x15\x04", "is a parquet file"),
    ],
)
def test_data_is_not_taken_for_text(tmp_path, content, words):
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_text(path)
    assert words in str(caught.value)
