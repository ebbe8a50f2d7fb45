"""Shards of other programs: nanoGPT's, llm.c's, modded-nanogpt's, and prepared shards that were renamed."""

import errno
import mmap
import os
import shutil

import make
import numpy as np
import pytest
from runs import assert_refused, copy_run, flags_of, run_here, train

import checkpoint
import train_gpt2
from fineweb_edu import prepare
from kit.files import UserError, warn_once
from kit.shards import open_bin, open_shards, source_of, tokenizer_of, verify


@pytest.fixture(scope="module")
def raw(shards, tmp_path_factory):
    """The ids of the `shards` fixture as nanoGPT's train.bin and val.bin."""
    splits = {split: np.concatenate([ids for _, ids in open_shards(shards, split)])
              for split in ("train", "val")}
    return make.write_raw(tmp_path_factory.mktemp("nanoGPT") / "data", **splits)


def rename(directory, old, new):
    """Rename the shards whose names contain `old`."""
    for path in list(directory.glob(f"*{old}*")):
        path.rename(directory / path.name.replace(old, new))


# ---------------------------------------------------------------------------------------- nanoGPT's two files


def test_nanogpts_files_train_with_the_tokenizer_that_the_flag_names(raw, learned, tmp_path, capsys):
    log = train(raw, tmp_path / "raw", "--data_tokenizer", learned)
    assert f"no manifest: its shards can't be verified, and their tokenizer is assumed to be {learned}" in (
        capsys.readouterr().out)
    with_header = tmp_path / "header"
    with_header.mkdir()
    for path in raw.iterdir():  # the same ids as llm.c writes them
        ids = path.read_bytes()
        header = np.array([20240520, 1, len(ids) // 2, *[0] * 253], dtype=np.int32)
        (with_header / f"x_{path.name}").write_bytes(header.tobytes() + ids)
    assert train(with_header, tmp_path / "log", "--data_tokenizer", learned) == log and len(log) > 40
    assert checkpoint.load_model_and_tokenizer(tmp_path / "raw")[1].n_vocab == 512


def test_nanogpts_files_do_not_train_without_a_tokenizer(raw, tmp_path):
    process = run_here(train_gpt2, *flags_of(raw, tmp_path / "log"))
    assert_refused(process, raw / "train.bin", "--data_tokenizer gpt2", "data/openwebtext/prepare.py")
    process = run_here(train_gpt2, *flags_of(raw, tmp_path / "log", "--data_tokenizer", "gpt2"))
    assert_refused(process, "--vocab_size 512", "50257 ids")
    process = run_here(train_gpt2, *flags_of(raw, tmp_path / "log", "--data_tokenizer", "none.json"))
    assert_refused(process, "no tokenizer none.json")


def test_a_resume_notices_another_tokenizer(raw, learned, tmp_path):
    train(raw, tmp_path / "log", "--data_tokenizer", learned, "--max_steps", 4)
    other = shutil.copy(learned, tmp_path / "tokenizer.json")
    train(raw, tmp_path / "log", "--data_tokenizer", other, "--max_steps", 4, "--resume")  # its place is free
    with open(other, "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="tokenizer 'tokenizer.json .* -> .*; use another --log_dir"):
        train(raw, tmp_path / "log", "--data_tokenizer", other, "--max_steps", 4, "--resume")


@pytest.mark.parametrize("content", [b"", b"\0", b"\1\0\2\0\3"])
def test_a_damaged_file_of_nanogpt_is_refused(tmp_path, content):
    make.write_raw(tmp_path / "data", train=range(100), val=range(100))
    (tmp_path / "data" / "val.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"val.bin has {len(content)} bytes, not a whole number"):
        open_shards(tmp_path / "data", "val")


def test_a_file_with_nanogpts_name_and_a_header_is_read_by_its_header(tmp_path):
    header = np.array([20240520, 1, 5, *[0] * 253], dtype=np.int32).tobytes()
    (tmp_path / "train.bin").write_bytes(header + np.arange(5, dtype=np.uint16).tobytes())
    assert open_bin(tmp_path / "train.bin").tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "train.bin").write_bytes(header[:-2])
    with pytest.raises(UserError, match="fewer than its header"):
        open_bin(tmp_path / "train.bin")


@pytest.mark.parametrize("name", ["x_train.npy", "x_train.bin", "train.bin"])
def test_ids_are_read_into_memory_where_files_can_not_be_mapped(tmp_path, faults, capsys, name):
    ids = np.arange(1000, dtype=np.uint16)
    header = np.array([20240520, 1, 1000, *[0] * 253], dtype=np.int32).tobytes()
    if name == "x_train.npy":
        np.save(tmp_path / name, ids)
    else:
        (tmp_path / name).write_bytes((header if "x_" in name else b"") + ids.tobytes())
    warn_once.cache_clear()
    faults.failing(mmap, "mmap", errno.ENODEV)
    for _ in range(2):
        [(_, tokens)] = open_shards(tmp_path, "train")
        assert np.array_equal(tokens, ids)
    assert capsys.readouterr().err.count("can't map files into memory") == 1


# --------------------------------------------------------------------------------------- the tokenizer's name


def test_the_flag_can_not_contradict_the_manifest(shards, whole, tmp_path):
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "log", "--data_tokenizer", "gpt2"))
    assert_refused(process, "--data_tokenizer gpt2", shards / "manifest.json", "omit the flag")
    assert tokenizer_of(shards, str(shards / "tokenizer.json")) == str(shards / "tokenizer.json")


def test_the_assumed_tokenizer_is_named(shards, tmp_path, capsys, faults):
    make.copy_shards(shards, tmp_path / "data", manifest=False)
    faults.without_vocabulary()
    train(tmp_path / "data", tmp_path / "log", "--max_steps", 1, "--vocab_size", 50304)
    assert "their tokenizer is assumed to be gpt2" in capsys.readouterr().out
    train(tmp_path / "data", tmp_path / "other", "--max_steps", 1)
    assert "their tokenizer is unknown" in capsys.readouterr().out
    process = run_here(train_gpt2, *flags_of(tmp_path / "none", tmp_path / "log2"))
    assert_refused(process, "no train shards")
    assert process.stdout == ""


# --------------------------------------------------------------------------------------- files of other kinds


@pytest.mark.parametrize("name, numbers, words", [
    ("x_train.bin", [20240801, 7, 500], "Llama 3"), ("train.bin", [20240801, 7, 500], "Llama 3"),
    ("x_train.bin", [20240326, 3, 1024], "is a model"),
    ("x_train.bin", [20240328, 2, 50257], "is a tokenizer"),
    ("hellaswag_val.bin", [20240522, 1, 10042], "multiple-choice"),
    ("x_train.bin", [20240520, 2, 500], "20240520, 2, not 20240520, 1"),
    ("openwebtext_train.bin", [198, 50256, 11], "must be train.bin and val.bin"),
])
def test_a_bin_file_of_another_kind_is_refused_as_what_it_is(tmp_path, name, numbers, words):
    (tmp_path / name).write_bytes(np.array(numbers + [0] * 600, dtype=np.int32).tobytes())
    with pytest.raises(UserError, match=f"{name}.*{words}"):
        open_bin(tmp_path / name)


def test_a_shard_of_more_than_a_billion_ids_is_opened(tmp_path):
    """llm.c allows up to 2**31; twice the count has no place in 32 bits."""
    count = 2**30 + 5
    path = tmp_path / "x_train.bin"
    path.write_bytes(np.array([20240520, 1, count], dtype=np.int32).tobytes())
    os.truncate(path, 1024 + 2 * count)  # a hole: it takes no space on the disk
    assert open_bin(path).shape == (count,)


@pytest.mark.parametrize("content", ['{"files": ["a.txt"]}', "[1]", '{"format": "theirs", "shards": []}'])
def test_a_manifest_of_another_program_is_named_and_left_alone(shards, tmp_path, learned, content):
    data = make.copy_shards(shards, tmp_path / "data", manifest=False)
    (data / "manifest.json").write_text(content)
    process = run_here(train_gpt2, *flags_of(data, tmp_path / "log"))
    assert_refused(process, f"{data / 'manifest.json'} was not written by fineweb", "move it elsewhere")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="was not written by fineweb_edu.py"):
        prepare([tmp_path / "a.txt"], data, {}, learned)
    assert (data / "manifest.json").read_text() == content


def test_two_data_sets_in_one_directory_are_both_named(tmp_path):
    make.write_shards(tmp_path, "tiny_shakespeare", train=range(9), val=range(9))
    make.write_shards(tmp_path, "TinyStories", train=range(9))
    with pytest.raises(UserError, match="TinyStories_train.npy and tiny_shakespeare_train.npy are train"):
        open_shards(tmp_path, "train")


# ----------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("directory, prefix", [
    ("edu_fineweb10B", "edufineweb"), ("fineweb10B", "fineweb"), ("finewebedu10B", "finewebedu"),
    ("my", "my"),
])
def test_shards_have_the_names_that_the_other_programs_look_for(tmp_path, texts, learned, directory, prefix):
    (tmp_path / "a.txt").write_text(texts[0])
    prepare([tmp_path / "a.txt"], tmp_path / directory, {}, learned, file_format="bin")
    names = sorted(path.name for path in (tmp_path / directory).glob("*.bin"))
    assert names == [f"{prefix}_train_000001.bin", f"{prefix}_val_000000.bin"]


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    make.write_shards(tmp_path, **{f"train_{n}": [n] * 20 for n in range(8, 13)}, val_0=range(20))
    assert [tokens[0] for _, tokens in open_shards(tmp_path, "train")] == [8, 9, 10, 11, 12]
    (tmp_path / "x_train_9.npy").rename(tmp_path / "x_train_09.npy")
    assert len(open_shards(tmp_path, "train")) == 5
    (tmp_path / "x_train_10.npy").unlink()
    with pytest.raises(UserError, match="train shard 000010 is missing between 000009 and 000011"):
        open_shards(tmp_path, "train")


def test_the_names_of_fineweb_edu_are_known(tmp_path):
    for prefix in ("finewebedu", "edu_fineweb", "edufineweb", "fineweb"):
        (tmp_path / prefix).mkdir()
        make.write_shards(tmp_path / prefix, prefix, train_000001=range(9))
        assert ("dataset" in source_of(tmp_path / prefix)) == ("edu" in prefix)


def test_renamed_shards_are_the_same_data(shards, whole, tmp_path):
    """Their numbers tell them apart, their digests prove it: training resumes on them in the same bits."""
    data = make.copy_shards(shards, tmp_path / "fineweb10B")
    rename(data, "data_", "fineweb_")
    assert verify(data) == verify(shards)
    log_dir = copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    assert train(data, log_dir, "--resume") == whole.log
    rename(data, "fineweb_train_000002", "train_2")  # one of them, with another number of digits
    assert verify(data) == verify(shards)


@pytest.mark.parametrize("do, name, words", [
    (os.replace, "x_train_000099.npy", "data_train_000002.npy is missing"),
    (os.replace, "x_val_000002.npy", "data_train_000002.npy is missing"),
    (os.replace, "x_train_000001.npy", "data_train_000001.npy and x_train_000001.npy are train"),
    (shutil.copy, "x_train_000002.npy", "data_train_000002.npy and x_train_000002.npy are train"),
    (shutil.copy, "x_train_000099.npy", "x_train_000099.npy is not in manifest"),
], ids=["another number", "another split", "a number that is taken", "a copy", "a copy with another number"])
def test_a_rename_that_leaves_a_doubt_is_refused(shards, tmp_path, do, name, words):
    data = make.copy_shards(shards, tmp_path / "data")
    do(data / "data_train_000002.npy", data / name)
    with pytest.raises(UserError, match=words):
        train(data, tmp_path / "log")


def test_shards_that_changed_places_are_found_by_their_digests(shards, tmp_path):
    data = make.copy_shards(shards, tmp_path / "data")
    for old, new in (("_000001", "_tmp"), ("_000002", "_000001"), ("_tmp", "_000002"), ("data_", "x_")):
        rename(data, old, new)
    with pytest.raises(UserError, match="x_train_000001.npy has changed since it was written"):
        train(data, tmp_path / "log")
