"""--plan: its counters are those of a run, its memory and time near what was measured and published."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT, assert_refused, flags_of, run_here, run_script

import train_gpt2
from kit import plan
from model import GPT, GPT2_SIZES, GPTConfig


def plan_of(*flags, gpus=1):
    args = train_gpt2.parse_args(list(map(str, flags)))
    return plan.make(args, train_gpt2.model_config(args), gpus)


def test_its_counters_are_those_of_a_run(shards, tmp_path):
    flags = flags_of(shards, tmp_path / "log", "--micro_batch_size", 2, "--norm", "rmsnorm")
    flags.remove("--vocab_size"), flags.remove("512")  # of the data
    output = run_here(train_gpt2, *flags).stdout
    record = json.loads((tmp_path / "log" / "run.json").read_text())["starts"][-1]
    planned = plan_of(*flags)
    assert planned.N == record["parameters"] and planned.flops_per_token == record["flops_per_token"]
    assert f"{planned.args.max_steps} steps, {planned.epochs:.2f} epochs" in output
    assert f"x 1 rank x {planned.micro_batches} micro-batches" in output
    saved = json.loads((tmp_path / "log" / "ckpt_000012" / "meta.json").read_text())["files"]
    tensors = sum(file["bytes"] for name, file in saved.items() if name.endswith(".safetensors"))
    assert tensors == pytest.approx(planned.checkpoint_bytes, rel=0.05)  # the files have headers


def test_it_needs_no_data_and_writes_nothing(tmp_path):
    process = run_script("train_gpt2.py", "--plan", 8, "--data_dir", tmp_path / "none", "--log_dir",
                         tmp_path / "log", "--micro_batch_size", 64)
    assert "124,475,904 parameters" in process.stdout and "assumed: FineWeb-Edu's" in process.stdout
    assert not list(tmp_path.iterdir())


def test_it_does_not_import_the_compiler():
    """That would take longer than everything else: the answer should come within three seconds."""
    code = ("import sys, train_gpt2\ntrain_gpt2.main(train_gpt2.parse_args(['--plan', '8']))\n"
            "assert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("flags, words", [
    (["--init_from", "gpt2"], "--init_from"), (["--micro_batch_size", "auto"], "--micro_batch_size auto"),
    (["--micro_batch_size", 1024], "--total_batch_size 524288"),
])
def test_what_it_can_not_plan_is_refused(flags, words):
    assert_refused(run_here(train_gpt2, "--plan", 8, *flags), words)


def test_the_demo_is_not_planned_with_the_vocabulary_and_size_of_fineweb_edu(tmp_path):
    flags = [f"@{ROOT}/configs/demo.txt", "--plan", "--data_dir", tmp_path]
    assert_refused(run_here(train_gpt2, *flags), f"--plan: {tmp_path} has no data yet")


def test_a_number_of_gpus_among_which_a_step_can_not_be_divided_has_no_row():
    planned = plan_of("--total_batch_size", 64 * 1024)
    assert [line.split()[0] for line in plan.limits(planned) if "MB/s" in line] == ["8", "64"]


@pytest.mark.parametrize("flags, words", [
    (["--max_steps", 10**6], "each token is read"), (["--warmup_steps", 10**5], "the whole run is warm-up"),
    (["--n_embd", 12 * 1024, "--n_layer", 96], "no card here has enough memory"),
    (["--total_batch_size", 32 * 1024], "64 GPUs can't be used"),
])
def test_it_warns(flags, words):
    warnings = [line for line in plan.lines(plan_of(*flags)) if line.startswith("warning:")]
    assert len(warnings) == 1 and words in warnings[0]
    assert not any("warning" in line for line in plan.lines(plan_of()))


def test_it_suggests_only_micro_batches_that_the_step_can_be_divided_into():
    h200 = next(line for line in plan.lines(plan_of(gpus=8)) if "H200, " in line)
    assert h200.endswith("--micro_batch_size up to 64")  # 8 ranks x 64 x 1024 tokens


def test_steps_between_saves_last_as_long_as_the_slower_of_compute_and_exchange():
    def row(*flags):
        return next(line for line in plan.lines(plan_of(*flags)) if line.startswith("    64 "))

    compute, exchange, minutes, steps = (
        float(row("--max_steps", 10**6).replace(",", "").split()[n]) for n in (1, 3, 10, 13))
    assert exchange > compute and steps == pytest.approx(minutes * 60_000 / exchange, rel=0.05)
    assert row().endswith(" min: longer than the run")


def test_a_given_mfu_adds_the_other_cards():
    assert not any("RTX 4090, MFU" in line for line in plan.lines(plan_of()))
    line = next(line for line in plan.lines(plan_of("--plan_mfu", 0.5)) if "RTX 4090, MFU" in line)
    hours = float(line.split(")")[1].split()[0])
    assert hours == pytest.approx(19073 * 2**19 * 0.855e9 / (0.5 * 165e12) / 3600, rel=0.01)


# time of a step on eight cards, published by llm.c: scripts/run_gpt2_*.sh; 468,000 tokens/s per H100
@pytest.mark.parametrize("card, size, tokens, published, calibrates", [
    ("A100", "gpt2", 2**19, 0.300, True), ("A100", "gpt2-medium", 2**19, 0.820, False),
    ("A100", "gpt2-large", 2**19, 1.7, False), ("H100", "gpt2-xl", 2**20, 2.80, True),
    ("H100", "gpt2", 2**19, 2**19 / (8 * 468_000), False)])
def test_its_time_is_near_published_runs(card, size, tokens, published, calibrates):
    with torch.device("meta"):
        model = GPT(GPTConfig(**GPT2_SIZES[size]))
    args = SimpleNamespace(max_steps=1, total_batch_size=tokens, sequence_length=1024, plan_mfu=None)
    predicted = plan.Plan(args, model, 8, 10**10, True).seconds(card, 8)
    print(f"{card}, {size}: {predicted:.3f} s, published {published:.3f} s: {predicted / published - 1:+.1%}")
    assert abs(predicted / published - 1) < (0.01 if calibrates else 0.2)


# flags and ranks; what dominates: parameters, vocabulary, activations, checkpointed ones, DDP, shards
CONFIGS = {
    "parameters": (1, "--n_layer 16 --n_embd 512 --sequence_length 128 --micro_batch_size 1 "
                      "--total_batch_size 256"),
    "vocabulary": (1, "--n_layer 2 --n_embd 512 --vocab_size 50304 --sequence_length 256 "
                      "--micro_batch_size 4 --total_batch_size 1024"),
    "activations": (1, "--n_layer 8 --n_embd 256 --sequence_length 512 --micro_batch_size 16 "
                       "--total_batch_size 8192"),
    "checkpointed": (1, "--n_layer 8 --n_embd 256 --sequence_length 512 --micro_batch_size 16 "
                        "--total_batch_size 8192 --checkpoint_activations"),
    "ddp": (2, "--n_layer 12 --n_embd 512 --vocab_size 4096 --sequence_length 128 --micro_batch_size 4 "
               "--total_batch_size 2048"),
    "shard": (2, "--n_layer 12 --n_embd 512 --vocab_size 4096 --sequence_length 128 --micro_batch_size 4 "
                 "--total_batch_size 2048 --shard"),
}


@pytest.mark.slow
def test_its_memory_is_near_the_measured_peak(shards, tmp_path):
    """On a CPU. The process itself is measured with a model of no size. glibc must return freed memory."""
    def peak(ranks, flags):
        log_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        flags = flags_of(shards, log_dir, "--n_head", 8, "--val_every", 0, "--save_every", 0,
                         "--max_steps", 4, *flags.split())
        run_script(*(("torchrun", ranks) if ranks > 1 else ()), "train_gpt2.py", *flags,
                   env={"MALLOC_MMAP_THRESHOLD_": "65536"})
        record = json.loads((log_dir / "run.json").read_text())
        return record["peak_memory_bytes"], plan_of(*flags, gpus=ranks)

    process = {ranks: peak(ranks, "--micro_batch_size 1")[0] for ranks in (1, 2)}
    for name, (ranks, flags) in CONFIGS.items():
        measured, planned = peak(ranks, flags)
        predicted = process[ranks] + sum(planned.memory("cpu", sharded=name == "shard").values())
        print(f"| {name} | {planned.N / 1e6:.1f}M | {predicted / 1e6:,.0f} MB | {measured / 1e6:,.0f} MB | "
              f"{predicted / measured - 1:+.1%} |")
        assert 0.9 < predicted / measured < 1.1, name
