"""Several processes, on one host or many, that do one piece of work together, by `jax.distributed`.

All run the same command and the same control flow. Where work is spread (`atd.parallel.workers`),
each does its own part, and what it found is gathered by all, in the order of the work; what must be
the same everywhere is compared (`agree`). Process 0 alone writes.

A process that ends by itself is missed by the others within HEARTBEAT seconds: they end with its
name (`atd.parallel.lost`).
"""

import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import zip_longest

import jax
import numpy as np
from jax.experimental import multihost_utils

from atd.errors import AtdError, BadInput, RunFailed
from atd.parallel.lost import end_in_one_line, stdout_as_stderr

HEARTBEAT = 20  # seconds without a sign of a process, after which it counts as lost
SHUTDOWN = 20  # seconds that a process which is done waits for the others
_HEARD = "all processes of the run end with this error"
_PIECE = 1 << 20  # bytes; lengths are sent as two int32


@dataclass(frozen=True)
class Hosts:
    """The processes of this work, and which of them this one is."""

    process_id: int = 0
    names: tuple[str, ...] = ("",)  # "process 1 (node7)", of each process

    @property
    def count(self) -> int:
        """How many processes there are."""
        return len(self.names)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.process_id == 0


_joined = Hosts()
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def hosts() -> Hosts:
    """Returns the processes that work together here; one where none has joined."""
    return Hosts() if _alone.get() else _joined


@contextmanager
def alone() -> Iterator[None]:
    """Has this process work by itself while it is open: the others wait, or do likewise."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def join(coordinator: str, processes: int | None, process_id: int | None, seconds: int) -> None:
    """Joins the processes of the work; returns once all are there.

    To be called before jax is asked for a device. From here on stderr has lines of this program
    alone, and the process ends with exit code 1 where another one is lost.

    Args:
        coordinator: "HOST:PORT" of process 0, or "auto": all three are found in the cluster's
            environment (Slurm, Open MPI and others that `jax.distributed.initialize` knows).
        processes, process_id: how many there are, and which this is, from 0.
        seconds: to wait for the others. When they are over, the process ends with a message.

    Raises:
        BadInput: arguments that cannot be.
    """
    global _joined
    given = {"--processes": processes, "--process-id": process_id}
    if coordinator == "auto":
        if named := [name for name, value in given.items() if value is not None]:
            raise BadInput(f"{', '.join(named)}: not with --coordinator auto, which finds them")
    else:
        _check(coordinator, processes, process_id)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    names: list[str] = []
    end_in_one_line(names, _absent(coordinator, processes, process_id, seconds))
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            processes,
            process_id,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except ValueError as error:
        raise BadInput(
            f"--coordinator auto: this is no cluster that jax knows ({error}); give --coordinator "
            "HOST:PORT, --processes and --process-id"
        ) from None
    here = [np.frombuffer(socket.gethostname().encode(), np.uint8)]
    with stdout_as_stderr():  # gloo prints there when it begins
        every = _all(here)
    names.extend(f"process {i} ({name.tobytes().decode()})" for i, (name,) in enumerate(every))
    _joined = Hosts(jax.process_index(), tuple(names))


def _check(coordinator: str, processes: int | None, process_id: int | None) -> None:
    """Raises BadInput for numbers that cannot be, and an address that is none."""
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise BadInput(f"--coordinator {coordinator}: expected HOST:PORT of process 0, or auto")
    if processes is None or process_id is None:
        raise BadInput("--coordinator HOST:PORT needs --processes N and --process-id I")
    if not 0 <= process_id < processes:
        raise BadInput(
            f"--process-id {process_id}: {processes} processes have the numbers 0 to "
            f"{processes - 1}"
        )


def _absent(coordinator: str, processes: int | None, process_id: int | None, seconds: int) -> str:
    """What is said where not all processes come together in time."""
    if process_id == 0:
        return (
            f"not all {processes} processes came to {coordinator} within {seconds} s: start the "
            "others, with the same --coordinator and --processes"
        )
    return (
        f"the coordinator {coordinator} did not answer within {seconds} s: start process 0 there, "
        "and see that this host can reach its port"
    )


# --- what processes tell one another --------------------------------------------------------------


def gathered(arrays: Sequence[np.ndarray], error: AtdError | None = None) -> list[list[np.ndarray]]:
    """Gives arrays to all processes; returns those of each, in order of the processes.

    Args:
        arrays: of this process: their number, shapes and dtypes are its own affair.
        error: what went wrong in this process instead, which ends all.

    Raises:
        AtdError: the error of this process, or that of another one with its name.
        RunFailed: another process is lost.
    """
    me = hosts()
    if me.count == 1:
        if error:
            raise error
        return [[*arrays]]
    told = f"{error.exit_code} {error}" if error else ""
    every = _all([np.frombuffer(told.encode(), np.uint8), *arrays])
    if error:
        raise _heard(error)
    for name, (said, *_) in zip(me.names, every, strict=True):
        if len(said):
            code, _, message = said.tobytes().decode().partition(" ")
            kind = BadInput if code == str(BadInput.exit_code) else RunFailed
            raise _heard(kind(f"{name}: {message}"))
    return [of_process for _, *of_process in every]


def in_turns(results: Sequence[Sequence[np.ndarray]], error: AtdError | None = None) -> list:
    """Gives results to all processes, and returns all of them.

    Args:
        results: of this process, each as many arrays, which took the items `process_id`,
            `process_id + count`, ... of the work.
        error: as in `gathered`.

    Returns:
        The results in the order of the items.
    """
    if hosts().count == 1 and error is None:
        return [*results]
    width = np.asarray([len(results[0]) if results else 0], np.int32)
    flat = [array for result in results for array in result]
    columns = []
    for size, *arrays in gathered([width, *flat], error):
        step = max(1, int(size[0]))
        columns.append([tuple(arrays[i : i + step]) for i in range(0, len(arrays), step)])
    turns = zip_longest(*columns)
    return [result for turn in turns for result in turn if result is not None]


def from_first(text: str) -> str:
    """Returns the text that process 0 gives; returns once all are here."""
    (first,), *_ = gathered([np.frombuffer(text.encode(), np.uint8)])
    return first.tobytes().decode()


def agree(facts: Mapping[str, object]) -> None:
    """Returns once all processes are here with the same facts.

    Args:
        facts: by the words that the message has for them.

    Raises:
        BadInput: a fact differs; says which, and in which process.
    """
    me = hosts()
    if me.count == 1:
        return
    mine = {name: str(value) for name, value in facts.items()}
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    first, *others = (json.loads(said.tobytes()) for (said,) in gathered([text]))
    for name, facts_there in zip(me.names[1:], others, strict=True):
        for fact, value in first.items():
            if (there := facts_there.get(fact)) != value:
                lines = zip_longest(
                    str(there).splitlines(), value.splitlines(), fillvalue="nothing"
                )
                found, expected = next(pair for pair in lines if pair[0] != pair[1])
                raise BadInput(
                    f"{name} has another {fact} than {me.names[0]}: {found}, not {expected}; all "
                    "processes of a run need the same"
                )


@contextmanager
def agreeing() -> Iterator[None]:
    """Has an error in one process end all of them, at the end of what is done while it is open."""
    try:
        yield
    except AtdError as error:
        if not _is_heard(error):
            gathered([], error)
        raise
    gathered([])


def _heard(error: AtdError) -> AtdError:
    """The error, marked as one that all processes know of."""
    error.add_note(_HEARD)
    return error


def _is_heard(error: BaseException | None) -> bool:
    """Whether all processes know of an error, or of what it came from."""
    notes = getattr(error, "__notes__", ())
    return error is not None and (_HEARD in notes or _is_heard(error.__cause__))


def leave(exit_code: int) -> None:
    """Ends this process at once where others wait for it, which will miss it; else returns."""
    if _joined.count > 1:
        os._exit(exit_code)


def _all(arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """The arrays of each process: one gathering of lengths, and one of bytes."""
    arrays = [np.asarray(array, order="C") for array in arrays]
    header = json.dumps([(array.dtype.name, array.shape) for array in arrays]).encode()
    content = b"".join([header, *(array.tobytes() for array in arrays)])
    sizes = np.asarray([len(header), *divmod(len(content), _PIECE)], np.int32)
    try:
        every = multihost_utils.process_allgather(sizes)  # [processes, 3]
        lengths = every[:, 1].astype(np.int64) * _PIECE + every[:, 2]
        padded = np.zeros(-(-int(lengths.max()) // 4096) * 4096, np.uint8)
        padded[: len(content)] = np.frombuffer(content, np.uint8)
        contents = multihost_utils.process_allgather(padded)  # [processes, bytes]
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # gloo raises both
        time.sleep(2 * HEARTBEAT)  # until it is known which process is lost
        raise RunFailed(f"a process does not answer: {str(error).splitlines()[0]}") from None
    return [
        _parts(of_process.tobytes(), int(size[0]))
        for of_process, size in zip(contents, every, strict=True)
    ]


def _parts(content: bytes, header: int) -> list[np.ndarray]:
    """The arrays of a process: a JSON list of dtypes and shapes, and their bytes."""
    found, start = [], header
    for name, shape in json.loads(content[:header]):
        array = np.frombuffer(content, np.dtype(name), int(np.prod(shape, dtype=np.int64)), start)
        found.append(array.reshape(shape))
        start += array.nbytes
    return found
