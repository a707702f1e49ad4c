"""Evaluates a model: perplexity, and the distance from the dense one on the same positions.

The tokens are cut into floor(n / context) windows that do not overlap; a remainder is left out.
Each window is run by itself, and over all scored positions

    perplexity  = exp(mean of -log p(token t | tokens before it in its window))
    KL          = sum_v p_dense(v) (log p_dense(v) - log p(v)) in nats: mean, median, 99 % quantile
    top-1       = the share of positions at which both models give one token the most probability

Conventions (`Evaluation` names the one used, for their figures cannot be compared):

    standard    that of papers: all context - 1 shifted tokens of a window are scored. With BOS, a
                window is BOS and context - 1 tokens of text.
    llama.cpp   that of `llama-perplexity`: BOS in front of the text and again in place of each
                window's first token, where the model's tokenizer adds one (add_bos_token); of a
                window only the tokens context/2 + 1 ... context - 1 are scored, so that each has
                at least half a window before it.

Logits never exist for more than a few positions: the hidden states [B, T, D] of a batch of windows
are computed, then the head and the log-softmax run over chunks of `positions` of them, for both
models at once. So the peak is a few times 2 models x positions x vocabulary x 4 bytes, whatever B
and T.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from atd.errors import BadInput, RunFailed
from atd.ir import Graph
from atd.models.tokens import check_tokens
from atd.parallel.hosts import hosts, in_turns
from atd.progress import Progress, Report, unheard

CONVENTIONS = ("standard", "llama.cpp")


class Model(Protocol):
    """A pytree that can be evaluated, such as what `atd.load` returns. One on several devices says
    so by `devices`, as an `atd.models.model.Model` does."""

    @property
    def vocabulary(self) -> int:
        """The number of tokens V."""
        ...

    @property
    def max_context(self) -> int | None:
        """How many positions the model was made for; None: any number."""
        ...

    def hidden(self, tokens, /) -> Any:
        """Computes the residual stream in front of the head: int32 [B, T] -> float32 [B, T, D].

        It sees to its own compilation. It has an option `chunk` where `evaluate` is to be given it.
        """

    def logits(self, hidden, /) -> Any:
        """Applies the head: float32 [P, D] -> float32 [P, V].

        Of a model on several devices also [devices, P, D], the first axis over those of the data
        axis.
        """


@dataclass(frozen=True)
class Evaluation:
    """Figures and the conditions that they hold under; those against another model may be None."""

    perplexity: float
    against_perplexity: float | None  # of the other model
    kl_mean: float | None  # nats
    kl_median: float | None
    kl_99: float | None  # 99 % quantile
    top1_agreement: float | None  # 0..1
    windows: int
    positions: int  # scored
    context: int  # tokens per window, BOS included
    bos: bool
    convention: str
    tokens: int  # given, before the cut into windows
    seconds: float  # all of it, compilation included
    tokens_per_second: float  # through all models; not counting the first batch, which compiles
    kl_windows: tuple[float, ...] = ()  # kl_mean of each window; none without another model

    def conditions(self) -> str:
        """Returns "30 windows of 256 tokens, no BOS, 7,650 positions scored" and the like."""
        bos = "BOS in front" if self.bos else "no BOS"
        convention = "" if self.convention == "standard" else f", {self.convention}'s convention"
        scored = f"{self.positions:,} positions scored"
        return f"{self.windows} windows of {self.context} tokens, {bos}, {scored}{convention}"

    def to_json(self) -> dict:
        """Returns all fields by name."""
        return dataclasses.asdict(self)


def evaluate(
    model: Model,
    tokens: np.ndarray,
    *,
    context: int,
    against: Model | None = None,
    bos_id: int | None = None,
    batch: int = 8,
    chunk: int | None = None,
    positions: int = 256,
    convention: str = "standard",
    progress: Report = unheard,
) -> Evaluation:
    """Evaluates a model on one text, and with `against` its distance from that one.

    Args:
      model: what `atd.load` returns, or another `Model`.
      tokens: ids of the text, int [n], without BOS.
      context: tokens per window, BOS included.
      against: the dense model to compare with.
      bos_id: the token to put in front of each window; None: no BOS.
      batch: windows that run together; of a model on several devices on each of the data axis. The
        last batch is padded, so that nothing compiles twice.
      chunk: tokens of a window that are read at a time, into a cache, which bounds the memory of
        activations; None: the whole window at once.
      positions: positions whose logits exist at a time.
      convention: "standard" or "llama.cpp", see the module.
      progress: hears of the tokens done after each batch.

    Raises BadInput for a text that is shorter than a window, ids outside the vocabulary, models of
    different vocabularies, and a context under 2 or beyond the positions that the model was made
    for: past them the figures would say more about the rope than about the weights. Raises
    RunFailed where logits are NaN or infinite.
    """
    if batch < 1 or positions < 1:
        raise BadInput(f"batch is {batch} and positions is {positions}; both must be at least 1")
    if chunk is not None and chunk < 1:
        raise BadInput(f"chunk is {chunk}; expected at least 1")
    begin = time.perf_counter()
    tokens = np.asarray(tokens)
    windows, first = cut(tokens, context, bos_id, convention)
    devices = getattr(model, "devices", None)
    spread = devices.data if devices else 1  # each device runs what it would run if it were alone
    batch = min(batch, len(windows)) * spread
    here = hosts()
    starts = [*range(0, len(windows), batch)][here.process_id :: here.count]
    check_models([m for m in (model, against) if m is not None], windows)

    how: dict[str, Any] = {} if chunk is None else {"chunk": chunk}
    batches = []
    laps = [time.perf_counter()]
    for start in starts:
        part = windows[start : start + batch]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
        # [batch, scored, D] each
        hidden, against_hidden = (
            m and m.hidden(padded, **how)[:, first:-1] for m in (model, against)
        )
        scores = _score(
            model,
            against,
            hidden,
            against_hidden,
            padded[:, first + 1 :],
            positions=positions,
            spread=spread,
        )
        batches.append([np.asarray(score)[: len(part)].ravel() for score in scores])
        laps.append(time.perf_counter())
        done = min(start + batch * here.count, len(windows)) * context
        progress(Progress("evaluating", done, windows.size, "tokens"))
    batches = in_turns(batches)
    laps = [
        *laps[: max(1, len(starts))],
        time.perf_counter(),
    ]  # with the wait for others

    nll, *compared = (
        np.concatenate(column).astype(np.float64) for column in zip(*batches, strict=True)
    )
    _check_finite(nll, compared, len(windows))
    compiling = min(1, max(0, len(laps) - 2))  # batches of each process, left out of the rate
    return Evaluation(
        perplexity=_perplexity(nll),
        **_distance(*compared),
        windows=len(windows),
        positions=len(nll),
        context=context,
        bos=bos_id is not None,
        convention=convention,
        tokens=len(tokens),
        seconds=laps[-1] - begin,
        tokens_per_second=(len(windows) - compiling * batch * here.count)
        * context
        / (laps[-1] - laps[compiling]),
        kl_windows=_by_window(len(windows), *compared),
    )


def _check_finite(nll: np.ndarray, compared: Sequence[np.ndarray], windows: int) -> None:
    """Raises RunFailed where a model's scores [positions] are not finite, as of NaN logits."""
    whose = {"the model's": nll, "the dense model's": sum(compared, np.zeros_like(nll))}
    for name, scores in whose.items():
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            window, position = divmod(int(wrong[0]), len(nll) // windows)
            raise RunFailed(
                f"{name} logits are not finite at {len(wrong)} of {len(nll)} positions, the first "
                f"in window {window} at its scored position {position}: weights are NaN or "
                "infinite, or a product overflowed (atd verify searches a converted folder)"
            )


def _perplexity(nll: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(nll.mean()))


def _distance(against_nll=None, kl=None, same=None) -> dict[str, float | None]:
    """The fields of an Evaluation that compare two models, from float64 [positions] each."""
    if against_nll is None or kl is None or same is None:
        return dict.fromkeys(
            ("against_perplexity", "kl_mean", "kl_median", "kl_99", "top1_agreement")
        )
    return {
        "against_perplexity": _perplexity(against_nll),
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float(same.mean()),
    }


def _by_window(windows: int, against_nll=None, kl=None, same=None) -> tuple[float, ...]:
    """The mean KL of each window, from float64 [positions]; () where no models are compared."""
    return () if kl is None else tuple(kl.reshape(windows, -1).mean(axis=1).tolist())


def cut(
    tokens: np.ndarray, context: int, bos_id: int | None, convention: str = "standard"
) -> tuple[np.ndarray, int]:
    """Cuts a text into windows: (int32 [W, context], first).

    Positions first ... context - 2 of each window are scored, position t on the token t + 1. Raises
    BadInput for a text that is shorter than a window, and as `evaluate` does for other arguments.
    """
    if convention not in CONVENTIONS:
        raise BadInput(f"unknown convention {convention!r}; known: {', '.join(CONVENTIONS)}")
    if context < 2:
        raise BadInput(f"a context of {context} tokens scores nothing; at least 2 are needed")
    if convention == "llama.cpp":
        tokens = tokens if bos_id is None else np.concatenate([[bos_id], tokens])
        fresh, first = context, context // 2
        if first == context - 1:
            raise BadInput(
                "a context of 2 tokens scores nothing under llama.cpp's convention; "
                "at least 3 are needed"
            )
    else:
        fresh, first = context - (bos_id is not None), 0
    count = len(tokens) // fresh
    if count == 0:
        raise BadInput(
            f"{len(tokens)} tokens are too few for one window of {context}: "
            f"at least {fresh} are needed; give a longer text or a smaller --context"
        )
    windows = tokens[: count * fresh].reshape(count, fresh).astype(np.int32)
    if bos_id is None:
        return windows, first
    if convention == "llama.cpp":
        windows[:, 0] = bos_id
        return windows, first
    return np.concatenate([np.full((count, 1), bos_id, np.int32), windows], axis=1), first


def check_models(models: Sequence[Model | Graph], windows: np.ndarray) -> None:
    """Raises BadInput where windows int32 [W, context] cannot be run by the models, one or two, as
    `evaluate` says.
    """
    context = windows.shape[1]
    sizes = [m.vocabulary for m in models]
    if len(set(sizes)) > 1:
        raise BadInput(
            f"the models' vocabularies differ: {sizes[0]} and {sizes[1]} tokens; "
            "compare conversions of one model"
        )
    check_tokens(windows, sizes[0])
    for limit in (m.max_context for m in models):
        if limit is not None and context > limit:
            raise BadInput(
                f"a context of {context} is beyond the {limit} positions the model was made for; "
                f"give --context {limit}"
            )


@partial(jax.jit, static_argnames=("positions", "spread"))
def _score(model, against, hidden, against_hidden, targets, positions: int, spread: int = 1):
    """Scores positions: hidden [B, S, D] of either model, targets int32 [B, S] -> float32s [B, S].

    They are the negative log-likelihood, and where there is another model its own, KL(against ||
    model), and whether the top-1 is the same. `spread` devices take as many runs of windows, each
    `positions` of its own at a time.
    """
    count = targets.size // spread  # of a device
    positions = min(positions, count)
    chunks = -(-count // positions)

    def chunked(values):
        """Cuts [B, S, ...] into [chunks, spread, positions, ...], with zeros at the end."""
        flat = values.reshape(spread, count, *values.shape[2:])
        room = (0, 0), (0, chunks * positions - count), *((0, 0),) * (flat.ndim - 2)
        whole = jnp.pad(flat, room).reshape(spread, chunks, positions, *flat.shape[2:])
        return whole.swapaxes(0, 1)

    def log_softmax(model, hidden):  # [spread, P, D] -> [spread, P, V]
        logits = model.logits(hidden) if spread > 1 else model.logits(hidden[0])[None]
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    def score(inputs):
        target, hidden, against_hidden = inputs  # [spread, P] and [spread, P, D]
        log_p = log_softmax(model, hidden)
        nll = -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
        if against is None:
            return (nll,)
        log_q = log_softmax(against, against_hidden)
        against_nll = -jnp.take_along_axis(log_q, target[..., None], axis=-1)[..., 0]
        kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
        return nll, against_nll, kl, same.astype(jnp.float32)

    # None for the hidden states of a model that is not there.
    inputs = jax.tree.map(chunked, (targets, hidden, against_hidden))
    scores = jax.lax.map(score, inputs)  # each [chunks, spread, positions]
    rows = (s.swapaxes(0, 1).reshape(spread, -1)[:, :count] for s in scores)
    return tuple(s.reshape(targets.shape) for s in rows)
