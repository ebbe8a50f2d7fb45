"""GPT-2 in Hugging Face's format: weights in and out, model card, upload.

AutoModelForCausalLM, AutoTokenizer, pipeline("text-generation") and lm-evaluation-harness load an exported
directory without a network, and so does every -m here. Importing this file does not import transformers.
"""

import shutil
from pathlib import Path

import torch

import tokenizer
from kit.files import UserError, first_line, share_tensors, temporary_path
from kit.published import HELLASWAG_EXAMPLES
from kit.recipe import TRAINING
from kit.record import read_curves, read_record

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
# the streams of log.txt that a model card reports
RESULTS = {"train": "training loss, nats per token", "val": "validation loss, nats per token",
           "val_bpb": "validation loss, bits per byte", "hella": "HellaSwag acc_norm, completion protocol"}


def read_gpt2(source):
    """The GPT-2 that `source` names on the hub or on disk: (GPTConfig's arguments as a dict, state dict).

    Raises ValueError if it differs from GPT-2 as published, OSError if it can't be found or downloaded.
    """
    from transformers import AutoConfig, GPT2LMHeadModel

    config = AutoConfig.from_pretrained(source)
    if config.model_type != "gpt2":
        raise ValueError(f"{source} is a {config.model_type}, not a GPT-2")
    as_published = dict(
        activation_function=("gelu_new", "gelu_pytorch_tanh"), layer_norm_epsilon=(1e-5,),
        tie_word_embeddings=(True,), scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,), n_inner=(None, 4 * config.n_embd),
    )
    for name, expected in as_published.items():
        if getattr(config, name) not in expected:
            raise ValueError(f"{source} has {name}={getattr(config, name)!r}, GPT-2 has {expected[0]!r}")

    shape = dict(block_size=config.n_positions, vocab_size=config.vocab_size, n_layer=config.n_layer,
                 n_head=config.n_head, n_embd=config.n_embd)
    theirs, info = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    # transformers fills in missing tensors with random numbers
    missing = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])} - {"lm_head.weight"})
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing[:3])}, or has it in another shape")
    return shape, {name: convert(name, tensor) for name, tensor in theirs.state_dict().items()}


def write_gpt2(model, directory):
    """Write a GPT as a directory for `GPT2LMHeadModel.from_pretrained`, its vocabulary without padding.

    That class always has biases: for a model without (bias=False) they are zeros.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    end_of_text = c.num_tokens - 1
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.num_tokens, n_positions=c.block_size,
        n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        bos_token_id=end_of_text, eos_token_id=end_of_text,
    ))
    state = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()
             if name.endswith(".bias")}
    state |= {name: convert(name, tensor.detach().cpu()) for name, tensor in model.state_to_save().items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: c.num_tokens]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state)
    theirs.generation_config.pad_token_id = end_of_text  # generate() would take it too, with a warning
    theirs.save_pretrained(directory)


def convert(name, tensor):
    """A tensor of Hugging Face's GPT-2 as our model stores it, and the reverse.

    OpenAI's Conv1D is a Linear with a transposed weight. attn.c_proj is square: its shape would not tell.
    """
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return tensor.t().contiguous() if name.endswith(conv1d) else tensor


def check_target(directory, push_to_hub=None):
    """Raise UserError if an export could not be written to a directory or uploaded."""
    if Path(directory).exists():
        raise UserError(f"{directory} exists: name a new directory")
    if push_to_hub:
        from huggingface_hub import get_token

        if get_token() is None:
            raise UserError("--push_to_hub: log in first, with `hf auth login` or the variable HF_TOKEN")


def write_directory(directory, model, encoding, card):
    """Write a model, its tokenizer (a tiktoken.Encoding) and its model card: completely or not at all."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory = Path(directory)
    temporary = temporary_path(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(encoding, temporary, model.config.block_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        share_tensors(temporary)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def upload(directory, repository):
    """Upload an exported directory to a repository of the hub; return the commit's address. UserError."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        return HfApi().upload_folder(repo_id=repository, folder_path=directory).commit_url
    except Exception as error:  # the hub's library raises many types
        raise UserError(f"--push_to_hub {repository}: {first_line(error)}; "
                        f"the export is complete in {directory}") from error


def model_card(model, name, source, meta=None, log_dir=None):
    """The README.md of a model for the hub: its shape, and what its run recorded up to its step.

    source: where the weights are from. meta and log_dir: of a checkpoint of ours, which may have been moved
    away from its run's directory.
    """
    from huggingface_hub import EvalResult, ModelCardData

    rows, data, evaluations = [("weights from", source)], {}, None
    if meta:
        record, settings = read_record(log_dir), meta.get("identity", {})
        data = record["data_source"]
        rows = [("steps", f"{meta['step']:,}")]
        for key, value in data.items():
            rows.append((key, value if isinstance(value, str) else ", ".join(file["name"] for file in value)))
        rows += [(setting, settings[setting]) for setting in TRAINING if setting in settings]
        curves = read_curves(log_dir)
        for stream, meaning in RESULTS.items():
            measured = [pair for pair in zip(*curves.get(stream, ((), ()))) if pair[0] <= meta["step"]]
            if not measured:
                continue
            step, value = measured[-1]
            if stream == "hella":
                count = record.get("hellaswag_examples")
                meaning += f", {count} examples"
                if count == HELLASWAG_EXAMPLES:  # fewer would be no result of the benchmark
                    task, dataset = "text-generation", "Rowan/hellaswag"
                    evaluations = [EvalResult(task, dataset, "HellaSwag", "acc_norm", value)]
            rows.append((meaning, f"{value:.4f} at step {step:,}"))
    front_matter = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"], eval_results=evaluations,
        model_name=Path(name).name, datasets=[data["dataset"]] if "dataset" in data else None)
    c = model.config
    parameters = model.num_params() - (c.vocab_size - c.num_tokens) * c.n_embd
    return CARD.format(
        front_matter=front_matter.to_yaml(), name=name, parameters=parameters, n_layer=c.n_layer,
        n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, num_tokens=c.num_tokens,
        training="\n".join(f"| {what} | {value} |" for what, value in rows))
