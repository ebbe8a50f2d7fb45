"""reference.py: the early loss of a run against known runs of the same recipe."""

import json
import shutil

import pytest

from kit import reference
from kit.files import UserError

FLAGS = dict(n_layer=2, max_lr=6e-4, seed=1)
SOURCE = dict(dataset="some/text", name="small")


def write_run(log_dir, log="", **record):
    log_dir.mkdir(parents=True)
    (log_dir / "log.txt").write_text(log)
    record = dict(flags=FLAGS, data_source=SOURCE, tokenizer="gpt2") | record
    (log_dir / "run.json").write_text(json.dumps(record))
    return log_dir


@pytest.fixture
def folder(tmp_path):
    """Two references, 4 and 5 at step 100."""
    write_run(tmp_path / "references" / "low", "100 val 4\n400 val 3\n400 train 1\n")
    write_run(tmp_path / "references" / "high", "100 val 5\n")
    return tmp_path / "references"


@pytest.mark.parametrize("loss, words", [
    (3.89, None), (4.5, None), (5.14, None), (float("nan"), None),
    (3.87, "3.2% below"), (3.8, "5.0% below"), (5.16, "3.2% above"), (5.5, "10.0% above"),
])
def test_a_loss_outside_the_band_is_reported(tmp_path, folder, loss, words):
    message = reference.check(100, loss, write_run(tmp_path / "run"), folder)
    if words is None:
        assert message is None
    else:
        assert f"step 100: val loss {loss:.4f} is {words}" in message and "high 5.0000, low 4.0000" in message
        assert ("learning rate" in message) == (loss > 5) and ("val split" in message) == (loss < 4)
        assert "\n" not in message


def test_a_variant_is_no_run_of_gpt2s_recipe(tmp_path, folder):
    """References that were recorded before a variant existed lack its flag."""
    run = write_run(tmp_path / "run", flags={**FLAGS, "norm": "rmsnorm", "optimizer": "adamw"})
    assert reference.check(100, 9.0, run, folder) is None
    run = write_run(tmp_path / "same", flags={**FLAGS, "norm": "layernorm", "optimizer": "adamw"})
    assert reference.check(100, 9.0, run, folder) is not None


def test_a_curve_is_interpolated_between_its_steps():
    curve = [0, 100, 400], [9, 4, 3]
    assert [reference.loss_at(step, *curve) for step in (0, 100, 400)] == [9, 4, 3]
    assert reference.loss_at(200, *curve) == pytest.approx(3.5)  # halfway on the log scale
    assert reference.loss_at(99, *curve) is None and reference.loss_at(401, *curve) is None


@pytest.mark.parametrize("change", [
    dict(flags=FLAGS | dict(n_layer=3)), dict(flags=FLAGS | dict(max_lr=1e-3)), dict(flags={}),
    dict(flags=FLAGS | dict(init_from="gpt2")), dict(data_source=SOURCE | dict(name="large")),
    dict(data_source=None), dict(tokenizer="tokenizer.json"),
])
def test_only_runs_of_the_same_recipe_are_compared(tmp_path, folder, change):
    write_run(folder / "scratch", "100 val 4\n", flags=FLAGS | dict(init_from=None))
    shutil.rmtree(folder / "low"), shutil.rmtree(folder / "high")
    assert reference.check(100, 9, write_run(tmp_path / "same"), folder)
    assert reference.check(100, 9, write_run(tmp_path / "seed", flags=FLAGS | dict(seed=2)), folder)
    assert reference.check(100, 9, write_run(tmp_path / "run", **change), folder) is None


def test_a_reference_without_a_data_source_is_not_used(tmp_path, folder):
    run = write_run(tmp_path / "run", data_source=None)
    for name in ("low", "high"):
        shutil.rmtree(folder / name)
    write_run(folder / "nameless", "100 val 4\n", data_source=None)
    assert reference.check(100, 9, run, folder) is None
    assert reference.check(100, 9, run, tmp_path / "no folder") is None


def test_a_damaged_reference_is_named(tmp_path, folder):
    (folder / "low" / "log.txt").write_text("100 val\n")
    with pytest.raises(UserError, match=r"low/log\.txt:1"):
        reference.check(100, 9, write_run(tmp_path / "run"), folder)


def test_the_published_run_is_the_default_recipe(tmp_path):
    from train_gpt2 import parse_args

    source = dict(dataset="HuggingFaceFW/fineweb-edu", name="sample-10BT", revision="x", files=[])
    run = write_run(tmp_path / "run", flags=vars(parse_args([])), data_source=source)
    assert set(reference.RECIPE) <= set(vars(parse_args([])))
    assert reference.check(250, 6.2, run) is None and reference.check(1000, 4.1, run) is None
    assert "build_nanogpt_pr30 6.1631" in reference.check(250, 7, run)
    assert reference.check(5000, 9, run) is None
