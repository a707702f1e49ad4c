"""Identifies the code of passes of other distributions and of scripts, so that what one of them
left is not taken up once it was edited. The code of atd's own goes with atd's version.
"""

import hashlib
import secrets
import sys
from pathlib import Path

OWN = "atd"


def code_digest(module: str) -> str:
    """Returns the sha256 of the source of a module that is being imported or was: of all Python
    files of its outermost package, or of its own file where it lies in none.

    A module without a file, as in a notebook, gets a random text: nothing can say that two are the
    same.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        return _digest(Path(file).resolve()) if file else secrets.token_hex()
    except OSError:
        return secrets.token_hex()


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(file):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _files(file: Path) -> list[Path]:
    """The files of the outermost package that a module's file lies in, or the file alone."""
    package = file.parent
    if not (package / "__init__.py").is_file():
        return [file]
    while (package.parent / "__init__.py").is_file():
        package = package.parent
    return sorted(package.rglob("*.py"))
