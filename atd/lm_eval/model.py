"""Defines the model "atd" of lm-evaluation-harness.

The conventions are those of the harness's own `hf`, so that figures can be compared: BOS in front
where the tokenizer adds one, BOS (else EOS) as the context of what has none, contexts cut from the
left where they and the continuation are longer than the model's context.
"""
# pyright: reportMissingImports=false

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import DEFAULT_MAX_LENGTH, has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput
from atd.lm_eval.writing import Writing, write, writing
from atd.models import frontend
from atd.models.model import Model, load
from atd.models.placement import use_device
from atd.progress import Progress
from atd.runtime.continuations import Request, fit, score_continuations

log = logging.getLogger("lm_eval.atd")  # below the harness's own, which shows it

HARNESS_DEVICE = "cuda:0"  # what the harness gives where its user gave none
WRITTEN = 8  # texts that are written together where batch_size is not given


@register_model("atd")
class AtdLM(TemplateLM):
    """A model of atd's, as the harness sees one."""

    def __init__(
        self,
        pretrained: str | Path | Model,
        *,
        backend: str = "auto",
        dtype: str = "float32",
        kv: str = "model",
        tokenizer: str | Path | Tokenizer | None = None,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        ignore_extra: bool = False,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads a model, or takes a loaded one.

        Args:
            pretrained: a folder, a .gguf file or a name of the hub, as `atd.open` takes it, or what
                `atd.load` returned; that one comes with a tokenizer.
            backend: as in `atd.load`, and so are dtype and kv.
            tokenizer: what to take the tokenizer from, where `pretrained` has none.
            batch_size: rows that run together. "auto" takes as many as make 2,048 tokens, and so
                does 1, which the harness gives where its user gave none.
            max_length: tokens of a row; by default those of the model's context, or 2,048.
            add_bos_token: whether BOS stands in front; by default where the tokenizer adds it.
            prefix_token_id: the context of texts without one; by default BOS, else EOS.
            ignore_extra: leave out tensors that are not part of the model's architecture.
            max_batch_size: what the harness gives; batches of "auto" are small, and never grow.
            device: where to compute: cpu, gpu, cuda:1. By default, and with cuda:0, which the
                harness gives where its user gave none, what jax chooses.

        Raises BadInput as `atd.load` does, and for options out of range.
        """
        super().__init__()
        if device and device != HARNESS_DEVICE:
            use_device(device)
        if isinstance(pretrained, Model):
            self.model = pretrained
        else:
            graph = frontend.open(pretrained, ignore_extra=ignore_extra)
            self.model = load(graph, backend=backend, dtype=dtype, kv=kv)
        found = pretrained if tokenizer is None else tokenizer
        if isinstance(found, Model):
            raise BadInput("a loaded model needs a tokenizer beside it")
        self.words = found if isinstance(found, Tokenizer) else open_tokenizer(found)
        self.rows = _rows(batch_size)
        self.max_length = self._checked_length(max_length)
        self.adds_bos = self.words.adds_bos if add_bos_token is None else add_bos_token
        self._prefix = prefix_token_id

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self._token(self.words.eos_ids[0] if self.words.eos_ids else None)

    @property
    def prefix_token_id(self) -> int:
        """The context of texts that have none."""
        if self._prefix is not None:
            return self._prefix
        return self.eot_token_id if self.words.bos_id is None else self.words.bos_id

    def _token(self, token: int | None) -> int:
        if token is None:
            raise BadInput(
                f"{self.words.name}: its tokenizer has no BOS and no EOS token, which the harness "
                "puts in front of texts without a context; give prefix_token_id"
            )
        return token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Returns the ids of a text; BOS in front unless add_special_tokens is False."""
        bos = self.adds_bos and add_special_tokens is not False
        if bos and add_special_tokens is None:
            prefix = self.words.decode([self.prefix_token_id], special=True)
            bos = not has_bos_prefix(string, prefix)
        return self.words.encode(string, bos=bos).tolist()

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its prepared requests under."""
        return self.words.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the text of the chat template; raises BadInput where there is none."""
        if chat_template and self.words.chat_template is None:
            raise BadInput(
                f"{self.words.name}: the model has no chat template; "
                "leave out --apply-chat-template (it is a base model, most likely)"
            )
        return self.words.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a conversation, open behind its last words where it is to go on."""
        text = self.words.apply_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)] if last in text else text

    # --- likelihoods ------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """Scores ((context, continuation), their ids, their ids); the texts key the cache."""
        for texts, _, continuation in requests:
            if not continuation:
                raise BadInput(f"a continuation has no token of its own: {texts}")
        whole = [
            Request(tuple(context), tuple(continuation)) for _, context, continuation in requests
        ]
        cut = [fit(request, self.max_length) for request in whole]
        shortened = sum(a.context != b.context for a, b in zip(whole, cut, strict=True))
        if shortened:
            log.warning(
                "%d of %d requests are longer than the model's context of %d tokens: their "
                "contexts are cut from the left",
                shortened,
                len(requests),
                self.max_length,
            )
        with _bar(len(cut), "Running loglikelihood requests", disable_tqdm) as report:
            scores = score_continuations(self.model, cut, rows=self.rows, progress=report)
        answers = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, in windows of the model's context: each token is
        predicted once, the first of a text from the prefix token.
        """
        owners, windows = [], []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            found = [(None, *make_disjoint_window(pair)) for pair in rolling]
            owners += [i] * len(found)
            windows += found
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (log_likelihood, _) in zip(owners, answers, strict=True):
            totals[i] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation -------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Returns what the model writes behind each context, up to the first stop string."""
        answers = [""] * len(requests)
        groups: dict[Writing, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(writing(request.args[1], self.words), []).append(i)
        with _bar(len(requests), "Running generate_until requests", disable_tqdm) as report:
            ended = 0
            for how, members in groups.items():

                def done(place: int, text: str, members=members) -> None:
                    nonlocal ended
                    answers[members[place]] = text
                    self.cache_hook.add_partial(
                        "generate_until", requests[members[place]].args, text
                    )
                    ended += 1
                    report(Progress("generating", ended, len(requests), "requests"))

                prompts = [self._prompt(requests[i].args[0], how.max_tokens) for i in members]
                write(
                    self.model,
                    self.words,
                    prompts,
                    how,
                    seed=members[0],
                    rows=self.rows or WRITTEN,
                    done=done,
                )
        return answers

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """The ids of a context, cut from the left so that the answer fits in."""
        room = self.max_length - max_tokens
        if room < 1:
            raise BadInput(
                f"max_gen_toks {max_tokens} leaves no room for a prompt in the model's context of "
                f"{self.max_length} tokens; give fewer (--gen_kwargs max_gen_toks=...)"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        if len(prompt) > room:
            log.warning("a prompt of %d tokens is cut from the left to %d", len(prompt), room)
        return prompt[-room:]

    def _checked_length(self, length: int | None) -> int:
        most = self.model.max_context
        if length is not None and not 1 <= length <= (most or length):
            raise BadInput(f"max_length is {length}; expected 1 to {most or 'any number'}")
        return length or most or DEFAULT_MAX_LENGTH


@contextmanager
def _bar(total: int, what: str, disable: bool) -> Iterator[Callable[[Progress], None]]:
    """Shows progress as the harness's own models do."""
    with tqdm(total=total, desc=what, disable=disable) as bar:

        def report(progress: Progress) -> None:
            bar.update(progress.done - bar.n)

        yield report


def _rows(batch_size: int | str) -> int | None:
    """The rows of a batch; None: by the number of tokens."""
    if str(batch_size).startswith("auto"):
        return None
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1:
        raise BadInput(f"batch_size is {batch_size}; expected auto, or a number of at least 1")
    return None if rows == 1 else rows
