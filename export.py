"""A model as a standard Hugging Face directory, with its tokenizer and a model card.

    python checkpoint.py export log my_gpt2
    python checkpoint.py export log my_gpt2 --push_to_hub USER/my_gpt2

AutoModelForCausalLM, AutoTokenizer, pipeline("text-generation") and lm-evaluation-harness load it, without a
network too, and every -m here takes it.
"""

import os
import shutil
from pathlib import Path

import checkpoint
import tokenizer
from files import UserError, beside, first_line
from hellaswag import VALIDATION_ROWS
from record import read_curves, read_record

CARD = """\
---
{front_matter}
---
# {name}

A GPT-2 of {parameters:,} parameters: {n_layer} layers, {n_head} heads, width {n_embd}, a context of
{block_size} tokens, {num_tokens:,} token ids.

```python
from transformers import pipeline

generate = pipeline("text-generation", "{name}")
print(generate("Hello, I'm a language model,", max_new_tokens=50)[0]["generated_text"])
```

| training | |
|---|---|
{training}

It continues a text as its training data would: it knows no truth, and repeats what that data holds of bias.
"""
# what a card tells of a run: settings of its identity, and streams of its log.txt
SETTINGS = ("total_batch_size", "sequence_length", "max_steps", "max_lr", "min_lr", "warmup_steps",
            "weight_decay", "grad_clip", "dropout", "seed")
FIGURES = {"train": "training loss, nats per token", "val": "validation loss, nats per token",
           "val_bpb": "validation loss, bits per byte", "hella": "HellaSwag acc_norm, completion protocol"}


def export(source, directory, push_to_hub=None):
    """Write the model that `source` names (see checkpoint.resolve) as a new directory, whole or not at all.

    push_to_hub: a repository of the hub that gets it too. Raises UserError.
    """
    directory = Path(directory)
    if directory.exists():
        raise UserError(f"{directory} exists: name a new directory")
    if push_to_hub:
        from huggingface_hub import HfApi, get_token

        if get_token() is None:
            raise UserError("--push_to_hub: log in first, by `hf auth login` or with the variable HF_TOKEN")
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = checkpoint.resolve(source)
    model, encoding = checkpoint.load_model_and_tokenizer(source)
    temporary = beside(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(encoding, temporary, model.config.block_size)
        card = model_card(source, model, push_to_hub or directory.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        checkpoint.share(temporary)
        os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{directory}: {source} as a Hugging Face model")
    if push_to_hub:
        try:
            HfApi().create_repo(push_to_hub, exist_ok=True)
            address = HfApi().upload_folder(repo_id=push_to_hub, folder_path=directory).commit_url
        except Exception as error:  # of the hub's library or those below it
            reason = first_line(error)
            raise UserError(f"--push_to_hub {push_to_hub}: {reason}; {directory} stands") from error
        print(f"uploaded: {address}")


def model_card(source, model, name):
    """The README.md of a model for the hub: its shape, and what its run has recorded up to its step."""
    from huggingface_hub import EvalResult, ModelCardData

    rows, data, results = [("weights from", source)], {}, None
    if isinstance(source, Path):  # a checkpoint of ours, which may lie apart from its run's directory
        meta, log_dir = checkpoint.read_meta(source, digests=False), source.parent
        record, settings = read_record(log_dir), meta.get("identity", {})
        data = record["data_source"]
        rows = [("steps", f"{meta['step']:,}")]
        for key, value in data.items():
            rows.append((key, value if isinstance(value, str) else ", ".join(file["name"] for file in value)))
        rows += [(setting, settings[setting]) for setting in SETTINGS if setting in settings]
        curves = read_curves(log_dir)
        for stream, meaning in FIGURES.items():
            measured = [pair for pair in zip(*curves.get(stream, ((), ()))) if pair[0] <= meta["step"]]
            if measured:
                step, value = measured[-1]
                if stream == "hella":
                    count = record.get("hellaswag_examples")
                    meaning += f", {count} examples"
                    if count == VALIDATION_ROWS:  # less is no result of the benchmark
                        task, dataset = "text-generation", "Rowan/hellaswag"
                        results = [EvalResult(task, dataset, "HellaSwag", "acc_norm", value)]
                rows.append((meaning, f"{value:.4f} at step {step:,}"))
    front_matter = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"], eval_results=results,
        model_name=Path(name).name, datasets=[data["dataset"]] if "dataset" in data else None)
    c = model.config
    parameters = model.num_params() - (c.vocab_size - c.num_tokens) * c.n_embd
    return CARD.format(
        front_matter=front_matter.to_yaml(), name=name, parameters=parameters, n_layer=c.n_layer,
        n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, num_tokens=c.num_tokens,
        training="\n".join(f"| {what} | {value} |" for what, value in rows))
