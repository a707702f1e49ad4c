"""Digests of content: what changes them, what does not, and files that change meanwhile."""

import hashlib
import os

import pytest

from atd.checkpoint import identity
from atd.checkpoint.identity import check_unchanged, read_contents
from atd.errors import BadInput, RunFailed
from atd.progress import Progress


def test_the_digest_is_that_of_the_pieces_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "PIECE", 4)
    monkeypatch.setattr(identity, "_READ", 2)
    a, b, empty = tmp_path / "a", tmp_path / "b", tmp_path / "empty"
    a.write_bytes(b"0123456789")
    b.write_bytes(b"4567012389")  # the same pieces in another order
    empty.write_bytes(b"")
    seen: list[Progress] = []
    found = read_contents([a, b, empty, a], seen.append).digests
    pieces = b"".join(hashlib.sha256(piece).digest() for piece in (b"0123", b"4567", b"89"))
    assert found[a] == hashlib.sha256(pieces).hexdigest()
    assert len(set(found.values())) == 3
    assert [now.done for now in seen] == [4, 8, 10, 14, 18, 20]
    assert seen[-1].ended


def test_a_bit_counts_and_times_do_not(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(bytes(100_000))
    first = read_contents([file]).digests
    os.utime(file, ns=(0, 12345))
    assert read_contents([file]).digests == first
    file.write_bytes(bytes(99_999) + b"\1")
    os.utime(file, ns=(0, 12345))
    assert read_contents([file]).digests != first


def test_a_file_that_changes_is_noticed_though_its_time_is_set_back(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    contents = read_contents([file])
    check_unchanged(contents)
    status = file.stat()
    other = tmp_path / "other"
    other.write_bytes(b"two")
    other.rename(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(RunFailed, match="was changed while it was read"):
        check_unchanged(contents)
    file.unlink()
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        check_unchanged(contents)
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_contents([file])
