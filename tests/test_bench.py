"""bench.py: its arms answer and do the same work, and a wrong flag is refused at once."""

import pytest
from runs import assert_refused, run_here

import bench


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
