"""A dataset that needs no network: the documentation that every Python installation carries.

The docstrings of the standard library and the topics of its language reference, some 2 MB of plain English,
with a tokenizer of 2,048 ids learned on them. `python train_gpt2.py @configs/demo.txt` makes it on first use.
"""

import ast
import json
import platform
import random
import sysconfig
from pathlib import Path

from files import UserError, atomic_write, locked
from fineweb_edu import prepare, read_manifest
from tokenizer import train

SOURCE = {"documentation of": f"Python {platform.python_version()}"}


def documents():
    """The texts, each once, shuffled by a fixed seed; nothing is imported but the reference's topics."""
    from pydoc_data.topics import topics

    # a dict keeps order and drops doubles
    found = dict.fromkeys(topics[name].strip() for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.relative_to(library).parts):
            continue
        try:
            nodes = [ast.parse(path.read_bytes())]
        except (SyntaxError, ValueError, OSError):  # templates that are no Python yet
            continue
        while nodes:
            node = nodes.pop()
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found[ast.get_docstring(node) or ""] = None
                nodes += reversed(node.body)
    texts = [text for text in found if text]
    random.Random(1337).shuffle(texts)
    return texts


def prepare_demo(data_dir):
    """Write the documentation as shards, and a tokenizer learned on it, to data_dir unless they are there."""
    manifest = read_manifest(data_dir)
    if manifest and manifest["source"] != SOURCE:
        raise UserError(f"--data_dir {data_dir} holds other data: leave --demo_data out, or name another one")
    if manifest and manifest["complete"]:
        return
    print(f"gathering Python's own documentation into {data_dir} ...", flush=True)
    texts = documents()
    if sum(map(len, texts)) < 10**6:
        raise UserError("--demo_data: this Python carries hardly any documentation; "
                        "install its full standard library")
    sources = Path(data_dir) / "sources"
    files, tokenizer = [str(sources / "python_docs.jsonl")], str(sources / "tokenizer.json")
    with locked(data_dir):
        sources.mkdir(exist_ok=True)
        with atomic_write(files[0]) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        train(texts, 2048, tokenizer)
        prepare(files, data_dir, SOURCE, tokenizer=tokenizer)
