"""Training end to end: learning, exact resumes, any number of ranks, refused mistakes."""

import gzip
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import zipfile

import make
import pytest
import torch
from runs import (
    ROOT,
    assert_close,
    assert_refused,
    assert_same_end,
    copy_run,
    flags_of,
    one_thread,
    read_log,
    run_here,
    run_script,
    train,
    weights,
)

import checkpoint
import fineweb_edu
import hellaswag
import train_gpt2
from kit import curves, device, record, reference, sources
from kit.device import Precision, compile_model
from kit.files import UserError
from train_gpt2 import get_lr, main, parse_args


def test_a_run_learns_and_writes_what_the_readme_lists(whole):
    log_dir, log = whole
    assert [step for step, stream in log if stream == "train"] == list(range(12))
    assert [step for step, stream in log if stream == "val"] == [0, 4, 8, 12]
    first, last = float(log[0, "val"]), float(log[12, "val"])
    assert first == pytest.approx(math.log(512), abs=0.2) and last < first - 0.3
    assert all(len(value.partition(".")[2]) >= 7 for value in log.values())
    assert [path.name for path in checkpoint.numbered(log_dir)] == ["ckpt_000012", "ckpt_000008"]
    best = checkpoint.read_meta(log_dir / "best")
    assert best["step"] == 12 and best["val_loss"] == pytest.approx(float(log[12, "val"]))
    model, tokenizer = checkpoint.load_model_and_tokenizer(log_dir)
    assert (tokenizer.n_vocab, model.config.n_embd, model.training) == (512, 32, False)
    record = json.loads((log_dir / "run.json").read_text())
    assert record["flags"]["max_lr"] == 3e-3 and record["parameters"] == model.num_params()
    assert {"git_commit", "torch", "device_name", "data_manifest", "world_size"} <= record.keys()
    assert len(record["starts"]) == 1


def test_validation_is_the_mean_over_a_fixed_text(shards, whole):
    log_dir, log = whole
    loader = train_gpt2.DataLoaderLite(1, 32, split="val", data_dir=shards)
    model = checkpoint.load_model(log_dir)
    windows = [loader.window(n) for n in range(1000 // 32)]
    with torch.no_grad():
        losses = [model(torch.tensor(w[None, :-1]), torch.tensor(w[None, 1:]))[1].item() for w in windows]
    assert float(log[12, "val"]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    tokenizer = checkpoint.load_model_and_tokenizer(log_dir)[1]
    size = sum(len(tokenizer.decode_bytes([i])) for w in windows for i in w[1:] if i != tokenizer.eot_token)
    bits = sum(losses) * 32 / math.log(2) / size
    assert float(log[12, "val_bpb"]) == pytest.approx(bits, abs=1e-5)


@pytest.mark.parametrize("step", [3, 11])
def test_a_stop_before_an_evaluation_loses_nothing(shards, whole, tmp_path, faults, step):
    """The saved step has not been evaluated yet; the resumed run writes its checkpoint again once it has."""
    with faults.put_in(), pytest.raises(SystemExit) as stopped:
        faults.after_step(step, faults.stop)
        train(shards, tmp_path / "log")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoint.numbered(tmp_path / "log")[0].name == f"ckpt_{step + 1:06d}"
    train(shards, tmp_path / "log", "--resume")
    assert_same_end(tmp_path / "log", whole)


def test_resume_without_a_run_starts_one_and_says_so(shards, whole, tmp_path, capsys):
    assert train(shards, tmp_path / "log", "--resume") == whole.log
    assert "contains no checkpoint: starting at step 0" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 8])
def test_micro_batches_do_not_change_the_run(shards, whole, tmp_path, size):
    assert_close(train(shards, tmp_path / "log", "--micro_batch_size", size), whole.log)


def test_two_ranks_are_one_process(shards, whole, tmp_path, texts):
    """Under a real torchrun: training, validation, HellaSwag; and a resume on another number of ranks."""
    data = make.write_jsonl(tmp_path / "hellaswag.jsonl", make.hellaswag_rows(texts, 30))
    flags = ["--hellaswag_every", 4, "--hellaswag_data", data, "--sample_every", 6, "--micro_batch_size", 2]
    one = train(shards, tmp_path / "one", *flags)
    process = run_script("torchrun", 2, "train_gpt2.py", *flags_of(shards, tmp_path / "two", *flags))
    assert process.stdout.count("finished") == 1
    two = read_log(tmp_path / "two")
    assert {(4, "hella"), (12, "hella")} <= two.keys()
    assert_close(two, one)
    assert_close({key: one[key] for key in whole.log}, whole.log)
    shutil.rmtree(tmp_path / "two" / "ckpt_000012")  # as if it had ended after step 8
    assert_close(train(shards, tmp_path / "two", *flags, "--resume"), one)


@pytest.fixture
def one_row(tmp_path, texts):
    """A HellaSwag file of one example."""
    return make.write_jsonl(tmp_path / "hellaswag.jsonl", make.hellaswag_rows(texts, 1))


def test_a_compiled_run_is_the_same_and_resumes(shards, whole, tmp_path, one_row):
    """With torch.compile: training, validation of a partial batch, HellaSwag, samples, resume."""
    flags = ["--compile", "--hellaswag_every", 4, "--hellaswag_data", one_row, "--sample_every", 4]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    log = train(shards, tmp_path / "log", *flags)
    assert json.loads((tmp_path / "log" / "run.json").read_text())["compiled"]
    # one to train and one to evaluate: the warm-up compiles what the steps run
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 2
    assert_close({key: log[key] for key in whole.log}, whole.log)
    shutil.rmtree(tmp_path / "log" / "ckpt_000012")
    assert train(shards, tmp_path / "log", *flags, "--resume") == log


def test_hellaswag_is_tokenized_once_a_run(shards, tmp_path, one_row, calls_of):
    rendered = calls_of(hellaswag, "render_example")
    log = train(shards, tmp_path / "log", "--hellaswag_every", 4, "--hellaswag_data", one_row)
    assert [step for step, stream in log if stream == "hella"] == [0, 4, 8, 12] and len(rendered) == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="saved tensors of a graph can't be read")
def test_a_compiled_model_keeps_less_for_the_backward_pass():
    """The outputs of LayerNorm and GELU are recomputed: they are a quarter of what torch would keep."""
    def kept(compiled):
        windows = torch.randint(512, (8, 65))
        nodes, sizes = [compiled(windows[:, :-1], windows[:, 1:])[1].grad_fn], {}
        for node in nodes:  # the list grows
            for tensor in getattr(node, "saved_tensors", ()):
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            nodes += [before for before, _ in node.next_functions if before and before not in nodes]
        return sum(sizes.values())

    raw_model = train_gpt2.GPT(train_gpt2.GPTConfig(64, 512, n_layer=2, n_head=2, n_embd=64))
    less = kept(compile_model(raw_model, "cpu"))
    torch._dynamo.reset()
    with torch._functorch.config.patch(ban_recompute_materialized_backward=True):  # torch's default
        assert less < 0.8 * kept(torch.compile(raw_model))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc's allocator")
def test_freed_memory_is_reused_without_page_faults():
    code = """if True:
        import resource, torch, kit.device, train_gpt2
        kit.device.tune("cpu")
        torch.ones(2**24)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**24)  # 64 MiB, 16,384 pages; the first may not fit into the freed memory
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)
    assert int(faults) <= 2 * 16384


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc's allocator")
@pytest.mark.parametrize("variables, is_kept", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)])
def test_freed_memory_is_returned_if_the_user_sets_glibcs_variables(variables, is_kept):
    code = """if True:
        import torch, kit.device
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        kit.device.tune("cpu")
        before = resident()
        torch.ones(2**24)  # 64 MiB, freed at once
        print(resident() - before)
    """
    grown = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **variables})
    assert (int(grown) > 48 * 2**20) == is_kept


@pytest.mark.slow
def test_compiled_gradients_are_the_same_bits_on_a_busy_machine():
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())  # with one, there is nothing to keep apart
    raw_model = train_gpt2.GPT(train_gpt2.GPTConfig(32, 512, 2, 2, 32))
    model = compile_model(raw_model, "cpu")
    windows = torch.randint(50, (4, 33))  # each token several times
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    seen = set()
    for _ in range(100):
        model(windows[:, :-1], windows[:, 1:])[1].backward()
        seen.add(raw_model.transformer.wte.weight.grad.numpy().tobytes())
        raw_model.zero_grad()
    for process in busy:
        process.kill()
    assert len(seen) == 1


def test_without_a_compiler_training_goes_on_and_says_so(
    shards, whole, tmp_path, monkeypatch, capsys
):
    def broken(model, **settings):
        raise RuntimeError("no C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert train(shards, tmp_path / "log", "--compile") == whole.log
    assert "training uncompiled: no C++ compiler found\n" in capsys.readouterr().out


def test_the_record_has_the_program_itself(whole):
    digest = json.loads((whole.log_dir / "run.json").read_text())["source"]
    with zipfile.ZipFile(whole.log_dir / f"source_{digest}.zip") as archive:
        names = set(archive.namelist())
        assert {"model.py", "train_gpt2.py", "kit/optim.py", "configs/demo.txt"} <= names
        assert not any(name.startswith("tests") for name in names)
        assert archive.read("model.py") == (ROOT / "model.py").read_bytes()
    assert len(list(whole.log_dir.glob("source_*"))) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_resumes(shards, whole, tmp_path, dtype):
    log = train(shards, tmp_path / "log", "--dtype", dtype)
    assert_close({key: log[key] for key in whole.log}, whole.log, tolerance=0.1)
    assert log != whole.log
    shutil.rmtree(tmp_path / "log" / "ckpt_000012")
    assert checkpoint.read_meta(tmp_path / "log" / "ckpt_000008")["scaler"] or dtype == "bfloat16"
    assert train(shards, tmp_path / "log", "--dtype", dtype, "--resume") == log


@pytest.mark.slow
def test_dropout_on_all_threads_resumes_bit_for_bit(shards, tmp_path):
    """The other runs in the tests use one thread."""
    log_dir, env = tmp_path / "log", {"OMP_NUM_THREADS": str(os.cpu_count())}
    command = ["train_gpt2.py", *flags_of(shards, log_dir, "--dropout", 0.2)]
    run_script(*command, env=env)
    log = read_log(log_dir)
    shutil.rmtree(log_dir / "ckpt_000012")
    run_script(*command, "--resume", env=env)
    assert read_log(log_dir) == log


def test_dropout_on_two_ranks_resumes_bit_for_bit(shards, tmp_path):
    log_dir = tmp_path / "log"
    command = ["torchrun", 2, "train_gpt2.py", *flags_of(shards, log_dir, "--dropout", 0.2)]
    run_script(*command)
    log = read_log(log_dir)
    shutil.rmtree(log_dir / "ckpt_000012")
    run_script(*command, "--resume")
    assert read_log(log_dir) == log


def test_the_host_is_tuned_before_anything_else(faults):
    faults.before_host_is_tuned(faults.interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(parse_args(["--data_dir", "no data at all"]))


def test_fine_tuning_starts_from_the_weights_with_a_fresh_optimizer(shards, whole, tmp_path, capsys):
    log = train(shards, tmp_path / "log", "--init_from", whole.log_dir, "--max_steps", 4, "--warmup_steps", 0)
    assert log[0, "val"] == whole.log[12, "val"] and float(log[4, "val"]) < float(log[0, "val"])
    assert "optimizer.safetensors" in weights(tmp_path / "log", "ckpt_000004")
    directory = tmp_path / "hf"
    checkpoint.load_model(whole.log_dir).save_pretrained(directory)
    shutil.copy(whole.log_dir / "best" / "tokenizer.json", directory)
    log = train(shards, tmp_path / "hf_log", "--init_from", directory, "--max_steps", 1, "--dropout", 0.1)
    assert float(log[0, "val"]) == pytest.approx(float(whole.log[12, "val"]), abs=1e-5)
    # the model's shape overrides the flags, and the run says so
    train(shards, tmp_path / "other", "--init_from", whole.log_dir, "--n_embd", 48, "--max_steps", 1)
    assert "n_layer 2, n_head 2, n_embd 32, vocab_size 512, block_size 32\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "other" / "run.json").read_text())["flags"]["n_embd"] == 32
    with pytest.raises(UserError, match="--sequence_length"):
        train(shards, tmp_path / "x", "--init_from", whole.log_dir, "--sequence_length", 64)


def test_eval_only_measures_the_newest_checkpoint_and_writes_nothing(shards, whole, tmp_path, capsys):
    log_dir = shutil.copytree(whole.log_dir, tmp_path / "log")
    before = {path: path.read_bytes() for path in log_dir.rglob("*") if path.is_file()}
    main(parse_args(list(map(str, flags_of(shards, log_dir, "--eval_only", "--sample_every", 4)))))
    out = capsys.readouterr().out
    assert f"{log_dir}/ckpt_000012: val loss {float(whole.log[12, 'val']):.4f}" in out and "step 0" not in out
    assert "Hello, I'm a language model," in out and "finished" not in out and "saved" not in out
    assert before == {path: path.read_bytes() for path in log_dir.rglob("*") if path.is_file()}
    # --init_from evaluates another model, here on 300 tokens fewer
    flags = ["--eval_only", "--init_from", whole.log_dir / "best", "--val_tokens", 700]
    main(parse_args(list(map(str, flags_of(shards, tmp_path / "none", *flags)))))
    assert "best" in capsys.readouterr().out and not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="none does not exist"):
        main(parse_args(["--eval_only", "--log_dir", str(tmp_path / "none")]))


def test_shards_without_a_manifest_train_unverified(shards, tmp_path, capsys, faults):
    """build-nanogpt's shards, on a machine that has no GPT-2 vocabulary either."""
    make.copy_shards(shards, tmp_path / "data", manifest=False)
    faults.without_vocabulary()
    train(tmp_path / "data", tmp_path / "log", "--max_steps", 2, "--vocab_size", 50304, "--sample_every", 1)
    out = capsys.readouterr().out
    assert out.count("can't be verified") == 1 and out.count("no samples, HellaSwag") == 1
    assert checkpoint.load_model(tmp_path / "log").config.num_tokens == 50257


def test_shards_of_an_unknown_small_vocabulary_train(shards, tmp_path, capsys):
    make.copy_shards(shards, tmp_path / "data", manifest=False)
    train(tmp_path / "data", tmp_path / "log", "--max_steps", 2, "--sample_every", 1)
    assert "does not name the tokenizer" in capsys.readouterr().out
    with pytest.raises(UserError, match="contains id .* last id is 63"):
        train(tmp_path / "data", tmp_path / "other", "--vocab_size", 64)


def test_without_hellaswag_and_network_training_goes_on(shards, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    log = train(shards, tmp_path / "log", "--hellaswag_every", 4)
    assert capsys.readouterr().out.count("HellaSwag is skipped: ") == 1 and log == whole.log


def test_evaluations_are_drawn_and_compared_with_references(shards, tmp_path, monkeypatch, capsys, calls_of):
    monkeypatch.setattr(reference, "check", lambda *args: "off the track")
    checked, drawn = calls_of(reference, "check"), calls_of(curves, "draw")
    flags = ["--plot", "--max_steps", 260, "--val_every", 125, "--save_every", 0]
    log = train(shards, tmp_path / "log", *flags)
    assert drawn == [([tmp_path / "log"], tmp_path / "log" / "curves.png")] * 4  # at 0, 125, 250 and 260
    assert (tmp_path / "log" / "curves.png").read_bytes().startswith(b"\x89PNG")
    [(step, loss, log_dir)] = checked
    assert (step, f"{loss:.10f}", log_dir) == (250, log[250, "val"], tmp_path / "log")
    assert capsys.readouterr().out.count("off the track\n") == 1


def test_without_matplotlib_training_goes_on_and_says_so_once(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import raises ImportError
    train(shards, tmp_path / "log", "--plot")
    [line] = [line for line in capsys.readouterr().out.splitlines()
              if "curves.png will no longer be drawn" in line]
    assert line.endswith("pip install matplotlib")


def test_intervals(shards, tmp_path):
    log = train(shards, tmp_path / "log", "--val_every", 5, "--save_every", 0, "--max_steps", 7)
    assert [step for step, stream in log if stream == "val"] == [0, 5, 7]
    assert not checkpoint.numbered(tmp_path / "log")
    log = train(shards, tmp_path / "none", "--val_every", 0, "--save_every", 5, "--max_steps", 7)
    assert not any(stream == "val" for _, stream in log) and not (tmp_path / "none" / "best").exists()
    assert [path.name for path in checkpoint.numbered(tmp_path / "none")] == ["ckpt_000007", "ckpt_000005"]


def test_schedule():
    args = parse_args([])
    assert get_lr(0, args) == pytest.approx(6e-4 / 715) and get_lr(714, args) == get_lr(715, args) == 6e-4
    assert get_lr(19073, args) == pytest.approx(6e-5)
    assert get_lr((715 + 19073) // 2, args) == pytest.approx(3.3e-4, rel=1e-3)
    short = parse_args(["--max_steps", "5", "--warmup_steps", "10"])  # ending during warm-up is allowed
    assert get_lr(4, short) == pytest.approx(3e-4)


def test_the_defaults_are_the_recipe():
    args = parse_args([])
    assert (args.total_batch_size, args.max_steps, args.warmup_steps) == (524_288, 19_073, 715)
    assert (args.max_lr, args.min_lr, args.weight_decay, args.grad_clip) == (6e-4, 6e-5, 0.1, 1.0)
    assert (args.n_layer, args.n_head, args.n_embd) == (12, 12, 768)
    assert (args.vocab_size, args.block_size) == (None, 1024)


def test_the_vocabulary_is_that_of_the_data(shards, whole, tmp_path):
    flags = list(map(str, flags_of(shards, tmp_path / "log")))
    at = flags.index("--vocab_size")
    with one_thread():
        main(parse_args(flags[:at] + flags[at + 2 :]))
    assert_same_end(tmp_path / "log", whole)


def test_a_run_with_a_padded_vocabulary_resumes_without_the_flag(shards, tmp_path):
    """As the runs of older versions, whose default was GPT-2's vocabulary whatever the data."""
    train(shards, tmp_path / "log", "--vocab_size", 640, "--max_steps", 12)
    shutil.rmtree(tmp_path / "log" / "ckpt_000012")
    flags = list(map(str, flags_of(shards, tmp_path / "log", "--resume")))
    at = flags.index("--vocab_size")
    with one_thread():
        main(parse_args(flags[:at] + flags[at + 2 :]))
    assert checkpoint.load_model(tmp_path / "log").config.vocab_size == 640


def test_every_config_is_complete_and_divides():
    for path in sorted((ROOT / "configs").glob("*.txt")):
        args = parse_args([f"@{path}"])
        assert args.total_batch_size % (args.micro_batch_size * args.sequence_length) == 0, path
        if path.name.startswith("gpt2_"):  # the cosine of the GPT-3 paper ends at a tenth
            assert args.min_lr == pytest.approx(args.max_lr / 10), path


def assert_train_refuses(shards, log_dir, flags, *words):
    with pytest.raises(UserError) as error:
        train(shards, log_dir, *flags)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize("flags, words", [
    (["--total_batch_size", 300], ["--total_batch_size 300", "_size 256 or --total_batch_size 384"]),
    (["--n_embd", 33], ["--n_embd"]),
    (["--n_layer", 0], ["--n_layer"]),
    (["--vocab_size", 400], ["--vocab_size 400"]),
    (["--data_dir", "."], ["no train shards"]),
    (["--sequence_length", 60_000, "--total_batch_size", 240_000, "--val_tokens", 60_000],
     ["--sequence_length"]),
    (["--device", "cuda:7"], ["--device"]),
    (["--hellaswag_every", 1, "--hellaswag_data", "missing_hellaswag.jsonl"], ["hellaswag"]),
    (["--hellaswag_every", 1, "--hellaswag_data", "empty.jsonl"], ["no examples"]),
])
def test_a_mistake_is_refused_before_anything_is_written(shards, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert_train_refuses(shards, tmp_path / "new", flags, *words)
    assert not (tmp_path / "new").exists()


def test_a_second_run_in_a_log_directory_is_refused(shards, whole):
    assert_train_refuses(shards, whole.log_dir, [], "already contains a run")


@pytest.mark.parametrize("name, content, words", [
    ("run.json", "[]", "run.json is damaged"), ("log.txt", "x y 1\n", "txt:1"),
])
def test_a_damaged_record_is_refused(shards, whole, tmp_path, name, content, words):
    log_dir = copy_run(whole.log_dir, tmp_path / "log")
    (log_dir / name).write_text(content)
    assert_train_refuses(shards, log_dir, ["--resume"], words)


@pytest.mark.parametrize("flags", [
    ["--max_steps", "0"], ["--dtype", "int4"], ["--max_lr", "nan"], ["--seed", str(2**63)],
    ["--block_size", "0"], ["--val_tokens", "5"], ["@/no/such/config.txt"],
])
def test_a_wrong_value_of_a_flag_is_refused(flags):
    assert_refused(run_script("train_gpt2.py", *flags, check=False), flags[0].lstrip("@"))


def test_an_unclosed_quote_in_a_config_is_refused(tmp_path):
    (tmp_path / "config.txt").write_text("--sample_prompt Don't")
    assert_refused(run_script("train_gpt2.py", f"@{tmp_path}/config.txt", check=False), "Don't")


@pytest.mark.slow
def test_the_demo_from_nothing(tmp_path, capsys):
    """The README's first command with few steps: makes data, trains a tokenizer and a model, samples."""
    flags = ["--data_dir", tmp_path / "data", "--log_dir", tmp_path / "log"]
    flags += ["--max_steps", 4, "--save_every", 4, "--val_tokens", 4096]
    main(parse_args([f"@{ROOT}/configs/demo.txt", *map(str, flags)]))
    out = capsys.readouterr().out
    assert "nats" in out and f"python sample.py -m {tmp_path}/log" in out and "step     3 | loss" in out
    assert run_here(fineweb_edu, "--verify", tmp_path / "data").returncode == 0
    text = run_script("sample.py", "-m", tmp_path / "log", "-p", "Return the", "-d", "cpu",
                      "--max_new_tokens", 10).stdout
    assert text.startswith("Return the") and len(text) > 15
    lines = (tmp_path / "data" / "sources" / "python_docs.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == sources.python_docs()  # the same in the same order


def test_a_profile_shows_where_the_time_goes_and_changes_nothing(shards, whole, tmp_path, capsys):
    log = train(shards, tmp_path / "log", "--profile", 2)
    assert log == whole.log
    table = (tmp_path / "log" / "profile.txt").read_text()
    assert "aten::mm " in table and "ProfilerStep" in table
    with gzip.open(tmp_path / "log" / "trace.json.gz", "rt") as file:
        steps = {event["name"] for event in json.load(file)["traceEvents"] if "ProfilerStep" in event["name"]}
    assert steps == {"ProfilerStep#4", "ProfilerStep#5"}  # the first ones allocate memory
    assert str(tmp_path / "log" / "profile.txt") in capsys.readouterr().out


def test_a_profile_of_a_run_that_ends_before_it_is_partial(shards, tmp_path):
    train(shards, tmp_path / "log", "--profile", 50, "--max_steps", 6)
    assert "aten::mm" in (tmp_path / "log" / "profile.txt").read_text()


def test_the_record_has_the_peak_memory_and_the_attention_kernel(whole):
    record = json.loads((whole.log_dir / "run.json").read_text())
    for facts in (record, record["starts"][-1]):
        assert facts["attention"] in ("FLASH_ATTENTION", "MATH")
        assert 5e7 < facts["peak_memory_bytes"] < 5e10


def test_auto_takes_the_largest_micro_batch_that_fits(shards, whole, tmp_path, monkeypatch, capsys):
    """Here two sequences of the eight per step fit. The numbers stay those of micro-batches of four."""
    tried = []

    def fits(model, batch, precision, device, missing):
        assert missing == 2  # AdamW's moments
        tried.append(len(batch[0]))
        return tried[-1] <= 2

    monkeypatch.setattr(train_gpt2, "fits_into_memory", fits)
    train(shards, tmp_path / "muon", "--micro_batch_size", "auto", "--optimizer", "muon", "--max_steps", 3)
    assert tried == [2, 4]
    tried.clear()
    capsys.readouterr()
    log = train(shards, tmp_path / "log", "--micro_batch_size", "auto")
    assert tried == [2, 4]
    assert "2 sequences x 32 tokens x 1 rank x 4 micro-batches" in capsys.readouterr().out
    assert_close(log, whole.log)
    assert json.loads((tmp_path / "log" / "run.json").read_text())["flags"]["micro_batch_size"] == 2


@pytest.mark.parametrize("total, sequences", [(256, 8), (96, 1), (2**15, 128)])
def test_auto_on_a_cpu_takes_at_most_4096_tokens(shards, tmp_path, capsys, total, sequences):
    train(shards, tmp_path / "log", "--micro_batch_size", "auto", "--total_batch_size", total,
          "--max_steps", 1, "--warmup_steps", 0, "--val_every", 0)
    assert f"{sequences} sequence{'s' * (sequences > 1)} x 32 tokens" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_found_and_leaves_no_gradient(monkeypatch):
    model = make.small_gpt().train()
    batch = torch.randint(96, (2, 4, 16))
    precision = Precision("cpu")
    assert device.fits_into_memory(model, batch, precision, "cpu", 2)
    assert all(p.grad is None for p in model.parameters())

    def fail(error):
        def forward(*_):
            raise error
        monkeypatch.setattr(model, "forward", forward)
        return device.fits_into_memory(model, batch, precision, "cpu", 2)

    assert fail(torch.OutOfMemoryError("CUDA out of memory")) is False
    with pytest.raises(RuntimeError, match="another"):
        fail(RuntimeError("another error"))


def test_a_record_that_was_removed_does_not_end_the_run(tmp_path):
    """A run adds facts after its second step; run.json may be gone by then."""
    record.add_facts(tmp_path, peak_memory_bytes=1)
    assert not list(tmp_path.iterdir())
    record.record_start(tmp_path, False, flags={})
    record.add_facts(tmp_path, peak_memory_bytes=1)
    assert record.read_record(tmp_path)["starts"][-1]["peak_memory_bytes"] == 1


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_the_compile_mode_is_torch_compiles(monkeypatch, name):
    monkeypatch.setattr(torch, "compile", lambda model, **options: options)
    assert compile_model(make.small_gpt(), name, "x") == {"mode": "x"}


@pytest.mark.parametrize("flags", [
    [], ["--dropout", 0.2], ["--value_residual", "--x0_shortcut", "--position", "rope", "--mlp", "swiglu"],
    pytest.param(["--compile"], marks=pytest.mark.slow),
], ids=["plain", "dropout", "variants", "compiled"])
def test_checkpointed_activations_change_no_bit(shards, tmp_path, flags):
    plain = train(shards, tmp_path / "plain", *flags)
    assert train(shards, tmp_path / "log", *flags, "--checkpoint_activations") == plain
    assert weights(tmp_path / "log", "best") == weights(tmp_path / "plain", "best")


def test_checkpointed_activations_are_not_kept():
    """Of each block, only its input (B, T, C) is."""
    model = make.small_gpt(n_layer=4).train()
    x, y = torch.randint(96, (2, 4, 16))

    def kept(checkpointed):
        model.checkpoint_activations, sizes = checkpointed, {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model.features(x)
        return sum(sizes.values()), features

    everything, inputs = kept(False)[0], kept(True)[0]
    assert inputs < everything / 5
