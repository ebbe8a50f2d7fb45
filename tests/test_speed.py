"""Speed ratios with the 124M on this machine: two ways to do the same work, in turn.

`python -m pytest -m slow -s` prints them.
"""

import statistics
import time

import make
import pytest
import torch
from test_hellaswag import argmin, naive_scores

import hellaswag

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gpt2_124M():
    return make.small_gpt(1024, 50257, n_layer=12, n_head=12, n_embd=768)


def seconds(function, *args):
    started = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - started, result


def in_turn(ours, theirs, rounds):
    """Time both in turn and print the medians; return the median of the ratios theirs / ours."""
    pairs = [(seconds(ours)[0], seconds(theirs)[0]) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    a, b = (statistics.median(times) for times in zip(*pairs))
    print(f"\nours {a:.2f} s, the other {b:.2f} s, ratio {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})")
    return statistics.median(ratios)


def test_hellaswag_against_one_example_at_a_time(gpt2_124M, real_data, gpt2_tokenizer):
    examples = list(hellaswag.iterate_examples(real_data / "hellaswag_val_sample.jsonl"))
    fast, slow = [], []
    parts = iter([examples[i : i + 40] for i in range(0, 280, 40) for _ in range(2)])

    def ours():
        result = hellaswag.evaluate(gpt2_124M, gpt2_tokenizer, next(parts))
        fast.extend(zip(result["predictions"], result["predictions_norm"]))

    def one_at_a_time():
        """Four padded rows and all their logits for each example, as tutorials do it."""
        for example in next(parts):
            slow.append(padded_predictions(gpt2_124M, gpt2_tokenizer, example))

    hellaswag.evaluate(gpt2_124M, gpt2_tokenizer, examples[:2])  # warm both arms up
    padded_predictions(gpt2_124M, gpt2_tokenizer, examples[0])
    assert in_turn(ours, one_at_a_time, 7) > 2
    assert fast == slow and len(fast) == 280
    sums, means = naive_scores(gpt2_124M, gpt2_tokenizer, examples[0])  # and the padding is sound
    assert (argmin(sums), argmin(means)) == slow[0]


def padded_predictions(model, tokenizer, example):
    context, endings = hellaswag.render_example(example, tokenizer)
    length = len(context) + max(map(len, endings))
    ids = torch.tensor([context + e + [0] * (length - len(context) - len(e)) for e in endings])  # (4, T)
    with torch.no_grad():
        logits, _ = model(ids)  # (4, T, V)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    scored = [losses[i, len(context) - 1 : len(context) - 1 + len(e)].double() for i, e in enumerate(endings)]
    return argmin([s.sum().item() for s in scored]), argmin([s.mean().item() for s in scored])


def test_sampling_against_the_uncached_loop(gpt2_124M):
    prompt = torch.tensor([[15496, 11, 314, 1101, 257, 3303, 2746, 11]])

    def cached():
        return gpt2_124M.generate(prompt, 128, temperature=0)

    @torch.no_grad()
    def uncached():
        idx = prompt
        for _ in range(128):
            logits, _ = gpt2_124M(idx)
            idx = torch.cat([idx, logits[:, -1, :50257].argmax(-1, keepdim=True)], dim=1)
        return idx

    assert torch.equal(cached(), uncached())
    assert in_turn(cached, uncached, 3) > 3
