"""Runs that an earlier version of this project wrote can be loaded and resumed: tests/version_1."""

import json
import shutil
from pathlib import Path

import make
import pytest
from runs import assert_close, read_log
from same_bits import write_tokens

import checkpoint
import train_gpt2
from kit import recipe
from kit.files import UserError
from model import GPTConfig

OLD = Path(__file__).parent / "version_1"
# the flags of that run
FLAGS = ("--n_layer 1 --n_head 2 --n_embd 8 --vocab_size 64 --sequence_length 16 --micro_batch_size 4 "
         "--total_batch_size 128 --max_steps 6 --warmup_steps 2 --max_lr 1e-2 --val_every 3 --save_every 3 "
         "--val_tokens 1000 --hellaswag_every 0 --sample_every 0 --device cpu --no-compile --no-plot").split()


def resume(folder, *flags):
    """Resume the old run in a copy that has its checkpoint of step 3 and the whole log."""
    write_tokens(folder)
    if not (folder / "log").exists():
        shutil.copytree(OLD, folder / "log")
    directories = ["--data_dir", str(folder), "--log_dir", str(folder / "log")]
    train_gpt2.main(train_gpt2.parse_args([*FLAGS, *directories, "--resume", *flags]))
    return read_log(folder / "log")


def test_an_old_run_is_resumed_to_the_same_end(tmp_path):
    log = resume(tmp_path)
    assert_close(log, read_log(OLD), tolerance=1e-4)  # another processor rounds otherwise
    assert checkpoint.numbered(tmp_path / "log")[0].name == "ckpt_000006"


def test_an_old_checkpoint_is_loaded():
    model, meta = checkpoint.load(OLD / "ckpt_000003")
    assert model.config == GPTConfig(16, 64, 1, 2, 8) and meta["step"] == 3


def test_a_flag_that_an_old_run_did_not_have_means_its_default(tmp_path):
    shutil.copytree(OLD, tmp_path / "log")

    def forget(meta):
        del meta["identity"]["dropout"], meta["config"]["dropout"], meta["identity"]["bias"]

    make.change_meta(tmp_path / "log" / "ckpt_000003", forget)
    with pytest.raises(UserError, match="dropout 0.0 -> 0.5; use another --log_dir"):
        resume(tmp_path, "--dropout", "0.5")
    assert max(resume(tmp_path))[0] == 6


def test_the_table_of_settings_has_the_defaults_of_the_model():
    """model.py repeats them, so that it can be read by itself."""
    config = GPTConfig()
    for setting in recipe.SETTINGS:
        if hasattr(config, setting.name) and setting.default is not None:
            assert getattr(config, setting.name) == setting.default
    fields = set(GPTConfig.__dataclass_fields__) - {"num_tokens", "dropout", "gelu"}
    assert fields == set(recipe.SHAPE)


def test_the_flags_of_the_table_reach_run_json_and_the_checkpoint(whole):
    flags = json.loads((whole.log_dir / "run.json").read_text())["flags"]
    identity = checkpoint.read_meta(whole.log_dir / "best")["identity"]
    for name in recipe.IDENTITY:
        assert identity[name] == flags[name]
