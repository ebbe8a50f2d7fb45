"""Preparation in parts: joined, they are the directory that one preparation gives, byte for byte."""

import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import hub
import make
import pytest
from runs import ROOT, assert_refused, run_here, run_script, run_until_killed, start_script

import fineweb_edu
import tokenizer
from kit import shards
from kit.files import UserError
from kit.shards import open_shards, read_manifest, verify

SMALL = "small_batches(5_000)"  # a file has many batches


@pytest.fixture(autouse=True)
def many_batches(faults):
    faults.small_batches(5_000)


@pytest.fixture(scope="module")
def text(texts, tmp_path_factory):
    """A folder of six files in all formats, one without text: about 36,000 tokens."""
    folder = tmp_path_factory.mktemp("input")
    make.write_all_formats(folder, texts[:16])
    (folder / "e.txt").write_text("")
    (folder / "f.txt").write_text("<|endoftext|>".join(texts[16:24]))
    return folder


def flags_of(text, learned, *flags):
    return ["--input", text, "--tokenizer", learned, "--num_proc", 1, *flags]


def prepared(data_dir, *flags):
    """Run fineweb_edu.py, which must succeed, and return what it printed."""
    process = run_here(fineweb_edu, *flags, "--data_dir", data_dir)
    assert process.returncode == 0, process.stderr
    return process.stdout


def refused(data_dir, *flags, words):
    assert_refused(run_here(fineweb_edu, *flags, "--data_dir", data_dir), *words)


def prepare_parts(data_dir, total, *flags):
    for number in reversed(range(1, total + 1)):  # in any order
        prepared(data_dir, *flags, "--part", f"{number}/{total}")


def contents(data_dir):
    """The files of a directory, without its parts and its lock, which is empty: {name: bytes}."""
    return {path.name: path.read_bytes() for path in data_dir.iterdir()
            if path.is_file() and path.name != ".lock"}


def shard_names(data_dir):
    return [shard["file"] for shard in read_manifest(data_dir)["shards"]]


SETTINGS = {
    "shards smaller than a part": ["--shard_size", 1_000],
    "shards larger than a part": ["--shard_size", 15_000],
    "less than two shards": ["--shard_size", 30_000],
    "val_size in several shards": ["--shard_size", 2_000, "--val_size", 5_300],
    "val_size beyond the first part": ["--shard_size", 20_000, "--val_size", 25_000],
    "bin": ["--shard_size", 3_000, "--format", "bin"],
    "split_on": ["--shard_size", 3_000, "--split_on", "<|endoftext|>"],
}


@pytest.fixture(scope="module")
def whole(text, learned, tmp_path_factory):
    """whole(name of settings): the contents of one preparation with them."""
    @functools.cache
    def prepare_once(name):
        data = tmp_path_factory.mktemp("whole") / "data"
        prepared(data, *flags_of(text, learned, *SETTINGS[name]))
        return contents(data)

    return prepare_once


@pytest.mark.parametrize("total", [1, 2, 4, 6])
@pytest.mark.parametrize("name", SETTINGS)
def test_parts_become_the_bytes_of_one_preparation(tmp_path, text, learned, whole, name, total):
    flags = flags_of(text, learned, *SETTINGS[name])
    prepare_parts(tmp_path / "data", total, *flags)
    assert contents(tmp_path / "data") == {}  # parts that run at the same time share no file
    printed = prepared(tmp_path / "data", *flags, "--merge")
    assert contents(tmp_path / "data") == whole(name)
    assert "tokenizer.json" in whole(name) and len(whole(name)) > 3
    assert f"rm -r {tmp_path / 'data' / 'parts'}" in printed
    assert "already prepared" in prepared(tmp_path / "data", *flags, "--merge")
    assert "already prepared" in prepared(tmp_path / "data", *flags)
    assert contents(tmp_path / "data") == whole(name)
    tokens = verify(tmp_path / "data")
    assert tokens == sum(verify(path) for path in (tmp_path / "data" / "parts").iterdir())
    assert len(list((tmp_path / "data" / "parts").iterdir())) == total


def test_parts_come_together_from_the_disks_of_several_machines(tmp_path, text, learned, whole):
    flags = flags_of(text, learned, *SETTINGS["bin"])
    for number in (1, 2, 3):
        prepared(tmp_path / f"machine {number}", *flags, "--part", f"{number}/3")
        source = read_manifest(tmp_path / f"machine {number}" / "parts" / f"{number}-of-3")["source"]
        read = [index for index, file in enumerate(source["files"]) if "digest" in file]
        assert read == [2 * number - 2, 2 * number - 1]  # each machine reads its own files only
        shutil.copytree(tmp_path / f"machine {number}" / "parts", tmp_path / "data" / "parts",
                        dirs_exist_ok=True)
    prepared(tmp_path / "data", *flags, "--merge")
    assert contents(tmp_path / "data") == whole("bin")


def test_parts_run_at_the_same_time_and_continue_after_a_kill(tmp_path, text, learned, whole):
    flags = flags_of(text, learned, *SETTINGS["shards smaller than a part"], "--data_dir", tmp_path / "data")
    processes = [start_script("fineweb_edu.py", *flags, "--part", f"{number}/2",
                              fault=f"{SMALL}; before_shard({4 * number}, kill)") for number in (1, 2)]
    for number, process in enumerate(processes, start=1):
        process.communicate()
        folder = tmp_path / "data" / "parts" / f"{number}-of-2"
        assert process.returncode == -9 and len(shard_names(folder)) == 4 * number
    assert_refused(run_here(fineweb_edu, *flags, "--merge"), "1/2, 2/2", "--part 1/2")
    for number in (1, 2):
        folder = tmp_path / "data" / "parts" / f"{number}-of-2"
        finished = {name: (folder / name).stat().st_mtime_ns for name in shard_names(folder)}
        assert "continuing after" in run_here(fineweb_edu, *flags, "--part", f"{number}/2").stdout
        assert len(shard_names(folder)) > len(finished)
        for name, changed in finished.items():
            assert (folder / name).stat().st_mtime_ns == changed
    assert run_here(fineweb_edu, *flags, "--merge").returncode == 0
    assert contents(tmp_path / "data") == whole("shards smaller than a part")


@pytest.mark.parametrize("name, fault, kept", [
    ("shards smaller than a part", "before_shard(9, kill)", 9),
    ("shards smaller than a part", "after_first_shard(kill)", 0),
    ("shards larger than a part", "before_shard(2, kill)", 2),
    ("less than two shards", "before_shard(1, kill)", 1),
    ("less than two shards", "after_first_shard(kill)", 0),
])
def test_a_merge_continues_after_a_kill(tmp_path, text, learned, whole, name, fault, kept):
    flags = flags_of(text, learned, *SETTINGS[name])
    data = tmp_path / "data"
    prepare_parts(data, 4, *flags)
    run_until_killed("fineweb_edu.py", *flags, "--data_dir", data, "--merge", fault=fault)
    finished = {name: (data / name).stat().st_mtime_ns for name in shard_names(data)}
    assert len(finished) == kept
    with pytest.raises(UserError, match="interrupted|--merge"):
        open_shards(data, "train")
    refused(data, *flags, words=[data, "--merge"])  # its places are not those of a preparation
    assert ("continuing after" in prepared(data, *flags, "--merge")) == (kept > 0)
    assert contents(data) == whole(name)
    for name, changed in finished.items():
        assert (data / name).stat().st_mtime_ns == changed


def test_a_merge_does_not_continue_with_other_parts(tmp_path, text, learned):
    flags = flags_of(text, learned, *SETTINGS["bin"])
    data = tmp_path / "data"
    prepare_parts(data, 2, *flags)
    run_until_killed("fineweb_edu.py", *flags, "--data_dir", data, "--merge", fault="before_shard(3, kill)")
    before = contents(data)
    shutil.rmtree(data / "parts")
    refused(data, *flags, "--part", "1/3", words=[data, "already contains shards"])
    for number in (1, 2, 3):
        prepared(tmp_path / "other", *flags, "--part", f"{number}/3")
    (tmp_path / "other" / "parts").rename(data / "parts")
    refused(data, *flags, "--merge", words=[data, "other parts", "manifest.json"])
    # a file of the first part changes, which has a higher number than the part that was being joined
    shutil.rmtree(data / "parts")
    shutil.copytree(text, tmp_path / "changed")
    with gzip.open(tmp_path / "changed" / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "something else"}')
    flags[1] = tmp_path / "changed"
    prepare_parts(tmp_path / "third", 2, *flags)
    (tmp_path / "third" / "parts").rename(data / "parts")
    refused(data, *flags, "--merge", words=[data, "different settings (source)"])
    assert contents(data) == before


@pytest.fixture(scope="module")
def two_parts(text, learned, tmp_path_factory):
    """Two parts, for reading only."""
    data = tmp_path_factory.mktemp("two") / "data"
    prepare_parts(data, 2, *flags_of(text, learned, "--shard_size", 3_000))
    return data


@pytest.mark.parametrize("flags, words", [
    (["--shard_size", 3_001], ["1-of-2", "different settings (shard_size)", "--merge"]),
    (["--val_size", 3_000], ["different settings (val_tokens_asked)"]),
    (["--format", "bin"], ["different settings (file_format)"]),
    (["--split_on", "x"], ["different settings (split_on)"]),
    (["--text_column", "n"], ["different settings (text_column)"]),
    (["--tokenizer", "other.json"], ["different settings (tokenizer)"]),
    (["--input", "f.txt"], ["1-of-2", "different input (files)"]),
])
def test_a_merge_needs_the_flags_of_the_parts(tmp_path, text, texts, learned, two_parts, flags, words,
                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(two_parts, tmp_path / "data")
    (tmp_path / "f.txt").write_text("other")
    tokenizer.train(texts[:9], 512, tmp_path / "other.json")
    flags = flags_of(text, learned, "--shard_size", 3_000, *flags, "--merge")
    refused(tmp_path / "data", *flags, words=words)
    assert contents(tmp_path / "data") == {}


def change_part(folder, change, tmp_path, text, flags):
    """Change the second of two parts."""
    if change == "missing":
        shutil.rmtree(folder)
    elif change == "incomplete":
        manifest = read_manifest(folder)
        manifest.update(complete=False, next=[5, 0, 0], batches=[])
        shards.write_manifest(folder, manifest)
    elif change == "damaged":
        make.damage(sorted(folder.glob("*.npy"))[1], "one byte flipped")
    elif change == "a shard less":
        sorted(folder.glob("*.npy"))[1].unlink()
    elif change == "another's":
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("1-of-2"), folder)
    elif change == "of three":
        prepared(folder.parent.parent, *flags, "--part", "3/3")
    else:
        shutil.rmtree(folder)
        if change == "other input":
            shutil.copytree(text, tmp_path / "more")
            (tmp_path / "more" / "g.txt").write_text("one more")
            flags = ["--input", tmp_path / "more", *flags[2:]]
        else:
            flags = [*flags, "--val_size", 1]
        prepared(folder.parent.parent, *flags, "--part", "2/2")


@pytest.mark.parametrize("change, words", [
    ("missing", ["parts: missing or not complete: 2/2;", "--part 2/2"]),
    ("incomplete", ["parts: missing or not complete: 2/2;", "--part 2/2"]),
    ("damaged", ["2-of-2_train_000001.npy", "has changed"]),
    ("a shard less", ["2-of-2_train_000001.npy", "missing"]),
    ("another's", ["2-of-2", "different settings (part)"]),
    ("of three", ["parts of 2 and of 3", "remove those"]),
    ("other input", ["2-of-2", "different input (files)"]),
    ("other flags", ["2-of-2", "different settings (val_tokens_asked)"]),
])
def test_a_part_that_does_not_fit_is_named(tmp_path, text, learned, two_parts, change, words):
    flags = flags_of(text, learned, "--shard_size", 3_000)
    shutil.copytree(two_parts, tmp_path / "data")
    change_part(tmp_path / "data" / "parts" / "2-of-2", change, tmp_path, text, flags)
    refused(tmp_path / "data", *flags, "--merge", words=words)
    started = change == "damaged"  # found when the shard is joined
    assert (tmp_path / "data" / "manifest.json").exists() == started


@pytest.mark.parametrize("flags, words", [
    (["--part", "9/4"], ["--part", "I from 1 to N", "'9/4'"]), (["--part", "0/4"], ["'0/4'"]),
    (["--part", "4"], ["'4'"]), (["--part", "/32"], ["'/32'"]), (["--part", "1/-2"], ["'1/-2'"]),
    (["--part", "1/7"], ["--part 1/7", "6 files", "at most 6 parts"]),
    (["--part", "1/2", "--merge"], ["--merge", "not allowed"]),
    (["--merge"], ["parts has no parts to merge", "--part 1/N"]),
])
def test_wrong_parts_are_refused(tmp_path, text, learned, flags, words):
    refused(tmp_path / "data", *flags_of(text, learned), *flags, words=words)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("source", [["--input", "-"], ["--dataset", "tinyshakespeare"], ["--verify", "x"]])
def test_only_files_are_prepared_in_parts(tmp_path, source):
    refused(tmp_path, *source, "--part", "1/1", words=["--part", "only for files"])
    refused(tmp_path, *source, "--merge", words=["--merge", "only for files"])


def test_a_part_is_not_prepared_beside_other_shards(tmp_path, text, learned, whole):
    flags = flags_of(text, learned, *SETTINGS["bin"])
    prepared(tmp_path / "data", *flags)
    refused(tmp_path / "data", *flags, "--part", "1/2", words=[tmp_path / "data", "already contains shards"])
    for number in (1, 2):
        prepared(tmp_path / "other", *flags, "--part", f"{number}/2")
    (tmp_path / "other" / "parts").rename(tmp_path / "data" / "parts")
    refused(tmp_path / "data", *flags, "--shard_size", 10, "--merge", words=["shard_size"])
    assert "already prepared" in prepared(tmp_path / "data", *flags, "--merge")
    assert "already prepared" in prepared(tmp_path / "data", *flags, "--part", "1/2")
    assert contents(tmp_path / "data") == whole("bin")


def test_a_run_says_that_parts_are_not_merged(two_parts):
    with pytest.raises(UserError, match="has parts, but no train shards.*--merge"):
        open_shards(two_parts, "train")


def test_a_text_that_is_too_short_for_its_val_split_is_refused_by_the_merge(tmp_path, text, learned):
    flags = flags_of(text, learned, "--val_size", 10**6)
    prepare_parts(tmp_path / "data", 2, *flags)
    refused(tmp_path / "data", *flags, "--merge", words=["--val_size 1000000 leaves nothing to train on"])


# ------------------------------------------------------------------------------- inputs that need some repair


def test_a_part_with_nulls_does_not_ask_for_new_parts_elsewhere(tmp_path, texts, learned):
    """--skip_null changes nothing in a part that ended without it."""
    make.write_jsonl(tmp_path / "a.jsonl", texts[:9])
    make.write_jsonl(tmp_path / "b.jsonl", [*texts[9:18], {"text": None}, *texts[18:20]])
    flags = ["--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--tokenizer", learned,
             "--shard_size", 2_000]
    prepared(tmp_path / "data", *flags, "--part", "1/2")
    refused(tmp_path / "data", *flags, "--part", "2/2", words=["b.jsonl:10", "--skip_null"])
    prepared(tmp_path / "data", *flags, "--skip_null", "--part", "2/2")
    refused(tmp_path / "data", *flags, "--merge", words=["2-of-2", "different settings (skip_null)"])
    prepared(tmp_path / "data", *flags, "--skip_null", "--merge")
    prepared(tmp_path / "whole" / "data", *flags, "--skip_null")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole" / "data")


def test_a_file_of_a_part_may_be_repaired_but_no_file_added(tmp_path, texts, learned):
    files = [make.write_jsonl(tmp_path / f"{name}.jsonl", texts[9 * n : 9 * n + 9])
             for n, name in enumerate("abcd")]
    flags = ["--input", *files, "--tokenizer", learned, "--shard_size", 50_000]
    complete = files[3].read_text()
    files[3].write_text(complete[: len(complete) // 2])
    prepared(tmp_path / "data", *flags, "--part", "1/2")
    process = run_here(fineweb_edu, *flags, "--data_dir", tmp_path / "data", "--part", "2/2")
    assert_refused(process, "d.jsonl:", "kept: repair or replace the file, and the same command continues")
    assert len(shard_names(tmp_path / "data" / "parts" / "2-of-2")) == 1
    more = [make.write_jsonl(tmp_path / f"{name}.jsonl", texts[40:44]) for name in "ef"]
    more = ["--input", *files, *more, *flags[5:]]  # c would become a file of part 1
    refused(tmp_path / "data", *more, "--part", "2/2", words=["2-of-2", "different settings (source)"])
    files[3].write_text(complete)
    assert "keeping 1 shard" in prepared(tmp_path / "data", *flags, "--part", "2/2")
    prepared(tmp_path / "data", *flags, "--merge")
    prepared(tmp_path / "whole" / "data", *flags)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole" / "data")


def test_a_preparation_continues_where_no_txt_is_left_to_split(tmp_path, texts, learned, faults):
    """--split_on is accepted if any input file is a .txt, even one of another part or one already read."""
    (tmp_path / "a.txt").write_text(" % ".join(texts[:9]))
    make.write_jsonl(tmp_path / "b.jsonl", texts[9:20])
    flags = ["--input", tmp_path / "a.txt", tmp_path / "b.jsonl", "--tokenizer", learned, "--split_on", " % ",
             "--shard_size", 4_000]
    with faults.put_in():
        faults.without_last_shards()
        prepared(tmp_path / "killed" / "data", *flags)
    assert read_manifest(tmp_path / "killed" / "data")["next"][0] == 1
    assert "continuing after" in prepared(tmp_path / "killed" / "data", *flags)
    prepare_parts(tmp_path / "data", 2, *flags)
    prepared(tmp_path / "data", *flags, "--merge")
    prepared(tmp_path / "whole" / "data", *flags)
    assert contents(tmp_path / "killed" / "data") == contents(tmp_path / "whole" / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole" / "data")


# ------------------------------------------------------------------------------------------------ of the hub


def test_parts_of_a_hub_dataset_have_one_revision(tmp_path, texts, learned):
    """A part takes the revision of the parts that it finds; others must be told apart by the merge."""
    names = [f"data/train-0000{n}.jsonl.gz" for n in range(4)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts[:20]]
    files = {name: gzip.compress("".join(lines[n::4]).encode()) for n, name in enumerate(names)}
    other = "f" * 40
    command = ["fineweb_edu.py", "--dataset", "someone/stories", "--tokenizer", learned, "--num_proc", 1,
               "--shard_size", 3_000]

    def serve_and_run(revision, *flags, check=True):
        content = files if revision == hub.REVISION else {**files, "data/new.jsonl.gz": files[names[0]]}
        with hub.serve_dataset(content, repository="someone/stories", revision=revision) as server:
            env = hub.environment(server, tmp_path / revision)
            return run_script(*command, *flags, env=env, check=check), server.asked

    serve_and_run(hub.REVISION, "--data_dir", tmp_path / "whole" / "data")
    _, asked = serve_and_run(hub.REVISION, "--data_dir", tmp_path / "data", "--part", "1/2")
    fetched = {path.rpartition("/")[2] for _, path in asked if path.endswith(".gz")}
    assert fetched <= {"train-00000.jsonl.gz", "train-00001.jsonl.gz"}
    serve_and_run(other, "--data_dir", tmp_path / "apart", "--part", "2/2")
    shutil.copytree(tmp_path / "data" / "parts", tmp_path / "apart" / "parts", dirs_exist_ok=True)
    process = run_script(*command, "--data_dir", tmp_path / "apart", "--merge", check=False)
    assert_refused(process, "2-of-2", "different revisions", "--revision")
    shutil.copytree(tmp_path / hub.REVISION, tmp_path / other, dirs_exist_ok=True)  # the files, in the cache
    serve_and_run(other, "--data_dir", tmp_path / "data", "--part", "2/2")
    run_script(*command, "--data_dir", tmp_path / "data", "--merge")  # needs no hub
    assert contents(tmp_path / "data") == contents(tmp_path / "whole" / "data")
    assert read_manifest(tmp_path / "data")["source"]["revision"] == hub.REVISION
    wrong = run_script(*command, "--data_dir", tmp_path / "data", "--merge", "--name", "x", check=False)
    assert_refused(wrong, "1-of-2", "different input (name)")


# ----------------------------------------------------------------------------------------------- by datatrove


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_datatrove_pipeline_of_the_docs_writes_the_same_shards(tmp_path, texts, gpt2_tokenizer, tasks):
    """Three files, the first without a document that the filter keeps; a killed task has left a shard."""
    pytest.importorskip("datatrove")
    document = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    [script] = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    script = script.replace("10**8", "10_000").replace("(documents, 1000)", "(documents, 7)")
    (tmp_path / "web.py").write_text(script)
    left = shards.part_folder(tmp_path / "data" / "web", 1, tasks) / f"1-of-{tasks}_train_000000.npy"
    left.parent.mkdir(parents=True)
    left.touch()
    (tmp_path / "texts").mkdir()
    contents_of_files = [["short", "🙂"], texts[:20], ["short", *texts[20:40]]]
    for number, documents in enumerate(contents_of_files):
        make.write_jsonl(tmp_path / "texts" / f"{number}.jsonl", documents)
    process = subprocess.run([sys.executable, "web.py", "texts", "data/web", str(tasks)], cwd=tmp_path,
                             env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    make.write_jsonl(tmp_path / "kept.jsonl", [text for text in texts[:40] if len(text) > 500])
    prepared(tmp_path / "whole" / "web", "--input", tmp_path / "kept.jsonl", "--shard_size", 10_000)
    joined, expected = contents(tmp_path / "data" / "web"), contents(tmp_path / "whole" / "web")
    sources = [json.loads(files.pop("manifest.json")) for files in (joined, expected)]
    assert joined == expected and len(joined) > 3
    assert sources[0] == {**sources[1], "source": {"dataset": "my web text"}}
