"""Faults in the data: damaged shards and HellaSwag files, killed preparations, servers that are busy or lie.

docs/reliability.md lists them.
"""

import gzip
import http.server
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import hub
import make
import numpy as np
import pytest
from runs import assert_refused, kill_all, ranks_of, read_log, run_here, run_script, start_script, train

import fineweb_edu
import hellaswag
from kit import files
from kit import shards as shards_module
from kit.files import UserError
from kit.shards import open_shards
from train_gpt2 import DataLoaderLite

# --------------------------------------------------------------------------------------------------- shards


def damage_shards(data, how):
    """Damage the second train shard of a directory, or add one; return its path."""
    path = sorted(data.glob("*_train_*.npy"))[1]
    ids = np.load(path)
    if how == "odd size":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "another dtype":
        np.save(path, ids.astype(np.int32))
    elif how == "replaced":  # by a shard of the same size
        np.save(path, ids[::-1])
    elif how == "added":
        path = Path(shutil.copy(path, data / "data_train_000099.npy"))
    else:
        make.damage(path, how)
    return path


@pytest.mark.parametrize("how, words", [
    ("truncated", "has .* bytes, its manifest says"), ("empty", "0 bytes, its manifest says"),
    ("odd size", "bytes, its manifest says"), ("another dtype", "bytes, its manifest says"),
    ("missing", "is missing"), ("added", "not in manifest"),
    ("replaced", "digest is .*, its manifest says"),
])
def test_a_damaged_shard_is_found_before_the_run_starts(shards, tmp_path, how, words):
    make.copy_shards(shards, tmp_path / "data")
    path = damage_shards(tmp_path / "data", how)
    with pytest.raises(UserError, match=f"{path.name}.*{words}"):
        train(tmp_path / "data", tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("how, words", [
    ("truncated", "complete"), ("empty", "complete"), ("odd size", "complete"), ("another dtype", "int32"),
    ("missing", "missing"), ("added", "missing"),
])
def test_a_damaged_shard_without_a_manifest_is_refused(shards, tmp_path, how, words):
    """build-nanogpt writes shards without a manifest."""
    make.copy_shards(shards, tmp_path / "data", manifest=False)
    damage_shards(tmp_path / "data", how)
    with pytest.raises(UserError, match=words):
        open_shards(tmp_path / "data", "train")


def test_shards_are_read_completely_only_once(shards, tmp_path, calls_of):
    """A run checks their digests when it first uses them, and again when a file has changed."""
    make.copy_shards(shards, tmp_path / "data")
    digested = calls_of(shards_module, "digest")
    names = [shard["file"] for shard in shards_module.read_manifest(tmp_path / "data")["shards"]]

    def verified():
        digested.clear()
        shards_module.verify_changed(tmp_path / "data")
        return [Path(path).name for path, in digested]

    assert verified() == names
    assert verified() == []
    (tmp_path / "data" / names[3]).touch()
    assert verified() == [names[3]]
    (tmp_path / "data" / ".verified.json").write_text("[]")
    assert verified() == names


def test_a_token_beyond_the_vocabulary_is_found_before_it_is_trained_on(shards, tmp_path):
    """Not earlier: the step before is recorded, and a run that ends there does not need that batch."""
    make.copy_shards(shards, tmp_path / "data", manifest=False)  # which would vouch for the ids
    path, tokens, start = DataLoaderLite(4, 32, data_dir=tmp_path / "data").place(3 * 8 + 1)  # of step 3
    ids = np.array(tokens)
    ids[start + 5] = 600
    np.save(path, ids)
    with pytest.raises(UserError, match=f"{path.name} contains id 600 at offset {start + 5}, but the"):
        train(tmp_path / "data", tmp_path / "log")
    assert max(read_log(tmp_path / "log"))[0] == 2
    assert max(train(tmp_path / "data", tmp_path / "shorter", "--max_steps", 3))[0] == 3


def test_short_shards_give_each_window_once_an_epoch(tmp_path):
    """Each epoch has a new order; a shard shorter than a window has none."""
    make.write_shards(tmp_path, val_000000=range(50), train_000001=range(1000, 2000),
                      train_000002=range(2000, 2003), train_000003=range(3000, 3777))
    loader = DataLoaderLite(1, 8, data_dir=tmp_path, seed=5)
    assert loader.num_windows == 999 // 8 + 776 // 8
    epochs = [[int(loader.next_batch()[0][0, 0]) for _ in range(loader.num_windows)] for _ in range(3)]
    starts = [1000 + 8 * i for i in range(999 // 8)] + [3000 + 8 * i for i in range(776 // 8)]
    assert all(sorted(epoch) == starts for epoch in epochs)
    assert epochs[0] != starts and epochs[0] != epochs[1] != epochs[2]
    loader.position = loader.num_windows + 17  # the position is all the state there is
    assert int(loader.next_batch()[0][0, 0]) == epochs[1][17]
    val = DataLoaderLite(2, 8, split="val", data_dir=tmp_path)
    assert [int(row[0]) for _ in range(3) for row in val.next_batch()[0]] == [0, 8, 16, 24, 32, 40]


# ---------------------------------------------------------------------------------------------- preparation


def test_sigkill_during_preparation_loses_no_finished_shard(tmp_path, texts, learned, faults):
    inputs = [make.write_parquet(tmp_path / name, texts * 12) for name in ("a.parquet", "b.parquet")]
    flags = ["--input", *inputs, "--tokenizer", learned, "--shard_size", 100_000, "--num_proc", 2,
             "--data_dir"]
    killed, whole = tmp_path / "killed" / "data", tmp_path / "whole" / "data"
    finished = {}
    for shards in (2, 9):
        process = start_script("fineweb_edu.py", *flags, killed, fault="small_batches(10**6)")
        while process.poll() is None and len(list(killed.glob("*.npy"))) < shards:
            time.sleep(0.005)
        kill_all(process)
        manifest = json.loads((killed / "manifest.json").read_text())
        assert not manifest["complete"] and len(manifest["shards"]) >= shards - 1
        assert manifest["next"][:2] > [0, 0] or shards == 2  # after the first batch
        with pytest.raises(UserError, match="interrupted"):
            open_shards(killed, "train")
        for name, changed in finished.items():  # no finished shard is written again
            assert (killed / name).stat().st_mtime_ns == changed
        finished = {
            shard["file"]: (killed / shard["file"]).stat().st_mtime_ns for shard in manifest["shards"]
        }
    assert_refused(run_here(fineweb_edu, *flags, killed), str(killed), "another version")  # larger batches
    (killed / ".data_train_000099.npy.tmp").touch()  # what a kill may leave
    faults.small_batches(10**6)
    assert "continuing after" in run_here(fineweb_edu, *flags, killed).stdout
    run_here(fineweb_edu, *flags, whole)
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in killed.iterdir()} == expected and len(expected) > 15


def test_sigkill_of_a_worker_ends_the_preparation_with_the_reason(tmp_path, texts, learned):
    """The system kills a worker when memory runs out. Only tiktoken has workers."""
    make.write_jsonl(tmp_path / "a.jsonl", texts * 40)
    flags = ["--input", tmp_path / "a.jsonl", "--data_dir", tmp_path / "out", "--shard_size", 10_000]
    process = start_script("fineweb_edu.py", "--tokenizer", learned, "--num_proc", 2, *flags,
                           fault="small_batches(10**5); without_gigatoken()")
    while not list((tmp_path / "out").glob("*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    started = time.monotonic()
    worker = next(pid for pid in ranks_of(process)
                  if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    assert "a worker was killed" in process.communicate()[0]
    assert process.returncode == 1 and time.monotonic() - started < 20


def test_a_worker_that_dies_while_it_sends_its_result_is_noticed(learned):
    """The process pool itself would wait for the rest of the result for ever."""
    encoder, unfinished = fineweb_edu.Encoder(learned, 1), Future()
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=[60])
    worker.start()
    timers = threading.Timer(1.5, worker.kill), threading.Timer(15, unfinished.set_result, [None])
    for timer in timers:
        timer.start()
    with pytest.raises(BrokenProcessPool):
        encoder.result(unfinished)
    timers[1].cancel()


def test_a_second_preparation_of_one_data_directory_is_refused(tmp_path, texts, learned):
    (tmp_path / "a.txt").write_text("\n".join(texts))
    flags = ["--input", tmp_path / "a.txt", "--tokenizer", learned, "--data_dir", tmp_path / "data"]
    with files.locked(tmp_path / "data"):
        process = run_script("fineweb_edu.py", *flags, check=False)
        assert_refused(process, tmp_path / "data", "in use")
    assert not (tmp_path / "data").exists()  # it was made for the lock only
    assert run_here(fineweb_edu, *flags).returncode == 0


# ------------------------------------------------------------------------------------ the hub and downloads


def test_a_hub_that_is_busy_and_breaks_off_is_asked_again(tmp_path, texts, learned):
    content = make.write_parquet(tmp_path / "part.parquet", texts).read_bytes()
    command = ["fineweb_edu.py", "--tokenizer", learned, "--num_proc", 1, "--name", "default", "--data_dir"]
    faults = ["503", "429", "503", "half", "503", "half"]
    with hub.serve_dataset({"data/train-00000.parquet": content}, faults=faults) as server:
        settings = dict(env=hub.environment(server, tmp_path), fault="short_pauses(0.1)")
        process = run_script(*command, tmp_path / "out", **settings)
        assert server.faults == [] and "retrying in 0.1 s" in process.stderr
        shards_module.verify(tmp_path / "out")
        # a server that never recovers is one line, and half a download never gets its final name
        server.faults[:] = ["none"]
        shutil.rmtree(tmp_path / "cache")
        process = run_script(*command, tmp_path / "new", check=False, **settings)
        *retries, last = process.stderr.splitlines()
        assert process.returncode == 2, process.stderr
        assert re.match(r"error: hf://.* can't be downloaded", last)
        assert len(retries) == 5 and not list((tmp_path / "cache").rglob("*.parquet"))
    for name in (hub.REPOSITORY, "someone/mistyped"):  # the server is gone
        process = run_script(*command, tmp_path / "other", "--dataset", name, check=False, **settings)
        assert_refused(process, f"--dataset {name}", "Without a network, --input")
        assert not (tmp_path / "other").exists()


GOOD = json.dumps(make.ROW)


@pytest.mark.parametrize("line, words", [
    ("<!DOCTYPE html>", "not JSON"), (GOOD[:-9], "not JSON"), ("[1]", "not a HellaSwag example"),
    (GOOD.replace('"d"', '"d", "e"'), "four texts"), (GOOD.replace(', "d"', ""), "four texts"),
    (GOOD.replace(', "label": 1', ""), "test split"), (GOOD.replace("1}", '""}'), "test split"),
    (GOOD.replace("1}", "-1}"), "no label .-1.*test split"), (GOOD.replace("1}", '"-1"}'), "test split"),
    (GOOD.replace("1}", "1.5}"), "must be 0, 1, 2 or 3, not 1.5"),
    (GOOD.replace("1}", "7}"), "label"), (GOOD.replace("1}", "true}"), "label"),
    (GOOD.replace("A man", ""), "ctx"),
], ids=["html", "cut off", "no object", "five endings", "three endings", "no label", "empty label",
        "label -1", "label '-1'", "label 1.5", "label 7", "label true", "empty ctx"])
def test_a_damaged_hellaswag_file_is_refused_with_the_line(tmp_path, line, words):
    (tmp_path / "data.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(UserError, match=f"data.jsonl:2: .*{words}"):
        list(hellaswag.iterate_examples(tmp_path / "data.jsonl"))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a file of three lines under /good, and faults under other names."""

    pages = {
        "/good": (200, (GOOD + "\n").encode() * 3), "/html": (200, b"<html>busy</html>"),
        "/short": (200, GOOD.encode()), "/error": (503, GOOD.encode()),
    }

    def do_GET(self):
        fault = self.server.faults.pop(0) if self.server.faults else self.path
        torn = fault == "/torn"
        status, content = self.pages["/good" if torn else fault]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if torn else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with hub.serve(Server, faults=[]) as server:
        yield server


def three_lines(path):
    """What a download has to be: raises UserError otherwise."""
    if len(Path(path).read_text().splitlines()) != 3:
        raise UserError("not three lines")


@pytest.mark.parametrize("page", ["html", "short", "error", "torn"])
def test_a_damaged_download_leaves_no_file(tmp_path, faults, server, page):
    faults.short_pauses(0.01, count=2)
    path = tmp_path / "new" / "lines.txt"
    with pytest.raises(UserError, match=page):
        files.fetch(f"{server.url}/{page}", path, three_lines, "ask a friend")
    assert list(path.parent.iterdir()) == []


def test_a_download_is_tried_again_and_made_once(tmp_path, faults):
    faults.short_pauses(0.01, count=2)
    path = tmp_path / "new" / "lines.txt"
    with hub.serve(Server, faults=["/error", "/torn"]) as server:
        url = f"{server.url}/good"
        assert files.fetch(url, path, three_lines, "ask a friend") == path and not server.faults
    three_lines(path)
    assert files.fetch(url, path, three_lines, "ask a friend") == path  # no server is asked
    with pytest.raises(UserError, match="ask a friend"):
        files.fetch(url, tmp_path / "other.txt", three_lines, "ask a friend")


def test_hellaswag_is_downloaded_from_the_hub_once(tmp_path, whole):
    """The pinned revision of the validation split: complete or refused, then read from the cache."""
    row = {**make.ROW, "label": "1", "activity_label": "Roofing"}  # the hub stores labels as text
    pages = {name: make.parquet_bytes([row] * count) for name, count in (("whole", 10042), ("short", 10041))}
    command = ["hellaswag.py", "-m", whole.log_dir, "-d", "cpu", "--limit", 2, "--json", "-"]
    _, repository, revision, path = re.match(r"(hf://datasets/)(.+)@(\w+)/(.+)", hellaswag.DATA).groups()
    for name, content in pages.items():
        with hub.serve_dataset({path: content}, repository=repository, revision=revision) as server:
            settings = dict(env=hub.environment(server, tmp_path / name), check=False)
            process = run_script(*command, **settings)
            if name == "short":
                assert_refused(process, "has 10041 examples, not 10042", "--hellaswag_data")
                continue
            assert json.loads(process.stdout)["n"] == 2, process.stderr
        process = run_script(*command, **settings)  # the server is gone
        assert json.loads(process.stdout)["data"] == hellaswag.DATA
    process = run_script(*command, env={**settings["env"], "HF_HOME": str(tmp_path / "new")}, check=False)
    assert_refused(process, "name a local copy with --hellaswag_data")  # one line, no list of retries


def test_a_tokenizer_in_the_data_directory_is_used_or_left_alone(tmp_path, learned, texts):
    source = make.write_jsonl(tmp_path / "topics.jsonl", texts[:20])
    data = tmp_path / "data"
    data.mkdir()
    (data / "tokenizer.json").write_text("{}")
    flags = ["--input", source, "--data_dir", data, "--num_proc", 1, "--tokenizer"]
    assert_refused(run_here(fineweb_edu, *flags, learned), data / "tokenizer.json", "not the same tokenizer")
    assert (data / "tokenizer.json").read_text() == "{}"
    shutil.copy(learned, data / "tokenizer.json")
    assert run_here(fineweb_edu, *flags, data / "tokenizer.json").returncode == 0


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.parquet"])
def test_hellaswag_is_read_from_the_files_that_people_have(tmp_path, name):
    """Labels as numbers or text, a byte order mark, blank lines, gzip, the hub's parquet."""
    labels = map(str, range(4)) if name == "data.parquet" else (0, "1", 2.0, "3.0")
    rows = [{**make.ROW, "label": label} for label in labels]
    if name == "data.parquet":
        (tmp_path / name).write_bytes(make.parquet_bytes(rows))
    else:
        content = ("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n\n").encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    examples = list(hellaswag.iterate_examples(tmp_path / name))
    assert [example["label"] for example in examples] == [0, 1, 2, 3] and examples[0]["ctx"] == "A man"


def test_a_damaged_gzip_file_is_refused_in_one_line(tmp_path):
    """zlib's error is neither an OSError nor a ValueError."""
    content = bytearray(gzip.compress(b"".join(json.dumps({**make.ROW, "ind": i}).encode() + b"\n"
                                               for i in range(2000))))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "data.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match="data.jsonl.gz"):
        list(hellaswag.iterate_examples(tmp_path / "data.jsonl.gz"))
