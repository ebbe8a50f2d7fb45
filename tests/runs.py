"""Start, stop and read runs: the scripts as a user runs them, and what they leave in a log directory."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import unittest.mock
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import checkpoint
import train_gpt2
from kit import files

ROOT = Path(__file__).parent.parent

# a GPT that trains in seconds on the `shards` fixture; everything optional is off unless a test asks for it
TINY = ("--n_layer 2 --n_head 2 --n_embd 32 --vocab_size 512 --sequence_length 32 --micro_batch_size 4 "
        "--total_batch_size 256 --max_steps 12 --warmup_steps 3 --max_lr 3e-3 --val_every 4 "
        "--val_tokens 1000 --hellaswag_every 0 --sample_every 0 --save_every 4 "
        "--log_every 1 --device cpu --no-compile --no-plot").split()
ENDLESS = ["--max_steps", 100_000, "--val_every", 0]  # for a run that a test stops


def sources():
    """The program's own Python files, without the tests."""
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    return [path for path in paths if path.parent.name != "tests"]


class Run(NamedTuple):
    """A finished run: its log directory, and its log as `read_log` returns it."""

    log_dir: Path
    log: dict


def flags_of(shards, log_dir, *flags):
    """The flags of a tiny run; later flags override earlier ones."""
    return [*TINY, "--data_dir", shards, "--log_dir", log_dir, *flags]


# ------------------------------------------------------------------------------------------------ processes


def command_line(command, fault=None):
    """The full command for `script --flags` or `torchrun N script --flags`; faults go through faulty.py."""
    if fault is not None:
        script = next(i for i, word in enumerate(command) if str(word).endswith(".py"))
        command = [*command[:script], "tests/faulty.py", *command[script:]]
    if command[0] == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={command[1]}"]
        command = [*launcher, *command[2:]]
    return [sys.executable, *map(str, command)]


def environment(fault=None, more=None):
    """The environment of a script: one thread, as in `train`, since their runs are compared bit by bit."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault or "", **(more or {})}


def run_script(*command, check=True, fault=None, env=None, timeout=280):
    """Run `script --flags` or `torchrun N script --flags` to its end; return the finished process.

    check: the exit status must be 0. fault: code for faulty.py.
    """
    process = subprocess.run(
        command_line(command, fault), cwd=ROOT, env=environment(fault, env), timeout=timeout,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def run_here(module, *flags, stdin=""):
    """Run a script's module in this process, which saves the imports; return the same as run_script.

    stdin: the text that is piped into it.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    err.reconfigure(errors="backslashreplace")  # like Python's own stderr
    status = 0
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), one_thread(),
          unittest.mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))):
        try:
            files.run_script(module.main, module.parse_args(list(map(str, flags))))
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):  # Python prints it
                print(status, file=err)
                status = 1
    for stream in (out, err):
        stream.flush()
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(flags, status or 0, *texts)


def run_until_killed(*command, fault):
    """Run a script whose fault kills it."""
    process = run_script(*command, fault=fault, check=False)
    assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr


def start_script(*command, fault=None):
    """Start a script and return the Popen, with stdout and stderr in one pipe. fault: code for faulty.py."""
    return subprocess.Popen(
        command_line(command, fault), cwd=ROOT, env=environment(fault), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )


def wait_for_line(process, words):
    """Read the output of a started script up to the line with these words, and return that line."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the process ended without {words!r}")


def children(pid):
    """The process ids of a process's children, in the order of their start."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def ranks_of(process):
    """The process ids of the ranks of a started torchrun, by rank."""
    return children(process.pid)


def kill_all(process):
    """Send SIGKILL to a started script and its ranks, like a machine that goes down; return the output."""
    for pid in [process.pid, *ranks_of(process)]:
        os.kill(pid, signal.SIGKILL)
    return process.communicate()[0]


def assert_refused(process, *words):
    """The script exited with status 2 and one error line that contains these words.

    argparse prints its usage before that line.
    """
    assert process.returncode == 2, (process.returncode, process.stderr)
    lines = process.stderr.strip().splitlines()
    lines = lines[1:] if lines[0].startswith("usage:") else lines
    assert len(lines) == 1, process.stderr
    line = lines[0]
    assert words and all(str(word) in line for word in words), line
    assert "[Errno" not in line, line


# ----------------------------------------------------------------------------------------------------- runs


def train(shards, log_dir, *flags):
    """Train a tiny model in this process, on one thread; return its log as `read_log` does."""
    with one_thread():
        train_gpt2.main(train_gpt2.parse_args(list(map(str, flags_of(shards, log_dir, *flags)))))
    return read_log(log_dir)


@contextlib.contextmanager
def one_thread():
    """Compute on one thread: tiny models gain nothing from two, which take ten times as long when busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_log(log_dir):
    """The values in log.txt except the timings: {(step, stream): text}. Each may occur only once."""
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    figures = {(int(step), stream): value for step, stream, value in lines if stream != "tok/s"}
    assert len(figures) == sum(stream != "tok/s" for _, stream, _ in lines)
    return figures


def weights(log_dir, name):
    """The tensor files of checkpoint `name`, optimizer included: {file name: bytes}."""
    return {path.name: path.read_bytes() for path in (log_dir / name).glob("*.safetensors")}


def copy_run(log_dir, to, without=None):
    """Copy a log directory, without the checkpoint of that name; return the copy."""
    return shutil.copytree(log_dir, to, ignore=shutil.ignore_patterns(without) if without else None)


def assert_close(one, other, tolerance=1e-5):
    """Two logs have the same keys, and values that differ by at most the tolerance."""
    assert one.keys() == other.keys()
    far = {key: (value, other[key]) for key, value in one.items()
           if not abs(float(value) - float(other[key])) <= tolerance}
    assert not far


def assert_same_end(log_dir, whole):
    """A run ended in the same bits as the uninterrupted run: log, weights, optimizer and metadata."""
    assert read_log(log_dir) == whole.log
    for name in (checkpoint.numbered(whole.log_dir)[0].name, "best"):
        assert weights(log_dir, name) == weights(whole.log_dir, name)
        assert checkpoint.read_meta(log_dir / name) == checkpoint.read_meta(whole.log_dir / name)


def names_of(log_dir):
    """The numbered checkpoints, the newest first."""
    return [path.name for path in checkpoint.numbered(log_dir)]


def assert_finite(model):
    assert all(p.isfinite().all() for p in model.parameters())
