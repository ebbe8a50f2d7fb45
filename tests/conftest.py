"""What the tests share: small data made here, the scripts run as a user runs them, real data where it is.

GPT2_TEST_DATA names a folder with tinyshakespeare.txt and hellaswag_val_sample.jsonl, TIKTOKEN_CACHE_DIR one
with GPT-2's vocabulary. Tests that need them skip with the reason where they are missing.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# a GPT that trains in seconds on the shards below; everything else is off unless a test asks for it
TINY = ("--n_layer 2 --n_head 2 --n_embd 32 --vocab_size 512 --sequence_length 32 --micro_batch_size 4 "
        "--total_batch_size 256 --max_steps 12 --warmup_steps 3 --max_lr 3e-3 --val_every 4 "
        "--val_tokens 1000 --hellaswag_every 0 --sample_every 0 --save_every 4 "
        "--device cpu --no-compile --no-plot").split()


def run_script(*command, check=True, env=None, timeout=280):
    """Run one of the scripts, or `torchrun N script`, as a user would; returns the finished process."""
    process = subprocess.run(
        command_line(command), cwd=ROOT, env={**os.environ, **(env or {})}, timeout=timeout,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def command_line(command):
    if command[0] == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={command[1]}"]
        command = [*launcher, *command[2:]]
    return [sys.executable, *map(str, command)]


def start_script(*command, fault=None):
    """The same, begun only: a subprocess.Popen whose output is read as it comes. fault: see faulty.py."""
    if fault is not None:
        script = next(i for i, word in enumerate(command) if str(word).endswith(".py"))
        command = [*command[:script], "tests/faulty.py", *command[script:]]
    return subprocess.Popen(command_line(command), cwd=ROOT, env={**os.environ, "FAULT": fault or ""},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_line(process, words):
    """Read what a started script prints, up to the line with these words."""
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the process ended without {words!r}")


def ranks_of(process):
    """The processes that a started torchrun has started, by rank."""
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def kill_all(process):
    """SIGKILL to a started script and to its ranks, as when a machine goes down; returns its last words."""
    for pid in [process.pid, *ranks_of(process)]:
        os.kill(pid, signal.SIGKILL)
    return process.communicate()[0]


def train(shards, log_dir, *flags):
    """A run in this process; returns its log as `read_log` does."""
    import train_gpt2

    train_gpt2.main(train_gpt2.parse_args(list(map(str, flags_of(shards, log_dir, *flags)))))
    return read_log(log_dir)


def flags_of(shards, log_dir, *flags):
    return [*TINY, "--data_dir", shards, "--log_dir", log_dir, *flags]


def read_log(log_dir):
    """The figures of log.txt but the timings, {(step, stream): as written}; each must stand there once."""
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    figures = {(int(step), stream): value for step, stream, value in lines if stream != "tok/s"}
    assert len(figures) == sum(stream != "tok/s" for _, stream, _ in lines)
    return figures


def weights(log_dir, name):
    """The tensors of a checkpoint as bytes, optimizer included."""
    return {path.name: path.read_bytes() for path in (log_dir / name).glob("*.safetensors")}


def close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    return all(abs(float(value) - float(other[key])) <= tolerance for key, value in one.items())


@pytest.fixture(scope="session")
def whole(shards, tmp_path_factory):
    """An uninterrupted run: its directory and its log."""
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    return log_dir, train(shards, log_dir)


def same_end(log_dir, whole):
    """Whether a run has ended in the bits of the whole one: its log, its weights, its optimizer."""
    import checkpoint

    assert read_log(log_dir) == whole[1]
    for name in (checkpoint.numbered(whole[0])[0].name, "best"):
        assert weights(log_dir, name) == weights(whole[0], name)
        assert checkpoint.read_meta(log_dir / name) == checkpoint.read_meta(whole[0] / name)
    return True


def with_biases(model):
    """The model with biases that are not zero, as a new one's are: one that is forgotten is seen."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def refused(process, *words):
    """Whether a script ended as a user's mistake must: status 2, one line (argparse puts its usage before
    it), and the line names these words."""
    assert process.returncode == 2, (process.returncode, process.stderr)
    lines = process.stderr.strip().splitlines()
    lines = lines[1:] if lines[0].startswith("usage:") else lines
    assert len(lines) == 1, process.stderr
    line = lines[0]
    assert words and all(str(word) in line for word in words), line
    return True


@pytest.fixture(scope="session")
def texts():
    """English of some 460 KB that every Python carries, in documents."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def learned(texts, tmp_path_factory):
    """A tokenizer of 512 ids."""
    from tokenizer import train

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert train(texts, 512, path) == 512
    return str(path)


@pytest.fixture(scope="session")
def shards(texts, learned, tmp_path_factory):
    """A directory of several shards, encoded with the learned tokenizer."""
    import json

    from fineweb_edu import prepare

    folder = tmp_path_factory.mktemp("shards")
    (folder / "topics.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"files": "topics"}
    prepare([str(folder / "topics.jsonl")], folder / "data", source, tokenizer=learned, shard_size=50_000,
            val_tokens=10_000)
    return folder / "data"


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    from files import UserError
    from tokenizer import get_tokenizer

    try:
        return get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_data():
    if "GPT2_TEST_DATA" not in os.environ:
        pytest.skip("GPT2_TEST_DATA is not set")
    return Path(os.environ["GPT2_TEST_DATA"])
