"""Signals, lost terminals, threads and odd environments: a run goes on, or stops with all it has done."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import make
import pytest
from runs import (
    ENDLESS,
    ROOT,
    Run,
    assert_refused,
    assert_same_end,
    copy_run,
    environment,
    flags_of,
    names_of,
    read_log,
    run_here,
    run_script,
    start_script,
    train,
    wait_for_line,
)

import checkpoint
import fineweb_edu
import sample
import train_gpt2
from kit import files

# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, after", [
    (signal.SIGTERM, 2), (signal.SIGINT, 3), (signal.SIGHUP, 1), (signal.SIGUSR1, 4),
], ids=["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_stop_signal_saves_and_exits(shards, whole, tmp_path, number, after):
    process = start_script("train_gpt2.py", *flags_of(shards, tmp_path / "log"))
    wait_for_line(process, f"step {after:5d} |")
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)  # torchrun and schedulers send it again: that is not another request
    while number != signal.SIGINT and process.poll() is None:
        time.sleep(0.01)
        process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == 128 + number, rest
    assert "stopping after this micro-batch" in rest
    step = int(re.search(r"stopped by SIG\w+ before step (\d+)", rest)[1])
    assert step > after and names_of(tmp_path / "log")[0] == f"ckpt_{step:06d}"
    train(shards, tmp_path / "log", "--resume")
    assert_same_end(tmp_path / "log", whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_that_is_ignored_from_the_start_stays_ignored(shards, whole, tmp_path, faults, name):
    number = getattr(signal, name)
    old = signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
    try:
        faults.at_step(3, lambda: signal.raise_signal(number))
        train(shards, tmp_path / "log")
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, old)
    assert_same_end(tmp_path / "log", whole)


def test_a_run_in_a_thread(shards, whole, tmp_path):
    """Only the main thread may handle signals; a server or a notebook may train in another one."""
    errors = []

    def work():
        try:
            train(shards, tmp_path / "log")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert_same_end(tmp_path / "log", whole)


@pytest.mark.parametrize("command", [
    ["train_gpt2.py"], ["hellaswag.py"], ["sample.py"], ["plot.py", "log"], ["app.py"], ["bench.py", "start"],
    ["checkpoint.py", "list", "log"], ["compare.py", "a.txt", "b.txt"],
    ["fineweb_edu.py", "--input", "README.md"],
    ["tokenizer.py", "train", "README.md", "--out", "/nowhere/t.json"],
])
def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path, command):
    """The stand-in interrupts the first import that a script makes of one of these modules."""
    for name in ("numpy", "matplotlib", "multiprocessing", "base64", "concurrent"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    process = run_script(*command, check=False, env={"PYTHONPATH": str(tmp_path)})
    assert process.returncode in (-signal.SIGINT, 130) and process.stderr == ""


# ----------------------------------------------------------------------------------------- a lost terminal


class Lost:
    """A text stream whose reader has gone, or which stands for a full disk."""

    encoding, errors = "utf-8", "replace"

    def write(self, text=None):
        raise BrokenPipeError(32, "Broken pipe")

    flush = fileno = write

    def isatty(self):
        return False


def test_output_that_fails_does_not_end_a_run(shards, whole, tmp_path):
    with contextlib.redirect_stdout(Lost()), contextlib.redirect_stderr(Lost()):
        train(shards, tmp_path / "log", "--sample_every", 4)
    assert_same_end(tmp_path / "log", whole)


@pytest.mark.parametrize("sink", ["| head -1", "> /dev/full", ">&-", ">&- 2>&- <&-"])
def test_a_run_whose_output_goes_nowhere(shards, whole, tmp_path, sink):
    """As a shell user would: what is closed must not be mistaken for a file of the run."""
    command = shlex.join(map(str, [sys.executable, "train_gpt2.py", *flags_of(shards, tmp_path / "log")]))
    command = f"{command} {sink}; echo ${{PIPESTATUS[0]}} > {tmp_path}/status"
    subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, timeout=100)
    assert (tmp_path / "status").read_text() == "0\n"
    assert_same_end(tmp_path / "log", whole)


@pytest.mark.parametrize("launcher", [
    [], pytest.param(["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"],
                     marks=pytest.mark.slow),
], ids=["python", "torchrun"])
def test_ctrl_c_saves_although_tee_dies_first(shards, tmp_path, launcher):
    """Ctrl-C reaches both sides of `train_gpt2.py | tee`; the lines after it have no reader."""
    flags = flags_of(shards, tmp_path / "log", *ENDLESS)
    command = shlex.join(map(str, [sys.executable, *launcher, "train_gpt2.py", *flags]))
    shell = subprocess.Popen(["bash", "-c", f"{command} 2>&1 | tee {tmp_path}/out"], cwd=ROOT,
                             env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    while "step     5 |" not in (tmp_path / "out").read_text() if (tmp_path / "out").exists() else True:
        time.sleep(0.05)
        assert shell.poll() is None
    os.killpg(shell.pid, signal.SIGINT)
    shell.wait(timeout=60)
    deadline = time.monotonic() + 60
    while not names_of(tmp_path / "log") and time.monotonic() < deadline:
        time.sleep(0.05)
    newest, skipped = checkpoint.latest(tmp_path / "log", to_resume=True)
    step = max(read_log(tmp_path / "log"))[0]
    assert newest.name == f"ckpt_{step + 1:06d}" and not skipped


# ------------------------------------------------------------------------------------- ranks and their files


def test_ranks_with_other_flags_are_refused(shards, tmp_path):
    process = run_script("torchrun", 2, "train_gpt2.py", *flags_of(shards, tmp_path / "log"), check=False,
                         fault='if RANK == 1: sys.argv += ["--seed", "7"]')
    assert process.returncode == 1
    assert re.search("error: rank 1 on .* has --seed 7, rank 0 on .* has 1337", process.stderr)


@pytest.fixture
def two_machines(shards, tmp_path):
    """Two directories with a data directory each, and a fault that puts each of two ranks alone into one."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        make.copy_shards(shards, folder / "data")
    return folders, f'os.environ["LOCAL_RANK"] = "0"; os.chdir({list(map(str, folders))}[RANK])'


def test_each_machine_verifies_its_own_shards(two_machines):
    folders, fault = two_machines
    run_script("torchrun", 2, "train_gpt2.py", *flags_of("data", "log", "--max_steps", 4), fault=fault)
    assert all((folder / "data" / ".verified.json").exists() for folder in folders)
    path = sorted((folders[1] / "data").glob("*_train_*"))[1]
    make.damage(path, "one byte flipped")
    flags = flags_of("data", "new_log")
    process = run_script("torchrun", 2, "train_gpt2.py", *flags, fault=fault, check=False)
    assert process.returncode == 1
    assert re.search(rf"error: data/{path.name} has changed since .* \(rank 1 on .+\)", process.stderr)


@pytest.mark.slow  # half a minute
def test_each_machine_prepares_its_own_demo_data(two_machines):
    folders, fault = two_machines
    flags = flags_of("demo", "log", "--demo_data", "--vocab_size", 2048, "--max_steps", 1)
    run_script("torchrun", 2, "train_gpt2.py", *flags, fault=fault)
    assert all((folder / "demo" / "manifest.json").exists() for folder in folders)


def test_ranks_with_other_data_are_refused(two_machines, texts, learned, tmp_path):
    folders, fault = two_machines
    shutil.rmtree(folders[1] / "data")
    source = make.write_jsonl(tmp_path / "other.jsonl", texts[1:])
    fineweb_edu.prepare([str(source)], folders[1] / "data", {"files": "topics"}, tokenizer=learned,
                        shard_size=50_000, val_tokens=10_000)
    process = run_script("torchrun", 2, "train_gpt2.py", *flags_of("data", "log"), fault=fault, check=False)
    assert process.returncode == 1
    assert re.search("error: rank 1 on .* has data .*, rank 0 on .* has", process.stderr), process.stderr


@pytest.mark.parametrize("own_checkpoint", [False, True], ids=["none", "of another run"])
def test_only_rank_0_needs_the_log_directory(shards, two_machines, own_checkpoint):
    folders, fault = two_machines
    run_script("torchrun", 2, "train_gpt2.py", *flags_of("data", "log"), fault=fault)
    finished = Run(folders[0] / "log", read_log(folders[0] / "log"))
    assert not (folders[1] / "log").exists()
    copy_run(folders[0] / "log", folders[0] / "again", without="ckpt_000012")
    if own_checkpoint:
        train(shards, folders[1] / "again", "--seed", 7)
    flags = flags_of("data", "again", "--resume")
    process = run_script("torchrun", 2, "train_gpt2.py", *flags, fault=fault)
    assert "not all ranks can read again/ckpt_000008: rank 0 sends it" in process.stdout
    assert_same_end(folders[0] / "again", finished)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_without_data_is_named(two_machines, rank):
    folders, fault = two_machines
    shutil.rmtree(folders[rank] / "data")
    process = run_script("torchrun", 2, "train_gpt2.py", *flags_of("data", "log"), fault=fault, check=False)
    host = re.escape(socket.gethostname())
    assert re.search(rf"error: no train shards in data: .* \(rank {rank} on {host}\)", process.stderr)


def test_rank_0_may_take_longer_than_the_timeout_before_training(shards, tmp_path):
    """It verifies the shards and downloads what is missing; the others wait."""
    fault = 'if RANK == 0: before(shards, "verify_changed", lambda *_: True, lambda: time.sleep(4))'
    flags = flags_of(shards, tmp_path / "log", "--timeout", 2, "--max_steps", 4)
    process = run_script("torchrun", 2, "train_gpt2.py", *flags, fault=fault)
    assert "finished" in process.stdout


def test_another_machine_may_check_a_checkpoint_for_longer_than_the_timeout(shards, whole, tmp_path):
    copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    fault = 'if RANK == 1: before(checkpoint, "read_meta", lambda *_, **__: True, lambda: time.sleep(4))'
    flags = flags_of(shards, tmp_path / "log", "--resume", "--timeout", 2, "--micro_batch_size", 2)
    process = run_script("torchrun", 2, "train_gpt2.py", *flags, fault=fault)
    assert "finished" in process.stdout


@pytest.mark.parametrize("env, words", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, "), ({"RANK": "x"}, "RANK is 'x', not a number"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "LOCAL_RANK, MASTER_PORT is not set"),
    ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is 1"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is -1"), ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
     "RANK is 2 and WORLD_SIZE is 2"),
])
def test_leftovers_of_a_scheduler_are_refused(shards, tmp_path, monkeypatch, env, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert_refused(run_here(train_gpt2, *flags_of(shards, tmp_path / "log")), words, "unset")


def test_empty_variables_of_a_scheduler_are_no_ranks(shards, whole, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    train(shards, tmp_path / "log")
    assert_same_end(tmp_path / "log", whole)
    assert_refused(run_here(train_gpt2, *flags_of(shards, tmp_path / "log")), "already contains a run")


def test_a_second_run_waits_for_the_demo_data(shards, tmp_path, calls_of, capsys):
    data = tmp_path / "data"
    prepared = calls_of(fineweb_edu, "prepare")
    with files.locked(data):
        thread = threading.Thread(target=fineweb_edu.prepare_demo, args=[data])
        thread.start()
        while "waiting until it ends" not in capsys.readouterr().out:
            assert thread.is_alive()
            time.sleep(0.01)
        manifest = (shards / "manifest.json").read_text()
        source = '"source": {"documentation of": "Python 3.0.0"}'  # that version's docs stay as they are
        (data / "manifest.json").write_text(re.sub(r'"source": {[^}]*}', source, manifest))
    thread.join()
    assert not prepared


# ------------------------------------------------------------------------------------ the last lines of a run


def test_a_run_that_saves_nothing_recommends_nothing(shards, tmp_path, capsys):
    train(shards, tmp_path / "log", "--val_every", 0, "--save_every", 0)
    out = capsys.readouterr().out
    assert "the model was not saved, because --save_every and --val_every are 0" in out
    assert "sample.py" not in out


@pytest.mark.parametrize("flags", [
    ["--save_every", 0], ["--val_every", 0], ["--val_every", 0, "--save_every", 0, "--keep_every", 3],
])
def test_the_recommended_command_works(shards, tmp_path, capsys, flags):
    train(shards, tmp_path / "a run's log", *flags)
    command = re.search(r"next: python (sample\.py .*)", capsys.readouterr().out)[1]
    process = run_here(sample, *shlex.split(command)[1:], "-d", "cpu", "--max_new_tokens", 3)
    assert process.returncode == 0 and process.stdout.startswith("Hello, I'm a language model,")


def test_a_piped_text_is_the_prompt(small_run):
    for piped, prompt in (("Once upon\n", "Once upon"), ("", "Hello, I'm a language model,")):
        process = run_here(sample, "-m", small_run, "-d", "cpu", "--max_new_tokens", 0, stdin=piped)
        assert (process.returncode, process.stdout) == (0, prompt + "\n")


def test_a_standard_input_that_gives_nothing_is_said(small_run):
    """As under a service, whose standard input may stay open for ever."""
    command = [sys.executable, "sample.py", "-m", small_run, "-d", "cpu", "--max_new_tokens", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert "waiting for a prompt on standard input" in (line := process.stderr.readline()) and "-p" in line
    assert process.communicate("Once") == ("Once\n", "")


def test_a_notebook_can_run_the_scripts(small_run):
    """%run replaces sys.stdout with a stream that can't be reconfigured."""
    class Cell:
        written = ""

        def write(self, text):
            self.written += text

        def flush(self):
            pass

    with contextlib.redirect_stdout(Cell()) as cell:
        args = sample.parse_args(["-m", str(small_run), "-d", "cpu", "-p", "Hello", "--max_new_tokens", "1"])
        files.run_script(sample.main, args)
    assert cell.written.startswith("Hello")


def test_a_compiler_cache_that_can_not_be_made_does_not_matter_without_compiling(shards, whole, tmp_path):
    (tmp_path / "file").touch()
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    run_script("train_gpt2.py", *flags_of(shards, tmp_path / "log"), env=env)
    assert_same_end(tmp_path / "log", whole)
