"""Flags and configs as people type them: hyphens, near misses, names of other programs, any order."""

import pytest
from runs import ROOT

import app
import bench
import checkpoint
import fineweb_edu
import hellaswag
import sample
import tokenizer
import train_gpt2
from kit.flags import bfloat16_on_this_cpu
from train_gpt2 import parse_args

DEMO = f"@{ROOT}/configs/demo.txt"


@pytest.mark.parametrize("argv", [["--max_steps", "3", DEMO], [DEMO, "--max_steps", "3"],
                                  ["--seed", "1", "--max-steps=3", DEMO, "--keep", "4"]])
def test_what_is_typed_wins_over_a_config_wherever_it_stands(argv):
    args = parse_args(argv)
    assert args.max_steps == 3 and args.n_layer == 3 and args.log_dir == "log_demo"


def test_hyphens_are_underscores_also_in_a_config(tmp_path):
    config = tmp_path / "config.txt"
    config.write_text("\ufeff--max-steps 7 --no_compile\n--val-every=5", encoding="utf-8")  # with a BOM
    args = parse_args([f"@{config}", "--log-dir", "my-log"])
    assert (args.max_steps, args.compile, args.val_every, args.log_dir) == (7, False, 5, "my-log")
    assert sample.parse_args(["--max-new-tokens", "5", "-p", "x"]).max_new_tokens == 5
    assert tokenizer.parse_args(["train", "x", "--vocab-size", "300", "--out", "y"]).vocab_size == 300


@pytest.mark.parametrize("module, argv, words", [
    (train_gpt2, ["--batch_size", "4"], "did you mean --micro_batch_size or --total_batch_size?"),
    (train_gpt2, ["--learning_rate=1"], "did you mean --max_lr?"),
    (train_gpt2, ["--model_type", "gpt2"], "did you mean --init_from?"),
    (train_gpt2, ["--gradient_accumulation_steps", "5"], "did you mean --total_batch_size?"),
    (train_gpt2, ["--compile", "False"],
     "unknown argument False: a flag that turns something on takes no value; --no-FLAG turns it off"),
    (train_gpt2, ["--compile=False"], "argument --compile/--no-compile: takes no value, but got 'False'"),
    (train_gpt2, ["--eval_only=True"], "argument --eval_only: takes no value, but got 'True'"),
    (train_gpt2, ["--max_step_s", "1"], "did you mean --max_steps"),
    (train_gpt2, ["configs/demo.txt"], "as in @configs/demo.txt"),
    (train_gpt2, ["@configs/no.txt"], "no config @configs/no.txt; there are @configs/demo.txt, "),
    (train_gpt2, ["@configs/dmo.txt"], "no config @configs/dmo.txt: did you mean @configs/demo.txt?"),
    (train_gpt2, ["--hellaswag_dat=x.txt"], "did you mean --hellaswag_data"),
    (train_gpt2, [""], "unknown argument ; see "), (sample, [""], "unknown argument ; see "),
    (train_gpt2, ["--config", DEMO[1:]], "a config needs an @, as in @configs/demo.txt"),
    (train_gpt2, ["--sample_prompt", "@home", DEMO], "begins with @ is written --sample_prompt=@home"),
    (train_gpt2, ["--save", "3"], "did you mean --save_every?"),  # not taken for --save_every
    (sample, ["--temp", "0.5"], "did you mean --temperature?"),
    (sample, [str(ROOT)], f"did you mean --model {ROOT}?"),
    (fineweb_edu, [__file__], f"did you mean --input {__file__}?"),
    (train_gpt2, [DEMO, DEMO], "is given twice"),
    (sample, ["--temprature", "1"], "did you mean --temperature?"),
    (hellaswag, ["--xyz"], "unknown argument --xyz; "),
    (tokenizer, ["train", "x", "--out", "y", "--vocabsize", "300"], "did you mean --vocab_size?"),
    (checkpoint, ["export", "a", "b", "--push-to-hubb", "c"], "did you mean --push_to_hub?"),
])
def test_an_unknown_argument_is_refused_with_what_may_be_meant(capsys, module, argv, words):
    with pytest.raises(SystemExit) as refused:
        module.parse_args(argv)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("module, before, now", [
    (sample, ["--model_type", "gpt2"], ["--model", "gpt2"]),
    (app, ["--model-type=gpt2"], ["-m", "gpt2"]),
    (hellaswag, ["--model_type", "gpt2", "--data", "x"], ["--model", "gpt2", "--hellaswag_data", "x"]),
    (train_gpt2, ["-m", "gpt2"], ["--init_from", "gpt2"]),
    (train_gpt2, ["--model=gpt2"], ["--init_from", "gpt2"]),
    (fineweb_edu, ["--input", "x", "--val_tokens", "9"], ["--input", "x", "--val_size", "9"]),
    (fineweb_edu, ["--text", "x"], ["--input", "x"]),
    (tokenizer, ["train", "x", "y", "--out", "z"], ["train", "--input", "x", "y", "--out", "z"]),
    (bench, ["all", "--text", __file__], ["all", "--input", __file__]),
])
def test_old_names_of_flags_work_and_are_not_shown(capsys, module, before, now):
    one, other = module.parse_args(before), module.parse_args(now)
    for args in (one, other):
        vars(args).pop("files", None)  # how tokenizer.py took its input before
    assert one == other
    with pytest.raises(SystemExit):
        module.parse_args([*before[:1], "--help"] if before[0] in ("train", "all") else ["--help"])
    shown = capsys.readouterr().out
    for name in (word.partition("=")[0].replace("-type", "_type") for word in before if word[:2] == "--"):
        assert name in ("--input", "--out") or f"{name} " not in shown, name
    assert "FILES" not in shown


@pytest.mark.parametrize("argv, words", [
    (["--max_steps", "x"], "argument --max_steps: must be a whole number, not 'x'"),
    (["--max_steps", "0"], "must be at least 1, not 0"), (["--seed", str(2**63)], "must be at most 9223"),
    (["--max_lr", "fast"], "must be a number, not 'fast'"),
    (["--max_lr", "nan"], "must be at least 0, not nan"),
    (["--max_lr", "1e200"], "must be at most 1e+100, not 1e200"),
])
def test_a_value_that_is_no_such_number_is_refused(capsys, argv, words):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert words in capsys.readouterr().err


def test_a_tokenizer_needs_a_text(capsys):
    with pytest.raises(SystemExit) as refused:
        tokenizer.parse_args(["train", "--out", "x"])
    assert refused.value.code == 2 and "--input: name the text" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    ("amx_bf16 avx512_bf16", "has AMX"), ("avx512_bf16 avx2", "has AVX-512 BF16"), ("avx2", "emulates"),
    (None, "on CPUs with AMX"),
])
def test_the_help_says_what_bfloat16_brings_on_this_processor(tmp_path, flags, words):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"model name\t: X\nflags\t\t: {flags}\n")
    assert words in bfloat16_on_this_cpu(tmp_path / "cpuinfo")


@pytest.mark.parametrize("argv, data_dir", [
    ([], "edu_fineweb10B"), (["--demo_data"], "data/demo"), (["--demo_data", "--data_dir", "x"], "x"),
])
def test_the_demo_data_have_a_directory_of_their_own(argv, data_dir):
    assert parse_args(argv).data_dir == data_dir


def test_help_shows_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit):
        train_gpt2.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--dropout X probability of dropping an activation (default: 0.0)" in shown
    assert "never removed (default: 0)" in shown and "(default: on)" in shown
    assert not any(f"(default: {value})" in shown for value in ("None", "()", "True", "False"))
