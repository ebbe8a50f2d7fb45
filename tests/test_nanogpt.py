"""Checkpoints of nanoGPT and build-nanogpt give the same logits here; models of llm.c are refused."""

import dataclasses
import math
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from runs import assert_refused, run_here

import checkpoint
import sample
from checkpoint import load_model
from kit.files import UserError
from model import GPT


class TheirBlock(torch.nn.Module):
    """A block with the parameter names of both programs; mask: whether it stores the causal mask."""

    def __init__(self, width, heads, length, bias, mask, gelu):
        super().__init__()
        nn = torch.nn
        self.heads, self.gelu = heads, gelu
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)
        self.attn.register_buffer("bias", torch.ones(length, length).tril()[None, None], persistent=mask)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2)
                   for part in self.attn.c_attn(self.ln_1(x)).chunk(3, dim=-1))
        weights = (q @ k.transpose(2, 3)) / math.sqrt(C // self.heads)
        weights = weights.masked_fill(self.attn.bias[:, :, :T, :T] == 0, -math.inf).softmax(dim=-1)
        x = x + self.attn.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.gelu))


class TheirGPT(torch.nn.Module):
    def __init__(self, shape, bias=True, mask=False, gelu="tanh"):
        super().__init__()
        nn, width = torch.nn, shape["n_embd"]
        torch.manual_seed(0)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(shape["vocab_size"], width), wpe=nn.Embedding(shape["block_size"], width),
            h=nn.ModuleList(TheirBlock(width, shape["n_head"], shape["block_size"], bias, mask, gelu)
                            for _ in range(shape["n_layer"])),
            ln_f=nn.LayerNorm(width, bias=bias)))
        self.lm_head = nn.Linear(width, shape["vocab_size"], bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, idx):
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


SHAPE = dict(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=16)


def write_nanogpt(path, shape=SHAPE, change=lambda saved: None, **how):
    """A file like nanoGPT's ckpt.pt, after `change`; returns the model. how: as TheirGPT."""
    theirs = TheirGPT(shape, gelu="none", **how)
    saved = {"model": {f"_orig_mod.{name}": tensor for name, tensor in theirs.state_dict().items()},
             "optimizer": torch.optim.AdamW(theirs.parameters()).state_dict(), "iter_num": 5000,
             "model_args": {**shape, "bias": how.get("bias", True), "dropout": 0.1},
             "best_val_loss": torch.tensor(2.875), "config": {"dataset": "openwebtext"}}
    change(saved)
    torch.save(saved, path)
    return theirs


def write_build_nanogpt(path, monkeypatch, shape=SHAPE):
    """A file like build-nanogpt's model_19072.pt, which pickles a class of its script; returns the model."""
    theirs = TheirGPT(shape)
    config = dataclasses.make_dataclass("GPTConfig", shape)
    config.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", config, raising=False)
    saved = {"model": theirs.state_dict(), "config": config(**shape), "step": 19072, "val_loss": 3.07}
    torch.save(saved, path)
    monkeypatch.undo()
    return theirs


def assert_same_logits(path, theirs, gelu):
    model = load_model(path)
    idx = torch.randint(50257, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(idx)[0] - theirs(idx)).abs().max() < 2e-4
    assert model.config.gelu == gelu and model.config.num_tokens == 50257
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("how", [dict(), dict(bias=False), dict(mask=True)])
def test_nanogpts_weights_give_the_same_logits(tmp_path, capsys, how):
    theirs = write_nanogpt(tmp_path / "ckpt.pt", **how)
    assert_same_logits(tmp_path / "ckpt.pt", theirs, "none")
    assert "nanoGPT, whose GELU is exact, step 5000, validation loss 2.8750" in capsys.readouterr().err
    assert load_model(tmp_path / "ckpt.pt").config.bias == how.get("bias", True)


def test_an_untied_head_stays_untied(tmp_path):
    def change(saved):
        saved["model"]["_orig_mod.lm_head.weight"] = saved["model"]["_orig_mod.lm_head.weight"] + 1

    theirs = write_nanogpt(tmp_path / "ckpt.pt", change=change)
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight + 1)
    model, idx = load_model(tmp_path / "ckpt.pt"), torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], theirs(idx), rtol=1e-4, atol=2e-4)


def test_build_nanogpts_weights_give_the_same_logits(tmp_path, monkeypatch, capsys):
    theirs = write_build_nanogpt(tmp_path / "model_19072.pt", monkeypatch)
    assert_same_logits(tmp_path / "model_19072.pt", theirs, "tanh")
    assert "weights of build-nanogpt, step 19072, validation loss 3.0700" in capsys.readouterr().err


def test_nanogpts_weights_are_exported_and_sampled(tmp_path, gpt2_tokenizer):
    theirs = write_nanogpt(tmp_path / "ckpt.pt", dict(SHAPE, vocab_size=50257))
    process = run_here(checkpoint, "export", tmp_path / "ckpt.pt", tmp_path / "hf")
    assert process.returncode == 0, process.stderr
    again, idx = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval(), torch.arange(9)[None]
    with torch.no_grad():
        assert (again(idx).logits - theirs(idx)).abs().max() < 2e-4
    assert "| weights from | ckpt.pt |" in (tmp_path / "hf" / "README.md").read_text()
    process = run_here(sample, "-m", tmp_path / "ckpt.pt", "-d", "cpu", "--max_new_tokens", 3, "-p", "Hello")
    assert process.returncode == 0 and process.stdout.startswith("Hello")


@pytest.mark.parametrize("reason, change", {
    "meta.pkl": lambda saved: saved["model_args"].update(vocab_size=65),
    "ln_f": lambda saved: saved["model"].update({"_orig_mod.transformer.ln_f.weight": torch.ones(3)}),
    "n_layer is 3": lambda saved: saved["model_args"].update(n_layer=3),
    "n_head must be": lambda saved: saved["model_args"].update(n_head="2"),
    "KeyError": lambda saved: saved.pop("model"),
    "it holds Python objects, which are not loaded": lambda saved: saved.update(config=GPT),  # a class
}.items())
def test_a_file_that_does_not_fit_is_refused(tmp_path, reason, change):
    write_nanogpt(tmp_path / "ckpt.pt", change=change)
    with pytest.raises(UserError, match=f"ckpt.pt.*{reason}") as refusal:
        load_model(tmp_path / "ckpt.pt")
    assert "\n" not in str(refusal.value)


def test_a_directory_of_another_program_names_its_file(tmp_path):
    write_nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=f"name its file, for example .*{tmp_path}/ckpt.pt"):
        load_model(tmp_path)


def test_weights_of_llm_c_are_refused_with_the_name_of_its_converter(tmp_path):
    (tmp_path / "gpt2_124M.bin").write_bytes((20240326).to_bytes(4, "little") + bytes(1020))
    process = run_here(sample, "-m", tmp_path / "gpt2_124M.bin", "-d", "cpu", "-p", "x")
    assert_refused(process, "gpt2_124M.bin", "export_hf.py")
