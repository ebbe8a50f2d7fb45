"""Shards and the loader: the texts' tokens in order, after any interruption, for any number of ranks."""

import functools
import gzip
import http.server
import io
import json
import shutil
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import hub
import make
import numpy as np
import pyarrow
import pytest
from backports import zstd
from runs import assert_refused, run_here, run_script

import fineweb_edu
import tokenizer
from fineweb_edu import prepare
from kit import formats, shards, sources
from kit.files import UserError, digest
from kit.shards import open_bin, open_shards, verify
from tokenizer import get_fast_tokenizer, get_tokenizer, train
from train_gpt2 import DataLoaderLite


def stream_of(data_dir):
    """All ids of a directory of shards, in order."""
    return np.concatenate([ids for split in ("val", "train") for _, ids in open_shards(data_dir, split)])


def expected_stream(texts, tokenizer):
    """The ids that documents become: <|endoftext|> before each one."""
    encoding = get_tokenizer(tokenizer)
    return np.array([i for text in texts for i in [encoding.eot_token, *encoding.encode_ordinary(text)]])


@pytest.mark.parametrize("num_proc, gigatoken", [(1, True), (1, False), (2, True), (2, False)])
def test_every_format_becomes_the_same_stream(tmp_path, texts, learned, num_proc, gigatoken, monkeypatch,
                                              faults, capsys):
    if not gigatoken:
        monkeypatch.setitem(sys.modules, "gigatoken", None)  # an import raises ImportError
    faults.small_batches(10_000)  # many batches, and the .txt in many pieces
    files, documents = make.write_all_formats(tmp_path, texts[:60])
    manifest = prepare(files, tmp_path / "out", {}, tokenizer=learned, shard_size=9_000, num_proc=num_proc)
    assert capsys.readouterr().out.count("gigatoken is not installed: using tiktoken") == (not gigatoken)
    expected = expected_stream(documents, learned)
    assert np.array_equal(stream_of(tmp_path / "out"), expected)
    assert verify(tmp_path / "out") == len(expected) == sum(shard["tokens"] for shard in manifest["shards"])
    assert [shard["tokens"] for shard in manifest["shards"]][:-1] == [9_000] * (len(manifest["shards"]) - 1)
    assert [shard["split"] for shard in manifest["shards"]] == (
        ["val"] + ["train"] * (len(manifest["shards"]) - 1)
    )


def test_with_gigatoken_tiktoken_encodes_only_a_sample(tmp_path, texts, learned, calls_of):
    """The other texts do not even become Python strings."""
    make.write_parquet(tmp_path / "a.parquet", texts * 6)
    encodings, made_strings = calls_of(fineweb_edu, "encode"), calls_of(formats, "documents")
    prepare([tmp_path / "a.parquet"], tmp_path / "out", {}, tokenizer=learned)
    [(sample, _)] = encodings
    assert sum(len(text) for _, text in sample) <= 64 * 4096 < sum(map(len, texts * 6)) / 5
    assert {len(batch) for batch, in made_strings} == {64}
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(texts * 6, learned))


def test_each_thread_has_a_tokenizer_of_its_own(tmp_path, texts, learned, monkeypatch):
    """A gigatoken tokenizer serves one thread at a time: shared, it would leave all cores but one idle."""
    meet = threading.Barrier(2, timeout=60)

    def two_calls(_):
        meet.wait()  # so that no thread does the work of both
        return get_fast_tokenizer(learned), get_fast_tokenizer(learned)

    with ThreadPoolExecutor(2) as pool:
        (a, a_again), (b, b_again) = pool.map(two_calls, range(2))
    assert a is a_again and b is b_again and a is not b

    monkeypatch.setattr(tokenizer, "RENEW_AFTER", 3)  # its cache of words would grow for ever
    with ThreadPoolExecutor(1) as pool:
        made = [pool.submit(get_fast_tokenizer, learned).result() for _ in range(7)]
    assert [one is other for one, other in zip(made, made[1:])] == [True, True, False, True, True, False]

    callers = set()
    monkeypatch.setattr(fineweb_edu, "get_fast_tokenizer",
                        lambda name: callers.add(threading.get_ident()) or get_fast_tokenizer(name))
    make.write_parquet(tmp_path / "a.parquet", texts)
    prepare([tmp_path / "a.parquet"], tmp_path / "out", {}, tokenizer=learned, num_proc=1)
    assert len(callers) == 1 and callers != {threading.get_ident()}  # the sample is encoded by the same one


def writer_and_ids(directory, file_format, count):
    """A writer with shards of 16M ids, and `count` parts of 2M ids to write."""
    manifest = dict(file_format=file_format, shard_size=16 * 10**6, val_tokens=None, shards=[], batches=[])
    manifest["next"] = (0, 0, 0)
    parts = [np.arange(n, n + 2 * 10**6).astype(np.uint16) for n in range(count)]
    return shards.ShardWriter(directory, manifest), parts


@pytest.mark.parametrize("file_format", ["npy", "bin"])
def test_ids_do_not_stay_in_memory(tmp_path, file_format, monkeypatch):
    """80 MB of ids reach the disk part by part, before the length of the val split is known."""
    writer, parts = writer_and_ids(tmp_path, file_format, 20)
    manifest = writer.manifest
    dropped, drop = [], shards.drop_cached_pages
    monkeypatch.setattr(shards, "drop_cached_pages", lambda file: dropped.append(file.tell()) or drop(file))
    tracemalloc.start()
    for batch, part in enumerate(parts):
        assert bool(manifest["shards"]) == (batch >= 16)  # two shards are full
        writer.add(0, batch, part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < parts[0].nbytes and max(np.diff(dropped)) <= parts[0].nbytes
    writer.finish()
    paths = [tmp_path / shard["file"] for shard in manifest["shards"]]
    written = [np.load(path) if file_format == "npy" else open_bin(path) for path in paths]
    assert [len(tokens) for tokens in written] == [16 * 10**6, 16 * 10**6, 8 * 10**6]
    assert np.array_equal(np.concatenate(written), np.concatenate(parts)) and written[0].dtype == np.uint16


def test_a_short_stream_is_split_again_part_by_part(tmp_path):
    """48 MB of ids, fewer than two shards, pass through memory in parts."""
    writer, parts = writer_and_ids(tmp_path, "npy", 12)
    for batch, part in enumerate(parts):
        writer.add(0, batch, part)
    tracemalloc.start()
    writer.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * parts[0].nbytes
    names = [shard["file"] for shard in writer.manifest["shards"]]
    assert sorted(names + ["manifest.json"]) == sorted(path.name for path in tmp_path.iterdir())
    written = [np.load(tmp_path / name) for name in names]
    assert [len(tokens) for tokens in written] == [2_400_000, 16 * 10**6, 5_600_000]
    assert np.array_equal(np.concatenate(written), np.concatenate(parts))


def test_parquet_of_any_kind_encodes_as_its_texts(tmp_path, texts, learned, faults):
    """Empty documents, a file of nothing else, large strings, a dictionary, many batches."""
    faults.small_batches(50_000)
    parts = [["", *texts[:300], "", texts[0], ""], [""] * 300, texts[:9], [texts[0], texts[1]] * 5]
    kinds = [pyarrow.string(), pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(
        pyarrow.int32(), pyarrow.string())]
    files = [tmp_path / f"{number}.parquet" for number in range(4)]
    for path, part, kind in zip(files, parts, kinds):
        make.write_text_column(path, pyarrow.array(part).cast(kind))
    prepare(files, tmp_path / "out", {}, tokenizer=learned, num_proc=2)
    documents = [text for part in parts for text in part]
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(documents, learned))


def test_where_gigatoken_differs_tiktoken_encodes(tmp_path, texts, learned, monkeypatch, capsys):
    train(texts[:9], 300, tmp_path / "other.json")
    other = get_fast_tokenizer(tmp_path / "other.json")
    monkeypatch.setattr(fineweb_edu, "get_fast_tokenizer", lambda name: other)
    files, documents = make.write_all_formats(tmp_path, texts[:20])
    prepare(files, tmp_path / "out", {}, tokenizer=learned, num_proc=2)
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(documents, learned))
    assert capsys.readouterr().out.count("differ") == 1


def test_half_a_character_encodes_as_by_tiktoken(learned):
    batch = [(True, "sound"), (True, "half \ud83d of one"), (False, "é🙂")]
    assert fineweb_edu.encode_fast(batch, learned).tolist() == fineweb_edu.encode(batch, learned).tolist()


@pytest.mark.parametrize("text", [
    "a line\r\n \t and more  \n\n" * 9, "oneword" * 40, "a\u00a0 b\x1c c!\x1cd\n" * 20, "\n" * 99,
])
def test_a_text_in_pieces_encodes_as_the_whole(learned, faults, text):
    for size in (1, 2, 7, 50):
        faults.small_batches(size)
        pieces = list(formats.Reader().pieces(io.StringIO(text, newline="")))
        ids = [i for _, piece in pieces for i in get_tokenizer(learned).encode_ordinary(piece)]
        assert ids == get_tokenizer(learned).encode_ordinary(text)
        assert [starts for starts, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert len(pieces) > 2 or " " not in text


@pytest.mark.parametrize("shard_size, val_tokens, expected", [
    (10**6, None, [("val", 100), ("train", 901)]),  # less than two shards: a tenth
    (400, None, [("val", 400), ("train", 400), ("train", 201)]),
    (400, 700, [("val", 400), ("val", 300), ("train", 301)]),
    (1000, 1, [("val", 1), ("train", 1000)]),
])
def test_sizes_of_the_splits(tmp_path, learned, shard_size, val_tokens, expected):
    (tmp_path / "a.txt").write_text("\x00" * 1000)  # a byte in no learned token: 1 + 1000 tokens
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "out", {}, learned, "text", shard_size, val_tokens)
    assert [(shard["split"], shard["tokens"]) for shard in manifest["shards"]] == expected


@pytest.mark.parametrize("shard_size", [400, 10**6], ids=["two shards and more", "less than two shards"])
def test_a_kill_between_a_shard_and_the_manifest_loses_nothing(tmp_path, learned, faults, shard_size):
    (tmp_path / "a.txt").write_text("\x00" * 1000)
    arguments = [tmp_path / "a.txt"], tmp_path / "out", {}, learned, "text", shard_size
    with faults.put_in(), pytest.raises(KeyboardInterrupt):
        faults.after_first_shard(faults.interrupt)
        prepare(*arguments)
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["out_val_000000.npy"]
    prepare(*arguments)
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(["\x00" * 1000], learned))
    assert verify(tmp_path / "out") == 1001


def test_a_preparation_that_fails_leaves_no_half_shard(tmp_path, learned, faults):
    faults.small_batches(50)
    (tmp_path / "a.txt").write_text("A few words. " * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n' * 50 + "{")
    with pytest.raises(UserError, match="b.jsonl:51: not JSON.*finished shards? (is|are) kept"):
        prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out", {}, learned, "text", 70)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert "out_train_000001.npy" in names and not any(name.startswith(".") for name in names)


def test_tinyshakespeare_is_prepared_with_gpt2s_tokenizer(tmp_path, real_data, gpt2_tokenizer):
    process = run_script("fineweb_edu.py", "--input", real_data / "tinyshakespeare.txt",
                         "--data_dir", tmp_path / "out")
    assert "304,224 train and 33,802 val tokens" in process.stdout
    assert verify(tmp_path / "out") == 338_025 + 1
    text = (real_data / "tinyshakespeare.txt").read_text()
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream([text], "gpt2"))
    assert "338,026 tokens" in run_script("fineweb_edu.py", "--verify", tmp_path / "out").stdout


def test_fineweb_edu_comes_from_the_hub(tmp_path, texts, learned):
    """`python fineweb_edu.py` against a local server with the hub's interface and layout."""
    files = {"data/CC-MAIN-2024-10/train-00000.parquet": texts[40:],
             "sample/10BT/000_00000.parquet": texts[:20], "sample/10BT/001_00000.parquet": texts[20:40]}
    files = {path: make.write_parquet(tmp_path / "part.parquet", part).read_bytes()
             for path, part in files.items()}
    files["README.md"] = (
        b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
        b"- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    command = ["fineweb_edu.py", "--tokenizer", learned, "--num_proc", 1]
    with hub.serve_dataset(files) as server:
        env = hub.environment(server, tmp_path)
        run_script(*command, "--data_dir", tmp_path / "out", env=env)
        wrong = run_script(*command, "--name", "nope", "--data_dir", tmp_path / "x", check=False, env=env)
    assert_refused(wrong, "--dataset", "nope", "sample-10BT")
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(texts[:40], learned))
    source = shards.read_manifest(tmp_path / "out")["source"]
    assert (source["dataset"], source["name"]) == (hub.REPOSITORY, "sample-10BT")
    assert source["revision"] == hub.REVISION
    fetched = [path for method, path in server.asked if method == "GET" and path.endswith(".parquet")]
    assert len(fetched) == 2  # the sample's two files, once each


@pytest.mark.parametrize("dataset, repository, ref, path", [
    ("fineweb", "HuggingFaceFW/fineweb", None, "sample/10BT/000_00000.parquet"),
    ("openwebtext", "Skylion007/openwebtext", "refs/convert/parquet", "plain_text/train/0000.parquet"),
    ("someone/stories", "someone/stories", None, "data/train-00000.jsonl.gz"),
])
def test_other_datasets_come_from_the_hub_by_name(tmp_path, texts, learned, dataset, repository, ref, path):
    files = {path: make.write_parquet(tmp_path / "part.parquet", texts[:20]).read_bytes()}
    if dataset == "someone/stories":  # several formats, some compressed
        lines = [json.dumps({"text": text}) + "\n" for text in texts[:20]]
        files = {"data/train-00000.jsonl.gz": gzip.compress("".join(lines[:9]).encode()),
                 "data/train-00001.json.zst": zstd.compress("".join(lines[9:]).encode())}
    if dataset == "fineweb":
        files["README.md"] = (b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
                              b"    path: sample/10BT/*\n---\n")
    command = ["fineweb_edu.py", "--dataset", dataset, "--tokenizer", learned, "--data_dir", tmp_path / "out"]
    with hub.serve_dataset(files, repository=repository) as server:
        run_script(*command, env=hub.environment(server, tmp_path))
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(texts[:20], learned))
    source = shards.read_manifest(tmp_path / "out")["source"]
    assert (source["dataset"], source["ref"], source["revision"]) == (repository, ref, hub.REVISION)
    assert ("HEAD", f"/datasets/{repository}/resolve/{ref or 'main'}/README.md") in server.asked


def test_the_default_directory_of_each_dataset():
    places = {"fineweb-edu": "edu_fineweb10B", "openwebtext": "data/openwebtext", "someone/x": "data/x"}
    for dataset, place in places.items():
        assert fineweb_edu.parse_args(["--dataset", dataset]).data_dir == place
    assert fineweb_edu.parse_args([]).data_dir == "edu_fineweb10B"
    assert fineweb_edu.parse_args(["--input", "x/my.jsonl.gz", "b.txt"]).data_dir == "data/my"


def test_tinyshakespeare_is_downloaded_once_and_known_by_its_digest(tmp_path, learned, monkeypatch):
    text = "to be, or not to be\n" * 100
    (tmp_path / "served.txt").write_text(text)
    expected = digest(tmp_path / "served.txt")
    arguments = ["--dataset", "tinyshakespeare", "--tokenizer", learned, "--data_dir", str(tmp_path / "out")]
    args = fineweb_edu.parse_args(arguments)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with hub.serve(handler) as server:
        url = f"{server.url}/served.txt"
        monkeypatch.setitem(sources.TEXTS, "tinyshakespeare", (url, "0" * 32))
        with pytest.raises(UserError, match="is not the expected one.*--input"):
            fineweb_edu.main(args)
        assert not (tmp_path / "out").exists()
        monkeypatch.setitem(sources.TEXTS, "tinyshakespeare", (url, expected))
        fineweb_edu.main(args)
    fineweb_edu.main(fineweb_edu.parse_args(arguments))  # from the copy
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream([text], learned))


def test_bin_shards_are_those_of_llm_c(tmp_path, texts, learned):
    """Header and ids as in https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py."""
    make.write_jsonl(tmp_path / "a.jsonl", texts[:60])
    flags = ["--input", tmp_path / "a.jsonl", "--tokenizer", learned, "--shard_size", 30_000]
    run_script("fineweb_edu.py", *flags, "--data_dir", tmp_path / "npy")
    run_script("fineweb_edu.py", *flags, "--data_dir", tmp_path / "bin", "--format", "bin")
    run_script("fineweb_edu.py", "--verify", tmp_path / "bin")
    assert np.array_equal(stream_of(tmp_path / "bin"), stream_of(tmp_path / "npy"))
    for path in (tmp_path / "bin").glob("*.bin"):
        header = np.fromfile(path, dtype=np.int32, count=256)
        ids = np.fromfile(path, dtype=np.uint16, offset=1024)
        assert header[:3].tolist() == [20240520, 1, len(ids)] and not header[3:].any()
    assert_refused(run_here(fineweb_edu, *flags, "--data_dir", tmp_path / "bin"), "file_format")
    large = run_here(fineweb_edu, *flags, "--format", "bin", "--shard_size", 2**31)
    assert_refused(large, "--shard_size")

    # llm.c writes no manifest: its shards are recognized by their names
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (tmp_path / "bin").glob("*.bin"):
        shutil.copyfile(path, theirs / path.name.replace("bin_", "edu_fineweb_"))
    loaders = [DataLoaderLite(4, 64, data_dir=folder) for folder in (theirs, tmp_path / "npy")]
    for _ in range(10):
        x, y = zip(*(loader.next_batch() for loader in loaders))
        assert x[0].equal(x[1]) and y[0].equal(y[1])
    assert shards.source_of(theirs)["dataset"] == "HuggingFaceFW/fineweb-edu"
    small = tmp_path / "small"  # those of dev/data/tinyshakespeare.py have no number
    small.mkdir()
    for split in ("val", "train"):
        path = next((tmp_path / "bin").glob(f"*_{split}_*"))
        shutil.copyfile(path, small / f"tiny_shakespeare_{split}.bin")
    assert len(stream_of(small)) > 30_000 and shards.source_of(small) == {}
    victim = theirs / "edu_fineweb_train_000001.bin"
    content = bytearray(victim.read_bytes())
    for damaged, words in (
        (content[:-2], "header says"),
        (np.array([20240801, 7], np.int32).tobytes() + content[8:], "20240801, 7"),  # Llama's, of uint32
        (content[1024:], "its header is"),
        (b"", "0 bytes, fewer than its header"),
    ):
        victim.write_bytes(damaged)
        with pytest.raises(UserError, match=f"edu_fineweb_train_000001.bin.*{words}"):
            open_shards(theirs, "train")
    victim.write_bytes(content)
    shutil.copyfile(next((tmp_path / "npy").glob("*train_000001.npy")), theirs / "x_train_000001.npy")
    with pytest.raises(UserError, match="remove one kind"):
        open_shards(theirs, "train")


def write_unreadable_files(folder, texts):
    good = make.write_parquet(folder / "good.parquet", texts[:3]).read_bytes()
    (folder / "torn.parquet").write_bytes(good[:-100])
    (folder / "middle.parquet").write_bytes(good[:40] + b"\xff" * 360 + good[400:])  # with an intact footer
    make.write_parquet(folder / "null.parquet", [*texts[:40], None])
    make.write_parquet(folder / "numbers.parquet", [1, 2])
    make.write_text_column(folder / "latin.parquet", pyarrow.array([b"caf\xe9"]).view(pyarrow.string()))
    (folder / "column.jsonl").write_text('{"text": "one"}\n{"content": "two"}\n')
    (folder / "number.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (folder / "torn.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (folder / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 100)[:-20])
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    (folder / "other.pdf").write_text("x")


@pytest.mark.parametrize("name, words", [
    ("null.parquet", "row 41.*is null; --skip_null"), ("numbers.parquet", "row 1.*int"),
    ("latin.parquet", "UTF"), ("middle.parquet", "middle.parquet"), ("missing.parquet", "no such file"),
    ("torn.parquet", "parquet"),
    ("column.jsonl", "column.jsonl:2.*content.*--text_column"), ("number.jsonl", "number.jsonl:2.*int"),
    ("torn.jsonl", "torn.jsonl:2"), ("torn.jsonl.gz", "torn.jsonl.gz"), ("latin.txt", "UTF-8"),
    ("empty.txt", "no text"), ("other.pdf", "jsonl"), ("missing.txt", "no such file"),
])
def test_an_unreadable_file_is_refused_by_name(tmp_path, texts, learned, name, words):
    write_unreadable_files(tmp_path, texts)
    with pytest.raises(UserError, match=words) as error:
        prepare([tmp_path / name], tmp_path / "out", {"name": name}, tokenizer=learned)
    assert name in str(error.value)


@pytest.mark.parametrize("settings, words", [
    (dict(column="body"), "score.*--text_column"), (dict(val_tokens=10**6), "--val_size 1000000 leaves"),
])
def test_settings_that_do_not_fit_the_text_are_refused(tmp_path, texts, learned, settings, words):
    good = make.write_parquet(tmp_path / "good.parquet", texts[:3])
    with pytest.raises(UserError, match=words):
        prepare([good], tmp_path / "out", {}, tokenizer=learned, **settings)


def test_a_tokenizer_with_too_many_ids_is_refused(tmp_path, monkeypatch):
    import tiktoken

    big = tiktoken.Encoding(
        "big", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={"<|endoftext|>": 70_000}
    )
    monkeypatch.setattr(fineweb_edu, "get_tokenizer", lambda name: big)
    (tmp_path / "a.txt").write_text("aaa")
    with pytest.raises(UserError, match="70001 ids"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", {}, tokenizer="big")


def test_another_preparation_in_the_same_place_is_refused(shards, tmp_path, learned):
    make.copy_shards(shards, tmp_path / "data")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="source"):
        prepare([tmp_path / "a.txt"], tmp_path / "data", {}, learned, shard_size=50_000, val_tokens=10_000)
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(UserError, match="unknown origin"):
        prepare([tmp_path / "a.txt"], tmp_path / "data", {}, learned)


def test_verify_finds_a_flipped_bit(shards, tmp_path):
    make.copy_shards(shards, tmp_path / "data")
    assert verify(tmp_path / "data") > 10**5
    path = sorted((tmp_path / "data").glob("*_train_*.npy"))[1]
    make.damage(path, "one byte flipped")
    assert_refused(run_here(fineweb_edu, "--verify", tmp_path / "data"), path.name, "digest")
    assert_refused(run_here(fineweb_edu, "--verify", tmp_path), "manifest")


# ----------------------------------------------------------------------------------------------- the loader


def test_ranks_and_micro_batches_partition_one_stream(shards):
    def global_batch(B, ranks, windows):
        """The inputs and targets of all ranks, in the order of the stream."""
        loaders = [DataLoaderLite(B, 32, rank, ranks, data_dir=shards) for rank in range(ranks)]
        rows = [rank.next_batch() for _ in range(windows // (B * ranks)) for rank in loaders]
        return [np.concatenate([pair[i].numpy() for pair in rows]) for i in (0, 1)]

    total = DataLoaderLite(1, 32, data_dir=shards).num_windows
    windows = (total + 64) // 16 * 16  # into the second epoch
    x, y = global_batch(1, 1, windows)
    assert np.array_equal(x[:, 1:], y[:, :-1])
    for B, ranks in ((16, 1), (4, 2), (8, 2), (2, 4), (4, 4)):
        assert all(map(np.array_equal, global_batch(B, ranks, windows), (x, y)))


def test_the_loader_refuses_data_that_it_can_not_read(tmp_path):
    with pytest.raises(UserError, match="no train shards"):
        DataLoaderLite(data_dir=tmp_path)
    make.write_shards(tmp_path, train_000001=[1, 2, 3, 60000, 5])
    with pytest.raises(UserError, match="--sequence_length"):
        DataLoaderLite(1, 5, data_dir=tmp_path)
    with pytest.raises(UserError, match="60000 at offset 3"):
        DataLoaderLite(1, 4, data_dir=tmp_path, vocab_size=50304).next_batch()
