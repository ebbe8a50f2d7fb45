"""Losses and gradients that are not finite, and runs that diverge: located, said, skipped or stopped."""

import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from runs import (
    assert_close,
    assert_finite,
    assert_refused,
    flags_of,
    names_of,
    read_log,
    run_here,
    run_script,
    train,
)

import checkpoint
import train_gpt2
from checkpoint import Progress
from kit.divergence import remedy, watch_loss
from model import GPT
from train_gpt2 import DataLoaderLite


@pytest.mark.parametrize("what, more", [
    ("loss", []), *(pytest.param(*case, marks=pytest.mark.slow)
                    for case in (("gradient", []), ("loss", ["--shard"]), ("gradient", ["--shard"])))])
def test_a_step_that_is_not_finite_on_one_rank_is_located(shards, tmp_path, what, more):
    """One sequence, which rank 1 reads in step 5, is at fault: the error names rank, shard and offset."""
    loader = DataLoaderLite(4, 32, data_dir=shards)
    sequence = 5 * 8 + 4 + 2  # eight sequences a step; after the four of rank 0, the third one
    path, _, offset = loader.place(sequence)
    fault = f'not_finite({loader.window(sequence)[:-1].tolist()}, "{what}")'
    flags = flags_of(shards, tmp_path / "log", "--val_every", 0, "--save_every", 1, *more)
    process = run_script("torchrun", 2, "train_gpt2.py", *flags, fault=fault, check=False)
    assert process.returncode == 1
    words = rf"error: step 5 has .*nan; rank 1: loss .* at offset {offset} of {re.escape(str(path))}"
    assert re.search(words, process.stderr), process.stderr
    assert names_of(tmp_path / "log") == ["ckpt_000005", "ckpt_000004"]
    assert_finite(checkpoint.load_model(tmp_path / "log"))

    if what == "gradient":  # from here on there is no difference
        return
    skip = ["--skip_bad_steps", 1]
    process = run_script("torchrun", 2, "train_gpt2.py", *flags, "--resume", *skip, fault=fault)
    assert "skipped: step 5" in process.stdout
    log = read_log(tmp_path / "log")
    assert float(log[5, "skipped"]) == 1 and (5, "train") not in log and (11, "train") in log
    assert checkpoint.read_meta(tmp_path / "log" / "ckpt_000012")["skipped"] == 1
    flags = flags_of(shards, tmp_path / "one", "--val_every", 0, "--save_every", 1, *skip)
    run_script("train_gpt2.py", *flags, fault=fault)
    assert_close(read_log(tmp_path / "one"), log)


@pytest.mark.parametrize("save_every", [1, 4])
def test_a_run_that_diverges_stops_and_saves_only_finite_weights(shards, tmp_path, save_every):
    flags = ["--max_lr", "1e30", "--warmup_steps", 0, "--save_every", save_every, "--val_every", 1]
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "log", *flags))
    assert_refused(process, "not finite" if "not finite" in process.stderr else "nan", "--max_lr")
    assert "--dtype" not in process.stderr  # on a CPU the run is in float32 already
    assert re.search(r"step \d+ .*(nan|inf|not finite)", process.stderr)
    for path in checkpoint.numbered(tmp_path / "log"):
        assert_finite(checkpoint.load(path)[0])


@pytest.mark.parametrize("skip", [0, 3])
def test_a_gradient_norm_that_overflows_is_the_users_to_mend(shards, tmp_path, skip):
    """Each element of the gradient is finite, so that a repeated step must repeat the test of the norm."""
    flags = ["--max_lr", 100, "--warmup_steps", 1, "--n_layer", 4, "--max_steps", 60, "--val_every", 0]
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "log", *flags, "--skip_bad_steps", skip))
    assert_refused(process, "gradient norm inf at offset", "lower --max_lr")
    assert process.stdout.count("skipped: step") == skip


def test_float32_is_recommended_to_runs_in_sixteen_bits():
    for name in ("bfloat16", "float16", "float32"):
        assert ("--dtype float32" in remedy(SimpleNamespace(name=name))) == (name != "float32")


def watched(losses, warmup_steps=10, stop=False):
    """Feed losses to watch_loss, of a model with 512 ids; return the messages."""
    messages, progress = [], Progress()
    args = SimpleNamespace(warmup_steps=warmup_steps, stop_on_divergence=stop, log_dir="log")
    for progress.step, loss in enumerate(losses):
        watch_loss(progress, loss, args, 512, SimpleNamespace(say=messages.append))
    return messages


def learning(steps=1000):
    """The losses of a run that learns, with noise and a few spikes."""
    draw = random.Random(0)
    return [3 + 3.3 * math.exp(-step / 100) + draw.gauss(0, 0.3) + 3 * (step % 200 == 150)
            for step in range(steps)]


def test_a_run_that_learns_is_not_called_diverged():
    assert not watched(learning())
    assert not watched([math.log(512) + 0.1] * 200)  # learns nothing, for example without a learning rate


@pytest.mark.parametrize("then", [[200.0], [5.0] * 100], ids=["at once", "slowly"])
def test_a_run_that_diverges_is_said_once(then):
    messages = watched(learning() + 3 * then)
    assert len(messages) == 1 and "the run has diverged" in messages[0] and "--max_lr" in messages[0]
    assert len(watched(learning() + 100 * then + learning() + 100 * then)) == 2  # it had recovered


def test_a_loss_far_above_a_uniform_guess_is_said_after_the_warmup():
    assert "a uniform guess gives 6.24" in watched([200.0] * 70)[0]
    assert not watched([200.0] * 59)


def test_a_run_stops_on_divergence_if_it_is_asked_to(shards, tmp_path):
    flags = ["--max_lr", 1, "--warmup_steps", 0, "--max_steps", 40]
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "log", *flags, "--stop_on_divergence"))
    assert_refused(process, "the run has diverged", f"{tmp_path}/log/best", "--init_from")
    step = int(re.search(r"error: step (\d+)", process.stderr)[1])
    assert (step, "train") in train(shards, tmp_path / "goes_on", *flags)
    meta = checkpoint.read_meta(checkpoint.numbered(tmp_path / "goes_on")[0])  # a resumed run remembers it
    assert meta["step"] == 40 and meta["diverged"] and meta["smoothed"] > meta["lowest"] + 1


def test_in_fp16_a_gradient_that_no_scale_makes_finite_stops_the_run(shards, tmp_path, monkeypatch):
    """The scaler halves its scale from 2**16 at each skipped step; below 1 the run stops, and says why."""
    features = GPT.features

    def infinite(self, *args, **named):
        x = features(self, *args, **named)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * torch.inf)
        return x

    monkeypatch.setattr(GPT, "features", infinite)
    flags = flags_of(shards, tmp_path / "log", "--dtype", "float16", "--max_steps", 40)
    process = run_here(train_gpt2, *flags)
    assert_refused(process, "step 16 has loss", "gradient norm", "lower --max_lr")
