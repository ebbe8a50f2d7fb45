"""What bench.py compares this project with: other programs' models, and the tutorials' way to make shards."""

import ast
import importlib.util
import multiprocessing
import os
import random
import sys
import sysconfig
import types
from pathlib import Path

from kit.files import UserError

ADAMW = dict(lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)


def load(peer, device, directory=None):
    """A peer's 124M with random weights, and how its own training loop uses it.

    peer: "transformers", "transformers compiled", "nanoGPT" or "build-nanogpt". directory: a checkout of one
    of the last two. Returns (model, function of (model, x, y) that gives the loss, optimizer, whether its
    loop compiles the model).
    """
    import torch

    if peer in ("transformers", "transformers compiled"):
        from transformers import GPT2Config, GPT2LMHeadModel

        no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(GPT2Config(**no_dropout)).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)  # the default of its Trainer
        # it shifts the labels itself, so its loss has T - 1 targets
        return model, lambda m, x, y: m(x, labels=x).loss, optimizer, peer.endswith("compiled")
    if peer == "nanoGPT":
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(directory, "model.py"))
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        model = theirs.GPT(theirs.GPTConfig(dropout=0.0, bias=False)).to(device)  # as in its train.py
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
        return model, lambda m, x, y: m(x, y)[1], optimizer, True
    assert peer == "build-nanogpt", peer
    tree = ast.parse(Path(directory, "train_gpt2.py").read_text())
    definitions = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)  # the rest of the file trains
    tree.body = [node for node in tree.body if isinstance(node, definitions)]
    theirs = types.ModuleType("build_nanogpt")
    sys.modules["build_nanogpt"] = theirs
    sys.path.append(directory)
    exec(compile(tree, "train_gpt2.py", "exec"), theirs.__dict__)
    theirs.master_process = False
    model = theirs.GPT(theirs.GPTConfig(vocab_size=50304)).to(device)
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, device_type=device)
    return model, lambda m, x, y: m(x, y)[1], optimizer, False


def tutorial_tokenize(text):
    """The ids of a document, as the tutorials make them."""
    import numpy as np
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(text)])
    assert (ids < 2**16).all()
    return ids.astype(np.uint16)


def tutorial_shards(files, directory, shard_size=10**8):
    """Make shards as the tutorials do: Pool.imap over the documents, ids copied into the shard's array."""
    import numpy as np
    from datasets import load_dataset

    dataset = load_dataset("parquet", data_files=files, split="train", cache_dir=f"{directory}/cache")
    shard, filled, count = np.empty(shard_size, np.uint16), 0, 0
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for ids in pool.imap(tutorial_tokenize, dataset["text"], chunksize=16):
            while filled + len(ids) > shard_size:
                shard[filled:], ids = ids[: shard_size - filled], ids[shard_size - filled :]
                np.save(f"{directory}/shard_{count:06d}", shard)
                filled, count = 0, count + 1
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
    np.save(f"{directory}/shard_{count:06d}", shard[:filled])


def package_texts(at_least):
    """Distinct text files of the Python installation, shuffled with a fixed seed: real text on any machine.

    Raises UserError if they have fewer than `at_least` characters.
    """
    texts, size = {}, 0
    for place in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[place]).rglob("*")):
            if path.suffix in (".py", ".pyi", ".h", ".txt", ".md", ".rst", ".json") and path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")[: 2**20]
                size += len(text) if text not in texts else 0
                texts[text] = None
    if size < at_least:
        raise UserError(f"--input: the installed packages have {size:,} characters of text, "
                        f"{at_least:,} are needed: name .parquet files")
    texts = list(texts)
    random.Random(0).shuffle(texts)
    return texts
