"""The ranks of a run: torchrun's processes, what they agree on, and how they stop together."""

import contextlib
import datetime
import math
import os
import re
import signal
import socket
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from kit.device import pick_device, type_of
from kit.files import UserError, first_line

# torchrun sets these
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LONGEST_WAIT = datetime.timedelta(days=7)  # for another rank's downloads, checks and saves
# found in the errors of gloo and NCCL when a rank has died or hangs
LOST_RANK = re.compile("by (remote )?peer|[Tt]imed out|Broken pipe|ncclRemoteError|remote process exited|"
                       "NCCL communicator was aborted|atchdog caught collective operation timeout")


class Ranks:
    """This process among the ranks that torchrun started; without torchrun, the only one.

    device: where this rank computes. group: the process group of gradients, the loss and Muon's updates, over
    NCCL on GPUs. Everything else is exchanged between CPUs over gloo, so it need not wait for a GPU.
    """

    def __init__(self, device=None, timeout=600.0):
        """Join the process group. timeout: seconds after which a rank that does not answer counts as lost.

        `barrier` waits longer, because rank 0 may be busy with files. Raises UserError if the device is not
        available, or if the environment is incomplete.
        """
        self.device = pick_device(device)
        self.rank, self.world_size = integer_variable("RANK", 0), integer_variable("WORLD_SIZE", 1)
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"RANK is {self.rank} and WORLD_SIZE is {self.world_size}, which fits no run: "
                            "start the ranks with torchrun, or unset both")
        missing = [name for name in VARIABLES if not os.environ.get(name)]
        if self.distributed and missing:
            raise UserError(f"WORLD_SIZE is {self.world_size}, but {', '.join(missing)} is not set: "
                            "start the ranks with torchrun, or unset WORLD_SIZE")
        self.local_rank = integer_variable("LOCAL_RANK", 0)  # among the ranks of this machine
        integer_variable("MASTER_PORT", 0)
        if self.distributed and self.device == "mps":
            raise UserError("torchrun's ranks can't use an Apple GPU (mps): use --device cpu, or start one "
                            "process without torchrun")
        if self.distributed and self.device == "cuda":
            # Slurm may show each rank only its own GPU
            only_one = torch.cuda.device_count() == 1
            self.device = pick_device("cuda:0" if only_one else f"cuda:{self.local_rank}")
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        self.timeout, self.over_nccl = timeout, False
        self.stop = None  # the StopSignal, once there is one
        if self.distributed:
            timeout = datetime.timedelta(seconds=timeout)
            store, *_ = next(rendezvous("env://", timeout=timeout))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun keeps this store when it restarts the ranks, and with it the addresses of the dead
                # ones, so each start uses new keys. Several torchruns count their restarts separately: for
                # them the user sets TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and each start has a new store
                store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size,
                                    timeout=timeout)
            self.patient = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
            self.over_nccl = self.device.startswith("cuda") and self.can_use_nccl()
            if self.over_nccl:
                # twice as long, so that `read` ends a hang: NCCL's own watchdog would abort the process
                self.group = dist.new_group(timeout=2 * timeout, backend="nccl",
                                            device_id=torch.device(self.device))
            else:
                self.group = dist.new_group(timeout=timeout)

    def can_use_nccl(self):
        """Whether the ranks' GPUs can exchange gradients directly. If not, rank 0 says why."""
        gpu = socket.gethostname(), str(torch.cuda.get_device_properties(self.device).uuid)
        problem = None
        if not all(self.gather(dist.is_nccl_available())):  # on Windows
            problem = "this torch has no NCCL"
        elif len(set(self.gather(gpu))) < self.world_size:
            problem = "some ranks share a GPU"
        if problem:
            self.say(f"{problem}: gradients go through the CPU, which is slow")
        return not problem

    @property
    def distributed(self):
        """Whether there is more than one rank."""
        return self.world_size > 1

    @property
    def is_first(self):
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def say(self, *messages):
        """Print each message on a line, on rank 0."""
        if self.is_first and messages:
            with tqdm.external_write_mode():  # clears tqdm's line meanwhile
                print(*messages, sep="\n", flush=True)

    def max(self, value):
        """The largest of all ranks' whole numbers or bools, as an int."""
        value = torch.tensor(int(value))
        if self.distributed:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    def gather(self, value):
        """All ranks' values that are not None, in rank order."""
        values = [value]
        if self.distributed:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return [value for value in values if value is not None]

    def from_first(self, value):
        """Rank 0's value, on all ranks."""
        values = [value]
        if self.distributed:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def tensors_from_first(self, tensors):
        """Rank 0's tensors, {name: tensor on the CPU}, on all ranks. What the others pass is ignored."""
        if not self.distributed:
            return tensors
        layout = self.from_first({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        if not self.is_first:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        self.copy_from_first(tensors[name] for name in layout)
        return tensors

    def copy_from_first(self, tensors):
        """Overwrite tensors on the CPU with those of rank 0."""
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)

    def check_same(self, facts):
        """Raise UserError, on all ranks, if a rank's facts (a dict) differ from those of rank 0."""
        first, *others = self.gather((self.rank, socket.gethostname(), facts))
        for rank, host, found in others:
            for name in (name for name in first[2] if found.get(name) != first[2][name]):
                raise UserError(f"rank {rank} on {host} has {name} {found.get(name)}, rank 0 on {first[1]} "
                                f"has {first[2][name]}: all ranks need the same flags and files")

    def sum(self, tensor):
        """The sum of all ranks' tensors, on the CPU; a tensor on the CPU is changed in place."""
        tensor = tensor.cpu()
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """The mean of all ranks' tensors, on the device, in place."""
        if self.distributed:
            dist.all_reduce(tensor, group=self.group)
            tensor /= self.world_size
        return tensor

    def share(self, function, items):
        """function(items) for a tensor (N, ...) of independent items; each rank computes a part."""
        if not self.distributed:
            return function(items)
        each = math.ceil(len(items) / self.world_size)
        results = items.new_zeros(self.world_size, each, *items.shape[1:])
        mine = items[self.rank * each : (self.rank + 1) * each]
        if len(mine):  # there may be fewer items than ranks
            results[self.rank, : len(mine)] = function(mine)
        dist.all_gather(list(results), results[self.rank].clone(), group=self.group)
        return results.flatten(0, 1)[: len(items)]

    def read(self, tensor):
        """The values of a tensor on this rank's device, as a list. Raises DistError if a rank is lost."""
        self.wait_for_gpu()
        return tensor.tolist()

    def wait_for_gpu(self):
        """Wait until this rank's GPU has finished its work. Raises DistError if a rank is lost.

        Call before a tensor is read that came from other ranks. This polls, so that signal handlers can run;
        the read itself would block until NCCL's watchdog aborts the process.
        """
        if not self.distributed or type_of(self.device) != "cuda":
            return
        # how long to wait after SIGTERM, before torchrun kills the ranks
        grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) - 10
        done, started = torch.cuda.Event(), time.monotonic()
        done.record()
        while not done.query():
            now = time.monotonic()
            signal_at = self.stop.received_at if self.stop and self.stop.number else math.inf
            if now - started > self.timeout or now - max(started, signal_at) > grace:
                raise dist.DistError("a collective of the GPUs timed out")
            if error := self.nccl_error():
                raise dist.DistError(f"NCCL reports {error}")
            time.sleep(1e-4)

    def nccl_error(self):
        """NCCL's error, such as "REMOTE_ERROR", or None. NCCL ends the process a minute after an error."""
        if self.over_nccl:
            with contextlib.suppress(AttributeError, RuntimeError):  # private names
                error = self.group._get_backend(torch.device(self.device)).get_error().name
                return None if error == "SUCCESS" else error

    def barrier(self):
        """Wait for all ranks, up to LONGEST_WAIT. A dead rank is an error."""
        if self.distributed:
            dist.barrier(group=self.patient)

    @contextlib.contextmanager
    def first_goes_ahead(self):
        """Run the body on rank 0, then on the first rank of each other machine, then on the rest.

        So all ranks find what the body prepares, whether or not the machines share a disk.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(2 - turn):
            self.barrier()

    def leave(self):
        """Leave the process group, once no rank needs another any more."""
        self.barrier()  # a rank that closes its connections would break a collective still under way
        if self.distributed:
            dist.destroy_process_group()


class StopRequested(Exception):
    """All ranks have agreed to stop. args[0] is the number of the signal that asked for it."""


class StopSignal:
    """A context that notes signals to stop; `check` raises StopRequested on all ranks together.

    They are SIGTERM, Ctrl-C, SIGHUP (a closed terminal) and SIGUSR1 (Slurm's warning before its time limit).
    A signal that is ignored from the start, such as SIGHUP under nohup, stays ignored. torchrun and
    schedulers send a signal several times, even to ranks that have received it, so repeats are ignored.
    Ctrl-C more than three seconds after the first signal ends the process at once.
    """

    SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows lacks the last two
    after_stop = set()  # signals that an earlier run in this process has set to be ignored

    def __init__(self, ranks):
        self.ranks, ranks.stop = ranks, self
        self.number, self.received_at, self.old_handlers = 0, 0.0, {}

    def __enter__(self):
        numbers = [getattr(signal, name) for name in self.SIGNALS if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []  # only the main thread may handle signals
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN or number in self.after_stop:
                self.old_handlers[number] = signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number, frame):
        if self.number and number == signal.SIGINT and time.monotonic() - self.received_at > 3:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.received_at = number, time.monotonic()
            if self.ranks.is_first:
                with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
                    os.write(2, b"\nstopping after this micro-batch; Ctrl-C after 3 s ends at once\n")

    def check(self):
        """Raise StopRequested if any rank has received a signal. All ranks must call it equally often."""
        number = self.ranks.max(self.number)
        if number:
            raise StopRequested(number)

    def __exit__(self, *_):
        for number, handler in self.old_handlers.items():
            # schedulers may repeat a signal until the process is gone: all is saved, so let it exit normally
            if self.number and number != signal.SIGINT:
                self.after_stop.add(number)
                handler = signal.SIG_IGN
            signal.signal(number, handler)


def integer_variable(name, default):
    """An environment variable as an int; default if it is unset or empty. Raises UserError."""
    value = os.environ.get(name) or default
    try:
        return int(value)
    except ValueError:
        raise UserError(f"the environment variable {name} is {value!r}, not a number: unset it") from None


def explain_failed_exchange(error, timeout):
    """One sentence if a RuntimeError means that an exchange between ranks failed, else None.

    Another rank has died or hangs, or NCCL can't work on this machine. timeout: seconds.
    """
    if not os.environ.get("RANK"):
        return None
    if isinstance(error, dist.DistBackendError) and not LOST_RANK.search(str(error)):
        reason = str(error).rpartition("Last error:")[2].strip() or first_line(error)
        return f"NCCL failed: {' '.join(reason.split())}; NCCL_DEBUG=INFO shows more"
    if not isinstance(error, dist.DistError) and not LOST_RANK.search(str(error)):
        return None
    return (f"rank {os.environ.get('RANK')} lost contact with another rank, which died or did not answer for "
            f"--timeout {timeout:g} seconds ({first_line(error)}); continue with --resume")


def torchrun_id():
    """What identifies this torchrun, or None: its run id, which users may choose, and its process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") and f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()}"


def restarted_by_torchrun():
    """Whether torchrun has restarted the ranks after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
