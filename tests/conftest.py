"""Fixtures: small data and models, a finished run, and the real data where it is available.

GPT2_TEST_DATA names a directory with tinyshakespeare.txt and hellaswag_val_sample.jsonl, TIKTOKEN_CACHE_DIR
one with GPT-2's vocabulary. Tests that need them are skipped without them.
"""

import os
import signal
from pathlib import Path

import faulty
import make
import pytest
import torch
from runs import Run, train

from fineweb_edu import prepare
from kit.files import UserError
from tokenizer import get_tokenizer
from tokenizer import train as train_tokenizer


def pytest_configure():
    """Undo what the tests' runs would inherit: nohup's ignored SIGHUP, and the user's settings of glibc."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.pop(name, None)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_make_parametrize_id(val):
    """Readable ids for cases that are given as a list or a dict."""
    if isinstance(val, list):
        return " ".join(map(str, val))
    if isinstance(val, dict):
        return ", ".join(f"{key}={value}" for key, value in val.items())


@pytest.fixture(autouse=True)
def torch_settings():
    """One thread per pytest worker; restore the settings of torch that a run or a compilation changed."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two threads each would wait for each other
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def texts():
    """English documents, about 460 KB, that come with every Python."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def learned(texts, tmp_path_factory):
    """The path of a tokenizer of 512 ids, trained on the texts."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert train_tokenizer(texts, 512, path) == 512
    return str(path)


@pytest.fixture(scope="session")
def shards(texts, learned, tmp_path_factory):
    """A directory of several shards, the texts encoded with the learned tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    source = make.write_jsonl(folder / "topics.jsonl", texts)
    prepare([str(source)], folder / "data", {"files": "topics"}, tokenizer=learned, shard_size=50_000,
            val_tokens=10_000)
    return folder / "data"


@pytest.fixture(scope="session")
def whole(shards, tmp_path_factory):
    """An uninterrupted tiny run, for reading only: a test that changes a file works on a copy."""
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    return Run(log_dir, train(shards, log_dir))


@pytest.fixture(scope="session")
def small_run(learned, tmp_path_factory):
    """A log directory with one checkpoint: a new model of one layer, which writes noise."""
    log_dir = tmp_path_factory.mktemp("small") / "log"
    make.small_checkpoint(log_dir, make.small_gpt(32, n_layer=1), step=3, tokenizer=learned)
    return log_dir


@pytest.fixture
def faults():
    """The module faulty, for faults in this process; they end with the test."""
    with faulty.put_in():
        yield faulty


@pytest.fixture
def calls_of(monkeypatch):
    """calls_of(owner, "name"): the list of the arguments of all calls of owner.name from now on."""
    def watch(owner, name):
        calls, real = [], getattr(owner, name)

        def watched(*args, **kwargs):
            calls.append(args)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
        return calls

    return watch


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    try:
        return get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_data():
    if "GPT2_TEST_DATA" not in os.environ:
        pytest.skip("GPT2_TEST_DATA is not set")
    return Path(os.environ["GPT2_TEST_DATA"])
