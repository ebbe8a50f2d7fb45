"""Faults in training runs: a process is killed, stopped or hangs, a checkpoint is damaged, the disk is full.

Each fault hits a small run, and the test looks at what is left. docs/reliability.md lists them.
`python -m pytest -m slow -k faults` runs the longer forms.
"""

import errno
import fcntl
import itertools
import json
import mmap
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import make
import pytest
from runs import (
    ENDLESS,
    ROOT,
    TINY,
    Run,
    assert_close,
    assert_refused,
    assert_same_end,
    copy_run,
    environment,
    flags_of,
    kill_all,
    names_of,
    ranks_of,
    read_log,
    run_here,
    run_script,
    run_until_killed,
    start_script,
    train,
    wait_for_line,
    weights,
)

import checkpoint
import train_gpt2
from fineweb_edu import prepare
from kit import files
from kit.files import UserError
from train_gpt2 import get_lr, parse_args


def starts_of(log_dir):
    """How often a run was started, by its record."""
    return len(json.loads((log_dir / "run.json").read_text())["starts"])


# ------------------------------------------------------------------------------------ killed, stopped, hung


LONG = ["--max_steps", 100, "--warmup_steps", 10]


@pytest.fixture(scope="module")
def long_whole(shards, tmp_path_factory):
    """An uninterrupted run of 100 steps."""
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    return Run(log_dir, train(shards, log_dir, *LONG))


@pytest.mark.parametrize("moment", [
    *range(3), *(pytest.param(moment, marks=pytest.mark.slow) for moment in range(3, 9)),
])
def test_sigkill_at_a_random_moment(shards, long_whole, tmp_path, moment):
    process = start_script("train_gpt2.py", *flags_of(shards, tmp_path / "log", *LONG))
    wait_for_line(process, " parameters, ")  # the start is recorded
    time.sleep(random.Random(moment).uniform(0, 0.8))
    assert "finished" not in kill_all(process)
    train(shards, tmp_path / "log", *LONG, "--resume")
    assert_same_end(tmp_path / "log", long_whole)
    assert starts_of(tmp_path / "log") == 2


def twenty_moments():
    """Faults that kill a run of 60 steps while it compiles, trains, evaluates, saves and deletes."""
    draw = random.Random(1337)

    def name(most=60):
        return f"ckpt_{draw.randrange(4, most + 1, 4):06d}"

    files = ["model.safetensors", "optimizer.safetensors", "meta.json", "tokenizer.json"]
    return [
        *(f"while_compiling(kill, after={seconds})" for seconds in (0.5, 2, 4)),
        *(f"at_step({draw.randrange(60)}, kill)" for _ in range(4)),
        *(f"in_micro_batch({draw.randrange(120)}, kill)" for _ in range(2)),
        *(f"in_evaluation({draw.randrange(4, 61, 4)}, kill)" for _ in range(2)),
        *(f'inside_save("{name()}", kill, writing="{file}")' for file in files),
        f'inside_save("{name()}", kill)',
        'inside_save("best", kill, after_rename=True)',
        f'inside_removal("{name(52)}", kill)',
        *(f'inside_removal("{name(52)}", kill, after_rename=True)' for _ in range(2)),
    ]


@pytest.mark.slow
def test_sigkill_at_twenty_moments_of_a_compiled_run(shards, tmp_path):
    flags = ["--compile", "--max_steps", 60]
    run_script("train_gpt2.py", *flags_of(shards, tmp_path / "whole", *flags))
    whole = Run(tmp_path / "whole", read_log(tmp_path / "whole"))
    moments = twenty_moments()
    assert len(moments) == 20
    for number, fault in enumerate(moments):
        log_dir = tmp_path / str(number)
        run_until_killed("train_gpt2.py", *flags_of(shards, log_dir, *flags), fault=fault)
        step = max(read_log(log_dir))[0] if (log_dir / "log.txt").exists() else "start"
        run_script("train_gpt2.py", *flags_of(shards, log_dir, *flags, "--resume"))
        assert_same_end(log_dir, whole)
        print(f"{fault}: after step {step}, then the same bits", flush=True)


@pytest.fixture(scope="module")
def whole_of_ranks(shards, tmp_path_factory):
    """whole_of_ranks(n, *flags): an uninterrupted run under torchrun on n ranks."""
    runs = {}

    def whole(ranks, *more):
        if (ranks, *more) not in runs:
            log_dir = tmp_path_factory.mktemp("whole") / "log"
            flags = flags_of(shards, log_dir, "--micro_batch_size", 8 // ranks, *more)
            run_script("torchrun", ranks, "train_gpt2.py", *flags)
            runs[ranks, *more] = Run(log_dir, read_log(log_dir))
        return runs[ranks, *more]

    return whole


ON_RANKS = [(2, []), (2, ["--shard"]), (3, []),  # 3 ranks take 4 micro-batches in turn
            *(pytest.param(4, flags, marks=pytest.mark.slow) for flags in ([], ["--shard"]))]


@pytest.mark.parametrize("ranks, more", ON_RANKS)
def test_a_run_on_several_ranks_has_the_numbers_of_one_process(whole, whole_of_ranks, ranks, more):
    assert_close(whole_of_ranks(ranks, *more).log, whole.log)


@pytest.mark.parametrize("ranks, more", ON_RANKS)
def test_sigkill_of_all_ranks(shards, whole_of_ranks, tmp_path, ranks, more):
    flags = flags_of(shards, tmp_path / "log", "--micro_batch_size", 8 // ranks, *more)
    process = start_script("torchrun", ranks, "train_gpt2.py", *flags)
    wait_for_line(process, "step     6 |")
    kill_all(process)
    run_script("torchrun", ranks, "train_gpt2.py", *flags, "--resume")
    assert_same_end(tmp_path / "log", whole_of_ranks(ranks, *more))


def test_a_run_resumes_with_another_micro_batch_size(shards, whole, tmp_path):
    copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    assert_close(train(shards, tmp_path / "log", "--resume", "--micro_batch_size", 1), whole.log)


@pytest.mark.parametrize("ranks, more", [
    (2, ["--shard"]), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, []), (3, [])))])
def test_a_run_resumes_on_another_number_of_ranks(shards, whole, tmp_path, ranks, more):
    copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    flags = flags_of(shards, tmp_path / "log", "--resume", "--micro_batch_size", 2, *more)
    run_script("torchrun", ranks, "train_gpt2.py", *flags)
    assert_close(read_log(tmp_path / "log"), whole.log)


@pytest.mark.parametrize("ranks", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_a_sharded_run_resumes_unsharded(shards, whole, whole_of_ranks, tmp_path, ranks):
    copy_run(whole_of_ranks(2, "--shard").log_dir, tmp_path / "log", without="ckpt_000012")
    flags = flags_of(shards, tmp_path / "log", "--resume", "--micro_batch_size", 2)
    run_script(*(("torchrun", ranks) if ranks > 1 else ()), "train_gpt2.py", *flags)
    assert_close(read_log(tmp_path / "log"), whole.log)


@pytest.mark.parametrize("background", ["--no-background", "--background"])
@pytest.mark.parametrize("fault, newest", [
    ('inside_save("ckpt_000004", kill)', None),
    ('inside_save("ckpt_000004", kill, after_rename=True)', 4),
    ('inside_save("best", kill, step=8)', 4),  # the best of step 4 has been moved aside
    ('inside_save("best", kill, step=8, after_rename=True)', 4),
    ('inside_save("ckpt_000008", kill)', 4),
    ('inside_save("ckpt_000012", kill)', 8),
    ('inside_removal("ckpt_000004", kill, after_rename=True)', 12),
])
def test_sigkill_inside_a_save(shards, whole, tmp_path, fault, newest, background):
    run_until_killed("train_gpt2.py", *flags_of(shards, tmp_path / "log", background), fault=fault)
    found, skipped = checkpoint.latest(tmp_path / "log")
    assert (found and int(found.name[-6:])) == newest and not skipped
    copy_run(tmp_path / "log", tmp_path / "cleaned")
    checkpoint.clean(tmp_path / "cleaned")
    checkpoint.load(tmp_path / "cleaned" / "best")  # even if the new one had not replaced it yet
    train(shards, tmp_path / "log", "--resume", background)
    assert_same_end(tmp_path / "log", whole)
    assert not list((tmp_path / "log").glob(".*.tmp"))


def test_a_checkpoint_in_the_background_is_that_of_its_step(shards, tmp_path, faults):
    """Training is at step 7 before the checkpoint of step 4 is written, which must not have changed."""
    flags, at_step_7, trained_on = ["--val_every", 0, "--keep", 3], threading.Event(), []
    train(shards, tmp_path / "whole", *flags)
    faults.at_step(7, at_step_7.set)
    faults.while_writing_tensors(lambda: trained_on.append(at_step_7.wait(60)))
    train(shards, tmp_path / "log", *flags, "--background")
    assert trained_on == [True]
    for step in (4, 8, 12):
        name = f"ckpt_{step:06d}"
        assert weights(tmp_path / "log", name) == weights(tmp_path / "whole", name)


@pytest.mark.parametrize("stop", [True, False])
def test_a_stopped_run_waits_for_its_checkpoint(shards, whole, tmp_path, faults, capsys, stop):
    """So does one that ends: what it says to be saved is on the disk."""
    faults.while_writing_tensors(lambda: time.sleep(2))
    if stop:
        faults.at_step(2, faults.stop)
        with pytest.raises(SystemExit):
            train(shards, tmp_path / "log", "--background", "--save_every", 0, "--val_every", 0)
    else:
        train(shards, tmp_path / "log", "--background", "--save_every", 12, "--val_every", 0)
    name = "ckpt_000003" if stop else "ckpt_000012"
    checkpoint.load(tmp_path / "log" / name)
    saved, ended = f"saved {tmp_path / 'log' / name}", "stopped by" if stop else "finished"
    output = capsys.readouterr().out
    assert output.index(saved) < output.index(ended)


def test_sigkill_between_the_log_and_the_checkpoint(shards, whole, tmp_path):
    flags = flags_of(shards, tmp_path / "log")
    run_until_killed("train_gpt2.py", *flags, fault='before_save("ckpt_000008", kill)')
    assert (8, "val") in read_log(tmp_path / "log")
    with open(tmp_path / "log" / "log.txt", "a") as file:
        file.write("8 train 5.9")  # and a line that was cut short
    train(shards, tmp_path / "log", "--resume")
    assert_same_end(tmp_path / "log", whole)


@pytest.mark.parametrize("to_rank", [None, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (0, 1))])
def test_sigterm_to_torchrun_or_to_one_rank(shards, tmp_path, to_rank):
    process = start_script("torchrun", 2, "train_gpt2.py", *flags_of(shards, tmp_path / "log", *ENDLESS))
    wait_for_line(process, "step     5 |")
    started = time.monotonic()
    os.kill(process.pid if to_rank is None else ranks_of(process)[to_rank], signal.SIGTERM)
    rest = process.communicate()[0]
    assert time.monotonic() - started < 30
    assert process.returncode == 1  # torchrun's own status, although both ranks saved and exited
    step = int(re.search(r"stopped by SIGTERM before step (\d+)", rest)[1])
    newest, skipped = checkpoint.latest(tmp_path / "log", to_resume=True)
    assert newest.name == f"ckpt_{step:06d}" and not skipped
    assert max(read_log(tmp_path / "log"))[0] == step - 1


@pytest.mark.parametrize("rank, more", [
    (0, []), (1, ["--shard"]), *(pytest.param(*case, marks=pytest.mark.slow)
                                 for case in ((1, []), (0, ["--shard"])))])
def test_sigkill_of_one_rank_ends_the_other_with_the_reason(shards, tmp_path, rank, more):
    flags = flags_of(shards, tmp_path / "log", *ENDLESS, *more)
    process = start_script("torchrun", 2, "train_gpt2.py", *flags)
    wait_for_line(process, "step     5 |")
    started = time.monotonic()
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    rest = process.communicate()[0]
    assert process.returncode == 1 and time.monotonic() - started < 20
    assert f"rank {1 - rank} lost contact with another rank" in rest and "with --resume" in rest


def test_torchrun_restarts_after_sigkill_of_one_rank(shards, whole_of_ranks, tmp_path):
    command = ["torchrun", 2, "--max-restarts=1", "train_gpt2.py", *flags_of(shards, tmp_path / "log")]
    process = run_script(*command, fault="if RANK == 1 and RESTART == 0: at_step(6, kill)")
    assert "finished" in process.stdout
    assert_same_end(tmp_path / "log", whole_of_ranks(2))
    assert starts_of(tmp_path / "log") == 2
    # a restart never resumes the run of another torchrun
    process = run_script(*command, check=False)
    assert process.stderr.count("already contains a run") == 2 and process.returncode == 1


@pytest.mark.parametrize("others_wait_for", ["stop", pytest.param("gradients", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(shards, tmp_path, others_wait_for):
    flags = flags_of(shards, tmp_path / "log", *ENDLESS, "--timeout", 8)
    fault = f'if RANK == 1: while_others_wait_for("{others_wait_for}", hang)'
    process = start_script("torchrun", 2, "train_gpt2.py", *flags, fault=fault)
    wait_for_line(process, "step     5 |")
    started = time.monotonic()
    line = wait_for_line(process, "error:")
    assert "rank 0 lost contact with another rank" in line and "--timeout 8 seconds" in line
    assert time.monotonic() - started < 30
    kill_all(process)  # torchrun itself waits 30 seconds for a process that does not answer


def test_the_loop_for_machines_that_may_go_away(shards, whole, tmp_path):
    """The loop is run as docs/reliability.md prints it, and its python is killed twice."""
    text = (ROOT / "docs/reliability.md").read_text()
    loop = re.search(r"^until .*train_gpt2.py.*done$", text, re.MULTILINE)[0]
    flags = " ".join(map(str, flags_of(shards, tmp_path / "log")))
    loop = loop.replace("python train_gpt2.py", f"{sys.executable} train_gpt2.py {flags}")
    process = subprocess.Popen(["bash", "-c", loop.replace("sleep 5", "sleep 0.1")], cwd=ROOT, text=True,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for moment in (0.05, 0.15):
        wait_for_line(process, " parameters, ")  # the start is recorded
        time.sleep(moment)
        os.kill(ranks_of(process)[0], signal.SIGKILL)
    process.communicate()
    assert process.returncode == 0
    assert_same_end(tmp_path / "log", whole)
    assert starts_of(tmp_path / "log") == 3
    wrong = subprocess.run(["bash", "-c", loop.replace("--max_steps 12", "--max_steps 13")], cwd=ROOT)
    assert wrong.returncode == 0  # a wrong flag ends the loop, too


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name, how", [("", "directory empty"), *itertools.product(
    ["model.safetensors", "optimizer.safetensors", "meta.json"],
    ["truncated", "one byte flipped", "missing"],
)])
def test_a_damaged_newest_checkpoint_is_skipped(shards, whole, tmp_path, capsys, name, how):
    path = copy_run(whole.log_dir, tmp_path / "log") / "ckpt_000012" / name
    if how == "directory empty":
        shutil.rmtree(path)
        path.mkdir()
    else:
        make.damage(path, how)
    train(shards, tmp_path / "log", "--resume")
    out = capsys.readouterr().out
    assert re.search(r"skipped damaged checkpoint: .*ckpt_000012", out) and "at step 8" in out
    assert_same_end(tmp_path / "log", whole)


def test_a_changed_meta_json_is_found(whole, tmp_path):
    path = copy_run(whole.log_dir / "ckpt_000012", tmp_path / "ckpt_000012") / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "best_val": meta["best_val"] / 2}))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="digest is not the one it states"):
        checkpoint.load(path.parent)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(shards, whole, tmp_path):
    copy_run(whole.log_dir, tmp_path / "log")
    for path in checkpoint.numbered(tmp_path / "log"):
        (path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint .* is valid"):
        train(shards, tmp_path / "log", "--resume")
    assert read_log(tmp_path / "log") == whole.log


EVERY_STEP = ["--max_steps", 6, "--save_every", 1, "--keep_every", 3, "--val_every", 2]


def test_the_newest_the_best_and_the_milestones_stay(shards, tmp_path):
    flags = [*EVERY_STEP, "--max_lr", 0.1, "--min_lr", 0.1]  # too large: the best is not the last
    train(shards, tmp_path / "log", *flags)
    names = ["ckpt_000006", "ckpt_000005", "ckpt_000003"]
    assert names_of(tmp_path / "log") == names
    losses = {step: float(value) for (step, stream), value in read_log(tmp_path / "log").items()
              if stream == "val" and step > 0}
    best = min(losses, key=losses.get)
    assert checkpoint.read_meta(tmp_path / "log" / "best")["step"] == best == 2
    for name in names[:2]:
        shutil.rmtree(tmp_path / "log" / name)
    train(shards, tmp_path / "log", *flags, "--resume")
    assert checkpoint.read_meta(tmp_path / "log" / "best")["step"] == best


def test_a_checkpoint_that_can_not_be_deleted_does_not_stop_the_run(shards, tmp_path, faults):
    faults.busy("ckpt_000001")
    train(shards, tmp_path / "log", *EVERY_STEP)  # replaces its best twice
    assert names_of(tmp_path / "log") == ["ckpt_000006", "ckpt_000005", "ckpt_000003", "ckpt_000001"]
    assert checkpoint.load(tmp_path / "log" / "best")[1]["step"] == 6


# -------------------------------------------------------------------------- the disk and other processes


@pytest.mark.parametrize("full_at, flags", [
    ("checkpoint", []), ("checkpoint", ["--background"]), ("log", []),
])
def test_a_full_disk_ends_the_run_in_one_line(shards, whole, tmp_path, full_at, flags):
    log_dir = copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    size = 100_000 if full_at == "checkpoint" else f"os.path.getsize({str(log_dir / 'log.txt')!r}) + 10"
    process = run_script("train_gpt2.py", *flags_of(shards, log_dir, "--resume", *flags), check=False,
                         fault=f"at_step(9, lambda: fill_disk({size}))")
    last = process.stderr.splitlines()[-1]
    name = "best" if full_at == "checkpoint" else "log.txt"
    assert process.returncode == 1
    assert re.match(rf"error: .*File too large.*{name}|error: .*{name}.*File too large", last), last
    assert "use --resume" in last
    assert checkpoint.latest(log_dir, to_resume=True)[0].name == "ckpt_000008"
    names = {path.name for path in log_dir.iterdir() if not path.name.startswith("source_")}
    assert names == {".lock", "best", "ckpt_000008", "log.txt", "run.json"}
    checkpoint.load(log_dir / "best")
    train(shards, log_dir, "--resume")
    assert_same_end(log_dir, whole)


@pytest.mark.parametrize("name", ["log.txt", "curves.png", "run.json", "best/model.bin", "ckpt_000001/x",
                                  "tensorboard/events"])
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resumed"])
def test_files_of_another_program_are_never_touched(shards, tmp_path, name, resume):
    path = tmp_path / "log" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 0}')
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "log", *resume))
    assert_refused(process, f"a {name.partition('/')[0]} of another program", tmp_path / "log")
    assert path.read_text() == '{"step": 0}'
    assert {path.name for path in (tmp_path / "log").iterdir()} == {name.partition("/")[0], ".lock"}


def test_temporary_files_of_another_program_stay(shards, learned, texts, tmp_path):
    source = make.write_jsonl(tmp_path / "topics.jsonl", texts[:20])
    for name in ("log/.mine.tmp", "log/.work.tmp/x", "data/.mine.tmp", "data/.work.tmp/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("theirs")
    prepare([str(source)], tmp_path / "data", {"files": "topics"}, learned)
    train(shards, tmp_path / "log", "--resume")
    train(shards, tmp_path / "log", "--resume")
    for name in ("log/.mine.tmp", "log/.work.tmp/x", "data/.mine.tmp", "data/.work.tmp/x"):
        assert (tmp_path / name).read_text() == "theirs"


@pytest.mark.parametrize("content", ["[1]", "not JSON"])
def test_a_run_json_of_another_program_is_not_called_damaged(shards, tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert_refused(run_here(train_gpt2, *flags_of(shards, tmp_path)), "a run.json of another program")


def test_a_run_whose_run_json_was_removed_resumes(shards, whole, tmp_path):
    log_dir = copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    (log_dir / "run.json").unlink()
    train(shards, log_dir, "--resume")
    assert_same_end(log_dir, whole)


def is_directory(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def is_folder(path, *_):
    """A directory of the program's, which are Paths: Python's own temporary ones stay as they are."""
    return isinstance(path, Path) and path.is_dir()


@pytest.mark.parametrize("fault, words", [
    ((fcntl, "flock", errno.ENOLCK), "has no locks"),
    ((fcntl, "flock", errno.EOPNOTSUPP), "has no locks"),
    ((fcntl, "flock", errno.ENOSYS), "has no locks"),
    ((os, "fsync", errno.EINVAL, is_directory), "power failure"),
    ((os, "fsync", errno.ENOTSUP), "power failure"),
    ((os, "fsync", errno.EBADF, is_directory), "power failure"),
    ((os, "open", errno.EACCES, is_folder), "power failure"),
    ((mmap, "mmap", errno.ENODEV), "can't map files into memory"),
    ((os, "chmod", errno.EPERM), None),
    ((os, "chmod", errno.ENOTSUP), None),
    ((os, "posix_fadvise", errno.EINVAL), None),
], ids=lambda value: " ".join([value[1], errno.errorcode[value[2]]]) if isinstance(value, tuple) else "")
def test_a_simple_file_system_is_enough(shards, whole, learned, texts, tmp_path, faults, capsys, fault,
                                        words):
    """A missing call gives at most one warning; shards and run have the same bits as without the fault."""
    source = make.write_jsonl(tmp_path / "topics.jsonl", texts)
    files.warn_once.cache_clear()
    with faults.put_in():
        faults.failing(*fault)
        prepare([str(source)], tmp_path / "data", {"files": "topics"}, learned, shard_size=50_000,
                val_tokens=10_000)
        train(shards, tmp_path / "log")
    assert_same_end(tmp_path / "log", whole)
    assert files.digest(tmp_path / "data" / "manifest.json") == files.digest(shards / "manifest.json")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(set(warnings)) and all(words in line for line in warnings)
    assert bool(warnings) == bool(words)


def test_a_run_resumes_where_tensors_can_not_be_mapped_into_memory(shards, whole, tmp_path, monkeypatch):
    """safetensors' error has a text alone, for example when it opens a file of /sys."""
    def load_file(path, device):
        raise OSError("No such device (os error 19)")

    log_dir = copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    monkeypatch.setattr(checkpoint, "load_file", load_file)
    train(shards, log_dir, "--resume")
    assert_same_end(log_dir, whole)


def test_no_file_is_renamed_while_it_is_open(shards, whole, learned, texts, tmp_path, faults):
    """Windows refuses that. The val split of the small input is cut a second time, from renamed files."""
    source = make.write_jsonl(tmp_path / "topics.jsonl", texts)
    faults.renames_as_on_windows()
    prepare([str(source)], tmp_path / "data", {"files": "topics"}, learned)
    train(shards, tmp_path / "log")
    train(shards, tmp_path / "log", "--resume", "--max_steps", 16, "--allow_change", "max_steps")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error(shards, tmp_path, faults, number):
    faults.failing(os, "fsync", number)
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "log"))
    assert (process.returncode, process.stderr.count("\n")) == (1, 1), process.stderr
    assert process.stderr.startswith(f"error: {os.strerror(number)}")


def test_a_log_directory_that_can_not_be_written_is_refused(shards, tmp_path):
    (tmp_path / "file").write_text("")
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "file" / "log"))
    assert_refused(process, tmp_path / "file" / "log", "can't be written")
    assert process.stdout == ""


def test_the_demo_in_one_directory_with_its_data_is_refused(tmp_path):
    """It would wait for its own lock."""
    both = ["--demo_data", "--data_dir", tmp_path, "--log_dir", f"{tmp_path}/."]
    assert_refused(run_here(train_gpt2, *both), "--log_dir", "name another one")


def test_a_second_run_on_one_log_directory_is_refused(shards, tmp_path):
    """The lock of a killed run is gone, although a child of it still runs."""
    flags = flags_of(shards, tmp_path / "log", *ENDLESS)
    fault = 'import subprocess; at_step(0, lambda: subprocess.Popen(["sleep", "60"], close_fds=False))'
    process = start_script("train_gpt2.py", *flags, fault=fault)
    wait_for_line(process, "step     5 |")
    assert_refused(run_here(train_gpt2, *flags, "--resume"), tmp_path / "log", "in use")
    sleeping = ranks_of(process)
    process.kill()
    process.wait()
    try:
        with files.locked(tmp_path / "log"):
            os.kill(sleeping[0], 0)  # it still runs
    finally:
        os.kill(sleeping[0], signal.SIGKILL)


@pytest.mark.parametrize("flags, words", [
    (["--max_lr", "1e-3"], "max_lr 0.003 -> 0.001; --allow_change max_lr"),
    (["--max_steps", 16, "--grad_clip", 2], "max_steps 12 -> 16, grad_clip 1.0 -> 2.0; --allow"),
    (["--seed", 1], "seed 1337 -> 1; use another --log_dir"),
    (["--seed", 1, "--max_steps", 16], "max_steps 12 -> 16, seed 1337 -> 1; use another --log_dir"),
    (["--total_batch_size", 512, "--allow_change", "max_lr"], "total_batch_size 256 -> 512"),
])
def test_a_resume_that_would_be_another_run_is_refused(shards, whole, tmp_path, flags, words):
    log_dir = copy_run(whole.log_dir, tmp_path / "log")
    with pytest.raises(UserError, match=words):
        train(shards, log_dir, "--resume", *flags)
    assert_same_end(log_dir, whole)


def test_a_resume_on_other_data_is_refused(shards, whole, tmp_path):
    other = make.copy_shards(shards, tmp_path / "data", manifest=False)
    with pytest.raises(UserError, match=f"the data: the shards are not.*use --init_from {whole.log_dir} "):
        train(shards, whole.log_dir, "--resume", "--data_dir", other)


def test_a_resume_beyond_the_last_step_is_refused(shards, whole):
    with pytest.raises(UserError, match="--max_steps 8: .*ckpt_000012 is already at step 12"):
        train(shards, whole.log_dir, "--resume", "--max_steps", 8, "--allow_change", "max_steps")


def test_a_resume_says_how_the_learning_rate_jumps(shards, whole, tmp_path, capsys):
    log_dir = copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    train(shards, log_dir, "--resume", "--max_steps", 16, "--allow_change", "max_steps")
    before, now = (get_lr(8, parse_args([*TINY, "--max_steps", steps])) for steps in ("12", "16"))
    assert f"changed: learning rate at step 8 {before:.2e} -> {now:.2e}" in capsys.readouterr().out
    assert float(read_log(log_dir)[8, "lr"]) == pytest.approx(now)


def test_a_blank_line_in_the_log_does_not_hinder_a_resume(shards, whole, tmp_path):
    log_dir = copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    (log_dir / "log.txt").write_text((log_dir / "log.txt").read_text().replace("\n", "\n\n", 3))
    train(shards, log_dir, "--resume")
    assert_same_end(log_dir, whole)


def test_a_resume_may_change_what_is_free_and_what_is_allowed(shards, whole, tmp_path):
    log_dir = copy_run(whole.log_dir, tmp_path / "log")
    free = ["--keep", 3, "--save_every", 6, "--micro_batch_size", 8, "--timeout", 60]
    train(shards, log_dir, "--resume", *free)
    allowed = ["--max_steps", 16, "--max_lr", "1e-3", "--allow_change", "max_steps", "max_lr"]
    train(shards, log_dir, "--resume", *allowed)
    assert max(read_log(log_dir))[0] == 16
    with pytest.raises(SystemExit):
        train(shards, log_dir, "--resume", "--allow_change", "seed")


# ---------------------------------------------------------------------------------------------- a long time


@pytest.mark.parametrize("steps", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_soak_leaks_neither_memory_nor_files(shards, tmp_path, steps):
    """A run that evaluates and saves every ten steps; its log is complete."""
    flags = flags_of(shards, tmp_path / "log", "--max_steps", steps, "--val_every", 10, "--save_every", 10)
    process = start_script("train_gpt2.py", *flags)

    def used_at(step):
        wait_for_line(process, f"step {step:5d} |")
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]), len(os.listdir(f"/proc/{process.pid}/fd"))

    memory, open_files = used_at(steps // 3)
    memory_later, open_files_later = used_at(steps - 1)
    rest = process.communicate()[0]
    assert "finished" in rest and process.returncode == 0
    assert abs(memory_later / memory - 1) <= 0.02 and open_files_later == open_files
    log = read_log(tmp_path / "log")
    assert [step for step, stream in log if stream == "train"] == list(range(steps))
    assert [step for step, stream in log if stream == "val"] == list(range(0, steps + 1, 10))
