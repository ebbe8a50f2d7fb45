"""bench.py: its arms answer and do the same work, and a wrong flag is refused at once. bench_gpu.py."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from runs import assert_refused, children, run_here, run_script, start_script, wait_for_line

import bench
import bench_gpu
import kit.device


@pytest.mark.parametrize("flags, word", [
    (["train", "--peer", "nanoGPT=/nowhere"], "--peer"), (["train", "--rounds", "0"], "--rounds"),
    (["sample", "--device", "mps"], "--device"), (["data", "--input", "/nowhere.parquet"], "--input"),
    (["hellaswag", "--hellaswag_data", "/nowhere.jsonl"], "--hellaswag_data"),
])
def test_a_wrong_value_of_a_flag_is_refused(flags, word):
    assert_refused(run_here(bench, *flags), word)


def test_an_arm_answers_and_a_dead_one_is_named():
    products = dict(work="matmul", device="cpu", rows=16, backward=True, dtype="float32")
    with bench.Arm(**products) as arm:
        first, second = arm(0), arm(1)
    assert first["rate"] > 1e9 and second["peak_bytes"] >= first["peak_bytes"] > 10**8
    with pytest.raises(SystemExit, match='"nowhere".*ended(.|\\n)*nowhere'):
        bench.Arm(work="sample", name="ours", device="nowhere", batch_size=1)


def test_rounds_ask_all_arms_for_the_same_work(monkeypatch):
    class Made:
        def __init__(self, **settings):
            self.settings = settings

        def __call__(self, number):
            asked.append((self.settings.get("name", "limit"), number))
            return dict(self.settings, rate=len(asked))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    asked = []
    monkeypatch.setattr(bench, "Arm", Made)
    units, pairs = bench.compare(["a", "b"], {"b": "there"}, 2, {}, work="train", device="cpu")
    assert asked == [(name, number) for peer in "ab" for number in range(2)
                     for name in ("limit", "ours", "limit", peer)]
    assert len(units) == 4 and units[2][1] == {"rate": 10}  # the mean of the ninth answer and the eleventh
    assert [ours for ours, _ in units] == [ours for rounds in pairs.values() for ours, _ in rounds]
    assert all(ours["name"] == "ours" and ours["device"] == "cpu" for ours, _ in units)
    assert [theirs.get("directory") for _, theirs in pairs["b"]] == ["there"] * 2
    assert "directory" not in pairs["a"][0][1]
    asked.clear()
    bench.compare(["a", "b"], {}, 2, {}, work="train", device="cuda")  # whose memory the arms would share
    assert asked == [(name, number) for name in ("limit", "ours", "a", "b") for number in range(2)]


def test_a_row_survives_when_each_peer_runs_out_of_memory(monkeypatch):
    """On a GPU a large micro-batch may fit this project only."""
    class Arm:
        def __init__(self, **settings):
            if settings.get("name") == "transformers":
                raise SystemExit("error: out of memory")

        def __call__(self, number):
            return dict(seconds=2.0, peak_bytes=10**9)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(bench, "Arm", Arm)
    made = next(bench.bench_sample(Namespace(device="cuda", peers={}, rounds=2)))
    assert made["figure"]["median"] == 64 and made["ratios"].keys() == {"tutorial"}
    made = list(bench.bench_sample(Namespace(device="cuda", peers={}, rounds=2)))[1]  # eight rows: one peer
    assert made["figure"]["median"] == 512 and made["ratios"] == {} and made["limit"]["median"] == 1
    bench.show(made)


def wait_for(condition):
    """The value of condition() once it is true."""
    for _ in range(600):
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("a minute has passed")


def read(path):
    return json.loads(path.read_text())["stages"]


@pytest.mark.slow
def test_the_plan_for_a_gpu_runs_through(tmp_path):
    run_script("bench_gpu.py", "--device", "cpu", "--tiny", "--json", tmp_path / "gpu.json")
    stages = read(tmp_path / "gpu.json")
    assert list(stages) == list(bench_gpu.STAGES) and not any("error" in stage for stage in stages.values())
    assert stages["train"]["stop"]["status"] == 143 and "ckpt_000021" in stages["train"]["resume"]["message"]
    assert "aten::mm" in stages["profile"]["table"]
    results = [value for value in stages["choices"].values() if isinstance(value, dict)]
    assert len(results) == 7 and all("times_as_fast" in result for result in results)
    losses = {name: result["loss"] for name, result in stages["choices"].items() if name != "seconds"}
    ddp = stages["ddp"]["torch.compile outside of DDP"]
    assert ddp["ranks"] == 2 and ddp["loss"] == pytest.approx(ddp["loss_of_default"], rel=1e-3)
    # in 16 bits another dtype of the residual stream gives another loss: the change has reached the graph
    assert losses["residual stream in bf16"] != losses["slices of 2**27 logits"]


@pytest.mark.parametrize("gigabytes, sizes", [(80, (32, 64)), (24, (16,)), (10, (8,))])
def test_a_gpu_is_measured_with_the_micro_batches_of_real_runs(monkeypatch, gigabytes, sizes):
    monkeypatch.setattr(kit.device, "memory_of", lambda device: gigabytes * 1e9)
    assert bench.train_sizes("cuda") == (tuple((B, 1024) for B in sizes), "bfloat16")


STAGE = """
import os, subprocess, sys, time
sys.path.insert(0, {root!r})
import bench_gpu

def card(args):
    {code}

bench_gpu.card = card
if "--stage" in sys.argv:
    bench_gpu.serve(sys.argv[2])
else:
    def keep(result):
        print(bench_gpu.json.dumps(result), flush=True)

    args = bench_gpu.argparse.Namespace(device="cpu")
    bench_gpu.run_stage("card", args, {seconds}, keep, (sys.executable, __file__))
"""


def start_stage(tmp_path, code, seconds=60):
    """A process that runs a stage with this code, and prints its results."""
    (tmp_path / "stage.py").write_text(STAGE.format(root=str(bench_gpu.ROOT), code=code, seconds=seconds))
    return subprocess.Popen([sys.executable, tmp_path / "stage.py"], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code, seconds, last", [
    ("os.write(1, b'NCCL INFO\\n'); print('words'); yield dict(a=1); time.sleep(99)", 8, "stopped after 8 s"),
    ("yield dict(a=1); raise RuntimeError('broken')", 60, "RuntimeError: broken"),
])
def test_a_stage_keeps_what_it_has_measured(tmp_path, code, seconds, last):
    """Whatever else is printed is no result, and a stage that is cut off or fails loses nothing."""
    first, second = map(json.loads, start_stage(tmp_path, code, seconds).communicate()[0].splitlines())
    assert first == {"a": 1} and last in str(second)


def test_a_stage_ends_when_the_command_is_killed(tmp_path):
    """With all that it has started, although the command can't do anything after SIGKILL."""
    process = start_stage(tmp_path, "child = subprocess.Popen(['sleep', '600']); yield dict(a=child.pid); "
                                    "child.wait(); time.sleep(600)")
    with process:
        child = Path("/proc", str(json.loads(process.stdout.readline())["a"]))
        assert child.exists()
        process.kill()
    wait_for(lambda: not child.exists())


def test_the_result_of_each_gpu_test_is_kept(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_gpu.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('n', [1, 2])\ndef test_a(n):\n    assert n == 1\n")
    monkeypatch.setattr(bench_gpu, "ROOT", tmp_path)
    results = list(bench_gpu.tests(Namespace()))
    assert results[:2] == [{"test_a[1]": "PASSED"}, {"test_a[2]": "FAILED"}]
    assert results[2]["status"] == 1 and "assert 2 == 1" in results[2]["output"]


def test_each_row_of_the_peers_is_kept(monkeypatch):
    def fails(settings):
        yield dict(name="c")
        raise RuntimeError

    monkeypatch.setattr(bench, "bench_train", lambda settings, only_largest: iter([dict(name="a")]))
    monkeypatch.setattr(bench, "bench_sample", fails)
    rows = bench_gpu.peers(Namespace(tiny=False, bench=dict(hellaswag_data=None)))
    assert [next(rows), next(rows)] == [{"a": {"name": "a"}}, {"c": {"name": "c"}}]


def test_one_gpu_does_not_measure_ddp(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(bench_gpu.ddp(Namespace(device="cuda"))) == [dict(skipped="needs two GPUs")]


def test_a_second_call_adds_to_the_results(tmp_path):
    out = tmp_path / "gpu.json"
    command = "bench_gpu.py", "--device", "cpu", "--tiny", "--json", out, "--stages"
    run_script(*command, "card")
    first = read(out)
    run_script(*command, "peers")
    assert read(out) == first | {"peers": read(out)["peers"]}
    out.write_text(out.read_text().replace('"device": "', '"device": "another '))
    assert "another device" in run_script(*command, "card", check=False).stderr
    out.write_text("[]")
    assert "no results of this script" in run_script(*command, "card", check=False).stderr


def test_the_plan_for_a_gpu_keeps_its_results_when_it_is_killed(tmp_path):
    """Killed in its second stage; what that stage had started is gone too."""
    out = tmp_path / "gpu.json"
    process = start_script("bench_gpu.py", "--device", "cpu", "--tiny", "--stages", "card", "profile",
                           "--json", out)
    wait_for_line(process, '"seconds"')  # of the first stage
    started = wait_for(lambda: children(process.pid) and children(children(process.pid)[0]))
    process.terminate()
    assert process.wait(30) == 143
    assert read(out)["card"].keys() == {"matmul_flops", "matmul_shape", "copy_bytes_per_second", "seconds"}
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def test_the_plan_for_a_gpu_ends_in_time(tmp_path):
    run_script("bench_gpu.py", "--device", "cpu", "--tiny", "--minutes", 0.1, "--stages", "train", "profile",
               "--json", tmp_path / "gpu.json")
    stages = read(tmp_path / "gpu.json")
    assert "stopped after" in stages["train"]["unfinished"] and stages["profile"]["skipped"]
