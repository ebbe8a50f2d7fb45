"""The figures of runs in wandb, trackio and TensorBoard, read back from the files of each. No network."""

import json
import os
import struct
import sys

import pytest
from runs import ROOT, assert_refused, flags_of, read_log, run_script, run_until_killed, train

from kit import tracking
from kit.files import UserError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Variables that a run sets for the packages do not reach the next test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def tensorboard_figures(log_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    config, = events.Tensors("config/text_summary")
    assert b"n_layer: 2\n" in config.tensor_proto.string_val[0]
    return [(event.step, stream, event.value) for stream in events.Tags()["scalars"]
            for event in events.Scalars(stream)]


def trackio_figures(log_dir):
    script = """
import json, trackio, trackio.sqlite_storage as storage
run, = trackio.Api().runs("gpt2")
assert run.config["n_layer"] == 2 and run.config["parameters"] > 0
print(json.dumps(storage.SQLiteStorage.get_logs("gpt2", run.name, run_id=run.id)))
"""
    rows = json.loads(run_script("-c", script, env={"TRACKIO_DIR": str(log_dir / "trackio")}).stdout)
    assert len({row["step"] for row in rows}) == len(rows)  # one row a step
    return [(row["step"], stream, value) for row in rows for stream, value in row.items()
            if stream not in ("step", "timestamp")]


def wandb_records(log_dir):
    """The records of the only offline run: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    path, = (log_dir / "wandb").glob("offline-run-*/run-*.wandb")
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


def wandb_figures(log_dir):
    records = list(wandb_records(log_dir))
    run = next(record.run for record in records if record.HasField("run"))
    assert run.project == "mine" and run.display_name.startswith("log-")
    assert any(item.key == "n_layer" and item.value_json == "2" for item in run.config.update)
    rows = [record.history for record in records if record.HasField("history")]
    assert len({row.step.num for row in rows}) == len(rows)
    return [(row.step.num, key, float(item.value_json)) for row in rows for item in row.item
            if not (key := item.key or item.nested_key[0]).startswith("_")]


FIGURES = {"tensorboard": tensorboard_figures, "trackio": trackio_figures, "wandb": wandb_figures}


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", pytest.param("trackio", marks=pytest.mark.slow)])
def test_each_figure_is_tracked_once_after_two_kills(shards, whole, tmp_path, kind):
    """Killed in step 6, then, resumed from step 4, in step 7: steps 4, 5 and 6 are trained more than once."""
    flags, before = flags_of(shards, tmp_path / "log", "--track", kind), set(os.listdir(ROOT))
    os.environ.update(HOME=str(tmp_path / "home"), WANDB_MODE="offline", WANDB_PROJECT="mine")
    (tmp_path / "home").mkdir()
    # after a second, in which trackio's thread writes the steps before
    run_until_killed("train_gpt2.py", *flags, fault="at_step(6, lambda: kill(after=1))")
    run_until_killed("train_gpt2.py", *flags, "--resume", fault="at_step(7, kill)")
    run_script("train_gpt2.py", *flags, "--resume")
    log = read_log(tmp_path / "log")
    assert log == whole.log  # tracking changes no figure
    tracked = FIGURES[kind](tmp_path / "log")
    figures = {(step, stream): value for step, stream, value in tracked}
    assert len(figures) == len(tracked)
    speeds = {key: figures.pop(key) for key in list(figures) if key[1] == "tok/s"}
    assert sorted(speeds) == [(step, "tok/s") for step in range(12)]
    assert figures == pytest.approx({key: float(value) for key, value in log.items()}, rel=1e-6, abs=1e-9)
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert set(os.listdir(ROOT)) - before <= {"__pycache__"}


@pytest.mark.parametrize("kind, package", [("wandb", "wandb"), ("trackio", "trackio"),
                                           ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_refused_before_the_data_is_read(tmp_path, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--track {kind}: .*; pip install {kind}"):
        train(tmp_path / "none", tmp_path / "log", "--track", kind)
    assert not (tmp_path / "log").exists()


def test_a_directory_is_not_taken_for_a_package(tmp_path, monkeypatch):
    """wandb makes a directory called wandb where a script runs."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install wandb"):
        tracking.check("wandb", tmp_path)
    sys.modules.pop("wandb", None)


def test_wandb_without_an_account_is_refused(tmp_path):
    os.environ.update(HOME=str(tmp_path))
    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[variable]
    flags = flags_of(tmp_path / "none", tmp_path / "log", "--track", "wandb")
    assert_refused(run_script("train_gpt2.py", *flags, check=False), "--track wandb", "WANDB_MODE=offline")


@pytest.fixture
def tracked(monkeypatch):
    """What a stand-in for TensorBoard receives; `failing` names the calls that raise."""
    class Tracked(list):
        failing, first = (), 0

        def fault(self, name, *args):
            if name in self.failing:
                raise OSError(f"no {name}\nat all")

        def start(self, *args):
            self.fault("start")
            return self.first, self.send, self.finish

        def send(self, figures, step):
            self.fault("send")
            self.append((step, *figures))

        def finish(self, failed):
            self.append("failed" if failed else "finished")
            self.fault("finish")

    tracked = Tracked()
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", (tracked.start, "os", "path"))
    return tracked


@pytest.mark.parametrize("failing", [["start"], ["send"], ["finish"], ["send", "finish"]])
def test_a_tracker_that_fails_does_not_change_the_run(shards, whole, tmp_path, capsys, tracked, failing):
    tracked.failing = failing
    assert train(shards, tmp_path / "log", "--track", "tensorboard") == whole.log
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--track tensorboard")]
    assert len(said) == 1 and said[0].endswith(f"no {failing[0]}")


def test_an_interrupted_step_is_tracked_only_once_it_is_complete(shards, tmp_path, tracked, faults):
    """Stopped after the validation of step 4, the run validates again: a tracker must not get half a step."""
    with faults.put_in(), pytest.raises(SystemExit):
        faults.in_micro_batch(8, faults.stop)  # two a step: the first one of step 4
        train(shards, tmp_path / "log", "--track", "tensorboard")
    step = "train", "norm", "lr", "tok/s"
    validated = "val", "val_bpb", *step
    assert tracked == [(0, *validated), (1, *step), (2, *step), (3, *step), "failed"]
    tracked.clear()
    tracked.first = 3  # like a tracker that knows what it has
    train(shards, tmp_path / "log", "--track", "tensorboard", "--resume")
    assert tracked == [(3, *step), (4, *validated), (5, *step), (6, *step), (7, *step), (8, *validated),
                       (9, *step), (10, *step), (11, *step), (12, "val", "val_bpb"), "finished"]
