"""Checkpoints of nanoGPT (ckpt.pt) and build-nanogpt (model_19072.pt): their weights, and nothing else.

Both are pickles. torch's weights_only loader builds only tensors and plain values out of them, and runs no
code that they name. Optimizer states are not read.
"""

import math
import re
import sys
import textwrap
import zipfile

import torch

from kit.files import UserError

SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
VOCABULARIES = (50257, 50304)  # GPT-2's, and the same padded, as both programs do
LLM_C = (20240326).to_bytes(4, "little")  # the first bytes of llm.c's model files
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DDP and torch.compile
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that older files hold


class SavedConfig:
    """Takes the place of the class GPTConfig that build-nanogpt pickles; it only holds the values."""


def read_gpt2(path):
    """The GPT-2 in a file of either program: (GPTConfig's arguments as a dict, state dict).

    Prints where the weights are from. Raises UserError if the file is anything else.
    """
    with open(path, "rb") as file:
        if file.read(4) == LLM_C:
            raise UserError(f"{path} is a model of llm.c: convert it with llm.c's dev/eval/export_hf.py, and "
                            "name the directory that it writes")
    unknown = f"{path} is not a checkpoint of this program, of nanoGPT or of build-nanogpt"
    if not zipfile.is_zipfile(path):  # as torch.save writes it
        raise UserError(f"{unknown}, or is truncated")
    try:
        with torch.serialization.safe_globals([(SavedConfig, "__main__.GPTConfig")]):
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if "model_args" in saved:
            program, config, gelu = "nanoGPT", saved["model_args"], "none"  # it uses nn.GELU()
            step, loss = saved.get("iter_num"), saved.get("best_val_loss")
        else:
            program, config, gelu = "build-nanogpt", vars(saved["config"]), "tanh"
            step, loss = saved.get("step"), saved.get("val_loss")
        shape = {name: config[name] for name in SHAPE}
        state = {WRAPPERS.sub("", name): tensor.to(torch.float32, copy=True)
                 for name, tensor in saved["model"].items() if not name.endswith(MASKS)}
        embedding = state["transformer.wte.weight"]
        tied = torch.equal(state.get("lm_head.weight", embedding), embedding)
        loss = math.nan if loss is None else float(loss)
    except Exception as error:  # torch raises many types
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 120, placeholder=' ...')}"
        if "weights_only" in str(error):  # torch's own message recommends running the pickle
            reason = ("it holds Python objects, which are not loaded; in the program that wrote it, save "
                      '{"model": state_dict, "config": vars(config)}')
        raise UserError(f"{unknown} ({reason})") from error
    if shape["vocab_size"] not in VOCABULARIES:
        raise UserError(f"{path} has {shape['vocab_size']} token ids, GPT-2's tokenizer has 50257: it needs "
                        "a meta.pkl, a pickle, which is never opened here; encode the text again with "
                        "fineweb_edu.py, and train on that")
    measured = f", validation loss {loss:.4f}" if abs(loss) < 1e3 else ""  # nanoGPT begins with 1e9
    exact = ", whose GELU is exact" if gelu == "none" else ""
    print(f"{path}: weights of {program}{exact}, step {step}{measured}; the optimizer's state is not read",
          file=sys.stderr)
    shape |= {"bias": "transformer.ln_f.bias" in state, "gelu": gelu, "tie_embeddings": tied}
    return shape, state
