"""Comparisons of recipes: the statistics, and compare.py as a user runs it."""

import shutil

import pytest
from runs import TINY, assert_refused, one_thread, run_here

import compare
import train_gpt2
from kit.experiments import PowerLaw, Result, as_text, interval
from kit.record import append_log, record_start


@pytest.fixture
def result(tmp_path):
    """A run of 30 steps of 100 tokens, evaluated every 10 steps."""
    record_start(tmp_path, False, flags={"max_steps": 30, "total_batch_size": 100})
    for step, loss in ((0, 5.0), (10, 4.0), (20, 3.0), (30, 2.8)):
        append_log(tmp_path, step, {"val": loss, **({"tok/s": 50.0 + step} if step else {})})
    return Result(tmp_path)


def test_the_tokens_to_a_loss_lie_between_two_evaluations(result):
    assert result.finished and result.final == 2.8 and result.tokens == 3000
    assert [result.tokens_to(loss) for loss in (6, 4, 3.5, 2.9)] == pytest.approx([0, 1000, 1500, 2500])
    assert result.tokens_to(2.7) is None and result.seconds_per_token == pytest.approx(1 / 70)


def test_a_run_without_its_last_evaluation_is_not_finished(result):
    text = (result.log_dir / "log.txt").read_text()
    (result.log_dir / "log.txt").write_text(text[: text.index("30 val")])
    assert not Result(result.log_dir).finished and not Result(result.log_dir / "none").finished


def test_an_interval_is_students():
    mean, half = interval([1.0, 2.0, 4.0])  # by hand: standard deviation 1.5275, t(2) = 4.303
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * 1.5275 / 3**0.5, rel=1e-3)
    assert as_text([1.0, 2.0, 4.0], 2) == "2.33 (-1.46 to 6.13)" and as_text([1.5], 2) == "1.50 (one seed)"
    values = [float(i % 2) for i in range(31)]
    assert interval(values)[1] == pytest.approx(2.042 * 0.5080 / 31**0.5, rel=0.02)  # t(30)


@pytest.fixture
def train_here(monkeypatch):
    """The runs of a comparison train in this process, which saves their imports."""
    def train(words, log_dir, args):
        with one_thread():
            train_gpt2.main(train_gpt2.parse_args([*words, "--log_dir", str(log_dir), *compare.QUIET]))

    monkeypatch.setattr(compare, "train", train)


def write_config(path, *more):
    path.write_text(" ".join(map(str, [*(word for word in TINY if word != "--no-plot"), *more])))
    return path


def test_a_comparison_is_trained_resumed_and_reported(shards, tmp_path, train_here):
    base, out = write_config(tmp_path / "base.txt", "--data_dir", shards), tmp_path / "out"
    command = [base, f"{base} --norm rmsnorm", "--seeds", 2, "--sweep", "max_lr=1e-3,1e-2", "--out", out]
    process = run_here(compare, *command)
    assert process.returncode == 0, process.stderr
    runs = sorted(str(path.parent.relative_to(out)) for path in out.glob("*/*/log.txt"))
    best = "max_lr=1e-2,seed={},val_start=500,val_tokens=500"
    assert runs == sorted(f"{arm}/{flags}" for arm in ("base", "base_--norm_rmsnorm") for flags in (
        "max_lr=1e-3,seed=1337,val_tokens=500", "max_lr=1e-2,seed=1337,val_tokens=500",
        best.format(1337), best.format(1338)))
    report = (out / "report.md").read_text()
    assert "| base | --max_lr 1e-2 | " in report and "(chosen)" in report and "edge of the sweep" in report
    table = report.partition("| arm | parameters")[2]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| base")]
    assert [len(row) for row in rows] == [8, 8] and "1.00 (1.00 to 1.00)" in rows[0][5]
    assert "base --norm rmsnorm: final loss " in report and "95% interval" in report
    assert (out / "curves.png").stat().st_size > 10_000

    # one run is lost: it alone is trained again, with the same result
    again = out / "base" / best.format(1338)
    log = [line for line in (again / "log.txt").read_text().splitlines() if "tok/s" not in line]
    shutil.rmtree(again)
    process = run_here(compare, *command)
    trained = [line for line in process.stdout.splitlines() if ": validation loss" in line]
    assert len(trained) == 1 and str(again) in trained[0]
    assert [line for line in (again / "log.txt").read_text().splitlines() if "tok/s" not in line] == log
    process = run_here(compare, *command, "--grad_clip", 0.5)
    assert_refused(process, "--grad_clip 1.0, not 0.5", "another --out")


def test_sizes_are_trained_and_the_largest_is_predicted(shards, tmp_path, train_here):
    base, out = write_config(tmp_path / "base.txt", "--data_dir", shards), tmp_path / "out"
    sizes = ["1x16", "1x32", "2x32", "2x48"]
    process = run_here(compare, "--scaling", ",".join(sizes), base, "--out", out, "--tokens_per_parameter",
                       0.1)
    assert process.returncode == 0, process.stderr
    report, lines = (out / "report.md").read_text(), process.stdout.splitlines()
    rows = [line.split(" | ") for line in report.splitlines() if " x " in line][1:]
    assert [row[0].strip("| ") for row in rows] == [size.replace("x", " x ") for size in sizes]
    assert rows[2][1:3] == ["25,408", "10"]  # 0.1 tokens each, 256 tokens a step
    predicted = next(i for i, line in enumerate(lines) if line.startswith("predicted loss of "))
    assert "n_layer=2,n_head=3,n_embd=48" in lines[predicted + 1] and "Measured: " in report
    assert (out / "curves.png").stat().st_size > 10_000
    assert_refused(run_here(compare, "--scaling", "1x16", base), "--scaling", "four sizes")


def test_a_power_law_is_found_and_predicts():
    sizes = [1e4, 3e4, 1e5, 3e5]
    exact = PowerLaw(sizes, [7 * size**-0.08 for size in sizes])
    assert exact.exponent == pytest.approx((0.08, 0), abs=1e-6)
    assert exact.predict(1e6) == pytest.approx([7 * 1e6**-0.08] * 3, rel=1e-6)
    noisy = PowerLaw(sizes, [3.4, 3.05, 2.8, 2.5])
    loss, low, high = noisy.predict(1e6)
    assert low < loss < high and noisy.exponent[1] > 0.005


def test_a_speedrun_times_whole_commands(shards, tmp_path, monkeypatch):
    base, out = write_config(tmp_path / "base.txt", "--data_dir", shards), tmp_path / "out"
    command = ["--speedrun", f"{base} --max_steps 4", base, "--out", out]
    process = run_here(compare, *command)
    assert process.returncode == 0, process.stderr
    rows = [line.split("|") for line in (out / "report.md").read_text().splitlines() if "base" in line]
    assert "above the target" in rows[0][2] and float(rows[0][3].split()[0]) > 1 and "1.000" in rows[1][4]
    assert_refused(run_here(compare, *command), "a speedrun starts anew, name another --out")


@pytest.mark.parametrize("words, reason", [
    (["base.txt"], "a comparison needs two arms"), (["base.txt", "base.txt"], "base is given twice"),
    (["base.txt", "none.txt"], "no config @none.txt"), (["base.txt", "base.txt --nrom rmsnorm"], "--norm"),
    (["base.txt", "base.txt --norm rms"], "--norm must be 'layernorm' or 'rmsnorm'"),
    (["base.txt", "base.txt --sequence_length 16"], "--sequence_length 16, base has 32"),
    (["base.txt", "base.txt --norm rmsnorm", "--sweep", "log_dir=a,b"], "--sweep"),
    (["base.txt", "--scaling", "64"], "64 should be sizes such as 2x64"),
    (["base.txt", "base.txt --norm rmsnorm", "--speedrun", "--sweep", "max_lr=1,2"], "--speedrun"),
], ids=str)
def test_a_comparison_that_makes_no_sense_is_refused(tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "base.txt")
    assert_refused(run_here(compare, *words), reason)


def test_a_run_that_fails_is_named_with_its_output(shards, tmp_path):
    base = write_config(tmp_path / "base.txt", "--data_dir", tmp_path / "none")
    process = run_here(compare, base, f"{base} --norm rmsnorm", "--out", tmp_path / "out")
    assert_refused(process, "base/seed=1337 ended with status 2", "none", "seed=1337.txt")
