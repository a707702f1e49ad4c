"""Reading texts."""

import pytest

from atd.checkpoint.files import read_text
from atd.errors import BadInput


def test_read_text_reads_as_text_mode_and_says_what_is_wrong(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("é\r\nb\rc\n".encode())
    assert read_text(path) == path.read_text(encoding="utf-8") == "é\nb\nc\n"
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
