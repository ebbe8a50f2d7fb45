"""Texts as people have them: formats, what --input takes, nulls, separators, and files that fail."""

import csv
import gzip
import io
import json
import lzma
import os
import re
import tracemalloc

import hub
import make
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from runs import assert_refused, run_here, run_script
from test_data import expected_stream, stream_of

import fineweb_edu
import sample
import tokenizer
import train_gpt2
from hellaswag import iterate_examples, render_example
from kit import formats, shards, sources
from kit.files import UserError
from kit.formats import Reader
from tokenizer import encode_text, get_tokenizer

DOCUMENTS = ["one\ntwo, \"three\"", "", "é🙂\r\n\u2028", "x" * 200_000, " last "]
BOM = "\ufeff"


def write(path, text):
    """Write a text to a file, compressed as its name says; return the path."""
    content = text.encode() if isinstance(text, str) else text
    pack = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix.lower(), bytes)
    path.write_bytes(pack(content))
    return path


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_text(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def texts_of(path, *settings, **named):
    return [text for _, text in Reader(*settings, **named).texts(path)]


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare(learned, *flags, stdin=""):
    """Run fineweb_edu.py here with the small tokenizer."""
    return run_here(fineweb_edu, "--tokenizer", learned, "--num_proc", 1, *flags, stdin=stdin)


# -------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("mark", ["", BOM], ids=["", "BOM"])
@pytest.mark.parametrize("name", [
    "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL", "a.json", "c4-train.00000-of-01024.json.gz",
    "a.json.zst", "list.json", "list.json.gz", "list.JSON.ZST", "a.csv", "a.csv.gz", "a.csv.zst", "A.PARQUET",
])
def test_every_format_of_rows_gives_the_same_documents(tmp_path, name, mark):
    rows = [{"id": str(number), "text": text} for number, text in enumerate(DOCUMENTS)]
    if name == "A.PARQUET":
        (tmp_path / name).write_bytes(make.parquet_bytes(rows))
    else:
        text = csv_text(rows) if ".csv" in name else json_lines(rows)
        write(tmp_path / name, mark + (json.dumps(rows, indent=1) if "list" in name else text))
    documents = [text for text in DOCUMENTS if text or ".csv" not in name]  # an empty cell is null
    assert list(Reader(skip_null=True).texts(tmp_path / name)) == [(True, text) for text in documents]


@pytest.mark.parametrize("name", ["a.txt", "SHAKE.TXT", "a.txt.gz", "a.txt.zst"])
def test_a_plain_text_is_one_document_without_its_byte_order_mark(tmp_path, name):
    text = "one\r\ntwo\n\n\ufeffthree"
    assert "".join(texts_of(write(tmp_path / name, BOM + text))) == text


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress], ids=["gzip", "zstd"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_compressed_files_are_known_by_their_first_bytes_too(tmp_path, name, pack):
    text = {"a.txt": "one", "a.csv": "text\none\n"}.get(name, '{"text": "one"}')
    assert texts_of(write(tmp_path / name, pack(f"{BOM}{text}".encode()))) == ["one"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.zst", "a.parquet", "data.jsonl.gz"])
def test_a_compressed_file_of_no_bytes_is_a_failed_download(tmp_path, learned, name):
    """An empty text takes some bytes in each of these formats."""
    (tmp_path / name).touch()
    full = write(tmp_path / "full.txt", "text")
    process = prepare(learned, "--input", full, tmp_path / name, "--data_dir", tmp_path / "out")
    assert_refused(process, tmp_path / name, "0 bytes")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="0 bytes"):
        list(iterate_examples(tmp_path / name))


@pytest.mark.parametrize("skip", [[], ["--skip_null"]])
def test_an_empty_cell_of_a_csv_is_null(tmp_path, learned, skip):
    path = write(tmp_path / "a.csv", 'id,text\n1,one\n2,\n3,""\n,two\n')  # another column may be empty
    process = prepare(learned, "--input", path, "--data_dir", tmp_path / "out", *skip)
    if skip:
        assert "2 rows left out: column 'text' is null" in process.stdout
        assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(["one", "two"], learned))
    else:
        assert_refused(process, "a.csv:3: column 'text' is null", "--skip_null")


def test_a_column_name_that_two_columns_have_is_refused_where_it_is_read(tmp_path):
    texts = pyarrow.array(["one"])
    table = pyarrow.Table.from_arrays([texts, texts, texts], names=["text", "id", "id"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "a.csv", "text,id,id\none,1,2\n")
    for name in ("a.parquet", "a.csv"):
        assert texts_of(tmp_path / name) == ["one"]
        with pytest.raises(UserError, match=f"{name}: 2 columns are named 'id': rename all but one"):
            texts_of(tmp_path / name, "id")


def test_zstd_files_of_several_frames_and_of_long_windows_are_read_whole(tmp_path):
    rows = [json_lines([{"text": text}]).encode() for text in ("one", "two")]
    (tmp_path / "frames.jsonl.zst").write_bytes(b"".join(map(zstd.compress, rows)))
    assert texts_of(tmp_path / "frames.jsonl.zst") == ["one", "two"]
    options = {zstd.CompressionParameter.window_log: 30}
    with zstd.open(tmp_path / "long.jsonl.zst", "wb", options=options) as file:
        file.write(rows[0])
    assert texts_of(tmp_path / "long.jsonl.zst") == ["one"]


def test_a_compressed_file_is_not_read_into_memory(tmp_path, faults):
    faults.small_batches(10_000)
    paths = [write(tmp_path / "a.jsonl.zst", json_lines([{"text": "word " * 200}] * 10_000)),
             write(tmp_path / "a.txt.zst", "word " * 2_000_000)]
    for path in paths:
        list(Reader().batches(write(tmp_path / f"small-{path.name}", "\n")))  # imports
        tracemalloc.start()
        size = sum(len(text) for batch in Reader().batches(path) for _, text in batch)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size >= 10**7 and peak < 10**6


@pytest.mark.parametrize("name, content, words", [
    ("a.json", '{\n "text": "one"\n}', "a.json:1: not JSON.*a .json contains JSON lines, or one list"),
    ("a.json", '[{"text": "one"}, 2]', "a.json, item 2: no column 'text', only int"),
    ("a.json", '[{"text": "one"},', "a.json: not JSON"),
    ("a.csv", "id,body\n1,one\n", "a.csv:2: no column 'text', only id, body"),
    ("a.csv", 'id,text\n1,"o\nne"\n2\n', "a.csv:4: 1 fields, but the header has 2"),
    ("a.csv", 'id,text\n1,"one\n2,two\n', "a.csv:3: not CSV"),
    ("a.txt.parquet.gz", "", "unsupported format.*zst.*parquet"), ("a.pdf", "", "a.pdf: unsupported format"),
    ("a.csv", b"id,text\n1,caf\xe9\n", "a.csv: not UTF-8.*iconv"),
    ("a.csv", "text,id,text\none,1,two\n", "a.csv: 2 columns are named 'text'"),
    ("a.txt", lzma.compress(b"text"), "a.txt: not UTF-8 text .*begins like xz: unpack"),
    ("a.jsonl", b"PAR1\x15\x04\xff", "a.jsonl: not UTF-8 text .*begins like parquet: unpack or convert"),
])
def test_what_can_not_be_read_is_named_with_its_line(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words):
        texts_of(write(tmp_path / name, content))


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("how", ["truncated", "one byte flipped", "not compressed"])
def test_a_damaged_compressed_file_is_one_line(tmp_path, learned, kind, how):
    words = np.random.default_rng(0).integers(0, 10**9, 30_000)
    rows = [{"text": f"{word} and more"} for word in words]
    path = write(tmp_path / f"a.jsonl.{kind}", json_lines(rows))
    if how == "not compressed":
        path.write_text(json_lines(rows))
    else:
        make.damage(path, how)
    process = prepare(learned, "--input", path, "--data_dir", tmp_path / "out")
    assert_refused(process, path)
    assert not (tmp_path / "out").exists() or how != "not compressed"  # that shows at the beginning


def test_nested_columns(tmp_path):
    rows = [{"meta": {"text": "in", "body": {"text": "deep"}}, "text": "out", "n": 1}]
    paths = [write(tmp_path / "a.jsonl", json_lines(rows)), write(tmp_path / "b.json", json.dumps(rows)),
             tmp_path / "c.parquet"]
    paths[2].write_bytes(make.parquet_bytes(rows))
    for path in paths:
        assert [texts_of(path, column) for column in ("text", "meta.text", "meta.body.text")] == [
            ["out"], ["in"], ["deep"]]
        for column, words in (("meta.title", "no column 'meta.title', only text, body"),
                              ("meta", "'meta' contains dict, not text"), ("text.x", "'text.x', only str"),
                              ("meta.body", "'meta.body' contains dict"), ("x.y", "only meta, text, n")):
            with pytest.raises(UserError, match=words):
                texts_of(path, column)
    literal = [{**rows[0], "meta.text": "literal"}]
    write(paths[0], json_lines(literal))
    paths[2].write_bytes(make.parquet_bytes(literal))
    write(tmp_path / "d.csv", "n,meta.text\n1,literal\n")
    for path in (paths[0], paths[2], tmp_path / "d.csv"):
        assert texts_of(path, "meta.text") == ["literal"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("column", ["text", "meta.text"])
def test_null_rows_are_refused_or_left_out_and_counted(tmp_path, learned, name, column):
    values = ["one", None, "two", None, "three"]
    rows = [{"text": text, "meta": {"text": text} if text or number == 1 else None}
            for number, text in enumerate(values)]
    path = write(tmp_path / name, json_lines(rows) if name == "a.jsonl" else json.dumps(rows))
    if name == "a.parquet":
        path.write_bytes(make.parquet_bytes(rows))
    flags = "--input", path, "--text_column", column, "--data_dir", tmp_path / "out"
    place = {"a.jsonl": "a.jsonl:2", "a.json": "a.json, item 2", "a.parquet": "a.parquet, row 2"}[name]
    assert_refused(prepare(learned, *flags), place, "--skip_null")
    process = prepare(learned, *flags, "--skip_null")
    assert f"2 rows left out: column '{column}' is null" in process.stdout
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(["one", "two", "three"], learned))


def test_half_of_a_surrogate_pair_is_the_same_character_everywhere(tmp_path, learned):
    lines = [r'{"text": "half \ud83d of é"}', r'{"text": "\udbc0\ud83d\ude42"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    texts = ["half \ufffd of é", "\ufffd🙂"]
    assert texts_of(path) == texts
    assert prepare(learned, "--input", path, "--data_dir", tmp_path / "out").returncode == 0
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(texts, learned))
    assert np.array_equal(expected_stream(["half \ud83d of é"], learned), expected_stream(texts[:1], learned))
    process = run_here(tokenizer, "train", path, "--vocab_size", 260, "--out", tmp_path / "t.json")
    assert process.returncode == 0 and get_tokenizer(str(tmp_path / "t.json")).n_vocab <= 260


@pytest.mark.parametrize("prefix", ["", "\n"], ids=["", "blank line"])
def test_byte_order_marks_in_configs_prompts_and_tokenizers(tmp_path, learned, prefix):
    (tmp_path / "config.txt").write_text(f"{BOM}{prefix}--max_steps 7\n", encoding="utf-8")
    assert train_gpt2.parse_args([f"@{tmp_path}/config.txt"]).max_steps == 7
    (tmp_path / "prompt.txt").write_text(f"{BOM}{prefix}Once", encoding="utf-8")
    assert sample.read_prompt(f"@{tmp_path}/prompt.txt") == f"{prefix}Once"
    content = open(learned, encoding="utf-8").read()
    (tmp_path / "tokenizer.json").write_text(f"{BOM}{prefix}{content}", encoding="utf-8")
    assert get_tokenizer(str(tmp_path / "tokenizer.json")).n_vocab == 512


# ------------------------------------------------------------------------------------------ separated texts


MARK = "<|endoftext|>"


def split_reference(text, separator):
    """The documents of a text by their definition, which needs the entire text."""
    return [part for part in re.split(rf"[\r\n]*{re.escape(separator)}[\r\n]*", text) if part]


@pytest.mark.parametrize("separator", [MARK, "\n\n", "--", "a"])
@pytest.mark.parametrize("text", [
    f"A story.\nIts end.\n{MARK}\nAnother one. \n\n{MARK}\n\n\n{MARK}third{MARK}\n",
    "\n<|endoftext|>\r\n\r\n  indented\r\n<|endof<|endoftext|>", "no separator at all\n", "<|endoftext|>" * 3,
    "a\n\n\nb--a---b\n--\n\n", "\n\n", "word " * 30 + MARK + "aword" * 20,
])
def test_documents_do_not_depend_on_the_size_of_the_blocks(learned, faults, text, separator):
    expected = split_reference(text, separator)
    for size in (1, 2, 3, 5, 14, 10**6):
        faults.small_batches(size)
        documents, ids = [], []
        for starts, piece in Reader(split_on=separator).pieces(io.StringIO(text, newline="")):
            documents.append(piece if starts else documents.pop() + piece)
            ids += get_tokenizer(learned).encode_ordinary(piece)
        assert documents == expected
        assert ids == [i for text in expected for i in get_tokenizer(learned).encode_ordinary(text)]


def test_many_line_breaks_are_searched_once(tmp_path):
    """A search from each of them would take an hour."""
    text = "a" + "\n" * 500_000 + "b" + "\r\n" * 500_000 + MARK + "c"
    pieces = list(Reader(split_on=MARK).texts(write(tmp_path / "a.txt", text)))
    assert "".join(piece for _, piece in pieces) == "a" + "\n" * 500_000 + "bc"
    assert [starts for starts, _ in pieces].count(True) == 2


def test_split_on_separates_the_documents_of_a_txt(tmp_path, learned):
    path = write(tmp_path / "stories.txt", f"one\n{MARK}\ntwo\n\n{MARK}\n")
    rows = write(tmp_path / "rows.jsonl", json_lines([{"text": f"three {MARK}"}]))
    flags = "--input", path, rows, "--data_dir"
    process = prepare(learned, *flags, tmp_path / "out", "--split_on", MARK)
    documents = ["one", "two", f"three {MARK}"]
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(documents, learned))
    assert f"{MARK} was read as plain text 1 time; " in process.stdout
    process = prepare(learned, *flags, tmp_path / "plain")
    assert f"{MARK} was read as plain text 3 times; --split_on '{MARK}'" in process.stdout
    assert shards.read_manifest(tmp_path / "out")["split_on"] == MARK
    assert_refused(prepare(learned, *flags, tmp_path / "out"), "different settings (split_on)")
    process = prepare(learned, *flags, tmp_path / "nowhere", "--split_on", "\\n\\n")
    assert "occurs nowhere: each .txt is one document" in process.stdout
    process = prepare(learned, "--input", rows, "--data_dir", tmp_path / "x", "--split_on", MARK)
    assert_refused(process, "--split_on", "none")
    assert_refused(prepare(learned, *flags, tmp_path / "x", "--split_on", ""), "--split_on")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_the_special_token_is_counted_in_every_format(tmp_path, learned, name):
    rows = [{"text": text} for text in (f"{MARK}{MARK}", "none", f"one {MARK}")]
    (tmp_path / name).write_bytes(make.parquet_bytes(rows) if name == "a.parquet" else
                                  (csv_text(rows) if name == "a.csv" else json_lines(rows)).encode())
    process = prepare(learned, "--input", tmp_path / name, "--data_dir", tmp_path / "out")
    assert f"{MARK} was read as plain text 3 times; " in process.stdout


# ------------------------------------------------------------------------------------- what --input takes


def test_directories_and_patterns_stand_for_their_files(tmp_path, learned, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    (folder / "b" / "c").mkdir(parents=True)
    for name in ("z.txt", "a.jsonl.gz", "b/c/M.TXT", "b/x.json", "README.md", ".hidden.txt", "b/notes"):
        write(folder / name, json_lines([{"text": name}]))
    (folder / "link").symlink_to(folder / "b")
    found = [f"texts/{name}" for name in ("a.jsonl.gz", "b/c/M.TXT", "b/x.json", "z.txt")]
    assert sources.find_files(["texts"]) == found
    assert capsys.readouterr().out == "texts: 4 files, without 3 of other formats\n"
    assert sources.find_files(["texts/*.*z*", "texts/b/**/*.TXT"]) == [found[0], found[1]]
    assert capsys.readouterr().out == "texts/*.*z*: 1 file\ntexts/b/**/*.TXT: 1 file\n"
    process = prepare(learned, "--input", "texts/b", "texts/z.txt", "--data_dir", "out")
    assert "texts/b: 2 files" in process.stdout
    documents = [(folder / "b/c/M.TXT").read_text(), "b/x.json", (folder / "z.txt").read_text()]
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(documents, learned))
    process = run_here(tokenizer, "train", "texts", "--vocab_size", 260, "--out", "t.json")
    assert process.returncode == 0 and "texts: 4 files" in process.stdout
    (folder / "b" / "gone.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match="gone.jsonl is a link to a file that does not exist"):
        sources.find_files(["texts"])
    (folder / "[odd].txt").write_text("a file may be named like a pattern")
    assert sources.find_files(["texts/[odd].txt"]) == ["texts/[odd].txt"]


def test_a_second_name_of_a_file_inside_an_entry_is_left_out_with_a_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("texts/b.txt", "texts/sub/c.txt", "elsewhere.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name, target in (("a.txt", "b.txt"), ("z.txt", "sub/c.txt"), ("out.txt", "../elsewhere.txt"),
                         ("linked", "sub")):
        (tmp_path / "texts" / name).symlink_to(target)
    files = ["texts/b.txt", "texts/out.txt", "texts/sub/c.txt"]
    assert sources.find_files(["texts"]) == files
    assert capsys.readouterr().out == (
        "texts: left out 2 links to files that are already included, such as texts/a.txt to texts/b.txt\n"
        "texts: 3 files, without 1 of other formats\n")
    assert sources.find_files(["texts/*"]) == sources.find_files(["texts/**"]) == files
    assert sources.find_files(["texts/*.txt"]) == ["texts/b.txt", "texts/out.txt", "texts/z.txt"]
    with pytest.raises(UserError, match="texts/b.txt and texts/a.txt are the same file"):
        sources.find_files(["texts", "texts/a.txt"])


def test_an_unreadable_directory_inside_the_input_is_refused(tmp_path, monkeypatch):
    """It would leave out texts without a word. (The superuser can read everything, so the call fails.)"""
    (tmp_path / "texts" / "closed").mkdir(parents=True)
    write(tmp_path / "texts" / "a.txt", "text")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="texts/closed can't be read"):
        sources.find_files([str(tmp_path / "texts")])


def test_inputs_that_are_missing_or_named_twice_are_refused(tmp_path, learned, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("texts/a.txt", "texts/b.txt", "other/x.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to("texts/a.txt")
    for inputs, words in (
        (["texts/a.txt", "texts/a.txt"], ["texts/a.txt", "same file"]),
        (["texts", "texts/b.txt"], ["texts/b.txt", "same file"]),
        (["texts/a.txt", "./link.txt"], ["texts/a.txt and ./link.txt are the same file"]),
        (["texts/*", "texts/../texts/a.txt"], ["same file"]),
        (["texts/c.txt"], ["texts/c.txt: no such file"]), (["*.csv"], ["*.csv: no such files"]),
        (["other"], ["other", ".jsonl"]), ([""], ["no such file"]), (["/dev/null"], ["/dev/null", "into -"]),
        (["texts/a.txt", "other/x.pdf"], ["x.pdf"]),
    ):
        assert_refused(prepare(learned, "--input", *inputs, "--data_dir", "out"), *words)
        assert_refused(run_here(tokenizer, "train", *inputs, "--out", "t.json"), *words)
        assert not (tmp_path / "out").exists() and not (tmp_path / "t.json").exists()
    for inputs, data_dir in (("texts", "texts"), ("texts", "texts/out"), (".", "out"), ("texts/*", "texts")):
        assert_refused(prepare(learned, "--input", inputs, "--data_dir", data_dir), "--data_dir", data_dir)
        assert sorted(os.listdir("texts")) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("entry, name", [
    (".hidden.txt", "hidden"), ("x/my.jsonl.gz", "my"), ("texts/", "texts"), ("x/texts/*.txt", "texts"),
    ("x/texts/**/*.txt", "texts"), ("-", "stdin"), ("/", "text"), ("...", "text"),
    ("c4-train.00000-of-01024.json.gz", "c4-train"),
])
def test_the_default_directory_has_a_name(entry, name):
    assert fineweb_edu.parse_args(["--input", entry]).data_dir == f"data/{name}"


def test_standard_input_is_prepared_and_continued(tmp_path, learned, texts, faults):
    text = "\n".join(texts[:40])
    flags = "--input", "-", "--shard_size", 9000, "--data_dir", tmp_path / "out"
    faults.small_batches(20_000)
    with faults.put_in():
        faults.before_shard(3, faults.interrupt)
        assert prepare(learned, *flags, stdin=text).returncode == 130
    stored = tmp_path / "out" / "sources" / "stdin.txt"
    process = prepare(learned, *flags, stdin=text + "other")
    assert_refused(process, "standard input", f"--input {stored}")
    assert stored.read_text() == text
    assert "continuing after" in prepare(learned, *flags, stdin=text).stdout
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream([text], learned))
    again = prepare(learned, "--input", stored, *flags[2:])  # without the pipe
    assert "already prepared" in again.stdout

    lines = json_lines([{"text": "one"}, {"text": "two"}])
    as_lines = ["-", "--stdin_format", "jsonl"]
    prepare(learned, "--input", *as_lines, "--data_dir", tmp_path / "lines", stdin=lines)
    assert np.array_equal(stream_of(tmp_path / "lines"), expected_stream(["one", "two"], learned))
    process = prepare(learned, "--input", "-", "--data_dir", tmp_path / "json", stdin=lines)
    assert_refused(process, "begins with a line of JSON: add --stdin_format jsonl")
    process = prepare(learned, "--input", "-", "--data_dir", tmp_path / "none")
    assert_refused(process, "no text in ", "stdin.txt")
    assert_refused(prepare(learned, "--input", stored, "--stdin_format", "csv"), "--stdin_format")
    process = run_here(tokenizer, "train", *as_lines, "--vocab_size", 258, "--out", tmp_path / "t.json",
                       stdin=lines)
    assert process.returncode == 0 and (tmp_path / "t.json").exists()


# ------------------------------------------------------------------ checks before the first shard, and damage


@pytest.mark.parametrize("name, content", [
    ("last.pdf", "x"), ("last.jsonl", '{"body": "x"}\n'), ("last.jsonl", '{"text": '),
    ("last.jsonl", '{"text": null}'), ("last.json", "[1]"), ("last.csv", "id,body\n1,x\n"),
    ("last.txt", b"caf\xe9"), ("last.parquet", b"PAR1 torn"), ("last.jsonl.gz", None), ("last.txt.zst", None),
])
def test_a_wrong_last_file_is_found_before_the_first_shard(tmp_path, learned, name, content):
    first = write(tmp_path / "first.jsonl", json_lines([{"text": "word " * 200}]))
    last = tmp_path / name
    write(last, content) if content else last.write_bytes(b"not compressed")
    flags = "--input", first, last, "--shard_size", 50, "--data_dir", tmp_path / "out"
    assert_refused(prepare(learned, *flags), name)
    assert not (tmp_path / "out").exists()
    assert_refused(run_here(tokenizer, "train", first, last, "--out", tmp_path / "t.json"), name)


def test_an_empty_file_among_others_is_said_and_left_out(tmp_path, learned):
    contents = {"a.txt": "one", "b.txt": "", "c.jsonl": "\n\n", "d.csv": "text\n", "e.json": "[]",
                "f.jsonl.gz": "", "g.txt": "two"}
    paths = [write(tmp_path / name, content) for name, content in contents.items()]
    paths.append(make.write_text_column(tmp_path / "h.parquet", pyarrow.array([], pyarrow.string())))
    empty = [*paths[1:6], paths[7]]
    process = prepare(learned, "--input", *paths, "--data_dir", tmp_path / "out")
    assert [line for line in process.stdout.splitlines() if "left out" in line] == [
        f"{path}: no text in it, left out" for path in empty]
    assert np.array_equal(stream_of(tmp_path / "out"), expected_stream(["one", "two"], learned))
    assert_refused(prepare(learned, "--input", *empty, "--data_dir", tmp_path / "none"), "no text in ")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def damaged(tmp_path, learned, texts, faults):
    """Three files of which the second is damaged in its middle, its sound content, and the flags."""
    faults.small_batches(5_000)
    lines = [json_lines({"text": text} for text in texts[n : n + 30]) for n in (0, 30, 60)]
    paths = [write(tmp_path / f"{number}.jsonl", part) for number, part in enumerate(lines)]
    write(paths[1], lines[1][: len(lines[1]) // 2])
    return paths, lines[1], ["--shard_size", 5_000, "--data_dir"]


def test_a_damaged_file_costs_no_finished_shard(tmp_path, learned, damaged):
    """Once it is repaired, the same command ends in the bytes of an undamaged preparation."""
    paths, sound, flags = damaged
    process = prepare(learned, "--input", *paths, *flags, tmp_path / "x" / "data")
    assert_refused(process, f"{paths[1]}:", "not JSON", "shards are kept", "the same command continues")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x" / "data").glob("*.npy")}
    assert len(kept) > 4
    write(paths[1], sound)
    process = prepare(learned, "--input", *paths, *flags, tmp_path / "x" / "data")
    assert "the input changed from file 2 on" in process.stdout and "continuing after" in process.stdout
    unchanged = [name for name in kept if (tmp_path / "x" / "data" / name).stat().st_mtime_ns == kept[name]]
    assert 2 <= len(unchanged) < len(kept)
    assert prepare(learned, "--input", *paths, *flags, tmp_path / "y" / "data").returncode == 0
    assert contents_of(tmp_path / "x" / "data") == contents_of(tmp_path / "y" / "data")


def test_a_damaged_file_can_be_left_out(tmp_path, learned, damaged):
    paths, _, flags = damaged
    prepare(learned, "--input", *paths, *flags, tmp_path / "x" / "data")
    process = prepare(learned, "--input", paths[0], paths[2], *flags, tmp_path / "x" / "data")
    assert "continuing after" in process.stdout
    prepare(learned, "--input", paths[0], paths[2], *flags, tmp_path / "y" / "data")
    assert contents_of(tmp_path / "x" / "data") == contents_of(tmp_path / "y" / "data")


def test_only_shards_of_unchanged_files_are_kept(tmp_path, learned, damaged):
    paths, sound, flags = damaged
    prepare(learned, "--input", *paths, *flags, tmp_path / "data")
    before = contents_of(tmp_path / "data")
    write(paths[0], "\n" + paths[0].read_text())
    process = prepare(learned, "--input", *paths, *flags, tmp_path / "data")
    assert_refused(process, "different settings (source)")
    assert contents_of(tmp_path / "data") == before


def test_skip_null_can_be_added_to_continue(tmp_path, learned, texts, faults):
    faults.small_batches(5_000)
    rows = [{"text": text} for text in [*texts[:40], None, *texts[40:50]]]
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    flags = ["--input", path, "--shard_size", 5_000, "--data_dir"]
    assert_refused(prepare(learned, *flags, tmp_path / "x" / "data"), "a.jsonl:41", "--skip_null", "are kept")
    process = prepare(learned, *flags, tmp_path / "x" / "data", "--skip_null")
    assert "continuing after" in process.stdout and "1 row left out" in process.stdout
    prepare(learned, *flags, tmp_path / "y" / "data", "--skip_null")
    assert contents_of(tmp_path / "x" / "data") == contents_of(tmp_path / "y" / "data")
    assert_refused(prepare(learned, *flags, tmp_path / "x" / "data"), "different settings (skip_null)")


def test_what_an_older_version_began_is_continued(tmp_path, learned, texts, faults):
    """Its manifests do not say where each shard ends. Complete ones have the same keys as ever."""
    faults.small_batches(5_000)
    path = write(tmp_path / "a.jsonl", json_lines({"text": text} for text in texts[:40]))
    flags = ["--input", path, "--shard_size", 5_000, "--data_dir"]
    with faults.put_in():
        faults.before_shard(4, faults.interrupt)
        assert prepare(learned, *flags, tmp_path / "x/data").returncode == 130
    manifest = json.loads((tmp_path / "x/data/manifest.json").read_text())
    for shard in manifest["shards"]:
        del shard["next"]
    (tmp_path / "x/data/manifest.json").write_text(json.dumps(manifest, indent=1))
    assert "continuing after" in prepare(learned, *flags, tmp_path / "x/data").stdout
    prepare(learned, *flags, tmp_path / "y/data")
    assert contents_of(tmp_path / "x" / "data") == contents_of(tmp_path / "y" / "data")
    manifest = json.loads((tmp_path / "x/data/manifest.json").read_text())
    assert list(manifest) == ["format", "source", "text_column", "tokenizer", "num_tokens", "shard_size",
                              "val_tokens_asked", "file_format", "val_tokens", "complete", "shards"]
    assert all(list(shard) == ["file", "split", "tokens", "bytes", "digest"] for shard in manifest["shards"])


def test_formats_of_a_hub_dataset_are_checked_before_the_first_download(tmp_path, learned):
    files = {"data/train-00000.jsonl.gz": gzip.compress(b'{"text": "one"}'), "data/train-00001.arrow": b"x"}
    files["README.md"] = (b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
                          b"    path: data/*\n---\n")
    with hub.serve_dataset(files, repository="someone/stories") as server:
        process = run_script("fineweb_edu.py", "--tokenizer", learned, "--dataset", "someone/stories",
                             "--data_dir", tmp_path / "out", check=False,
                             env=hub.environment(server, tmp_path))
    assert_refused(process, "train-00001.arrow", formats.FORMATS)
    assert not [path for method, path in server.asked if method == "GET" and "/data/train" in path]


# ---------------------------------------------------------------------------------------- long white space


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\r\n", " \n", "\u00a0", "\u3000 "])
def test_long_runs_of_white_space_encode_as_by_tiktoken(learned, space):
    """The runs are longer than those that are cut, and tiktoken itself survives them."""
    encoding, run = get_tokenizer(learned), space * (tokenizer.LONGEST_RUN + 5)
    for text, pieces in ((run, 1), (f"a{run}b", 2), (f"{run}'s", 2), (f"a.{run}\x1c{run}1{run}", 3),
                         (f"é{run}{MARK}", 2)):
        ids = encode_text(text, encoding)
        assert ids == encoding.encode_ordinary(text) and encoding.decode(ids) == text
        assert encode_text(text, encoding, special=True) == encoding.encode(text, allowed_special="all")
        assert len(list(tokenizer.cut_long_runs(text))) == pieces


def test_any_text_that_is_cut_at_white_space_encodes_alike(learned, monkeypatch):
    """Here, runs of two characters are long."""
    monkeypatch.setattr(tokenizer, "LONGEST_RUN", 0)
    monkeypatch.setattr(tokenizer, "LONG_RUN", re.compile(f"(?<!{tokenizer.SPACE}){tokenizer.SPACE}{{2,}}"))
    encoding, draw = get_tokenizer(learned), np.random.default_rng(0)
    parts = [" ", " ", "\n", "\t", "\u2003", "\x85", "\x1c", "a", "word", "'s", "1", "!", "é", MARK]
    for _ in range(2000):
        text = "".join(draw.choice(parts, draw.integers(1, 12)))
        assert encode_text(text, encoding) == encoding.encode_ordinary(text)
        assert encode_text(text, encoding, special=True) == encoding.encode(text, allowed_special="all")


@pytest.mark.parametrize("unit", [" ", "\n", "x", "é"])
def test_a_run_of_a_million_characters_is_encoded_everywhere(tmp_path, learned, unit):
    """tiktoken itself panics, with an exception that is no Exception, at a million blanks and a word.

    The trainer of the tokenizers library takes hours for it.
    """
    encoding, text = get_tokenizer(learned), f"a{unit * 1_100_000}b"
    stream = fineweb_edu.encode([(True, text)], learned).tolist()
    assert encoding.decode(stream[1:]) == text
    assert fineweb_edu.encode_fast([(True, text)], learned).tolist() == stream
    assert sample.encode_prompt(text, encoding)[0].tolist() == stream[1:]
    assert render_example({"ctx": text, "endings": ["b"]}, encoding)[0] == stream[1:]
    assert tokenizer.train([text], 260, tmp_path / "t.json") == 260
    assert '"FixedLength"' not in (tmp_path / "t.json").read_text()
