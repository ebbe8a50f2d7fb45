"""GPT-2 in Hugging Face's format: load from the hub or a directory, export, upload.

AutoModelForCausalLM, AutoTokenizer, pipeline("text-generation") and lm-evaluation-harness load an exported
directory without a network. Every -m here does too, unless the export is a Llama or Qwen3 (kit/llama.py).
Importing this file does not import transformers.
"""

import functools
import json
import re
import shutil
import sys
from pathlib import Path

import torch

import tokenizer
from kit import llama, variants
from kit.files import UserError, first_line, share_tensors, temporary_path
from kit.published import HELLASWAG_EXAMPLES
from kit.recipe import TRAINING, VARIANTS
from kit.record import read_curves, read_record
from kit.sources import HUB_TIMEOUT

CARD = """\
---
{front_matter}
---
# {name}

A GPT-2{variants} of {parameters:,} parameters: {n_layer} layers, {n_head} heads, width {n_embd}, a context of
{block_size} tokens, {num_tokens:,} token ids.

```python
from transformers import pipeline

generate = pipeline("text-generation", "{name}")
print(generate({prompt}, max_new_tokens=50)[0]["generated_text"])
```

| training | |
|---|---|
{training}

The model continues text in the style of its training data. What it writes may be false, and it repeats the
biases of that data.
"""
# the streams of log.txt that a model card reports
RESULTS = {"train": "training loss, nats per token", "val": "validation loss, nats per token",
           "val_bpb": "validation loss, bits per byte", "hella": "HellaSwag acc_norm, completion protocol"}


# the weights that are downloaded from the hub, besides .json, .txt and .model files
WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")  # the first that exists
# a directory with any of these has a tokenizer
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*_tokens*.json")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)  # name, or owner/name
# remedies for a model that is not found
LOCAL = ("name a log directory (python train_gpt2.py writes one), a checkpoint in it, or a Hugging Face "
         "directory")
MODELS = f"{LOCAL}, or gpt2, ..., gpt2-xl, or another GPT-2 of the hub (OWNER/NAME)"
ADAPTER = ("the adapter of a fine-tune (PEFT, for example LoRA), not a whole model: merge it with PEFT's "
           "merge_and_unload(), save the result in another directory, and name that")
# how Hugging Face names the GELUs of GPTConfig
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


def locate(source):
    """The local directory of the model that `source` names, a directory or a name on the hub.

    Raises UserError.
    """
    return Path(source) if Path(source).is_dir() else download(source)


@functools.cache
def download(name):
    """The local directory of a model of the hub, which is downloaded once. Raises UserError."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=HUB_TIMEOUT).siblings]
    except RepositoryNotFoundError as error:
        raise UserError(f"{name} does not exist here, and the Hugging Face hub has no public model of that "
                        f"name: {MODELS}") from error
    except Exception as error:  # the hub's library raises many types
        config = try_to_load_from_cache(name, "config.json")
        if isinstance(config, str):
            return Path(config).parent
        raise UserError(f"{name} does not exist here or in the cache of the Hugging Face hub, which can't be "
                        f"reached over the network ({first_line(error)}): {LOCAL}") from error
    weights = [[file for file in files if re.fullmatch(pattern, file)] for pattern in WEIGHTS]
    texts = [file for file in files if "/" not in file and file.endswith((".json", ".txt", ".model"))]
    try:
        return Path(snapshot_download(name, allow_patterns=texts + (weights[0] or weights[1])))
    except Exception as error:
        raise UserError(f"{name} can't be downloaded from the Hugging Face hub ({first_line(error)}): repeat "
                        "the command; complete files are not downloaded again") from error


def tokenizer_of(source):
    """The argument of `get_tokenizer` for a model: its directory, or "gpt2" if that has no tokenizer."""
    directory = locate(source)
    if any(file for pattern in TOKENIZER_FILES for file in directory.glob(pattern)):
        return str(directory)
    if directory != Path(source):  # on the hub, every GPT-2 has one
        raise UserError(f"{source}: its tokenizer is not in the cache of the Hugging Face hub; load the "
                        "model once with a network")
    ids = tokenizer.read_json(directory / "config.json").get("vocab_size", 50257)
    if ids < 50257:
        raise UserError(f"{source} has no tokenizer, and {ids} token ids, too few for GPT-2's: put its "
                        "tokenizer.json into that directory")
    print(f"{source} has no tokenizer: GPT-2's is used", file=sys.stderr)
    return "gpt2"


def read_gpt2(source):
    """The GPT-2 that `source` names on the hub or on disk: (GPTConfig's arguments as a dict, state dict).

    Raises UserError if it can't be found or downloaded, or computes something else than this GPT would.
    """
    directory = locate(source)  # before the import, which takes seconds
    if (directory / "adapter_config.json").is_file():
        raise UserError(f"{source} is {ADAPTER}")
    from transformers import AutoConfig, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of is checked below
    config = AutoConfig.from_pretrained(directory)
    if config.model_type != "gpt2":
        raise UserError(f"{source} is a {config.model_type}, not a GPT-2: run it with transformers")
    as_published = dict(
        activation_function=tuple(GELUS), layer_norm_epsilon=(1e-5,),
        scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,), n_inner=(None, 4 * config.n_embd),
    )
    for name, expected in as_published.items():
        if getattr(config, name) not in expected:
            raise UserError(f"{source} has {name}={getattr(config, name)!r}, GPT-2 has {expected[0]!r}: run "
                            "this model with transformers")

    # without its tokenizer, each row counts as a token, as in transformers
    shape = dict(block_size=config.n_positions, vocab_size=config.vocab_size, num_tokens=config.vocab_size,
                 n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                 gelu=GELUS[config.activation_function])
    theirs, info = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    if any(".lora_" in name for name in info["unexpected_keys"]):
        raise UserError(f"{source} is {ADAPTER}")
    # transformers fills in missing tensors with random numbers, and leaves out layers beyond n_layer
    missing = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])} - {"lm_head.weight"})
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing[:3])}, or has it in a different shape: "
                        "download or export it again")
    layers = re.compile(r"\bh\.\d+\.(ln_|mlp\.|attn\.c_)")
    extra = sorted(name for name in info["unexpected_keys"] if layers.search(name))
    if extra:
        raise UserError(f"{source} has {extra[0]}, but n_layer={config.n_layer} in its config.json")
    # compared, because the config does not decide it: transformers ties the two only if the files hold one of
    # them, or equal ones
    shape["tie_embeddings"] = torch.equal(theirs.lm_head.weight, theirs.transformer.wte.weight)
    return shape, {name: convert(name, tensor) for name, tensor in theirs.state_dict().items()}


def write(model, directory, end_of_text=None, padding=None):
    """Write a GPT as a directory for `AutoModelForCausalLM.from_pretrained`, its vocabulary without padding.

    end_of_text: an id (default: the last one, as in GPT-2). padding: an id (default: end_of_text). Raises
    UserError if transformers has no class that computes what the model does.
    """
    check_exportable(model.config)
    end_of_text = model.config.num_tokens - 1 if end_of_text is None else end_of_text
    write_as = llama.write if llama.fits(model.config) else write_gpt2
    write_as(model, directory, end_of_text, end_of_text if padding is None else padding)


def check_exportable(config):
    """Raise UserError if transformers has no class that computes what a GPT with this GPTConfig does."""
    expressed = llama.EXPRESSED if llama.fits(config) else ("tie_embeddings",)
    rest = [text for name, text in variants.beyond_gpt2(config).items() if name not in expressed]
    if rest:
        raise UserError(f"a model with {', '.join(rest)} can't be exported: transformers has no class "
                        "for it; sample.py and hellaswag.py run it")


def write_gpt2(model, directory, end_of_text, padding):
    """Write a GPT without variants as a directory for `GPT2LMHeadModel.from_pretrained`; ids as in `write`.

    That class always has biases: for a model without (bias=False) they are zeros.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.num_tokens, n_positions=c.block_size, n_ctx=c.block_size,  # n_ctx is for llama.cpp
        n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        activation_function=next(name for name, gelu in GELUS.items() if gelu == c.gelu),
        tie_word_embeddings=c.tie_embeddings,
        bos_token_id=end_of_text, eos_token_id=end_of_text,
    ))
    state = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()
             if name.endswith(".bias")}
    state |= {name: convert(name, tensor.detach().cpu()) for name, tensor in model.state_to_save().items()}
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][: c.num_tokens]
    theirs.load_state_dict(state)
    # without it, generate() would use <|endoftext|>, with a warning
    theirs.generation_config.pad_token_id = padding
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
        ids = encoding.eot_token, encoding.encode_single_token(tokenizer.padding_token(encoding))
        model.save_pretrained(temporary, *ids)
        tokenizer.save_pretrained(encoding, temporary, model.config.block_size)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        share_tensors(temporary)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def upload(directory, repository):
    """Upload an exported directory to a repository of the hub; return the commit's address.

    Raises UserError.
    """
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
    away from its run's directory. A card may be published: it holds no path of this machine.
    """
    from huggingface_hub import EvalResult, ModelCardData

    origin = Path(source).name if Path(source).exists() else source
    rows, data, evaluations, prompt = [("weights from", origin)], {}, None, None
    if meta:
        record, settings = read_record(log_dir), meta.get("identity", {})
        data, prompt = dict(record["data_source"]), record["flags"].get("sample_prompt")
        if "dataset" in data and Path(data["dataset"]).exists():  # a local one
            data["files of"] = Path(data.pop("dataset")).name
        rows = [("steps", f"{meta['step']:,}")]
        for key, value in data.items():
            rows.append((key, value if isinstance(value, str) else file_names(value)))
        rows += [(setting, settings[setting]) for setting in TRAINING if setting in settings]
        rows += [(setting, settings[setting]) for setting, default in VARIANTS.items()
                 if settings.get(setting, default) != default]
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
        library_name="transformers", pipeline_tag="text-generation", eval_results=evaluations,
        tags=[] if llama.fits(model.config) else ["gpt2"],
        model_name=Path(name).name, datasets=[data["dataset"]] if "dataset" in data else None)
    c = model.config
    parameters = model.num_params() - (c.vocab_size - c.num_tokens) * c.n_embd
    beyond = variants.beyond_gpt2(c).values()
    return CARD.format(
        variants=f" with {', '.join(beyond)}" if beyond else "",
        prompt=json.dumps(prompt or "Hello, I'm a language model,", ensure_ascii=False),  # valid Python
        front_matter=front_matter.to_yaml(), name=name, parameters=parameters, n_layer=c.n_layer,
        n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, num_tokens=c.num_tokens,
        training="\n".join(f"| {what} | {table_cell(value)} |" for what, value in rows))


def file_names(files):
    """Up to three names of a list of files, and how many there are."""
    names = ", ".join(Path(file["name"]).name for file in files[:3])
    return names if len(files) <= 3 else f"{len(files):,} files: {names}, ..."


def table_cell(value):
    """A value as one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
