"""Shards and the loader: what goes in comes out, after any interruption, for any number of ranks."""

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
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import refused, run_script

import fineweb_edu
import tokenizer
from files import UserError
from fineweb_edu import open_shards, prepare, verify
from tokenizer import get_fast_tokenizer, get_tokenizer, train
from train_gpt2 import DataLoaderLite

FINEWEB_COLUMNS = "id dump url file_path language language_score token_count score int_score".split()


def stream_of(data_dir):
    return np.concatenate([ids for split in ("val", "train") for _, ids in open_shards(data_dir, split)])


def expected_stream(texts, tokenizer):
    encoding = get_tokenizer(tokenizer)
    return np.array([i for text in texts for i in [encoding.eot_token, *encoding.encode_ordinary(text)]])


def write_parquet(path, texts, row_group_size=20):
    columns = {"text": texts, **{name: [name] * len(texts) for name in FINEWEB_COLUMNS}}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)


def write_all_formats(folder, texts):
    """The texts in four files, a quarter each: parquet, jsonl, jsonl.gz, and one document of plain text."""
    quarter = len(texts) // 4
    lines = [json.dumps({"text": text, "n": 1}) + "\n" for text in texts]
    write_parquet(folder / "a.parquet", texts[:quarter])
    (folder / "b.jsonl").write_text("".join(lines[quarter : 2 * quarter]) + "\n")
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.writelines(lines[2 * quarter : 3 * quarter])
    last = "\r\n".join(texts[3 * quarter :])
    (folder / "d.txt").write_bytes(last.encode())
    return (
        [folder / name for name in ("a.parquet", "b.jsonl", "c.jsonl.gz", "d.txt")],
        texts[: 3 * quarter] + [last],
    )


@pytest.mark.parametrize("num_proc, gigatoken", [(1, True), (1, False), (2, True), (2, False)])
def test_every_format_becomes_the_same_stream(tmp_path, texts, learned, num_proc, gigatoken, monkeypatch,
                                              capsys):
    if not gigatoken:
        monkeypatch.setitem(sys.modules, "gigatoken", None)  # to import it is an ImportError
    monkeypatch.setattr(fineweb_edu, "BATCH_CHARS", 10_000)  # many batches, and the .txt in many pieces
    files, documents = write_all_formats(tmp_path, texts[:60])
    manifest = prepare(files, tmp_path / "out", {}, tokenizer=learned, shard_size=9_000, num_proc=num_proc)
    assert capsys.readouterr().out.count("gigatoken is not installed: tiktoken encodes") == (not gigatoken)
    expected = expected_stream(documents, learned)
    assert np.array_equal(stream_of(tmp_path / "out"), expected)
    assert verify(tmp_path / "out") == len(expected) == sum(shard["tokens"] for shard in manifest["shards"])
    assert [shard["tokens"] for shard in manifest["shards"]][:-1] == [9_000] * (len(manifest["shards"]) - 1)
    assert [shard["split"] for shard in manifest["shards"]] == (
        ["val"] + ["train"] * (len(manifest["shards"]) - 1)
    )


def test_tiktoken_encodes_only_a_sample_beside_gigatoken(tmp_path, texts, learned, monkeypatch):
    """The work of the fast path: a sample for tiktoken, and no Python string of any other text."""
    write_parquet(tmp_path / "a.parquet", texts * 6)
    encoded, encode = [], fineweb_edu.encode
    sizes, documents = [], fineweb_edu.documents
    monkeypatch.setattr(fineweb_edu, "documents", lambda batch: sizes.append(len(batch)) or documents(batch))

    def watched(batch, tokenizer):
        encoded.append(sum(len(text) for _, text in batch))
        return encode(batch, tokenizer)

    monkeypatch.setattr(fineweb_edu, "encode", watched)
    prepare([tmp_path / "a.parquet"], tmp_path / "out", {}, tokenizer=learned)
    assert len(encoded) == 1 and encoded[0] <= 64 * 4096 < sum(map(len, texts * 6)) / 5
    assert set(sizes) == {64}
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(texts * 6, learned))


def test_each_thread_has_a_tokenizer_of_its_own(tmp_path, texts, learned, monkeypatch):
    """gigatoken's lets in one thread at a time: shared, it would leave all cores but one idle."""
    meet = threading.Barrier(2, timeout=60)

    def two_calls(_):
        meet.wait()  # so that neither thread does the work of both
        return get_fast_tokenizer(learned), get_fast_tokenizer(learned)

    with ThreadPoolExecutor(2) as pool:
        (a, a_again), (b, b_again) = pool.map(two_calls, range(2))
    assert a is a_again and b is b_again and a is not b

    monkeypatch.setattr(tokenizer, "RENEW_AFTER", 3)  # its memory of words would grow for ever
    with ThreadPoolExecutor(1) as pool:
        made = [pool.submit(get_fast_tokenizer, learned).result() for _ in range(7)]
    assert [one is other for one, other in zip(made, made[1:])] == [True, True, False, True, True, False]

    callers = set()
    monkeypatch.setattr(fineweb_edu, "get_fast_tokenizer",
                        lambda name: callers.add(threading.get_ident()) or get_fast_tokenizer(name))
    write_parquet(tmp_path / "a.parquet", texts)
    prepare([tmp_path / "a.parquet"], tmp_path / "out", {}, tokenizer=learned, num_proc=1)
    assert len(callers) == 1 and callers != {threading.get_ident()}  # none is made to look at a sample alone


def writer_and_ids(directory, file_format, count):
    """The writer of a new directory, 16M ids a shard, and `count` parts of 2M ids to give it."""
    manifest = dict(file_format=file_format, shard_size=16 * 10**6, val_tokens=None, shards=[], batches=[])
    manifest["next"] = (0, 0, 0)
    parts = [np.arange(n, n + 2 * 10**6).astype(np.uint16) for n in range(count)]
    return fineweb_edu.ShardWriter(directory, manifest), parts


@pytest.mark.parametrize("file_format", ["npy", "bin"])
def test_ids_do_not_stay_in_memory(tmp_path, file_format, monkeypatch):
    """The work, counted: 80 MB of ids reach the disk part by part, before the val split's length is known."""
    writer, parts = writer_and_ids(tmp_path, file_format, 20)
    manifest = writer.manifest
    released, release = [], fineweb_edu.release
    monkeypatch.setattr(fineweb_edu, "release", lambda file: released.append(file.tell()) or release(file))
    tracemalloc.start()
    for batch, part in enumerate(parts):
        assert bool(manifest["shards"]) == (batch >= 16)  # two shards are full
        writer.add(0, batch, part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < parts[0].nbytes and max(np.diff(released)) <= parts[0].nbytes
    writer.finish()
    paths = [tmp_path / shard["file"] for shard in manifest["shards"]]
    shards = [np.load(path) if file_format == "npy" else fineweb_edu.open_bin(path) for path in paths]
    assert [len(tokens) for tokens in shards] == [16 * 10**6, 16 * 10**6, 8 * 10**6]
    assert np.array_equal(np.concatenate(shards), np.concatenate(parts)) and shards[0].dtype == np.uint16


def test_a_stream_is_cut_anew_part_by_part(tmp_path):
    """The work, counted: 48 MB of ids are less than two shards, and pass through memory in parts."""
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
    shards = [np.load(tmp_path / name) for name in names]
    assert [len(tokens) for tokens in shards] == [2_400_000, 16 * 10**6, 5_600_000]
    assert np.array_equal(np.concatenate(shards), np.concatenate(parts))


def test_parquet_of_any_kind_encodes_as_its_texts(tmp_path, texts, learned, monkeypatch):
    """Empty documents, an empty file but for them, large strings, a dictionary, many batches."""
    monkeypatch.setattr(fineweb_edu, "BATCH_CHARS", 50_000)
    parts = [["", *texts[:300], "", texts[0], ""], [""] * 300, texts[:9], [texts[0], texts[1]] * 5]
    kinds = [pyarrow.string(), pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(
        pyarrow.int32(), pyarrow.string())]
    files = [tmp_path / f"{number}.parquet" for number in range(4)]
    for path, part, kind in zip(files, parts, kinds):
        table = pyarrow.table({"text": pyarrow.array(part).cast(kind)})
        pyarrow.parquet.write_table(table, path, row_group_size=100)
    prepare(files, tmp_path / "out", {}, tokenizer=learned, num_proc=2)
    documents = [text for part in parts for text in part]
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(documents, learned))


def test_where_gigatoken_differs_tiktoken_encodes(tmp_path, texts, learned, monkeypatch, capsys):
    train(texts[:9], 300, tmp_path / "other.json")
    other = get_fast_tokenizer(tmp_path / "other.json")
    monkeypatch.setattr(fineweb_edu, "get_fast_tokenizer", lambda name: other)
    files, documents = write_all_formats(tmp_path, texts[:20])
    prepare(files, tmp_path / "out", {}, tokenizer=learned, num_proc=2)
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(documents, learned))
    assert capsys.readouterr().out.count("differ") == 1


def test_half_a_character_encodes_as_by_tiktoken(learned):
    batch = [(True, "sound"), (True, "half \ud83d of one"), (False, "é🙂")]
    assert fineweb_edu.encode_fast(batch, learned).tolist() == fineweb_edu.encode(batch, learned).tolist()


@pytest.mark.parametrize("text", [
    "a line\r\n \t and more  \n\n" * 9, "oneword" * 40, "a\u00a0 b\x1c c!\x1cd\n" * 20, "\n" * 99,
])
def test_a_text_in_pieces_encodes_as_the_whole(learned, monkeypatch, text):
    for size in (1, 2, 7, 50):
        monkeypatch.setattr(fineweb_edu, "BATCH_CHARS", size)
        pieces = list(fineweb_edu.read_pieces(io.StringIO(text, newline="")))
        ids = [i for _, piece in pieces for i in get_tokenizer(learned).encode_ordinary(piece)]
        assert ids == get_tokenizer(learned).encode_ordinary(text)
        assert [starts for starts, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert len(pieces) > 2 or " " not in text


@pytest.mark.parametrize("shard_size, val_tokens, expected", [
    (10**6, None, [("val", 100), ("train", 901)]),  # smaller than two shards: a tenth
    (400, None, [("val", 400), ("train", 400), ("train", 201)]),
    (400, 700, [("val", 400), ("val", 300), ("train", 301)]),
    (1000, 1, [("val", 1), ("train", 1000)]),
])
def test_sizes_of_the_splits(tmp_path, learned, shard_size, val_tokens, expected):
    (tmp_path / "a.txt").write_text("\x00" * 1000)  # a byte that no learned token holds: 1 + 1000 tokens
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "out", {}, learned, "text", shard_size, val_tokens)
    assert [(shard["split"], shard["tokens"]) for shard in manifest["shards"]] == expected


@pytest.mark.parametrize("shard_size", [400, 10**6])  # of two shards and more, and of less
def test_a_kill_between_a_shard_and_the_manifest(tmp_path, learned, monkeypatch, shard_size):
    (tmp_path / "a.txt").write_text("\x00" * 1000)
    arguments = [tmp_path / "a.txt"], tmp_path / "out", {}, learned, "text", shard_size
    write_manifest = fineweb_edu.write_manifest

    def killed(data_dir, manifest):
        if manifest["shards"]:
            raise KeyboardInterrupt
        write_manifest(data_dir, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(fineweb_edu, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(*arguments)
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["out_val_000000.npy"]
    prepare(*arguments)
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(["\x00" * 1000], learned))
    assert verify(tmp_path / "out") == 1001


def test_a_preparation_that_breaks_off_leaves_no_half_shard(tmp_path, learned, monkeypatch):
    monkeypatch.setattr(fineweb_edu, "BATCH_CHARS", 50)
    (tmp_path / "a.txt").write_text("A few words. " * 100)
    with pytest.raises(UserError, match="no such file"):
        prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", {}, learned, "text", 70)
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert "out_train_000001.npy" in names and not any(name.startswith(".") for name in names)


def test_tinyshakespeare(tmp_path, real_data, gpt2_tokenizer):
    process = run_script("fineweb_edu.py", "--input", real_data / "tinyshakespeare.txt",
                         "--data_dir", tmp_path / "out")
    assert "304,224 train and 33,802 val tokens" in process.stdout
    assert verify(tmp_path / "out") == 338_025 + 1
    text = (real_data / "tinyshakespeare.txt").read_text()
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream([text], "gpt2"))
    assert "338,026 tokens" in run_script("fineweb_edu.py", "--verify", tmp_path / "out").stdout


def parquet_bytes(folder, texts):
    write_parquet(folder / "part.parquet", texts)
    return (folder / "part.parquet").read_bytes()


def test_fineweb_edu_comes_from_the_hub(tmp_path, texts, learned):
    """`python fineweb_edu.py` itself, against a local server with the hub's interface and layout."""
    files = {"data/CC-MAIN-2024-10/train-00000.parquet": texts[40:],
             "sample/10BT/000_00000.parquet": texts[:20], "sample/10BT/001_00000.parquet": texts[20:40]}
    files = {path: parquet_bytes(tmp_path, part) for path, part in files.items()}
    files["README.md"] = (
        b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
        b"- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    server = hub.serve(files)
    env = hub.environment(server, tmp_path)
    command = ["fineweb_edu.py", "--tokenizer", learned, "--num_proc", 1]
    run_script(*command, "--data_dir", tmp_path / "out", env=env)
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(texts[:40], learned))
    source = fineweb_edu.read_manifest(tmp_path / "out")["source"]
    assert (source["dataset"], source["name"]) == (hub.REPOSITORY, "sample-10BT")
    assert source["revision"] == hub.REVISION
    fetched = [path for method, path in server.asked if method == "GET" and path.endswith(".parquet")]
    assert len(fetched) == 2  # the sample's two files, once each
    process = run_script(*command, "--name", "nope", "--data_dir", tmp_path / "x", check=False, env=env)
    assert refused(process, "--dataset", "nope", "sample-10BT")
    server.shutdown()


@pytest.mark.parametrize("dataset, repository, ref, path", [
    ("fineweb", "HuggingFaceFW/fineweb", None, "sample/10BT/000_00000.parquet"),
    ("openwebtext", "Skylion007/openwebtext", "refs/convert/parquet", "plain_text/train/0000.parquet"),
    ("someone/stories", "someone/stories", None, "data/train-00000-of-00001.parquet"),
])
def test_other_datasets_by_name(tmp_path, texts, learned, dataset, repository, ref, path):
    files = {path: parquet_bytes(tmp_path, texts[:20])}
    if dataset == "fineweb":
        files["README.md"] = (b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
                              b"    path: sample/10BT/*\n---\n")
    server = hub.serve(files, repository=repository)
    run_script("fineweb_edu.py", "--dataset", dataset, "--tokenizer", learned, "--data_dir", tmp_path / "out",
               env=hub.environment(server, tmp_path))
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(texts[:20], learned))
    source = fineweb_edu.read_manifest(tmp_path / "out")["source"]
    assert (source["dataset"], source["ref"], source["revision"]) == (repository, ref, hub.REVISION)
    assert ("HEAD", f"/datasets/{repository}/resolve/{ref or 'main'}/README.md") in server.asked
    server.shutdown()


def test_where_the_shards_of_a_dataset_go():
    places = {"fineweb-edu": "edu_fineweb10B", "openwebtext": "data/openwebtext", "someone/x": "data/x"}
    for dataset, place in places.items():
        assert fineweb_edu.parse_args(["--dataset", dataset]).data_dir == place
    assert fineweb_edu.parse_args([]).data_dir == "edu_fineweb10B"
    assert fineweb_edu.parse_args(["--input", "x/my.jsonl.gz", "b.txt"]).data_dir == "data/my"


def test_tinyshakespeare_is_downloaded_once_and_known_by_its_digest(tmp_path, learned, monkeypatch):
    text = "to be, or not to be\n" * 100
    (tmp_path / "served.txt").write_text(text)
    expected = fineweb_edu.digest(tmp_path / "served.txt")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/served.txt"
    arguments = ["--dataset", "tinyshakespeare", "--tokenizer", learned, "--data_dir", str(tmp_path / "out")]
    args = fineweb_edu.parse_args(arguments)
    monkeypatch.setitem(fineweb_edu.TEXTS, "tinyshakespeare", (url, "0" * 32))
    with pytest.raises(UserError, match="another text.*--input"):
        fineweb_edu.main(args)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(fineweb_edu.TEXTS, "tinyshakespeare", (url, expected))
    fineweb_edu.main(args)
    server.shutdown()
    fineweb_edu.main(fineweb_edu.parse_args(arguments))  # the copy that is there
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream([text], learned))


def test_bin_shards_are_llm_cs(tmp_path, texts, learned):
    """Header and ids as https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py has them."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:60]))
    command = ["fineweb_edu.py", "--input", tmp_path / "a.jsonl", "--tokenizer", learned]
    command += ["--shard_size", 30_000]
    run_script(*command, "--data_dir", tmp_path / "npy")
    run_script(*command, "--data_dir", tmp_path / "bin", "--format", "bin")
    run_script("fineweb_edu.py", "--verify", tmp_path / "bin")
    assert np.array_equal(stream_of(tmp_path / "bin"), stream_of(tmp_path / "npy"))
    for path in (tmp_path / "bin").glob("*.bin"):
        header = np.fromfile(path, dtype=np.int32, count=256)
        ids = np.fromfile(path, dtype=np.uint16, offset=1024)
        assert header[:3].tolist() == [20240520, 1, len(ids)] and not header[3:].any()
    assert refused(run_script(*command, "--data_dir", tmp_path / "bin", check=False), "file_format")
    large = run_script(*command, "--format", "bin", "--shard_size", 2**31, check=False)
    assert refused(large, "--shard_size")

    # theirs have no manifest: by their names alone they are read as they are, or refused
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (tmp_path / "bin").glob("*.bin"):
        shutil.copyfile(path, theirs / path.name.replace("bin_", "edu_fineweb_"))
    loaders = [DataLoaderLite(4, 64, data_dir=folder) for folder in (theirs, tmp_path / "npy")]
    for _ in range(10):
        x, y = zip(*(loader.next_batch() for loader in loaders))
        assert x[0].equal(x[1]) and y[0].equal(y[1])
    assert fineweb_edu.source_of(theirs)["dataset"] == "HuggingFaceFW/fineweb-edu"
    small = tmp_path / "small"  # dev/data/tinyshakespeare.py's have no number
    small.mkdir()
    for split in ("val", "train"):
        path = next((tmp_path / "bin").glob(f"*_{split}_*"))
        shutil.copyfile(path, small / f"tiny_shakespeare_{split}.bin")
    assert len(stream_of(small)) > 30_000 and fineweb_edu.source_of(small) == {}
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


def test_what_can_not_be_read_is_refused_by_name(tmp_path, texts, learned):
    write_parquet(tmp_path / "good.parquet", texts[:3])
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-100])
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"content": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 100)[:-20])
    (tmp_path / "e.txt").write_bytes(b"caf\xe9")
    (tmp_path / "f.txt").write_text("")
    (tmp_path / "g.pdf").write_text("x")
    write_parquet(tmp_path / "h.parquet", [*texts[:300], None])
    write_parquet(tmp_path / "i.parquet", [1, 2])
    not_utf8 = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": not_utf8}), tmp_path / "j.parquet")
    middle = bytearray((tmp_path / "good.parquet").read_bytes())
    middle[40:400] = b"\xff" * 360  # behind an intact footer
    (tmp_path / "k.parquet").write_bytes(middle)
    for name, words in {
        "h.parquet": f"row {len(texts[:300]) + 1}.*NoneType", "i.parquet": "row 1.*int", "j.parquet": "UTF",
        "k.parquet": "k.parquet", "missing.parquet": "no such file",
        "torn.parquet": "parquet", "a.jsonl": "a.jsonl:2.*content.*--text_column",
        "b.jsonl": "b.jsonl:2.*int", "c.jsonl": "c.jsonl:2", "d.jsonl.gz": "d.jsonl.gz",
        "e.txt": "UTF-8", "f.txt": "no text", "g.pdf": "jsonl", "missing.txt": "no such file",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            prepare([tmp_path / name], tmp_path / "out", {"name": name}, tokenizer=learned)
        assert name in str(error.value)
    with pytest.raises(UserError, match="score.*--text_column"):
        prepare([tmp_path / "good.parquet"], tmp_path / "out", {}, tokenizer=learned, column="body")
    with pytest.raises(UserError, match="--val_tokens"):
        prepare([tmp_path / "good.parquet"], tmp_path / "out", {}, tokenizer=learned, val_tokens=10**6)


def test_ids_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    import tiktoken

    big = tiktoken.Encoding(
        "big", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={"<|endoftext|>": 70_000}
    )
    monkeypatch.setattr(fineweb_edu, "get_tokenizer", lambda name: big)
    (tmp_path / "a.txt").write_text("aaa")
    with pytest.raises(UserError, match="70001 ids"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", {}, tokenizer="big")


def test_another_preparation_in_the_same_place_is_refused(shards, tmp_path, learned):
    shutil.copytree(shards, tmp_path / "data")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="source"):
        prepare([tmp_path / "a.txt"], tmp_path / "data", {}, learned, shard_size=50_000, val_tokens=10_000)
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(UserError, match="unknown origin"):
        prepare([tmp_path / "a.txt"], tmp_path / "data", {}, learned)


def test_verify_finds_a_flipped_bit(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    assert verify(tmp_path / "data") > 10**5
    path = sorted((tmp_path / "data").glob("*_train_*.npy"))[1]
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert refused(
        run_script("fineweb_edu.py", "--verify", tmp_path / "data", check=False), path.name, "digest"
    )
    assert refused(run_script("fineweb_edu.py", "--verify", tmp_path, check=False), "manifest")


# the loader


def windows_of(loader, micro_batches):
    return [loader.next_batch() for _ in range(micro_batches)]


def test_ranks_and_micro_batches_partition_one_stream(shards):
    def global_batch(B, ranks, windows):
        """The rows of all ranks in the order of the stream, and the targets beside them."""
        loaders = [DataLoaderLite(B, 32, rank, ranks, data_dir=shards) for rank in range(ranks)]
        rows = [rank.next_batch() for _ in range(windows // (B * ranks)) for rank in loaders]
        return [np.concatenate([pair[i].numpy() for pair in rows]) for i in (0, 1)]

    total = DataLoaderLite(1, 32, data_dir=shards).num_windows
    windows = (total + 64) // 16 * 16  # beyond the end of the first epoch, across all shards
    x, y = global_batch(1, 1, windows)
    assert np.array_equal(x[:, 1:], y[:, :-1])
    for B, ranks in ((16, 1), (4, 2), (8, 2), (2, 4), (4, 4)):
        assert all(map(np.array_equal, global_batch(B, ranks, windows), (x, y)))


def test_loader_refusals(tmp_path):
    with pytest.raises(UserError, match="no train shards"):
        DataLoaderLite(data_dir=tmp_path)
    np.save(tmp_path / "x_train_000001.npy", np.array([1, 2, 3, 60000, 5], dtype=np.uint16))
    with pytest.raises(UserError, match="--sequence_length"):
        DataLoaderLite(1, 5, data_dir=tmp_path)
    with pytest.raises(UserError, match="60000 at 3"):
        DataLoaderLite(1, 4, data_dir=tmp_path, vocab_size=50304).next_batch()
