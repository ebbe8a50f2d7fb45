"""HellaSwag's harness protocol against lm-evaluation-harness itself: python -m pytest -m harness -s

The stock task, its texts and its metrics, run on an exported model and local documents.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_hellaswag import gpt

import hellaswag
from tokenizer import get_tokenizer

pytestmark = pytest.mark.harness

TOLERANCE = 1e-4  # nats, between two implementations in fp32


@pytest.fixture
def harness(tmp_path):
    """A function that runs lm-evaluation-harness on a model and documents: (its samples, its metrics)."""
    reason = 'pip install "lm_eval[hf]>=0.4.13,<0.5"'
    lm_eval = pytest.importorskip("lm_eval", reason=reason)
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason=reason).HFLM

    def run(model, hf_tokenizer, documents):
        model.save_pretrained(tmp_path / "model")
        hf_tokenizer(tmp_path / "model")
        data, task = tmp_path / "documents.jsonl", tmp_path / "task.yaml"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
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


def check_against_harness(run, model, tokenizer, hf_tokenizer, examples, documents):
    """The same choices (unless tied), the same log-likelihoods, the same figures."""
    result = hellaswag.evaluate(model, tokenizer, examples, protocol="harness")
    samples, figures = run(model, hf_tokenizer, documents)
    assert len(samples) == len(examples)
    largest = ties = 0
    for i, sample in enumerate(samples):
        theirs = np.array([loglikelihood for loglikelihood, _ in sample["filtered_resps"]])
        with np.errstate(divide="ignore"):  # of an ending that was nothing but marks
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
          f"{ties} of {2 * len(samples)} choices another one of a tie")
    return result


def test_real_examples(real_data, gpt2_tokenizer, harness):
    """The sample holds ctx alone, so that its parts are derived; the harness is told them by another rule:
    what doesn't end as a sentence ends in a ctx_b."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR is not set")
    examples = list(hellaswag.iterate_examples(real_data / "hellaswag_val_sample.jsonl"))[::8]
    documents = []
    for example in examples:
        ctx_a, ctx_b = example["ctx"], ""
        if ctx_a.rstrip("\"')")[-1] not in ".!?":
            ctx_a, _, ctx_b = ctx_a.rpartition(". ")
            ctx_a += "."
        documents.append({**example, "ctx_a": ctx_a, "ctx_b": ctx_b})
    assert 50 < sum(document["ctx_b"] != "" for document in documents) < len(documents) - 50

    def hf_tokenizer(folder):
        cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
        shutil.copy(cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee", folder / "merges.txt")
        shutil.copy(cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", folder / "vocab.json")

    check_against_harness(harness, gpt(128, 50257), gpt2_tokenizer, hf_tokenizer, examples, documents)


def official_examples(texts):
    """Sixty as the official file has them, with everything the harness cleans, cuts and counts."""
    words = " ".join(texts[:20]).split()
    examples = []
    for i in range(60):
        take = words[40 * i : 40 * i + 40]
        ctx_a = " ".join(take[: 3 + i % 12]) + "."
        ctx_b = " ".join(take[20 : 20 + i % 4]).upper() if i % 2 else ""  # capitalize() lowers the rest
        endings = [" ".join(take[24 + 4 * j : 25 + 4 * j + (i + j) % 4]) for j in range(4)]
        if i % 3 == 0:
            ctx_a = f"[header] How to {ctx_a} [title] {take[30]}  twice   [substeps]{take[31]}"
            endings[i % 4] = f" [step] {endings[i % 4]} [title] Größe: 5 €   [substeps] "
        if i % 5 == 0:  # cleaned, the context ends in blanks
            ctx_a, ctx_b = ctx_a + " [step]", ""
        examples.append({"activity_label": f"Topic {take[0]}", "ctx_a": ctx_a, "ctx_b": ctx_b,
                         "ctx": f"{ctx_a} {ctx_b}".strip(), "endings": endings, "label": i % 4})
    return examples


def test_official_format(texts, learned, harness):
    from transformers import PreTrainedTokenizerFast

    examples = official_examples(texts)
    tokenizer = get_tokenizer(learned)
    assert any(hellaswag.texts(example, "harness")[0].endswith(" ") for example in examples)
    fast = PreTrainedTokenizerFast(tokenizer_file=learned, eos_token="<|endoftext|>")
    result = check_against_harness(harness, gpt(64, 512), tokenizer, fast.save_pretrained, examples, examples)
    assert 10 < result["endings_cut"] < 100
