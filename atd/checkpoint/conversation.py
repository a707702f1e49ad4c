"""Keeps conversations in JSON files.

{"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "..."}, ...]}
"""

from collections.abc import Sequence
from pathlib import Path

from atd.checkpoint.files import path_exists, read_json, write_json
from atd.errors import BadInput

ROLES = ("system", "user", "assistant")


def write_conversation(path: Path, model: str, messages: Sequence[dict[str, str]]) -> None:
    """Writes the messages of a conversation and the name of the model that took part in it.

    Raises BadInput where there is a file already that is no conversation.
    """
    if path_exists(path):
        try:
            read_conversation(path)
        except BadInput:
            raise BadInput(f"{path}: is there and no conversation; choose another name") from None
    if not path_exists(path.absolute().parent):
        raise BadInput(f"{path}: the folder {path.absolute().parent} does not exist")
    write_json(path, {"model": model, "messages": list(messages)})


def read_conversation(path: Path) -> tuple[str, list[dict[str, str]]]:
    """Reads a conversation: the name of its model, "" where the file has none, and its messages.

    Raises BadInput for a file that cannot be read, or is no conversation.
    """
    stored = read_json(path)
    model, messages = stored.get("model", ""), stored.get("messages")
    if not isinstance(model, str) or not isinstance(messages, list):
        raise BadInput(f"{path}: no conversation: expected the fields model and messages")
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, dict) else {}
        if fields.get("role") not in ROLES or not isinstance(fields.get("content"), str):
            raise BadInput(
                f"{path}: no conversation: message {number} has no role ({', '.join(ROLES)}) and "
                "content"
            )
    return model, [{"role": m["role"], "content": m["content"]} for m in messages]
