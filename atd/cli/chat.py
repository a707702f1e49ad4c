"""The command chat: a conversation with a model on the terminal, or by lines of a pipe.

Heavy imports stay inside, so that `atd --help` answers at once.
"""

import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from atd.cli.options import (
    Activations,
    Backend,
    Chunk,
    Device,
    Dtype,
    IgnoreExtra,
    Kv,
    MaxNewTokens,
    Model,
    Quiet,
    Seed,
    Temperature,
    TensorParallel,
    Tokenizer,
    TopK,
    TopP,
    check_least,
    command,
    mesh_of,
    say_assumed,
)
from atd.errors import AtdError, BadInput, nearest

if TYPE_CHECKING:
    from atd.runtime.chat import Answer, Chat

HELP = """\
/reset      begin a new conversation; the system message stays
/save FILE  write the conversation to a JSON file
/load FILE  go on with the conversation in a file
/help       show this
/exit       end the program, as Ctrl-D does
Ctrl-C stops an answer. A message that is to begin with / is given with a blank in front."""


@command()
def chat(
    model: Model,
    *,
    system: Annotated[str, tyro.conf.arg(metavar="STR")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chunk: Chunk = 512,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    kv: Kv = "model",
    device: Device = None,
    tensor_parallel: TensorParallel = 1,
    activations: Activations = "model",
    tokenizer: Tokenizer = None,
    ignore_extra: IgnoreExtra = False,
    quiet: Quiet = False,
) -> None:
    """Talk with a model that has a chat template.

    A line is a message. Where stdin is no terminal, each of its lines is answered in turn, and the
    first error ends the program. /help lists the commands: /reset, /save FILE, /load FILE, /exit.
    Ctrl-C stops an answer and not the program.

    Args:
        system: What the system message says, in front of the conversation.
    """
    from atd.checkpoint.hub import hub_id
    from atd.checkpoint.reader import open_tokenizer
    from atd.ir.rewrite import with_activations
    from atd.models import frontend
    from atd.models.model import load
    from atd.reports.progress import shown
    from atd.runtime.chat import Chat, first_prompt
    from atd.runtime.generate import room
    from atd.runtime.sampling import Sampling

    check_least(1, max_new_tokens=max_new_tokens, chunk=chunk)
    mesh = mesh_of(device, tensor_parallel)
    sampling = Sampling(temperature, top_k, top_p, seed)
    words = open_tokenizer(tokenizer or model)
    say_assumed(words, quiet)
    first = first_prompt(words, [{"role": "system", "content": system}] if system else [])
    graph = frontend.open(model, ignore_extra=ignore_extra)
    room(graph, words.encode(first), max_new_tokens)
    graph = with_activations(graph, activations)
    with shown(quiet=quiet) as (_, progress):
        loaded = load(graph, backend=backend, dtype=dtype, kv=kv, mesh=mesh, progress=progress)
    options = {"system": system, "max_new_tokens": max_new_tokens, "chunk": chunk}
    name = str(hub_id(model) or model.absolute().name)
    terminal = Terminal(Chat(loaded, words, sampling, **options), name, quiet)
    terminal.run()


@dataclass
class Terminal:
    """Reads lines from stdin, prints answers on stdout, and all else on stderr."""

    chat: "Chat"
    name: str  # of the model
    quiet: bool = False

    def run(self) -> None:
        """Answers each line until there are no more, or one says /exit."""
        interactive = sys.stdin.isatty()
        if interactive:
            self._note(f"{self.name}; /help lists the commands, Ctrl-C stops an answer")
        for line in _lines("> " if interactive else ""):
            try:
                if line.startswith("/"):
                    if not self._command(*line.split(maxsplit=1)):
                        return
                elif line.strip():
                    self._answer(line.strip())
            except AtdError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)

    def _answer(self, text: str) -> None:
        """Prints the answer as it comes, and how fast that was."""
        with _interruptible() as stopped:
            answer = self.chat.answer(text, partial_print, stopped)
        print(flush=True)
        self._note(status(answer))

    def _command(self, word: str, rest: str = "") -> bool:
        """Does what a command says; returns whether the program goes on."""
        rest = rest.strip()
        commands: dict[str, Callable[[], None]] = {
            "/reset": self.chat.reset,
            "/save": lambda: self._save(_file(word, rest)),
            "/load": lambda: self._load(_file(word, rest)),
            "/help": lambda: print(HELP, flush=True),
            "/exit": lambda: None,
        }
        if word not in commands:
            raise BadInput(f"there is no command {word!r}{nearest(word, commands)}")
        if rest and word not in ("/save", "/load"):
            raise BadInput(f"{word} takes nothing behind it, and not {rest!r}")
        commands[word]()
        return word != "/exit"

    def _save(self, file: Path) -> None:
        from atd.checkpoint.conversation import write_conversation

        write_conversation(file, self.name, self.chat.messages)
        self._note(f"{file}: {len(self.chat.messages)} messages written")

    def _load(self, file: Path) -> None:
        from atd.checkpoint.conversation import read_conversation
        from atd.runtime.chat import first_prompt

        model, messages = read_conversation(file)
        first_prompt(self.chat.tokenizer, messages)
        self.chat.messages = messages
        self._note(f"{file}: {len(messages)} messages read")
        if model not in ("", self.name):
            self._note(f"note: {file} is a conversation with {model}, and this is {self.name}")

    def _note(self, line: str) -> None:
        """Says something for people, on stderr in dim letters."""
        if not self.quiet:
            from rich.console import Console

            out = Console(stderr=True)
            out.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def partial_print(text: str) -> None:
    """Prints a part of a line at once."""
    print(text, end="", flush=True)


def status(answer: "Answer") -> str:
    """Returns the line below an answer: its tokens, its speed, and what was read for it."""
    stopped = ", stopped" if answer.finish == "interrupted" else ""
    cut = ", cut off at --max-new-tokens or the context" if answer.finish == "length" else ""
    return (
        f"[{answer.tokens} tokens{stopped}{cut}; the first after {answer.first_seconds:.2f} s, "
        f"then {answer.tokens_per_second:.1f} tokens/s; {answer.read} of {answer.prompt} tokens "
        "read]"
    )


def _file(word: str, name: str) -> Path:
    """The file that a command names."""
    if not name:
        raise BadInput(f"{word} needs the name of a file: {word} FILE")
    return Path(name).expanduser()


def _lines(prompt: str) -> Iterator[str]:
    """Yields the lines of stdin to its end, asking for each by the prompt.

    Ctrl-C drops what was typed.
    """
    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401  it gives input() a history and keys for editing
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # which the tokenizer refuses by name
    while True:
        try:
            yield input(prompt) if prompt else _line()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends the program)", file=sys.stderr)


def _line() -> str:
    """The next line of stdin; EOFError where there is none."""
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.rstrip("\r\n")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; pressed again, it ends the program.

    An exception in the midst of a step would leave the cache in pieces.
    """
    pressed = False

    def press(signum, frame) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
