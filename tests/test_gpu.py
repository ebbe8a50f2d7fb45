"""A CUDA device gives the same run, predictions and text as the CPU. Skipped without one."""

import shutil

import make
import pytest
import torch
from runs import copy_run, flags_of, read_log, run_script

import checkpoint
import hellaswag
from kit.device import compile_model
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def run(shards, log_dir, *flags, launcher=()):
    """Run the script on the device, compiled and in its default precision; return its log and its output."""
    flags = flags_of(shards, log_dir, "--device", DEVICE, "--compile", *flags)
    process = run_script(*launcher, "train_gpt2.py", *flags)
    return read_log(log_dir), process.stdout


def assert_same_losses(log, other):
    """bf16 matmuls have 8 bits; the val loss falls by 6% in the run. Gradient norms may differ more."""
    losses, expected = ({key: float(value) for key, value in each.items() if key[1] in ("train", "val")}
                        for each in (log, other))
    assert losses == pytest.approx(expected, rel=0.02)


@pytest.fixture(autouse=True)
def exact():
    """Matmuls in fp32, whatever an earlier run in this process has set."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def on_device(shards, tmp_path_factory):
    """A whole run: its directory, its log and its output."""
    log_dir = tmp_path_factory.mktemp("device") / "log"
    return log_dir, *run(shards, log_dir)


@pytest.mark.parametrize("vocab_size", [512, 50304])
def test_loss_and_gradients_are_the_cpus(vocab_size):
    model = make.small_gpt(64, vocab_size, n_embd=64).train()
    x, y = torch.randint(vocab_size, (2, 4, 64))
    found = []
    for device in ("cpu", DEVICE):
        model.to(device).zero_grad()
        _, loss = model(x.to(device), y.to(device))
        loss.backward()
        tensors = (loss, model(x.to(device))[0], *(p.grad for p in model.parameters()))
        found.append([tensor.detach().cpu() for tensor in tensors])
    for one, other in zip(*found):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_compiled_is_eager_at_124m():
    """Loss and gradients in bf16: compiled, they are as close to fp32's as uncompiled."""
    torch.manual_seed(0)
    model = GPT(GPTConfig()).to(DEVICE).train()
    x, y = torch.randint(50257, (2, 4, 1024)).to(DEVICE)
    found = []
    for version, dtype in ((model, torch.float32), (model, torch.bfloat16),
                           (compile_model(model, DEVICE), torch.bfloat16)):
        model.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = version(x, y)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    names = "loss", *(name for name, _ in model.named_parameters())
    errors = {name: ((plain - exact).norm().item(), (compiled - exact).norm().item(), exact.norm().item())
              for name, exact, plain, compiled in zip(names, *found)}
    wrong = {name: (plain, compiled, size) for name, (plain, compiled, size) in errors.items()
             if compiled > 1.5 * plain + 1e-3 * size}
    assert not wrong


def test_a_run_follows_the_cpus(on_device, whole):
    log_dir, figures, words = on_device
    dtype = "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    assert f"{dtype} on cuda" in words and ", compiled" in words
    assert_same_losses(figures, whole.log)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_evaluations_and_samples_between_the_steps(shards, texts, tmp_path, dtype):
    """HellaSwag and samples in 16 bits, with dropout and, in float16, a scaler."""
    make.write_jsonl(tmp_path / "data.jsonl", make.hellaswag_rows(texts, 1))
    figures, words = run(shards, tmp_path / "log", "--dtype", dtype, "--dropout", 0.1, "--sample_every", 4,
                         "--hellaswag_every", 4, "--hellaswag_data", tmp_path / "data.jsonl")
    assert {(4, "hella"), (12, "hella")} <= figures.keys() and words.count("Hello") >= 4
    assert float(figures[12, "val"]) < float(figures[0, "val"])


def test_a_run_resumes(on_device, shards, tmp_path):
    run(shards, tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "ckpt_000012")
    figures, words = run(shards, tmp_path / "log", "--resume")
    assert "ckpt_000008 at step 8" in words
    assert_same_losses(figures, on_device[1])


def test_a_run_of_the_cpu_resumes_on_the_device(whole, shards, tmp_path):
    copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    figures, words = run(shards, tmp_path / "log", "--resume", "--dtype", "float32")
    assert "ckpt_000008 at step 8" in words
    assert_same_losses(figures, whole.log)


def test_predictions_and_text_are_the_cpus(on_device, learned, texts, tmp_path):
    examples = make.hellaswag_rows(texts)
    model, tokenizer = checkpoint.load_model(on_device[0]), get_tokenizer(learned)
    prompt = torch.tensor([[65], [66]])
    there = hellaswag.evaluate(model.to(DEVICE), tokenizer, examples)["loglikelihoods"]
    text = model.generate(prompt.to(DEVICE), 60, temperature=0).cpu()  # longer than the context of 32
    here = hellaswag.evaluate(model.to("cpu"), tokenizer, examples)["loglikelihoods"]
    assert torch.allclose(torch.tensor(there), torch.tensor(here), rtol=1e-3)
    assert torch.equal(text, model.generate(prompt, 60, temperature=0))
    make.write_jsonl(tmp_path / "data.jsonl", examples)
    for command in (("hellaswag.py", "--data", tmp_path / "data.jsonl"), ("sample.py", "-p", "The")):
        run_script(*command, "-m", on_device[0], "-d", DEVICE)


def test_two_ranks_share_a_gpu(on_device, shards, tmp_path, monkeypatch):
    """DDP, the compiler and CUDA together; gradients travel over gloo."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    figures, words = run(shards, tmp_path / "log", "--micro_batch_size", 2, launcher=("torchrun", 2))
    assert "some ranks share a GPU" in words
    assert_same_losses(figures, on_device[1])


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@two_gpus
def test_two_ranks_over_nccl(on_device, shards, tmp_path):
    figures, words = run(shards, tmp_path / "log", "--micro_batch_size", 2, launcher=("torchrun", 2))
    assert "2 ranks" in words and "some ranks share a GPU" not in words
    assert_same_losses(figures, on_device[1])


@two_gpus
def test_two_ranks_with_a_shard_each(on_device, shards, tmp_path):
    """FSDP over NCCL, with an evaluation, a save and a resume on one GPU without it."""
    flags = "--micro_batch_size", 2
    figures, _ = run(shards, tmp_path / "log", *flags, "--shard", launcher=("torchrun", 2))
    assert_same_losses(figures, on_device[1])
    shutil.rmtree(tmp_path / "log" / "ckpt_000012")
    figures, words = run(shards, tmp_path / "log", *flags, "--resume")
    assert "ckpt_000008 at step 8" in words
    assert_same_losses(figures, on_device[1])


@two_gpus
@pytest.mark.parametrize("act, timeout", [("kill", 600), ("hang", 15)])
def test_a_rank_lost_over_nccl_ends_the_other_with_the_reason(shards, tmp_path, act, timeout):
    flags = flags_of(shards, tmp_path / "log", "--device", DEVICE, "--no-compile", "--micro_batch_size", 2,
                     "--timeout", timeout)
    process = run_script("torchrun", 2, "train_gpt2.py", *flags, check=False,
                         fault=f'if RANK == 1: while_others_wait_for("gradients", {act})')
    assert process.returncode == 1
    assert "rank 0 lost contact" in process.stderr and "continue with --resume" in process.stderr
