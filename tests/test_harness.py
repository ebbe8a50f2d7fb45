"""HellaSwag's harness protocol against lm-evaluation-harness itself: python -m pytest -m harness -s

The harness's own task and metrics, on local documents and a model that checkpoint.py export has written.
"""

from pathlib import Path

import make
import numpy as np
import pytest

import hellaswag
from checkpoint import export
from tokenizer import get_tokenizer

pytestmark = pytest.mark.harness

TOLERANCE = 1e-4  # nats, between two implementations in fp32


@pytest.fixture
def harness(tmp_path):
    """A function that runs lm-evaluation-harness on a model and documents: (its samples, its metrics)."""
    reason = 'pip install "lm_eval[hf]>=0.4.13,<0.5"'
    lm_eval = pytest.importorskip("lm_eval", reason=reason)
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason=reason).HFLM

    def run(model, tokenizer_name, documents):
        export(make.small_checkpoint(tmp_path, model, tokenizer=tokenizer_name), tmp_path / "model")
        data = make.write_jsonl(tmp_path / "documents.jsonl", documents)
        task = tmp_path / "task.yaml"
        task.write_text(
            f"include: {Path(lm_eval.__file__).parent}/tasks/hellaswag/hellaswag.yaml\n"
            "task: hellaswag_local\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{validation: {data}}}, cache_dir: {tmp_path}/cache}}\n"
            "training_split: null\n"
        )
        lm = HFLM(str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=8,
                  softmax_dtype="float64")  # sums of hundreds of nats lose the fourth digit in fp32
        output = lm_eval.simple_evaluate(lm, tasks=[str(task)], num_fewshot=0, bootstrap_iters=1)
        samples = sorted(output["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
        return samples, output["results"]["hellaswag_local"]

    return run


def gpt(block_size, vocab_size):
    return make.small_gpt(block_size, vocab_size, n_head=4, n_embd=64, scale=4)


def check_against_harness(run, model, tokenizer_name, examples, documents):
    """The same choices (unless tied), the same log-likelihoods, the same figures."""
    result = hellaswag.evaluate(model, get_tokenizer(tokenizer_name), examples, protocol="harness")
    samples, figures = run(model, tokenizer_name, documents)
    assert len(samples) == len(examples)
    largest = ties = 0
    for i, sample in enumerate(samples):
        theirs = np.array([loglikelihood for loglikelihood, _ in sample["filtered_resps"]])
        with np.errstate(divide="ignore"):  # an ending of nothing but marks is empty
            theirs_norm = theirs / [len(choice) for choice in sample["doc"]["choices"]]
        for suffix, scores in (("", theirs), ("_norm", theirs_norm)):
            ours, choice = result[f"loglikelihoods{suffix}"][i], result[f"predictions{suffix}"][i]
            assert ours == pytest.approx(scores, rel=0, abs=TOLERANCE), examples[i]
            ties += choice != scores.argmax()
            assert scores.max() - scores[choice] < 2 * TOLERANCE
            assert sample[f"acc{suffix}"] == (choice == examples[i]["label"])
        largest = max(largest, np.abs(theirs - result["loglikelihoods"][i]).max())
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert result[name] == pytest.approx(figures[f"{name},none"])
    assert len(set(map(tuple, (result["predictions"], result["predictions_norm"])))) == 2
    assert len({*result["predictions"]}) == 4  # the model does choose
    print(f"\n{len(samples)} examples, largest difference of log-likelihoods {largest:.1e}, "
          f"{ties} of {2 * len(samples)} choices a different one of a tie")
    return result


def test_real_examples(real_data, gpt2_tokenizer, harness):
    """The sample has only ctx, so hellaswag.py derives its parts. The harness gets them by another rule:
    if ctx does not end like a sentence, what follows its last full stop is ctx_b."""
    examples = list(hellaswag.iterate_examples(real_data / "hellaswag_val_sample.jsonl"))[::8]
    documents = []
    for example in examples:
        ctx_a, ctx_b = example["ctx"], ""
        if ctx_a.rstrip("\"')")[-1] not in ".!?":
            ctx_a, _, ctx_b = ctx_a.rpartition(". ")
            ctx_a += "."
        documents.append({**example, "ctx_a": ctx_a, "ctx_b": ctx_b})
    assert 50 < sum(document["ctx_b"] != "" for document in documents) < len(documents) - 50
    check_against_harness(harness, gpt(128, 50304), "gpt2", examples, documents)


def test_rows_in_the_official_format(texts, learned, harness):
    examples = make.official_rows_to_clean(texts)
    assert any(hellaswag.context_and_endings(example, "harness")[0].endswith(" ") for example in examples)
    result = check_against_harness(harness, gpt(64, 512), learned, examples, examples)
    assert 10 < result["endings_cut"] < 100
