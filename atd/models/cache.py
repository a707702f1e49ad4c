"""Keys and values of the tokens that a model has read."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from atd.errors import BadInput
from atd.ir import INT8
from atd.models import ops

APPENDED = 16  # tokens appended to a filled cache are padded to at least this many


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far.

    A call that returns a new cache uses up the one it was given.
    """

    # By block and attention node: k, v [B, kv_heads, length, head_dim], and of those in 8 bits the
    # scales of k and of v [B, kv_heads, length].
    blocks: tuple[dict[str, ops.Cache], ...]
    positions: jax.Array  # int32 [B, 1]: where the next token of each sequence stands
    filled: int  # positions taken by the longest sequence, known on the host
    length: int

    @property
    def kv(self) -> str:
        """The setting of `load` that it was made for: model, or int8."""
        slots = (slots for nodes in self.blocks for slots in nodes.values())
        return INT8 if any(len(parts) > 2 for parts in slots) else "model"

    def longer(self, length: int) -> "Cache":
        """Returns the cache with room for `length` tokens, at least as many as it has now."""
        more = length - self.length

        def padded(slots: jax.Array) -> jax.Array:
            return jnp.pad(slots, [(0, more if axis == 2 else 0) for axis in range(slots.ndim)])

        return replace(self, blocks=jax.tree.map(padded, self.blocks), length=length)

    def back_to(self, tokens: int) -> "Cache":
        """Returns the cache of the first `tokens` tokens of each sequence.

        What lies behind them is never attended to, and is overwritten. Raises BadInput where there
        are fewer tokens.
        """
        if not 0 <= tokens <= self.filled:
            raise BadInput(f"a cache of {self.filled} tokens has no first {tokens}")
        positions = jnp.minimum(self.positions, tokens)
        return replace(self, positions=positions, filled=tokens)


def empty_slots(
    shape: tuple[int, int, int, int], dtype, in_8_bits: bool, places: Sharding | None = None
) -> ops.Cache:
    """Returns the empty cache of an attention node.

    Args:
        shape: (B, kv_heads, length, head_dim).
        dtype: of keys and values that are not in 8 bits.
        in_8_bits: whether they are.
        places: where they lie; None: on one device.
    """
    codes = [jnp.zeros(shape, jnp.int8 if in_8_bits else dtype, device=places) for _ in "kv"]
    scales = [jnp.zeros(shape[:3], jnp.float32, device=places) for _ in "kv" if in_8_bits]
    return (*codes, *scales)


def bucket(length: int) -> int:
    """Returns the least power of two that is at least `length`: few lengths, few compilations."""
    return 1 << (length - 1).bit_length()


def padded_width(width: int, cache: Cache) -> int:
    """Returns to how many tokens `width` new ones of each sequence are padded."""
    least = APPENDED if cache.filled and width > 1 else 1
    return min(max(bucket(width), least), cache.length - cache.filled)


def check_kv(cache: Cache, kv: str) -> None:
    """Raises BadInput where a cache holds keys and values in another way than a model's."""
    if cache.kv != kv:
        raise BadInput(
            f"the cache is one of a model with kv {cache.kv!r}, and this model's is {kv!r}; "
            "make one with its new_cache"
        )


def check_room(cache: Cache, batch: int, width: int) -> None:
    """Raises BadInput where `width` tokens of each of `batch` sequences do not fit in."""
    if cache.positions.shape[0] != batch:
        raise BadInput(
            f"prefill of {batch} prompts needs a cache for as many sequences; "
            f"make one with new_cache"
        )
    if width > cache.length - cache.filled:
        taken = f", {cache.filled} of them taken" if cache.filled else ""
        raise BadInput(
            f"a prompt of {width} tokens is longer than the cache of {cache.length}{taken}; "
            "make a longer one, or shorten the prompt"
        )
