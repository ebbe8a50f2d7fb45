"""Make test data: HellaSwag rows and files, small models, checkpoints, shards, texts in files, damage."""

import gzip
import io
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

import checkpoint
from checkpoint import Progress
from kit import files
from model import GPT, GPTConfig

# ------------------------------------------------------------------------------------------------ HellaSwag

ROW = {"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 1}


def hellaswag_rows(texts, count=40):
    """Rows made of words of the texts, with contexts and endings of different lengths."""
    words = " ".join(texts[:20]).split()
    return [
        {"ctx": " ".join(words[7 * i : 7 * i + 3 + i]), "label": i % 4,
         "endings": [" ".join(words[50 * i + j : 50 * i + 2 * j + 1 + i % 5]) for j in range(4)]}
        for i in range(count)
    ]


def official_rows(rows):
    """The rows in the format of the official file; every third context ends in spaces once it is cleaned."""
    return [{**row, "activity_label": f"Topic {i % 5}", "ctx_b": "",
             "ctx_a": row["ctx"] + " [step]" * (i % 3 == 0),
             "split_type": "indomain" if i % 4 else "zeroshot",
             "endings": [f"{row['endings'][0]} für 5 €", *row["endings"][1:]]}  # more bytes than characters
            for i, row in enumerate(rows)]


def official_rows_to_clean(texts):
    """Sixty rows in the official format, with all that lm-evaluation-harness cleans, cuts and counts."""
    words = " ".join(texts[:20]).split()
    rows = []
    for i in range(60):
        take = words[40 * i : 40 * i + 40]
        ctx_a = " ".join(take[: 3 + i % 12]) + "."
        ctx_b = " ".join(take[20 : 20 + i % 4]).upper() if i % 2 else ""  # capitalize() lowers the rest
        endings = [" ".join(take[24 + 4 * j : 25 + 4 * j + (i + j) % 4]) for j in range(4)]
        if i % 3 == 0:
            ctx_a = f"[header] How to {ctx_a} [title] {take[30]}  twice   [substeps]{take[31]}"
            endings[i % 4] = f" [step] {endings[i % 4]} [title] Größe: 5 €   [substeps] "
        if i % 5 == 0:  # once it is cleaned, the context ends in spaces
            ctx_a, ctx_b = ctx_a + " [step]", ""
        rows.append({"activity_label": f"Topic {take[0]}", "ctx_a": ctx_a, "ctx_b": ctx_b,
                     "ctx": f"{ctx_a} {ctx_b}".strip(), "endings": endings, "label": i % 4})
    return rows


# ------------------------------------------------------------------------------------------ texts in files

FINEWEB_COLUMNS = "id dump url file_path language language_score token_count score int_score".split()


def write_jsonl(path, rows):
    """One row a line; a row that is a string becomes {"text": row}. Returns the path."""
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet_bytes(rows):
    """A parquet file of these rows (dicts), as bytes."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def write_parquet(path, texts, row_group_size=20):
    """The texts in a file with the columns of FineWeb-Edu. Returns the path."""
    columns = {"text": texts, **{name: [name] * len(texts) for name in FINEWEB_COLUMNS}}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def write_text_column(path, texts, row_group_size=100):
    """A parquet file with nothing but a text column, given as a list or as a pyarrow array."""
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=row_group_size)
    return path


def write_all_formats(folder, texts):
    """The texts in four files, a quarter each: parquet, jsonl, jsonl.gz, and one document of plain text.

    Returns the paths and the documents that they hold.
    """
    quarter = len(texts) // 4
    paths = [folder / name for name in ("a.parquet", "b.jsonl", "c.jsonl.gz", "d.txt")]
    lines = [json.dumps({"text": text, "n": 1}) + "\n" for text in texts]
    write_parquet(paths[0], texts[:quarter])
    paths[1].write_text("".join(lines[quarter : 2 * quarter]) + "\n")
    with gzip.open(paths[2], "wt") as file:
        file.writelines(lines[2 * quarter : 3 * quarter])
    last = "\r\n".join(texts[3 * quarter :])
    paths[3].write_bytes(last.encode())
    return paths, [*texts[: 3 * quarter], last]


# --------------------------------------------------------------------------------------------------- shards


def write_shards(folder, prefix="x", **shards):
    """Shards without a manifest from ids: write_shards(folder, val_000000=ids, train_000001=ids)."""
    for name, ids in shards.items():
        np.save(folder / f"{prefix}_{name}.npy", np.asarray(ids, dtype=np.uint16))
    return folder


def write_raw(folder, **splits):
    """Shards as nanoGPT writes them, in a new folder: write_raw(folder, train=ids, val=ids)."""
    folder.mkdir()
    for split, ids in splits.items():
        np.asarray(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
    return folder


def copy_shards(shards, to, manifest=True):
    """Copy a directory of shards, on request as build-nanogpt leaves them: without any .json file."""
    return shutil.copytree(shards, to, ignore=shutil.ignore_patterns(".*", *([] if manifest else ["*.json"])))


# ------------------------------------------------------------------------------------ models, checkpoints


def small_gpt(block_size=16, vocab_size=512, n_layer=2, n_head=2, n_embd=16, seed=0, scale=1, **config):
    """A new GPT in eval mode. scale: of all parameters; with 4 and more the choices are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, **config)).eval()
    for parameter in model.parameters():
        parameter.data *= scale
    return model


def with_biases(model):
    """The model with random biases, which are zero in a new one: a forgotten bias shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def small_checkpoint(log_dir, model=None, step=2, tokenizer="gpt2", **more):
    """Save a model, by default a small new one, as the checkpoint of a step; return the checkpoint's path."""
    path = log_dir / f"ckpt_{step:06d}"
    checkpoint.save(path, small_gpt() if model is None else model, Progress(step), tokenizer, **more)
    return path


def write_meta(path, meta):
    """Write a meta.json with a valid digest of itself, as an attacker would."""
    if isinstance(meta, dict):
        body = {key: value for key, value in meta.items() if key != "self"}
        meta = {**body, "self": checkpoint.text_digest(body)}
    (path / "meta.json").write_text(json.dumps(meta))


def change_meta(path, change):
    """Call change() on the content of a meta.json, and make its digest valid again."""
    meta = json.loads((path / "meta.json").read_text())
    change(meta)
    write_meta(path, meta)


def change_listed_file(path, content):
    """Replace a file of a checkpoint, and its size and digest in meta.json."""
    path.write_bytes(content)
    entry = {"bytes": path.stat().st_size, "digest": files.digest(path)}
    change_meta(path.parent, lambda meta: meta["files"].update({path.name: entry}))


# --------------------------------------------------------------------------------------------------- damage


def damage(path, how):
    """Damage a file: "one byte flipped", "truncated", "empty" or "missing"."""
    content = bytearray(path.read_bytes())
    path.unlink()  # never write through to a hard link or a memory map
    if how == "one byte flipped":
        content[len(content) // 2] ^= 1
    if how != "missing":
        path.write_bytes({"truncated": content[:-7], "empty": b""}.get(how, content))
