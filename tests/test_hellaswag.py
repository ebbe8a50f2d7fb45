"""HellaSwag: the fast evaluation predicts what one example at a time does; bad files are refused by line."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, run_script

import hellaswag
from model import GPT, GPTConfig
from tokenizer import get_tokenizer


def naive_scores(model, tokenizer, example):
    """The protocol as the tutorials write it: one ending at a time, all logits. Sums and means of losses."""
    sums, means = [], []
    for ending in example["endings"]:
        ids = tokenizer.encode_ordinary(example["ctx"])
        scored = tokenizer.encode_ordinary(" " + ending)
        sequence = torch.tensor((ids + scored)[-(model.config.block_size + 1) :])
        with torch.no_grad():
            logits, _ = model(sequence[None, :-1])
        losses = F.cross_entropy(logits[0], sequence[1:], reduction="none")[-len(scored) :]
        sums.append(losses.double().sum().item())
        means.append(losses.double().mean().item())
    return sums, means


def argmin(values):
    return values.index(min(values))


def check_against_naive(model, tokenizer, examples, **settings):
    result = hellaswag.evaluate(model, tokenizer, examples, **settings)
    scores = [naive_scores(model, tokenizer, example) for example in examples]
    assert result["predictions"] == [argmin(sums) for sums, _ in scores]
    assert result["predictions_norm"] == [argmin(means) for _, means in scores]
    labels = [example["label"] for example in examples]
    n = len(examples)
    assert result["n"] == n
    for name, predictions in (("acc", "predictions"), ("acc_norm", "predictions_norm")):
        p = sum(a == b for a, b in zip(result[predictions], labels)) / n
        assert result[name] == pytest.approx(p)
        assert result[f"{name}_stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    return result


def gpt(block_size, vocab_size, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=2, n_head=4, n_embd=64)).eval()
    for p in model.parameters():
        p.data *= 4  # far from uniform, so that the endings differ
    return model


@pytest.fixture
def examples(texts):
    """Forty made of words of different lengths."""
    words = " ".join(texts[:20]).split()
    return [
        {"ctx": " ".join(words[7 * i : 7 * i + 3 + i]), "label": i % 4,
         "endings": [" ".join(words[50 * i + j : 50 * i + 2 * j + 1 + i % 5]) for j in range(4)]}
        for i in range(40)
    ]


def test_predictions_equal_one_example_at_a_time(learned, examples):
    tokenizer = get_tokenizer(learned)
    for batch_tokens in (None, 1, 700):
        result = check_against_naive(gpt(512, 512), tokenizer, examples, batch_tokens=batch_tokens)
        assert result["endings_cut"] == 0


def test_examples_longer_than_the_context_keep_their_end(learned, examples):
    tokenizer = get_tokenizer(learned)
    examples[3]["endings"][2] = " ".join(["a very long ending"] * 30)  # on its own longer than the context
    result = check_against_naive(gpt(24, 512), tokenizer, examples)
    lengths = [
        len(tokenizer.encode_ordinary(e["ctx"])) + len(tokenizer.encode_ordinary(" " + ending))
        for e in examples for ending in e["endings"]
    ]
    assert result["endings_cut"] == sum(length > 25 for length in lengths) > 20


def test_real_examples(real_data, gpt2_tokenizer):
    examples = list(hellaswag.iterate_examples(real_data / "hellaswag_val_sample.jsonl"))
    assert len(examples) == 2009
    check_against_naive(gpt(128, 50257), gpt2_tokenizer, examples[:60])


def test_contexts_are_read_once_and_only_endings_reach_the_head(learned, examples, monkeypatch):
    """The work, counted: tokens through the blocks and rows through the head, against the padded way."""
    tokenizer, model = get_tokenizer(learned), gpt(512, 512)
    read, scored = [], []
    features, token_losses = model.features, model.token_losses
    monkeypatch.setattr(model, "features", lambda ids, *a: read.append(ids.numel()) or features(ids, *a))
    monkeypatch.setattr(model, "token_losses", lambda x, t: scored.append(len(x)) or token_losses(x, t))
    hellaswag.evaluate(model, tokenizer, examples)
    rendered = [hellaswag.render_example(example, tokenizer) for example in examples]
    endings = sum(len(ending) for _, four in rendered for ending in four)
    shared = sum(len(context) for context, _ in rendered) + endings - 4 * len(examples)
    assert sum(scored) == endings
    assert shared <= sum(read) < 1.35 * shared  # padding: rows of like length share a batch


def test_command_with_a_checkpoint(tmp_path, examples, learned):
    import checkpoint

    checkpoint.save(tmp_path / "log" / "ckpt_000000", 0, gpt(64, 512), learned)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    command = ["hellaswag.py", "-m", tmp_path / "log", "-d", "cpu", "--data", tmp_path / "data.jsonl"]
    process = run_script(*command, "--json", tmp_path / "out.json", "--limit", 30)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["n"] == 30 and f"acc {result['acc']:.4f}" in process.stdout.splitlines()[-1]
    run_script("torchrun", 2, *command, "--json", tmp_path / "two.json", "--limit", 30)
    assert json.loads((tmp_path / "two.json").read_text()) == result


def test_command_refusals(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("")
    command = ["hellaswag.py", "-m", tmp_path / "nothing", "--data"]
    assert refused(run_script(*command, data, check=False), data, "no examples")
    assert refused(run_script(*command, tmp_path / "no.jsonl", check=False), "no.jsonl")
    assert refused(run_script(*command, data, "--json", "/nonexistent/out.json", check=False), "--json")
    data.write_text(json.dumps({"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 1}) + "\n")
    assert refused(run_script(*command, data, check=False), "nothing", "gpt2-xl")
