"""Checkpoints: written completely or not at all, verified on every load."""

import shutil

import make
import pytest
import torch
from runs import train

import checkpoint
from checkpoint import DamagedCheckpoint, Progress
from kit.device import pick_device
from kit.files import UserError
from model import GPT


def trained(steps=2, seed=0):
    model = make.small_gpt(seed=seed).train()
    optimizer = model.configure_optimizers(0.1, 1e-3, "cpu")
    for _ in range(steps):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model, optimizer):
    x = torch.arange(32).view(2, 16)
    model(x, x)[1].backward()
    optimizer.step()
    optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_loaded_checkpoint_trains_on_bit_for_bit(tmp_path, learned):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "ckpt_000002", model, Progress(2, 1.25), learned, optimizer)
    again, meta = checkpoint.load(tmp_path / "ckpt_000002")
    assert (meta["step"], meta["val_loss"]) == (2, 1.25) and same(model, again)
    assert again.lm_head.weight is again.transformer.wte.weight and not again.training
    optimizer_again = again.configure_optimizers(0.1, 1e-3, "cpu")
    checkpoint.Source(tmp_path / "ckpt_000002", meta).load_optimizer(optimizer_again)
    for pair in ((model, optimizer), (again.train(), optimizer_again)):
        train_step(*pair)
    assert same(model, again)
    loaded, tokenizer = checkpoint.load_model_and_tokenizer(tmp_path)  # a log directory: its newest
    assert tokenizer.n_vocab == 512 and isinstance(loaded, GPT)
    assert not list(tmp_path.glob(".*"))


def test_the_newest_valid_checkpoint_is_found_and_the_damaged_ones_named(tmp_path):
    model, optimizer = trained()
    for step in (5, 10, 1000000):
        checkpoint.save(tmp_path / f"ckpt_{step:06d}", model, Progress(step), optimizer=optimizer)
    assert checkpoint.latest(tmp_path) == (tmp_path / "ckpt_1000000", [])
    shutil.rmtree(tmp_path / "ckpt_1000000")
    (tmp_path / "ckpt_1000000").mkdir()
    newest, skipped = checkpoint.latest(tmp_path)
    assert newest.name == "ckpt_000010" and "ckpt_1000000" in skipped[0]
    checkpoint.save(tmp_path / "ckpt_000015", model, Progress(15), optimizer=optimizer)
    checkpoint.prune(tmp_path, 2, 15)  # the damaged newer one does not count
    names = [path.name for path in checkpoint.numbered(tmp_path)]
    assert names == ["ckpt_1000000", "ckpt_000015", "ckpt_000010"]
    checkpoint.save(tmp_path / "ckpt_1000000", model, Progress(1000000))  # a damaged one is replaced
    assert checkpoint.latest(tmp_path)[0].name == "ckpt_1000000"
    assert checkpoint.latest(tmp_path, to_resume=True)[0].name == "ckpt_000015"  # that one has an optimizer
    checkpoint.save(tmp_path / "ckpt_1000000", model, Progress(1000000), optimizer=optimizer)
    checkpoint.prune(tmp_path, 2, 1000000)
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ["ckpt_1000000", "ckpt_000015"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "meta.json"])
@pytest.mark.parametrize("how", ["one byte flipped", "truncated", "missing"])
def test_damage_is_found_before_anything_is_used(tmp_path, capsys, name, how):
    model, optimizer = trained()
    path = tmp_path / "ckpt_000002"
    checkpoint.save(path, model, Progress(2), optimizer=optimizer)
    make.damage(path / name, how)
    with pytest.raises(DamagedCheckpoint, match="ckpt_000002"):
        checkpoint.load(path)
    assert checkpoint.latest(tmp_path)[0] is None
    with pytest.raises(UserError, match="no valid checkpoint.*ckpt_000002.*train_gpt2.py"):
        checkpoint.load_model(tmp_path)
    checkpoint.save(tmp_path / "ckpt_000001", model, Progress(1), optimizer=optimizer)
    checkpoint.load_model(tmp_path)  # the older one, and it says so
    assert "skipped damaged checkpoint: " in (told := capsys.readouterr().err) and "ckpt_000002" in told


def test_what_is_no_run_and_no_checkpoint_is_refused_without_a_command_that_writes_there(tmp_path):
    (tmp_path / "my.txt").write_text("some text")
    with pytest.raises(UserError, match="no valid checkpoint: name a log directory"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(UserError, match="my.txt is not a checkpoint .* of build-nanogpt, or is truncated$"):
        checkpoint.load_model(tmp_path / "my.txt")


@pytest.mark.parametrize("when", ["writing", "syncing"])
def test_a_full_disk_while_saving_leaves_the_old_checkpoint(tmp_path, faults, when):
    old, new = trained(seed=1)[0], trained(seed=2)[0]
    checkpoint.save(tmp_path / "best", old, Progress(1))
    with faults.put_in():
        if when == "writing":
            faults.while_writing_tensors(faults.no_space)
        else:
            faults.inside_save("best", faults.no_space, writing="meta.json")
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(tmp_path / "best", new, Progress(2))
    assert same(checkpoint.load_model(tmp_path / "best"), old) and not list(tmp_path.glob(".*"))


def test_clean_restores_the_old_checkpoint_after_a_kill_between_two_renames(tmp_path):
    old = trained(seed=1)[0]
    checkpoint.save(tmp_path / "best", old, Progress(1))
    (tmp_path / "best").rename(tmp_path / ".best.old.tmp")
    (tmp_path / ".ckpt_000002.tmp").mkdir()
    checkpoint.clean(tmp_path)
    assert same(checkpoint.load_model(tmp_path / "best"), old) and not list(tmp_path.glob(".*"))


def test_a_source_or_device_that_does_not_exist_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # gpt3 might be a name of the hub
    for source in (tmp_path, tmp_path / "missing", "gpt3"):
        with pytest.raises(UserError, match="checkpoint"):
            checkpoint.load_model(source)
    for device in ("tpu", "cuda:x", "cpu:1", "cuda:99"):
        with pytest.raises(UserError, match="--device"):
            pick_device(device)
    assert pick_device("cpu:0") == "cpu:0"


def test_list_and_verify_show_steps_losses_sizes_and_damage(tmp_path, capsys):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "ckpt_000005", model, Progress(5, 5.25), optimizer=optimizer)
    checkpoint.save(tmp_path / "ckpt_000010", model, Progress(10, None), optimizer=optimizer)
    checkpoint.save(tmp_path / "best", model, Progress(5, 5.25))

    def shown(command, directory=tmp_path):
        checkpoint.main(checkpoint.parse_args([command, str(directory)]))
        return capsys.readouterr().out.splitlines()

    lines = shown("list")
    assert [line + ", verified" for line in lines] == shown("verify") and len(lines) == 3
    expected = ("000005: step 5, latest val loss 5.2500, ", "000010: step 10, not evaluated, ",
                "best: step 5, ")
    for line, words in zip(lines, expected):
        assert words in line and line.endswith(" MB")
    assert shown("list", tmp_path / "best") == lines[2:]

    path = tmp_path / "ckpt_000005" / "model.safetensors"
    make.damage(path, "one byte flipped")  # the size stays: only the digest shows it
    assert shown("list") == lines
    with pytest.raises(SystemExit, match="1"):
        shown("verify")
    first, second, _ = capsys.readouterr().out.splitlines()
    assert "damaged" in first and "digest" in first and second.endswith("verified")
    path.write_bytes(b"")
    (tmp_path / "ckpt_000010" / "meta.json").unlink()
    for directory in (tmp_path, tmp_path / "ckpt_000005", tmp_path / "ckpt_000010"):
        with pytest.raises(SystemExit, match="1"):
            shown("list", directory)
    for other, words in (("nothing", "does not exist"), ("ckpt_000099", "does not exist"),
                         (path.relative_to(tmp_path), "contains no checkpoint")):
        with pytest.raises(UserError, match=words):
            shown("list", tmp_path / other)


def test_init_from_crops_the_positions_to_block_size(tmp_path, shards, whole, capsys):
    before = checkpoint.load_model(whole.log_dir)
    flags = ["--init_from", whole.log_dir, "--max_steps", 1, "--sequence_length", 16, "--warmup_steps", 0]
    train(shards, tmp_path / "cropped", *flags, "--block_size", 16)
    assert "--block_size 16: the model keeps the first 16 of the 32 positions" in capsys.readouterr().out
    cropped = checkpoint.load_model(tmp_path / "cropped")
    assert cropped.config.block_size == 16 and cropped.transformer.wpe.weight.shape == (16, 32)
    assert (cropped.transformer.wpe.weight - before.transformer.wpe.weight[:16]).abs().max() < 0.01
    train(shards, tmp_path / "whole", *flags)  # no flag: all positions stay
    assert checkpoint.load_model(tmp_path / "whole").config.block_size == 32
    with pytest.raises(UserError, match="--block_size 64: .* has learned only 32 positions"):
        train(shards, tmp_path / "longer", *flags, "--block_size", 64)
