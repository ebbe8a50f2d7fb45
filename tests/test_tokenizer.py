"""Tokenizers: GPT-2's and those trained on text, with the same interface."""

import pytest
import tokenizers
from runs import assert_refused, run_here, run_script

import bench
import hellaswag
import plot
import tokenizer
from kit.files import UserError, check_output
from tokenizer import get_tokenizer, train


def test_gpt2s_ids_of_a_text(gpt2_tokenizer):
    assert gpt2_tokenizer.encode("Hello, I'm a language model,") == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11
    ]
    assert (gpt2_tokenizer.n_vocab, gpt2_tokenizer.eot_token) == (50257, 50256)


def test_a_learned_tokenizer_is_byte_level_and_the_same_in_both_libraries(learned, texts):
    ours, theirs = get_tokenizer(learned), tokenizers.Tokenizer.from_file(learned)
    assert ours.n_vocab == 512 and ours.eot_token == 511
    odd = "  naïve\r\n\t日本語 🙂 \x00 I'LL don't 1234567890   "
    for text in [*texts[:40], odd]:
        ids = ours.encode_ordinary(text)
        assert ours.decode(ids) == text and ids == theirs.encode(text).ids
    assert ours.encode("<|endoftext|>", allowed_special="all") == [511] == theirs.encode("<|endoftext|>").ids
    assert len(ours.encode_ordinary("<|endoftext|>")) > 1


def test_training_is_reproducible_and_stops_early_on_a_small_text(tmp_path, texts, learned):
    train(texts, 512, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == open(learned, "rb").read()
    assert (train(["ab ab ab"], 5000, tmp_path / "small.json")
            == get_tokenizer(str(tmp_path / "small.json")).n_vocab < 300)


@pytest.mark.parametrize("size", [256, 65537])
def test_an_impossible_vocabulary_size_is_refused(tmp_path, size):
    with pytest.raises(UserError, match="vocab_size"):
        train(["text"], size, tmp_path / "x.json")


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    for name, content in {"a.json": "{", "b.json": "[]", "c.json": '{"model": {"vocab": {"a": 5}}}'}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            get_tokenizer(str(tmp_path / name))
    with pytest.raises(UserError, match="no tokenizer"):
        get_tokenizer(str(tmp_path / "missing.json"))


def test_the_command_trains_a_tokenizer(tmp_path, texts):
    (tmp_path / "text.txt").write_text(texts[0])
    out = tmp_path / "tokenizer.json"
    process = run_script("tokenizer.py", "train", tmp_path / "text.txt", "--vocab_size", 280, "--out", out)
    assert "280 tokens" in process.stdout and get_tokenizer(str(out)).n_vocab == 280


@pytest.mark.parametrize("script, flags", [
    (tokenizer, ["train", "FILE", "--out", "FILE"]), (tokenizer, ["train", "FOLDER", "--out", "LINK"]),
    (hellaswag, ["--data", "FILE", "--json", "FILE"]), (hellaswag, ["-m", "FILE", "--json", "LINK"]),
    (bench, ["data", "--text", "FILE", "--json", "FILE"]),
], ids=["tokenizer", "tokenizer, a link", "hellaswag", "hellaswag, the model", "bench"])
def test_no_command_overwrites_its_input(tmp_path, script, flags):
    folder = tmp_path / "texts"
    folder.mkdir()
    names = {"FOLDER": folder, "FILE": folder / "my.txt", "LINK": tmp_path / "link.txt"}
    names["FILE"].write_text("some text")
    names["LINK"].symlink_to(names["FILE"])
    process = run_here(script, *(names.get(flag, flag) for flag in flags))
    assert_refused(process, flags[-2], names[flags[-1]], f"would overwrite the input {names['FILE']}")
    assert names["FILE"].read_text() == "some text"


def test_an_output_that_can_not_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"--out .*/t.json: the directory {tmp_path} can't be written"):
        check_output("--out", f"{tmp_path}/t.json")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*/file/t.json: "):
        check_output("--out", f"{tmp_path}/file/t.json")


def test_the_directory_of_an_output_is_made_or_the_error_names_the_output(tmp_path):
    (tmp_path / "my.txt").write_text("some text " * 100)
    (tmp_path / "log.txt").write_text("0 train 3.0\n1 train 2.0\n")
    out = tmp_path / "new/deeper/tokenizer.json"
    run_here(tokenizer, "train", "--input", tmp_path / "my.txt", "--vocab_size", 260, "--out", out)
    assert out.exists()
    out.unlink(), out.mkdir()
    process = run_here(tokenizer, "train", "--input", tmp_path / "my.txt", "--out", out)
    assert_refused(process, str(out))
    assert ".tmp" not in process.stderr
    for script, *flags in ((tokenizer, "train", "--input", tmp_path / "my.txt", "--out"),
                           (bench, "start", "--json"), (plot, tmp_path, "--out"),
                           (hellaswag, "-m", "gpt2", "--json")):
        process = run_here(script, *flags, tmp_path / "my.txt/out.png")
        assert_refused(process, "my.txt")
        assert ".tmp" not in process.stderr


def test_without_network_and_cache_the_error_names_the_remedy(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    nowhere = {
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "https_proxy": "http://127.0.0.1:9",
        "DATA_GYM_CACHE_DIR": "",
    }
    process = run_script("fineweb_edu.py", "--input", tmp_path / "text.txt", "--data_dir", tmp_path / "out",
                         check=False, env=nowhere)
    assert_refused(process, "TIKTOKEN_CACHE_DIR", "vocab.bpe", "encoder.json")
