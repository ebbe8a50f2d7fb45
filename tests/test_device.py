"""What depends on the kind of device, as far as it can be tested without one."""

import re
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch._C._distributed_c10d import ErrorType

import kit.ranks
from checkpoint import Progress, Saver
from kit import device, validation
from kit.background import Background
from kit.device import Precision, peak_flops
from kit.files import UserError
from kit.ranks import Ranks, StopSignal
from kit.sharding import whole_copy, whole_on_cpu
from kit.validation import Validation
from model import GPT, GPTConfig


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA B300 SXM6 AC", 2250e12),
    ("NVIDIA GeForce RTX 5090", 209e12),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504e12),
    ("NVIDIA L40", None),  # not an L4
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),  # slower, and not in the table
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a slice has a part of the card's speed
])
def test_the_peak_of_a_card_is_found_by_its_name(name, peak):
    assert peak_flops(name) == peak


def test_models_are_compiled_by_default_except_on_mps():
    assert [device.compiles_by_default(name) for name in ("cpu", "cuda:1", "mps")] == [True, True, False]


def test_evaluation_and_sampling_do_not_use_cudnns_attention(monkeypatch):
    """Training does. Both settings are torch's global ones, so they are put back."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        device.tune("cuda:0", training=True)
        with validation.inference(torch.nn.Linear(1, 1), Precision("cpu"), Ranks("cpu")):
            assert not enabled()
        assert enabled()
        device.tune("cuda:0")  # of hellaswag.py and sample.py
        assert not enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        torch.set_float32_matmul_precision("highest")


def test_training_is_not_kept_waiting_by_a_thread_that_draws():
    """A thread of pure Python releases the GIL after a fraction of a millisecond."""
    interval = sys.getswitchinterval()
    try:
        with Background(on=True) as background:
            done = threading.Event()

            def draw():
                while not done.is_set():
                    pass

            background.submit(draw)
            started = time.perf_counter()
            for _ in range(100):
                time.sleep(0)  # releases the GIL, as torch does in each operation
            seconds = (time.perf_counter() - started) / 100
            done.set()
    finally:
        sys.setswitchinterval(interval)
    assert seconds < 2e-3  # 5 ms by default


def test_memory_tried_for_micro_batches_is_not_reported(monkeypatch):
    peak = [0]

    class Model(torch.nn.Linear):
        def forward(self, x, y):
            peak[0] = 10**9
            return None, super().forward(x).sum()

    precision = Precision("cpu")
    monkeypatch.setattr(device, "type_of", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda name: peak.__setitem__(0, 0))
    assert device.fits_into_memory(Model(1, 1), (torch.ones(1, 1),) * 2, precision, "cpu", 2)
    assert peak == [0]


# ------------------------------------------------------------------------------------------------- many ranks


@pytest.mark.parametrize("kind, rank, visible, device", [
    ("cuda", 1, 4, "cuda:1"),
    ("cuda", 1, 1, "cuda:0"),  # each rank sees its own GPU only, as Slurm can do it
    ("cuda", 3, 2, "--device cuda:3: not available"),
    ("mps", 0, 0, "torchrun's ranks can't use an Apple GPU"),
])
def test_each_rank_takes_its_gpu(monkeypatch, kind, rank, visible, device):
    variables = dict(RANK=rank, WORLD_SIZE=4, LOCAL_RANK=rank, MASTER_ADDR="localhost", MASTER_PORT=1)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)

    class Taken(Exception):
        pass

    def take(device):
        raise Taken(device)

    monkeypatch.setattr(torch.cuda, "set_device", take)
    with pytest.raises((Taken, UserError), match=re.escape(device)):
        Ranks()


@pytest.mark.parametrize("uuids, nccl, problem", [
    (["a", "b"], True, None),
    (["a", "a"], True, "some ranks share a GPU"),
    (["a", "b"], False, "this torch has no NCCL"),
])
def test_ranks_that_can_not_use_nccl_say_why(monkeypatch, capsys, uuids, nccl, problem):
    ranks = Ranks("cpu")
    ranks.world_size = 2
    others = iter([[nccl, True], [(socket.gethostname(), uuid) for uuid in uuids]])
    monkeypatch.setattr(ranks, "gather", lambda value: [value, next(others)[1]])
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[0]))
    assert ranks.can_use_nccl() == (problem is None)
    printed = capsys.readouterr().out
    assert printed.startswith(problem) if problem else not printed


@pytest.mark.parametrize("signal_after, timeout, seconds", [(None, 0.3, 0.3), (0.1, 60, 0.1 + 0.2)])
def test_a_rank_does_not_wait_for_its_gpu_for_ever(monkeypatch, signal_after, timeout, seconds):
    """A GPU that waits for a lost rank never finishes: give up after --timeout, or soon after SIGTERM."""
    ranks = Ranks("cpu", timeout)
    ranks.world_size, ranks.device = 2, "cuda:0"
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10.2")
    never = SimpleNamespace(record=lambda: None, query=lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: never)
    stop = StopSignal(ranks)
    started = time.monotonic()
    if signal_after:
        threading.Timer(signal_after, stop.on_signal, (signal.SIGTERM, None)).start()
    with pytest.raises(torch.distributed.DistError) as raised:
        ranks.read(torch.zeros(2))
    assert seconds <= time.monotonic() - started < seconds + 5
    monkeypatch.setenv("RANK", "0")
    assert "lost contact" in kit.ranks.explain_failed_exchange(raised.value, timeout)


@pytest.mark.parametrize("gather", [
    lambda model, ranks: whole_on_cpu(model.state_to_save(), ranks, copy=False),
    lambda model, ranks: whole_copy(model, ranks),
    lambda model, ranks: Validation(SimpleNamespace(B=1), [], None, ranks).loss(model, model, None),
    lambda model, ranks: Saver(None, {}, None, model, None, None, ranks).save("best", Progress()),
])
def test_before_gathered_tensors_are_read_the_gpu_is_polled(monkeypatch, gather):
    """Reading them blocks while a collective waits for a lost rank, and no signal handler would run."""
    model = GPT(GPTConfig(8, 16, 1, 1, 8))
    model.set_requires_gradient_sync = None  # what tells a sharded model
    ranks, read = Ranks("cpu"), []

    def polled():
        raise torch.distributed.DistError("a rank is lost")

    monkeypatch.setattr(ranks, "wait_for_gpu", polled)
    for method in ("to", "cpu", "tolist", "__bool__"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_, name=method, **__: read.append(name))
    with pytest.raises(torch.distributed.DistError, match="a rank is lost"):
        gather(model, ranks)
    assert not read


def test_an_error_of_nccl_is_noticed_before_nccl_ends_the_process(monkeypatch):
    """Its watchdog sets the error, waits about a minute and then aborts."""
    ranks = Ranks("cpu")
    ranks.world_size, ranks.device, ranks.over_nccl = 2, "cuda:0", True
    errors = iter([ErrorType.SUCCESS, ErrorType.SUCCESS, ErrorType.REMOTE_ERROR])
    backend = SimpleNamespace(get_error=lambda: next(errors))
    ranks.group = SimpleNamespace(_get_backend=lambda device: backend)
    never = SimpleNamespace(record=lambda: None, query=lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: never)
    with pytest.raises(torch.distributed.DistError, match="REMOTE_ERROR") as raised:
        ranks.read(torch.zeros(2))
    monkeypatch.setenv("RANK", "0")
    assert "lost contact" in kit.ranks.explain_failed_exchange(raised.value, 600)
    del ranks.group._get_backend  # a torch without this private name
    assert ranks.nccl_error() is None


@pytest.mark.parametrize("message", [  # reported in pytorch issue 118369, nccl issue 795
    "[Rank 7] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=64088, OpType=ALLREDUCE, "
    "Timeout(ms)=1800000) ran for 25625251 milliseconds before timing out.",
    "NCCL error in: ProcessGroupNCCL.cpp:1331, remote process exited or there was a network error, "
    "NCCL version 2.14.3\nncclRemoteError: A call failed possibly due to a network error",
    "NCCL communicator was aborted on rank 1.",
    "NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled system error, NCCL version 2.21.5\nncclSystemError: "
    "System call failed.\nLast error:\nsocketProgress: Connection closed by remote peer host<41234>",
])
def test_nccls_errors_are_explained(monkeypatch, message):
    monkeypatch.setenv("RANK", "1")
    assert "rank 1 lost contact" in kit.ranks.explain_failed_exchange(
        torch.distributed.DistBackendError(message), 600)


def test_an_error_of_nccl_that_is_no_lost_rank_shows_its_reason(monkeypatch):
    """--resume would not help: for example the 64 MB of shared memory of a container are full."""
    monkeypatch.setenv("RANK", "1")
    error = torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled system error, NCCL version 2.21.5\n"
        "ncclSystemError: System call failed.\nLast error:\n"
        "Error while creating shared memory segment /dev/shm/nccl-a1 (size 9637888)")
    assert kit.ranks.explain_failed_exchange(error, 600) == (
        "NCCL failed: Error while creating shared memory segment /dev/shm/nccl-a1 (size 9637888); "
        "NCCL_DEBUG=INFO shows more")
