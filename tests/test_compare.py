"""Comparisons of recipes: the statistics, and compare.py as a user runs it."""

import json
import shutil
import time

import pytest
from runs import TINY, assert_refused, one_thread, run_here, start_script

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


def test_a_comparison_is_trained_resumed_and_reported(shards, tmp_path, train_here, monkeypatch):
    base, out = write_config(tmp_path / "base.txt", "--data_dir", shards), tmp_path / "out"
    command = [base, f"{base} --norm rmsnorm", "--seeds", 2, "--sweep", "max_lr=1e-3,1e-2", "--out", out]
    process = run_here(compare, *command)
    assert process.returncode == 0, process.stderr
    runs = sorted(str(path.parent.relative_to(out)) for path in out.glob("*/*/log.txt"))
    best = "max_lr=1e-2,seed={},val_start=500,val_tokens=500"
    assert runs == sorted(f"{arm}/{flags}" for arm in ("base", "base_--norm_rmsnorm") for flags in (
        "max_lr=1e-3,seed=1337,val_tokens=500", "max_lr=1e-2,seed=1337,val_tokens=500",
        best.format(1338), best.format(1339)))  # not the seed that chose
    report = (out / "report.md").read_text()
    assert "| base | --max_lr 1e-2 | " in report and "(chosen)" in report
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
    monkeypatch.setattr(compare, "source", lambda: ("other", {}))
    assert_refused(run_here(compare, *command), "trained by another version", "--any_version")
    assert run_here(compare, *command, "--any_version").returncode == 0


def test_sizes_are_trained_and_the_largest_is_predicted(shards, tmp_path, train_here):
    base, out = write_config(tmp_path / "base.txt", "--data_dir", shards), tmp_path / "out"
    base.write_text(base.read_text().replace("--vocab_size 512", ""))  # the data's vocabulary counts
    sizes = ["1x16", "1x32", "2x32", "2x48", "3x48"]
    process = run_here(compare, "--scaling", ",".join(sizes), base, "--out", out, "--tokens_per_parameter",
                       0.1)
    assert process.returncode == 0, process.stderr
    report, lines = (out / "report.md").read_text(), process.stdout.splitlines()
    rows = [line.split(" | ") for line in report.splitlines() if " x " in line][1:]
    assert [row[0].strip("| ") for row in rows] == [size.replace("x", " x ") for size in sizes]
    assert rows[2][1:3] == ["42,880", "17"]  # 0.1 tokens each, 256 tokens a step
    records = [json.loads(path.read_text()) for path in out.glob("*/*/run.json")]
    assert {f"{record['starts'][-1]['parameters']:,}" for record in records} == {row[1] for row in rows}
    predicted = next(i for i, line in enumerate(lines) if line.startswith("predicted loss of "))
    assert "n_layer=3,n_head=3,n_embd=48" in lines[predicted + 1] and "Measured: " in report
    assert (out / "curves.png").stat().st_size > 10_000
    assert_refused(run_here(compare, "--scaling", "1x16", base), "--scaling", "five different sizes")


def test_a_power_law_is_found_and_predicts():
    sizes = [1e4, 3e4, 1e5, 3e5]
    exact = PowerLaw(sizes, [7 * size**-0.08 for size in sizes])
    assert exact.exponent == pytest.approx((0.08, 0), abs=1e-6)
    assert exact.predict(1e6) == pytest.approx([7 * 1e6**-0.08] * 3, rel=1e-6)
    noisy = PowerLaw(sizes, [3.4, 3.05, 2.8, 2.5])
    loss, low, high = noisy.predict(1e6)
    assert low < loss < high and noisy.exponent[1] > 0.005


def test_a_speedrun_times_whole_commands(shards, tmp_path):
    base, out = write_config(tmp_path / "base.txt", "--data_dir", shards), tmp_path / "out"
    command = ["--speedrun", f"{base} --max_steps 4", base, "--out", out]
    process = run_here(compare, *command)
    assert process.returncode == 0, process.stderr
    rows = [line.split("|") for line in (out / "report.md").read_text().splitlines() if "base" in line]
    assert "above the target" in rows[0][2] and float(rows[0][3].split()[0]) > 1 and "1.000" in rows[1][4]
    assert_refused(run_here(compare, *command), "a speedrun can't continue a run: name another --out")


@pytest.mark.parametrize("words, reason", [
    (["base.txt"], "a comparison needs two arms"), (["base.txt", "base.txt"], "base is given twice"),
    (["base.txt", "none.txt"], "no config @none.txt"), (["base.txt", "base.txt --nrom rmsnorm"], "--norm"),
    (["base.txt", "base.txt --norm rms"], "--norm must be 'layernorm' or 'rmsnorm'"),
    (["base.txt", "base.txt --sequence_length 16"], "--sequence_length 16, base has 32"),
    (["base.txt", "base.txt --norm rmsnorm", "--sweep", "log_dir=a,b"], "--sweep"),
    (["base.txt", "base.txt --norm rmsnorm", "--seed", "3"], "use --seeds"),
    (["base.txt", "base.txt --norm 'rmsnorm"], "is not a config and flags"),
    (["base.txt", "base.txt --total_batch_size 100"], "100 can't be divided into micro-batches"),
    (["base.txt", "base.txt --val_every 0"], "--val_every 0"),
    (["base.txt", "base.txt --norm rmsnorm", "--sweep", "schedule=cosine,linear"], "linear"),
    (["base.txt", "base.txt --bias", "--sweep", "max_lr=1,2", "--seeds", "3", "--first_seed", "1335"],
     "--first_seed: --sweep chooses with seed 1337"),
    (["base.txt", "--scaling", "64"], "64 should be sizes such as 2x64"),
    (["base.txt", "base.txt --norm rmsnorm", "--speedrun", "--sweep", "max_lr=1,2"], "--speedrun"),
], ids=str)
def test_a_comparison_that_makes_no_sense_is_refused(tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "base.txt")
    assert_refused(run_here(compare, *words), reason)


LOSSES = {"base": [4.0, 4.1, 4.2], "better": [3.8, 3.9, 4.0], "equal": [4.1, 4.1, 4.1]}


def write_arms(tmp_path, losses=LOSSES):
    """Arms with finished runs of 20 steps of 100 tokens, whose loss falls linearly from 6."""
    arms = []
    for name, finals in losses.items():
        arms.append(compare.Arm(f"{name}.txt", []))
        for seed, final in enumerate(finals):
            log_dir = tmp_path / name / str(seed)
            log_dir.mkdir(parents=True)
            flags = {"max_steps": 20, "total_batch_size": 100}
            record_start(log_dir, False, flags=flags, parameters=1234, flops_per_token=5e6, dtype="float32")
            for step in (0, 10, 20):
                loss = 6 + (final - 6) * step / 20
                append_log(log_dir, step, {"val": loss, **({"tok/s": 1000.0} if step else {})})
            arms[-1].results.append(Result(log_dir))
    return arms


def test_the_report_pairs_seeds_and_tells_noise_from_difference(tmp_path):
    report = "\n".join(compare.report(write_arms(tmp_path)))
    rows = {line.split("|")[1].strip(): line.split("|") for line in report.splitlines() if line[:3] in
            ("| b", "| e")}
    assert rows["base"][5].strip() == "4.1000 ± 0.1000" and rows["base"][6].strip() == "1.00 (1.00 to 1.00)"
    ratios = [(6 - base) / (6 - better) for base, better in zip(LOSSES["base"], LOSSES["better"])]
    assert rows["better"][6].split()[0] == f"{sum(ratios) / 3:.2f}" and rows["better"][8].strip() == "100 ms"
    assert rows["equal"][6].strip() == "reached by 2 of 3" and not rows["equal"][7].strip()
    assert "better: final loss -0.2000 against base, 95% interval -0.2000 to -0.2000." in report
    assert ("equal: final loss -0.0000 against base, 95% interval -0.2484 to +0.2484: within the noise"
            in report)
    assert "Final losses by seed: base 4.0000, 4.1000, 4.2000; better" in report


def test_times_of_different_setups_are_not_compared(tmp_path):
    arms = write_arms(tmp_path)
    record_start(arms[1].results[0].log_dir, True, flags=arms[0].results[0].record["flags"], parameters=1234,
                 flops_per_token=5e6, dtype="bfloat16")
    arms[1].results[0] = Result(arms[1].results[0].log_dir)  # read again
    report = "\n".join(compare.report(arms))
    assert "times are not compared" in report and "100 ms" not in report


def test_a_value_that_diverges_is_not_chosen(shards, tmp_path, train_here, monkeypatch):
    def train(words, log_dir, args):
        if "1e9" in words:
            raise compare.Diverged("lower --max_lr")
        compare_train(words, log_dir, args)

    compare_train = compare.train
    monkeypatch.setattr(compare, "train", train)
    base = write_config(tmp_path / "base.txt", "--data_dir", shards)
    process = run_here(compare, base, f"{base} --bias", "--sweep", "max_lr=1e9,1e-3", "--out",
                       tmp_path / "out")
    assert process.returncode == 0 and "| base | --max_lr 1e9 | inf |" in process.stdout
    assert "--max_lr 1e-3 | " in process.stdout.partition("parameters")[2]


def test_the_seeds_can_be_chosen(shards, tmp_path, train_here):
    base = write_config(tmp_path / "base.txt", "--data_dir", shards)
    command = [base, f"{base} --norm rmsnorm", "--seeds", 2, "--first_seed", 7, "--out", tmp_path / "out"]
    assert run_here(compare, *command).returncode == 0
    runs = {str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/*/*/log.txt")}
    assert runs == {f"{arm}/seed={seed}" for arm in ("base", "base_--norm_rmsnorm") for seed in (7, 8)}


def test_a_run_that_fails_is_named_with_its_output(shards, tmp_path):
    base = write_config(tmp_path / "base.txt", "--data_dir", tmp_path / "none")
    process = run_here(compare, base, f"{base} --norm rmsnorm", "--out", tmp_path / "out")
    assert_refused(process, "base/seed=1337 ended with status 2", "none", "seed=1337.txt")


def test_sigterm_stops_the_run_too(shards, tmp_path):
    base, out = write_config(tmp_path / "base.txt", "--data_dir", shards), tmp_path / "out"
    endless = ["--max_steps", 100_000, "--val_every", 50_000]
    process = start_script("compare.py", base, f"{base} --norm rmsnorm", *endless, "--out", out)
    log = out / "base" / "seed=1337" / "log.txt"
    while not log.exists() or len(log.read_text()) < 1000:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 143
    assert "stopped by SIGTERM before step" in (out / "base" / "seed=1337.txt").read_text()
    assert list(log.parent.glob("ckpt_*"))
