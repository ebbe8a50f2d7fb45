"""sample.py: text out, streamed; and every script's --help and refusals of flags, at once."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref

import make
import pytest
import torch
from runs import ROOT, assert_refused, run_here, run_script, sources

import checkpoint
import hellaswag
import sample
from kit.packed import pack
from tokenizer import get_tokenizer


def test_samples_follow_the_prompt_and_the_seed(small_run, tmp_path):
    (tmp_path / "prompt.txt").write_text("The quick\nbrown fox")
    flags = ["-m", small_run, "-d", "cpu", "--max_new_tokens", 50]
    prompt = ["-p", f"@{tmp_path}/prompt.txt", "-n", 3]
    first = run_script("sample.py", *flags, *prompt).stdout
    assert first.count("The quick\nbrown fox") == 3 and first.count("-" * 40) == 2
    assert run_here(sample, *flags, *prompt).stdout == first  # the seed is fixed
    assert run_here(sample, *flags, *prompt, "--seed", 2).stdout != first
    long = run_here(sample, *flags, "-p", "word " * 100)
    assert "the model reads the last 32" in long.stderr and long.stdout.startswith("word word")


def test_int8_samples_are_reproducible(small_run):
    flags = ["-m", small_run, "-d", "cpu", "-p", "The", "--max_new_tokens", 20, "--int8"]
    assert run_script("sample.py", *flags).stdout == run_here(sample, *flags).stdout != "The\n"


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
], ids=["cpu", "cuda", "python"])
def test_memory_that_does_not_suffice_is_one_line(small_run, monkeypatch, error):
    def allocate(*_, **__):
        raise error

    monkeypatch.setattr(sample, "print_samples", allocate)
    assert_refused(run_here(sample, "-m", small_run, "-p", "The"), "out of memory: use a smaller model")


def test_another_error_of_torch_keeps_its_traceback(small_run, monkeypatch):
    monkeypatch.setattr(sample, "print_samples", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run_here(sample, "-m", small_run, "-p", "The")


def gpt():
    return make.with_biases(make.small_gpt(64, n_head=4, n_embd=64))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_a_packed_model_writes_the_same_tokens_and_calls_no_module_in_a_layer(rows, monkeypatch):
    model, idx = gpt(), torch.randint(512, (rows, 5))
    plain, logits = model.generate(idx, 40, temperature=0), model(idx)[0]
    matmuls, matmul = [], torch.ops.mkldnn._linear_pointwise
    counted = types.SimpleNamespace(default=lambda *args: matmuls.append(args) or matmul(*args))
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    unpacked = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    held, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: held.append(
        sum(weight() is not None for weight in unpacked)) or reorder(*args))
    pack(model)
    called, call = [], torch.nn.Module.__call__
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, *x: called.append(self) or call(self, *x))
    assert torch.equal(model.generate(idx, 40, temperature=0), plain)
    assert {type(module) for module in called} == {torch.nn.Embedding} and len(called) == 2 * 40
    if torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported():
        assert len(matmuls) == 9 * 40  # each linear layer for each token
        read = [x.numel() // x.size(-1) for x, *_ in matmuls]  # the prompt once, then a token at a time;
        assert read == [5 * rows] * 8 + [rows] * (1 + 9 * 39)  # the head reads the last token only
        assert all(weight.is_mkldnn for _, weight, *_ in matmuls)  # packed
        assert held[0] == 10 and held[-1] == 4  # at the end the embeddings and the last pair: no second model
    torch.testing.assert_close(model(idx)[0], logits, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="already packed"):
        pack(model)


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
def test_a_packed_model_without_biases_is_in_eval_mode(int8):
    model = make.small_gpt(64, n_head=4, n_embd=64, dropout=0.5, bias=False).train()
    idx = torch.randint(512, (2, 60))
    pack(model, int8)
    assert torch.equal(model(idx)[0], model(idx)[0])


@torch.no_grad()
def test_int8_weights_are_close_and_a_quarter_of_the_bytes(monkeypatch):
    model, idx = gpt(), torch.randint(512, (2, 60))
    logits, layers = model(idx)[0], [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    prepacked, prepack = [], torch.ops.quantized.linear_prepack
    monkeypatch.setattr(torch.ops.quantized, "linear_prepack",
                        lambda weight, bias: prepacked.append(weight) or prepack(weight, bias))
    pack(model, int8=True)
    assert sorted(weight.numel() for weight in prepacked) == sorted(layer.weight.numel() for layer in layers)
    for weight in prepacked:
        assert weight.element_size() == 1
        original = next(layer.weight for layer in layers if layer.weight.shape == weight.shape
                        and torch.allclose(layer.weight, weight.dequantize(), atol=1e-2))
        error = (weight.dequantize() - original).abs()
        assert (error <= original.abs().amax(dim=1, keepdim=True) / 127 * 0.51).all()  # half a step
    assert 0 < (model(idx)[0] - logits).std() < 0.03 * logits.std()  # 0 would mean that they are not used


def test_streams_as_it_generates(small_run, capsys, monkeypatch):
    """Each token is printed before the model computes the next one."""
    model, tokenizer = checkpoint.load_model_and_tokenizer(small_run)
    printed = []
    stream = model.stream

    def watched(*args, **kwargs):
        for new in stream(*args, **kwargs):
            yield new
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(model, "stream", watched)
    sample.print_samples(model, tokenizer, "The", 1, 20, torch.Generator().manual_seed(0))
    assert printed[0].startswith("The") and len(printed) == 20 and sum(map(bool, printed)) > 10


def test_stops_at_end_of_text_and_decodes_split_characters(small_run, capsys):
    model, tokenizer = checkpoint.load_model_and_tokenizer(small_run)
    ids = [*tokenizer.encode("é🙂"), tokenizer.eot_token, *tokenizer.encode("beyond")]
    model.stream = lambda idx, n, **_: iter(torch.tensor(ids).view(-1, 1, 1).repeat(1, len(idx), 1))
    sample.print_samples(model, tokenizer, "<", 2, 9)
    assert capsys.readouterr().out == "<é🙂\n" + "-" * 40 + "\n<é🙂\n"


def test_prompts_are_typed_on_a_terminal_when_none_is_given(small_run):
    terminal, stdin = pty.openpty()
    command = [sys.executable, "sample.py", "-m", small_run, "-d", "cpu", "--max_new_tokens", "5"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, text=True)
    os.write(terminal, b"The first\n\nThe second\nexit \n")  # the empty line does nothing
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.count("prompt> ") == 4
    assert out.index("prompt> The first") < out.index("prompt> The second")


def test_a_session_on_a_terminal(small_run):
    """Settings by /commands, a text stopped by Ctrl-C, an earlier prompt recalled by the arrow keys."""
    terminal, theirs = pty.openpty()
    command = [sys.executable, "sample.py", "-m", small_run, "-d", "cpu", "--max_new_tokens", "8"]
    env = {**os.environ, "TERM": "vt100"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=env)

    def answer(typed, until="prompt> "):
        os.write(terminal, typed)
        shown = ""
        while until not in shown:
            shown += os.read(terminal, 4096).decode(errors="replace")
        return shown.replace("\r", "")

    assert "ckpt_000003, step 3: type a prompt, /help or exit" in answer(b"")
    assert "/top_k 50" in answer(b"/help\n")
    assert "temperature 0.5" in answer(b"/temp 0.5\n") and "top_k 3" in answer(b"/top_k 3\n")
    assert "top_k" not in answer(b"/top_k off\n").split("off")[1]
    assert "/frob: unknown; /help" in answer(b"/frob 3\n")
    assert "/temp needs a value:\n/temp 0.7" in answer(b"/temp\n")
    for mistake in ("/temp -1", "/temp hot", "/temp off", "/top_p 2", "/seed x", f"/seed {2**80}"):
        assert f"{mistake}: " in answer(f"{mistake}\n".encode())
    assert "/seed x: must be a whole number, not 'x'" in answer(b" /seed x\n")
    assert "/temp hot: must be a number, not 'hot'" in answer(b"/temp hot\n")
    first, other = [answer(b"The first\n") for _ in range(2)]
    assert first != other and "/seed" in answer(b"/seed 1337\n")
    assert first == answer(b"The first\n")
    answer(b"/seed 1337\n")
    again = answer(b"\x1b[A\x1b[A\n")  # twice up: the earlier prompt
    assert again.partition("\n")[2] == first.partition("\n")[2]
    assert "num_samples 2" in answer(b"/n 2\n") and "-" * 40 in answer(b"The first\n")
    assert "/n 0: " in answer(b"/n 0\n") and "num_samples 1" in answer(b"/n 1\n")
    assert "max_new_tokens 1000000" in answer(b"/tokens 1000000\n")  # at 2 ms a token
    assert "temperature 0.0" in answer(b"/temp 0\n")
    answer(b"The last\n", until="\nThe last")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    answer(b"")
    assert time.monotonic() - started < 60 and "temperature 0.9" in answer(b"/temp 0.9\n")
    os.write(terminal, b"/quit\n")
    assert process.wait(timeout=60) == 0


def test_without_a_model_the_newest_run_is_taken(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["-d", "cpu", "-p", "Hello", "--max_new_tokens", 0]
    assert_refused(run_here(sample, *flags), "no run found in log", "@configs/modern_demo.txt", "-m gpt2")
    assert_refused(run_here(hellaswag, "-d", "cpu"), "no run found in log")  # before anything is downloaded
    for name in ("log", "log_old", "log_new"):
        shutil.copytree(small_run, tmp_path / name)
        for path in (tmp_path / name).glob("*/meta.json"):
            os.utime(path, (1, 2 if name == "log_new" else 1))
    process = run_here(sample, *flags)
    assert (process.stdout, process.stderr) == ("Hello\n", "using -m log_new (the newest run)\n")


def test_an_empty_prompt_starts_a_document(learned):
    tokenizer = get_tokenizer(learned)
    assert sample.encode_prompt("", tokenizer).tolist() == [[511]]
    assert sample.encode_prompt("<|endoftext|>", tokenizer).tolist() == [[511]]
    sample.encode_prompt("\ud800 not utf-8", tokenizer)


@pytest.mark.parametrize("flags, words", [
    (["-p", "@/no/such/file"], ["-p", "/no/such/file"]), (["--temperature", "-1"], ["--temperature"]),
    (["--top_k", "0"], ["--top_k"]), (["--top_p", "2"], ["--top_p"]), (["-d", "tpu"], ["--device", "tpu"]),
    (["-n", "0"], ["-n"]), (["--max_new_tokens", "x"], ["--max_new_tokens"]),
    (["-m", "nowhere"], ["nowhere", "gpt2"]),
])
def test_a_wrong_value_of_a_flag_is_refused(small_run, flags, words):
    assert_refused(run_here(sample, "-m", small_run, *flags), *words)


def test_gpt2_without_network_is_one_line(tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert_refused(run_script("sample.py", "-m", "gpt2", "-p", "x", check=False, env=env), "gpt2", "network")


@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb_edu.py", "hellaswag.py", "sample.py",
                                    "app.py", "bench.py", "checkpoint.py", "compare.py", "plot.py"])
def test_help_and_wrong_flags_answer_before_torch_is_imported(script):
    process = run_script("-X", "importtime", script, "--help")
    assert "usage:" in process.stdout
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "argparse" in imported and not {"torch", "numpy", "transformers"} & imported
    part = {"bench.py": ["all"], "checkpoint.py": ["list", "log"], "plot.py": ["log"],
            "compare.py": ["a.txt"]}.get(script, [])
    assert_refused(run_script(script, *part, "--no_such_flag", check=False), "--no_such_flag")


def test_importing_does_nothing(tmp_path):
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources()]
    code = (
        "import os, sys, random, torch\n"
        "state = lambda: (dict(os.environ), os.listdir('.'), random.getstate(),\n"
        "    torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_float32_matmul_precision())\n"
        "before = state()\n"
        f"import {', '.join(names)}\n"
        "assert before == state()\n"
        "assert not {'transformers', 'datasets', 'tokenizers'} & set(sys.modules), 'heavy imports'\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    process = run_script("-c", f"import sys, os; sys.dont_write_bytecode = True; "
                         f"sys.path.insert(0, {str(ROOT)!r}); os.chdir({str(tmp_path)!r})\n{code}")
    assert process.stdout == ""


def test_importing_the_model_imports_no_compiler():
    code = "import sys, model; sys.exit('torch._dynamo' in sys.modules)"  # it takes longer than the rest
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_loading_a_model_imports_no_compiler():
    code = """if True:
        import sys
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=16))
        GPT.from_state(model.config, model.state_to_save())
        sys.exit('torch._dynamo' in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
