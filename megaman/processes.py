"""The processes that `accelerate launch` or torchrun started for one run: what they tell each
other, and how all of them end when one does.

They exchange objects through torch.distributed's gloo, on GPUs as well, and add up gradients with
NCCL where each has a GPU of its own. Each process waits in a thread for a message of its neighbor,
which comes when the run is over. If the connection breaks before that, the neighbor has died.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from megaman.errors import INTERRUPTED, RUN_FAILED, UserError, summarize_error

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

JOINING = timedelta(minutes=10)  # the slowest process may have to read torch from a network drive
PATIENCE = timedelta(days=30)  # a process that has finished waits for the others
NOTICE = 1.0  # seconds within which it shows that a neighbor has died
GRACE = 30.0  # seconds after which a process that does not end is ended
SAYING = 5.0  # seconds within which a process reports a mistake in the command line
STOPPED, FAILED, LOST = "stopped", "failed", "lost"  # how a run ends before its work is done
END = "end"  # the key in the store under which the first process to end notes how

Value = TypeVar("Value")


def count_processes(environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes of this run, on all machines."""
    return int(environment.get("WORLD_SIZE", "1"))


def launcher(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The words before the script's name in a command that starts this run on this machine."""
    count = count_processes(environment)
    if count == 1:
        return ["python"]
    # accelerate launch does the same on GPUs, but starts a single process on a CPU.
    local_count = int(environment.get("LOCAL_WORLD_SIZE", str(count)))
    machines = [] if local_count == count else ["--nnodes", str(count // local_count)]
    return ["torchrun", *machines, "--nproc_per_node", str(local_count)]


def _torch() -> Any:
    """torch, which is loaded when it is first needed."""
    # Else it prints a page about each connection that breaks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed

    return torch


class Processes:
    """The processes of a run, of which this one is number rank of count, and number local_rank of
    the local_count on its machine. This class is a run of one process."""

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, local_count: int = 1):
        self.rank, self.count = rank, count
        self.local_rank, self.local_count = local_rank, local_count
        self.is_main = rank == 0  # the one that writes and prints what all have in common

    @property
    def summary(self) -> str:
        """A line about several processes, "" for one."""
        return f"{self.count} processes, which share out the batches" if self.count > 1 else ""

    def exchange(self, value: Value) -> list[Value]:
        """The values of all processes, by rank, once all are here. They are pickled."""
        return [value]

    def from_main(self, make: Callable[[], Value]) -> Value:
        """What make returns in the main process; it is called there alone."""
        return cast(Value, self.exchange(make() if self.is_main else None)[0])

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor, of one shape in all processes, by its sum over the processes."""

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """Those of a run's items that this process computes: every count-th."""
        return items[self.rank :: self.count]

    def own_device(self, device: torch.device) -> torch.device:
        """The device that this process computes on: each its own GPU, if there are enough."""
        torch = _torch()
        if device.type != "cuda" or self.count == 1:
            return device
        torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())


class _Group(Processes):
    """The processes of a launcher."""

    def __init__(self) -> None:
        distributed = _torch().distributed
        store, rank, count = next(distributed.rendezvous("env://", timeout=JOINING))
        self.store = distributed.PrefixStore("megaman", store)
        self.store.set_timeout(JOINING)
        distributed.init_process_group(
            "gloo", store=self.store, rank=rank, world_size=count, timeout=JOINING
        )
        self._talk = distributed.new_group(timeout=PATIENCE)
        local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
        super().__init__(
            rank, count, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
        )

    def exchange(self, value: Value) -> list[Value]:
        distributed = _torch().distributed
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, self._talk)
        return values

    def add_up(self, tensor: torch.Tensor) -> None:
        group = self._gpus if tensor.device.type == "cuda" else self._talk
        _torch().distributed.all_reduce(tensor, group=group)

    @cached_property
    def _gpus(self) -> ProcessGroup:
        """NCCL's group if each process has a GPU of its own, else gloo's, which copies through the
        CPU."""
        torch = _torch()
        has_own = self.local_count <= torch.cuda.device_count()
        if all(self.exchange(has_own and torch.distributed.is_nccl_available())):
            return torch.distributed.new_group(backend="nccl", timeout=PATIENCE)
        return self._talk


class _Neighbor(threading.Thread):
    """Waits for the message of the process before this one that it is done.

    If that process dies, is_lost is set and the main thread interrupted.
    """

    def __init__(self, processes: Processes):
        distributed = _torch().distributed
        super().__init__(daemon=True)
        self.rank = (processes.rank - 1) % processes.count
        self._next = (processes.rank + 1) % processes.count
        self._group: ProcessGroup = distributed.new_group(timeout=PATIENCE)
        self._is_ending = threading.Event()
        self.is_lost = False

    def run(self) -> None:
        torch = _torch()
        try:
            torch.distributed.recv(torch.empty(1), self.rank, self._group)
        except RuntimeError:
            self.is_lost = True
            _interrupt_main_thread()
            if not self._is_ending.wait(GRACE):
                print(f"error: {self.obituary}", file=sys.stderr, flush=True)
                os._exit(RUN_FAILED)  # every file is written in one step, so none is damaged

    @property
    def obituary(self) -> str:
        """What to say if the process has died."""
        return f"Process {self.rank} has died, so the others end"

    def part(self) -> None:
        """Tell the next process that this one is done, and wait for the message."""
        torch = _torch()
        torch.distributed.send(torch.zeros(1), self._next, self._group)
        self.join()

    def note_end(self) -> None:
        """Let the main thread take its time to end."""
        self._is_ending.set()


def _interrupt_main_thread() -> None:
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:  # to that thread, so that it wakes up
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@contextlib.contextmanager
def one_report() -> Iterator[None]:
    """Within this, a mistake that all processes of a machine meet alike is reported by one."""
    if count_processes() == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except (UserError, SystemExit) as error:
        time.sleep(SAYING)  # the launcher ends the others as soon as one has ended
        code = error.exit_code if isinstance(error, UserError) else error.code
        raise SystemExit(code) from None


@contextlib.contextmanager
def join_processes(remedy: str) -> Iterator[Processes]:
    """Within this context the run's processes know each other, and when one ends all end.

    An exception in one process is reported there; the others end quietly with its exit code. If a
    process dies, UserError with this remedy is raised in one of the others.
    """
    if count_processes() == 1:
        yield Processes()
        return
    with _one_interrupt() as received:
        try:
            group = _Group()
            neighbor = _Neighbor(group)
        except RuntimeError as error:
            message = (
                f"The processes of this run did not find each other ({summarize_error(error)})"
            )
            raise UserError(message, "Start them again") from None
        neighbor.start()
        try:
            yield group
            neighbor.part()
        except BaseException as error:
            received.append(0)  # no signal matters any more
            neighbor.note_end()
            reason = _reason(error, group, neighbor, remedy)
            atexit.register(_exit, _exit_code(reason))
            raise reason from None
        _close()


@contextlib.contextmanager
def _one_interrupt() -> Iterator[list[int]]:
    """Within this the first signal of the launcher, of Ctrl-C or of the thread that waits for the
    neighbor raises KeyboardInterrupt, and later ones do nothing. Yields the list of signals."""
    received: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    former = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield received
    # Not after an error: the launcher's signal may come before that has been reported.
    for number, handler in former.items():
        signal.signal(number, handler)


def _reason(error: BaseException, group: _Group, neighbor: _Neighbor, remedy: str) -> BaseException:
    """What to raise in place of an error, so that all processes end with one line.

    The first process that ends decides; the others are quiet, but for the main process after
    Ctrl-C.
    """
    if isinstance(error, (KeyboardInterrupt, RuntimeError)):
        neighbor.join(NOTICE)  # else the error may be known before its reason
    kind = STOPPED if isinstance(error, KeyboardInterrupt) else FAILED
    if neighbor.is_lost:
        kind = LOST
    mine = f"{kind} {group.rank}"
    try:
        first = group.store.compare_set(END, "", mine).decode()
    except RuntimeError:  # the process that has the store is gone
        first = mine
    if first.startswith(STOPPED):
        return KeyboardInterrupt() if group.is_main else SystemExit(INTERRUPTED)
    if first != mine:
        return SystemExit(RUN_FAILED)
    if kind == LOST:
        return UserError(neighbor.obituary, remedy)
    return error


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else RUN_FAILED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, UserError) else RUN_FAILED


def _exit(code: int) -> None:
    """End at once: the thread that waits for the neighbor must not meet an interpreter that is
    being taken down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _close() -> None:
    from torch import distributed

    # Gloo's thread needs the GIL to free the last message's tensor, and ending the group waits for
    # that thread while holding the GIL.
    time.sleep(0.5)
    distributed.destroy_process_group()
