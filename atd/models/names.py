"""Names of tensors: those that other tools write, as Hugging Face has them.

    _orig_mod.model.layers.0.mlp.up_proj.weight        torch.compile
    module.model.layers.0.mlp.up_proj.weight           DataParallel
    language_model.model.layers.0.mlp.up_proj.weight   a model of text and pictures
    layers.0.mlp.up_proj.weight                        a model saved without its head

all are `model.layers.0.mlp.up_proj.weight`.
"""

import re
from collections.abc import Mapping

from atd.checkpoint.files import StoredTensor
from atd.errors import BadInput

_WRAPPED = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(r"^(?:module\.|language_model\.|model\.(?=language_model\.))+")
_INNER = re.compile(r"(?:layers\.\d+|embed_tokens|norm)\.")


def plain_name(name: str) -> str:
    """Returns the name that Hugging Face has for a tensor; names of other modules stay."""
    plain = _OUTER.sub("", _WRAPPED.sub("", name))
    return f"model.{plain}" if _INNER.match(plain) else plain


def by_plain_name(tensors: Mapping[str, StoredTensor], origin: object) -> dict[str, StoredTensor]:
    """Returns the tensors by the names that Hugging Face has for them.

    Args:
        tensors: by the names in the file.
        origin: what messages name.

    Raises:
        BadInput: two tensors have one name.
    """
    plain: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        other = plain.setdefault(plain_name(name), tensor)
        if other is not tensor:
            raise BadInput(
                f"{origin}: both {other.name} and {name} would be {plain_name(name)}; "
                "keep one of them"
            )
    return plain
