"""bench.py: its arms answer and do the same work, and a wrong flag is refused at once. bench_gpu.py."""

import json
import time
from pathlib import Path

import pytest
from runs import assert_refused, children, run_here, run_script, start_script, wait_for_line

import bench
import bench_gpu


@pytest.mark.parametrize("flags, word", [
    (["train", "--peer", "nanoGPT=/nowhere"], "--peer"), (["train", "--rounds", "0"], "--rounds"),
    (["sample", "--device", "mps"], "--device"), (["data", "--input", "/nowhere.parquet"], "--input"),
    (["hellaswag", "--hellaswag_data", "/nowhere.jsonl"], "--hellaswag_data"),
    (["start", "--json", "/nowhere/bench.json"], "--json"),
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
    results = bench.compare(["a", "b"], {"b": "there"}, 2, {}, work="train", device="cpu")
    assert asked == [(name, number) for peer in "ab" for number in range(2)
                     for name in ("limit", "ours", "limit", peer)]
    mine, theirs, limits = results["b"]
    assert [answer["name"] for answer in mine] == ["ours"] * 2 and mine[0]["device"] == "cpu"
    assert [answer.get("directory") for answer in theirs] == ["there"] * 2
    assert limits[0] == {"rate": 10}  # the mean of the ninth answer and the eleventh
    assert "directory" not in results["a"][1][0]
    asked.clear()
    bench.compare(["a", "b"], {}, 2, {}, work="train", device="cuda")  # whose memory the arms would share
    assert asked == [(name, number) for name in ("limit", "ours", "a", "b") for number in range(2)]


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
    # in 16 bits another dtype of the residual stream gives another loss: the change has reached the graph
    assert losses["residual stream in bf16"] != losses["slices of 2**27 logits"]


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
