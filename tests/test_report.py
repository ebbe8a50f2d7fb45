"""What a run prints: a line that renews itself on a terminal, lines elsewhere, warnings, a summary."""

import os
import pty
import re
import subprocess

import pytest
from runs import ROOT, assert_refused, command_line, environment, flags_of, run_here, train

import train_gpt2
from kit.files import count
from model import GPT


def test_a_terminal_shows_one_line_that_renews_itself(shards, tmp_path):
    ours, theirs = pty.openpty()
    command = command_line(["train_gpt2.py", *flags_of(shards, tmp_path / "log", "--sample_every", 6)])
    process = subprocess.Popen(command, cwd=ROOT, env=environment(more={"COLUMNS": "120"}),
                               stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    text = shown.decode(errors="replace")
    lines = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]  # as they stay on it
    assert "step 11 of 12 | loss " in text and "tokens/s" in text
    assert not any("| loss" in line for line in lines)
    assert sum("val loss" in line for line in lines) == 4 and any("finished: " in line for line in lines)


@pytest.mark.parametrize("every, steps", [(0, []), (5, [0, 5, 10, 11]), (1, list(range(12)))])
def test_elsewhere_every_few_steps_have_a_line(shards, tmp_path, capsys, every, steps):
    log = train(shards, tmp_path / "log", "--log_every", every)
    assert [int(step) for step in re.findall(r"^step +(\d+) \| loss", capsys.readouterr().out, re.M)] == steps
    assert all((step, "train") in log for step in range(12))


def test_samples_begin_with_the_first_interval(shards, tmp_path, capsys):
    train(shards, tmp_path / "log", "--sample_every", 6, "--sample_prompt", "The end")
    before, _, after = capsys.readouterr().out.partition("step     5 |")
    assert "The end" not in before and "step     4 |" in before
    assert "\nstep 6: samples\nThe end" in after


def test_the_summary_names_losses_and_places(shards, tmp_path, capsys):
    log = train(shards, tmp_path / "log", "--plot")
    out = capsys.readouterr().out
    loss, val = float(log[11, "train"]), float(log[12, "val"])
    assert f"finished: training loss {loss:.4f}, validation loss {val:.4f}\n" in out
    for name in ("ckpt_000012", "curves.png", "log.txt"):
        assert re.search(rf"^  \w+: +{re.escape(str(tmp_path / 'log' / name))}$", out, re.M), name


def test_the_summary_names_the_best_model_if_the_loss_rose_after_it(shards, tmp_path, capsys, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5])
    monkeypatch.setattr(train_gpt2.Validation, "loss", lambda *_, **__: next(losses))
    train(shards, tmp_path / "log")
    out = capsys.readouterr().out
    best = tmp_path / "log" / "best"
    assert f"best:    {best}, validation loss 3.0000: the loss rose after it" in out
    assert f'next: python sample.py -m {best} -p "' in out


def test_many_epochs_are_said_with_the_steps_of_one(shards, tmp_path, capsys):
    flags = ["--total_batch_size", 2**14, "--micro_batch_size", 512, "--val_every", 0, "--warmup_steps", 0]
    train(shards, tmp_path / "log", *flags, "--max_steps", 2)
    assert "warning" not in capsys.readouterr().out
    flags += ["--max_steps", 1000, "--max_lr", "1e30"]  # which ends it after the first steps
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "many", *flags))
    warning = re.search(r"warning: .* only ([\d,]+) tokens, .* (\d+) times; .*--max_steps (\d+)",
                        process.stdout)
    tokens, times, steps = (int(text.replace(",", "")) for text in warning.groups())
    assert times == round(1000 * 2**14 / tokens) and (steps - 1) * 2**14 < tokens <= steps * 2**14


def test_a_learning_rate_that_would_rise_is_said(shards, tmp_path, capsys):
    for min_lr, said in ((3e-3, False), (4e-3, True)):
        train(shards, tmp_path / str(min_lr), "--min_lr", min_lr, "--max_steps", 1, "--val_every", 0)
        assert ("will rise after the warm-up" in capsys.readouterr().out) == said


@pytest.mark.parametrize("compiling", ["--compile", "--no-compile"])
@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    MemoryError(),
], ids=["can't allocate", "not enough", "MemoryError"])
def test_memory_that_does_not_suffice_is_one_line(shards, tmp_path, monkeypatch, error, compiling):
    def forward(self, idx, targets=None):
        raise error

    monkeypatch.setattr(GPT, "forward", forward)
    monkeypatch.setattr(train_gpt2, "compile_model", lambda model, *_: model)
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "log", "--val_every", 0, compiling))
    assert_refused(process, "out of memory: use a smaller --micro_batch_size")
    assert ("compiling: a minute or more" in process.stdout) == (compiling == "--compile")
    if compiling == "--compile":  # who sees a mistake in the plan need not wait for the compiler
        assert process.stdout.index(" epochs\n") < process.stdout.index("compiling: a minute")


def test_few_steps_are_not_said_to_be_no_epochs(shards, tmp_path, capsys):
    train(shards, tmp_path / "log", "--max_steps", 1, "--val_every", 0)
    assert "\n1 step, less than 0.01 epochs\n" in capsys.readouterr().out


def test_numbers_agree_with_their_nouns():
    assert [count(1, "rank"), count(2000, "step"), count(2, "micro-batch", "es")] == [
        "1 rank", "2,000 steps", "2 micro-batches"]
