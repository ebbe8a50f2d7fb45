"""Faults at named points of a run.

    FAULT='at_step(7, kill)' python tests/faulty.py train_gpt2.py --flags

FAULT is Python code that runs before the script and may use all names of this module. A fault is a point of
the run and an act that happens there: `inside_save("best", kill)`. In a test's own process, the `faults`
fixture is this module, and undoes every patch when the test ends.

Only this module knows which functions of the program belong to a point.
"""

import builtins
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

import checkpoint
import fineweb_edu
import train_gpt2
from kit import files, formats, shards
from kit.device import compile_model
from kit.report import Report
from model import GPT
from train_gpt2 import DataLoaderLite

RANK = int(os.environ.get("RANK", 0))
RESTART = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
PATCHED = []  # (owner, name, the original)


def patch(owner, name, new):
    PATCHED.append((owner, name, getattr(owner, name)))
    setattr(owner, name, new)


@contextlib.contextmanager
def put_in():
    """Undo, at the end of the block, what was patched in it."""
    kept = len(PATCHED)
    try:
        yield
    finally:
        while len(PATCHED) > kept:
            setattr(*PATCHED.pop())


def before(owner, name, when, act):
    """Call act() before owner.name does its work, the first time that when(*its arguments) is true."""
    real, done = getattr(owner, name), []

    def faulty(*args, **kwargs):
        if not done and when(*args, **kwargs):
            done.append(True)
            act()
        return real(*args, **kwargs)

    patch(owner, name, faulty)


# ------------------------------------------------------------------------------------------------------ acts


def kill(after=0):
    """Send SIGKILL to this process, after so many seconds."""
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    """Suspend this process: it still exists, but does not answer."""
    os.kill(os.getpid(), signal.SIGSTOP)


def stop():
    """Send SIGTERM to this process, like a scheduler."""
    signal.raise_signal(signal.SIGTERM)


def interrupt():
    """Break off here: the stand-in for SIGKILL in a test's own process."""
    raise KeyboardInterrupt


def no_space():
    """Fail like a call to a full disk."""
    raise OSError(28, "No space left on device")


def fill_disk(size):
    """No file can grow beyond this size: the same calls fail with the same error as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))


# ------------------------------------------------------------------------------- points of a training run


def before_host_is_tuned(act):
    before(train_gpt2, "tune", lambda *_, **__: True, act)


def at_step(number, act):
    """The step has its gradient, and the optimizer is about to use it."""
    before(train_gpt2, "get_lr", lambda step, args: step == number, act)


def after_step(number, act):
    """The step has been logged and printed; the next evaluation or save has not begun."""
    line, real = f"step {number:5d} |", builtins.print

    def faulty(*words, **kwargs):
        real(*words, **kwargs)
        if words and str(words[0]).startswith(line):
            act()

    patch(builtins, "print", faulty)


def in_micro_batch(number, act):
    """This rank is about to read its training micro-batch `number`, counted from the start of the run."""
    before(DataLoaderLite, "next_batch", lambda loader, *_: loader.position == number * windows(loader), act)


def windows(loader):
    """The number of windows that all ranks together read in a micro-batch."""
    return loader.B * loader.num_processes


def in_evaluation(step, act):
    """The validation after training step `step - 1` is about to read its first micro-batch."""
    at_step(step - 1, lambda: before(
        DataLoaderLite, "batch", lambda loader, *_: "_val_" in Path(loader.shards[0][0]).name, act))


def while_others_wait_for(what, act, step=8):
    """In that step, the other ranks wait for this one: for its "gradients", or for its vote to "stop"."""
    owner, name = {"gradients": (GPT, "forward"), "stop": (dist, "all_reduce")}[what]
    # after the previous step's optimizer, the ranks vote on a stop, then run the model and sum the gradients
    at_step(step - 1, lambda: before(owner, name, lambda *_, **__: True, act))


def while_compiling(act, after):
    """So many seconds after torch.compile was called."""
    before(torch, "compile", lambda *_, **__: True, threading.Timer(after, act).start)


def compiled_as_on_a_gpu():
    """torch.compile with a GPU's settings: the loss is part of the graph. A later recompilation fails."""
    patch(train_gpt2, "compile_model", lambda model, device, *rest: compile_model(model, "cuda", *rest))
    before(Report, "start", lambda *_, **__: True,
           lambda: torch.compiler.set_stance("fail_on_recompile"))


def failing_backward_compilation():
    """torch.compile compiles the forward pass, and fails at the backward pass."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def fail(graph, inputs):
        raise RuntimeError("out of resource: shared memory")

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=fail)
    patch(train_gpt2, "compile_model", lambda model, *_: torch.compile(model, backend=backend))


def not_finite(sequence, what):
    """Put NaN into the "loss" of this input sequence (a list of ids), or only into its "gradient"."""
    sequence, features = torch.tensor(sequence), GPT.features

    def poisoned(self, idx, *rest, **named):
        x = features(self, idx, *rest, **named)
        bad = torch.where((idx == sequence).all(dim=1), torch.nan, 0.0).view(-1, 1, 1)
        if what == "loss":
            return x + bad
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient + bad)
        return x

    patch(GPT, "features", poisoned)


def without_vocabulary():
    """As if there were neither GPT-2's vocabulary nor a network."""
    def no_network(name):
        raise files.UserError("no network")

    patch(train_gpt2, "get_tokenizer", no_network)


def failing(owner, name, number, when=lambda *_: True):
    """Each call of owner.name for which when(*its arguments) is true fails with this error number."""
    real = getattr(owner, name)

    def faulty(*args, **kwargs):
        if when(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    patch(owner, name, faulty)


def renames_as_on_windows():
    """A file that is open, and a directory that holds one, can't be renamed."""
    def is_open(path):
        path = os.path.abspath(path)
        links = (os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        return any(link == path or link.startswith(path + "/") for link in links)

    for name in ("rename", "replace"):
        failing(os, name, 13, lambda old, new: is_open(old))


# -------------------------------------------------------------------------------------- points of a save


def on_rename(when, act, after):
    """Call act() before or after the first rename for which when(old path, new path) is true."""
    done = []

    def faulty_form(real):
        def faulty(old, new, **kwargs):
            hit = not done and when(Path(os.fspath(old)), Path(os.fspath(new)))
            if hit:
                done.append(True)
            if hit and not after:
                act()
            real(old, new, **kwargs)
            if hit and after:
                act()
        return faulty

    for name in ("rename", "replace"):
        patch(os, name, faulty_form(getattr(os, name)))


def before_save(name, act):
    """Nothing of checkpoint `name` is written: its temporary directory is about to be made."""
    before(os, "mkdir", lambda path, *_, **__: name in Path(path).name, act)


def while_writing_tensors(act):
    """A checkpoint's directory is made, and the first tensor file is about to be written."""
    before(checkpoint, "save_file", lambda *_: True, act)


def inside_save(name, act, step=None, writing=None, after_rename=False):
    """Checkpoint `name` is complete and about to be renamed to its final name, or has just been renamed.

    step: the step of the checkpoint, since "best" is saved several times. writing: earlier, when this file
    of the checkpoint is about to be synced to the disk.
    """
    def is_written(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return path.name == writing and name in path.parent.name

    def is_renamed(old, new):
        return new.name == name and step in (None, json.loads((old / "meta.json").read_text())["step"])

    if writing:
        before(os, "fsync", is_written, act)
    else:
        on_rename(is_renamed, act, after_rename)


def inside_removal(name, act, after_rename=False):
    """An old checkpoint is about to be renamed for its deletion, or has just been renamed."""
    on_rename(lambda old, new: old.name == name and new.name.startswith("."), act, after_rename)


def busy(name):
    """The directory `name` can't be renamed, and no directory can be deleted."""
    real = os.rename

    def faulty(old, new):
        if Path(old).name == name:
            raise OSError(16, "Device or resource busy", str(old))
        real(old, new)

    patch(os, "rename", faulty)
    patch(shutil, "rmtree", lambda path, ignore_errors: None)


# -------------------------------------------------------------------------- points and settings of the data


def small_batches(chars):
    """Read texts in batches of so many characters, so that a small file has many batches."""
    patch(formats, "BATCH_CHARS", chars)


def without_gigatoken():
    """As if gigatoken were not installed: tiktoken encodes, in worker processes."""
    patch(fineweb_edu, "get_fast_tokenizer", lambda name: None)


def short_pauses(seconds, count=5):
    """Ask a busy server again `count` times, after so many seconds; libraries pause no longer than that."""
    real = time.sleep
    patch(files, "PAUSES", (seconds,) * count)
    patch(time, "sleep", lambda asked: real(min(asked, seconds)))


def before_shard(number, act):
    """Shard `number` is complete, and its file is about to get its final name."""
    on_rename(lambda old, new: new.stem.endswith(f"_{number:06d}"), act, after=False)


def after_first_shard(act):
    """The first shard has its final name; the manifest that lists it is about to be written."""
    def lists_a_shard(old, new):
        return new.name == "manifest.json" and json.loads(old.read_text())["shards"]

    on_rename(lists_a_shard, act, after=False)


def without_last_shards():
    """A preparation ends before it writes its last shards."""
    patch(shards.ShardWriter, "finish", lambda self: None)


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1].removesuffix(".py"))
    exec(os.environ["FAULT"])
    files.run_script(script.main, script.parse_args(sys.argv[2:]))
