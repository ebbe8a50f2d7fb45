"""Shards of other programs: nanoGPT's, llm.c's, modded-nanogpt's, and prepared shards that were renamed."""

import os
import shutil

import make
import numpy as np
import pytest
from runs import copy_run, train

from fineweb_edu import prepare
from kit.files import UserError
from kit.shards import open_bin, open_shards, source_of, verify


def rename(directory, old, new):
    """Rename the shards whose names contain `old`."""
    for path in list(directory.glob(f"*{old}*")):
        path.rename(directory / path.name.replace(old, new))


@pytest.mark.parametrize("name, numbers, words", [
    ("x_train.bin", [20240801, 7, 500], "Llama 3"),
    ("x_train.bin", [20240326, 3, 1024], "is a model"),
    ("x_train.bin", [20240328, 2, 50257], "is a tokenizer"),
    ("hellaswag_val.bin", [20240522, 1, 10042], "multiple-choice"),
    ("x_train.bin", [20240520, 2, 500], "20240520, 2, not 20240520, 1"),
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


def test_two_data_sets_in_one_directory_are_both_named(tmp_path):
    make.write_shards(tmp_path, "tiny_shakespeare", train=range(9), val=range(9))
    make.write_shards(tmp_path, "TinyStories", train=range(9))
    with pytest.raises(UserError, match="TinyStories_train.npy and tiny_shakespeare_train.npy are train"):
        open_shards(tmp_path, "train")


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
