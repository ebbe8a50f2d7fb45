"""Checkpoints: the one owner of their format, which holds no pickle.

    python checkpoint.py list log        # what a run has saved: step, validation loss, size
    python checkpoint.py verify log      # the same, and whether every byte is as it was written
    python checkpoint.py export log DIR  # the newest as a Hugging Face directory (export.py)

    LOG_DIR/ckpt_000250/      the newest few, each with all that a run needs to go on
        model.safetensors       weights, fp32, under GPT-2's names
        optimizer.safetensors   the optimizer's tensors
        tokenizer.json          the tokenizer, if it is not GPT-2's
        meta.json               step, config, the run's identity, and a digest of each file and of itself
    LOG_DIR/best/             the same without the optimizer: the lowest validation loss so far

A checkpoint named N has consumed exactly the batches 0..N-1. It is written beside its place and renamed, so
that a name stands for a whole checkpoint; every load checks the digests.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Show the checkpoints of a run (exit status 1: one is damaged), or export one."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("list", "by their sizes"), ("verify", "by their digests: every byte is read")):
        command = commands.add_parser(name, help=f"show the checkpoints of a run, checked {what}")
        command.add_argument("directory", metavar="DIR", help="a run's log directory, or one checkpoint")
    command = commands.add_parser("export", help="write a model as a Hugging Face directory, and upload it")
    command.add_argument("source", metavar="CHECKPOINT_OR_LOG_DIR", help="what -m of sample.py takes")
    command.add_argument("directory", metavar="DIR", help="the new directory")
    command.add_argument("--push_to_hub", metavar="USER/NAME", help="a repository of the Hugging Face hub")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from files import UserError, beside, digest, first_line, naming, run, sync  # noqa: E402
from model import GPT, GPT2_SIZES, GPTConfig  # noqa: E402
from tokenizer import get_tokenizer  # noqa: E402

FORMAT = "gpt2 checkpoint, version 1"
NAME = re.compile(r"ckpt_(\d{6,})$")


# what a run and a person read of a meta.json, if it is there
KINDS = dict(step=int, config=dict, files=dict, identity=dict, val_loss=(float, type(None)), best_val=float,
             dtype=str, scaler=dict, skipped=int)
REQUIRED = ("step", "config", "files")
SCALER = dict(scale=float, growth_factor=float, backoff_factor=float, growth_interval=int,
              _growth_tracker=int)  # of a GradScaler, for fp16


class DamagedCheckpoint(UserError):
    """A checkpoint that is not as it was written."""


def save(path, step, model, tokenizer="gpt2", optimizer=None, **meta):
    """Write a checkpoint of model (and optimizer) as the directory `path`: it appears complete or not at all.

    tokenizer: "gpt2" or the path of a tokenizer.json. meta: plain values for meta.json. Raises OSError where
    it can't be written, as on a full disk.
    """
    path = Path(path)
    temporary, replaced = beside(path), beside(path.with_name(path.name + ".old"))
    for leftover in (temporary, replaced):
        discard(leftover)
    try:
        temporary.mkdir(parents=True)
        save_file(contiguous(model.state_to_save()), temporary / "model.safetensors")
        if optimizer is not None:
            state = optimizer.state_dict()["state"]
            tensors = {f"{i}.{key}": value for i, values in state.items() for key, value in values.items()}
            save_file(contiguous(tensors), temporary / "optimizer.safetensors")
        if tokenizer != "gpt2":
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        files = {file.name: {"bytes": file.stat().st_size, "digest": digest(file)}
                 for file in temporary.iterdir()}
        body = dict(format=FORMAT, step=step, config=asdict(model.config), files=files, **meta)
        text = json.dumps({**body, "self": text_digest(body)}, indent=1)
        with naming(path):
            (temporary / "meta.json").write_text(text, encoding="utf-8")
        share(temporary)
        for written in (*temporary.iterdir(), temporary):
            sync(written)
        if path.exists():  # a damaged one, or the last best: no directory can be renamed over it
            os.rename(path, replaced)
        os.rename(temporary, path)
        sync(path.parent)
        discard(replaced)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written ({error})") from error
    finally:
        discard(temporary)


def discard(path):
    """Remove a directory, if it is there, or at least its name: half a checkpoint never stands under it."""
    garbage = path.with_name(f".{time.time_ns()}.tmp")
    if path.exists():
        with contextlib.suppress(OSError):
            os.rename(path, garbage)
        shutil.rmtree(garbage, ignore_errors=True)


def share(directory):
    """Let those read the tensors of a directory who can read its .json files.

    safetensors 0.8 lets their owner alone: https://github.com/safetensors/safetensors/issues/782
    """
    for path in directory.glob("*.safetensors"):
        shutil.copymode(next(directory.glob("*.json")), path)


def contiguous(tensors):
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def text_digest(body):
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def read_meta(path, digests=True):
    """A checkpoint's meta.json, once its files are proved whole (by their sizes alone without digests).

    Raises DamagedCheckpoint with the reason.
    """
    path = Path(path)
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("self") != text_digest(meta):
            raise DamagedCheckpoint(f"{path}/meta.json is damaged: its digest is not the one it states")
        if meta["format"] != FORMAT:
            raise DamagedCheckpoint(f"{path} is of the format {meta['format']!r}, this is {FORMAT!r}")
        number = NAME.match(path.name)
        if (not all(isinstance(meta.get(key), KINDS[key]) for key in KINDS if key in meta or key in REQUIRED)
                or "model.safetensors" not in meta["files"]
                or not all({"bytes", "digest"} <= entry.keys() for entry in meta["files"].values())
                or meta.get("scaler") and not all(isinstance(meta["scaler"].get(key), kind)
                                                  for key, kind in SCALER.items())
                or number and int(number[1]) != meta["step"]):
            raise DamagedCheckpoint(f"{path}/meta.json does not describe this checkpoint")
        for name, expected in meta["files"].items():
            file = path / name
            if not file.is_file():
                raise DamagedCheckpoint(f"{file} is missing")
            if file.stat().st_size != expected["bytes"]:
                raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, "
                                        f"{expected['bytes']} were written")
            if digests and digest(file) != expected["digest"]:
                raise DamagedCheckpoint(f"{file} is damaged: its digest is not the one in meta.json")
    except DamagedCheckpoint:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not a whole checkpoint: it can't be read ({error!r})") from error
    return meta


def load(path, device="cpu"):
    """Read a checkpoint: (model in eval mode on `device`, meta). Raises DamagedCheckpoint."""
    meta = read_meta(path)
    try:
        state = load_file(Path(path) / "model.safetensors", device=device)
        if any(tensor.dtype != torch.float32 for tensor in state.values()):
            raise ValueError("they are not all float32")
        return GPT.from_state(GPTConfig(**meta["config"]), state), meta
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DamagedCheckpoint(f"{path}: the weights do not fit the model ({reason})") from error


def load_optimizer(path, optimizer):
    """Put a checkpoint's optimizer tensors back; the settings (learning rate, decay) stay the run's own.

    Raises DamagedCheckpoint: AdamW's kernel does not look whether a tensor is as long as its parameter.
    """
    try:
        tensors = load_file(Path(path) / "optimizer.safetensors")
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path}: the optimizer's tensors can't be read ({error})") from error
    params = [p for group in optimizer.param_groups for p in group["params"]]
    fitting = {f"{i}.{key}": (shape, torch.float32) for i, p in enumerate(params)
               for key, shape in (("step", torch.Size()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape))}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found and found != fitting:  # none: of a run that has made no step
        raise DamagedCheckpoint(f"{path}: the optimizer's tensors do not fit the model")
    state = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def numbered(log_dir):
    """The numbered checkpoints of a log directory, the newest first."""
    found = [(int(NAME.match(path.name)[1]), path)
             for path in Path(log_dir).glob("ckpt_*") if NAME.match(path.name)]
    return [path for _, path in sorted(found, reverse=True)]


def latest(log_dir, to_resume=False):
    """The newest valid checkpoint of a log directory, or None; and why each newer one was passed over.

    to_resume: only one with an optimizer will do.
    """
    skipped = []
    for path in numbered(log_dir):
        try:
            if "optimizer.safetensors" not in read_meta(path)["files"] and to_resume:
                raise DamagedCheckpoint(f"{path} has no optimizer.safetensors: a run can't go on from it")
            return path, skipped
        except DamagedCheckpoint as error:
            skipped.append(str(error))
    return None, skipped


def prune(log_dir, keep, step, keep_every=0):
    """Remove all but the newest `keep` checkpoints up to `step`; a damaged one beyond it will be replaced.

    The multiples of keep_every stay too. What can't be removed is left where it is.
    """
    steps = {path: int(NAME.match(path.name)[1]) for path in numbered(log_dir)}
    for path in [path for path in steps if steps[path] <= step][keep:]:
        if not keep_every or steps[path] % keep_every:
            discard(path)


def clean(log_dir):
    """Tidy up after a crash in mid-save: put back what was about to be replaced, remove the unfinished."""
    for replaced in Path(log_dir).glob(".*.old.tmp"):
        path = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old.tmp"))
        if not path.exists():
            os.rename(replaced, path)
    for leftover in Path(log_dir).glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def resolve(source):
    """What `-m SOURCE` means: "gpt2..." or a Hugging Face directory (str), or one checkpoint (Path).

    A run's log directory stands for its newest valid checkpoint. Raises UserError if it is none of these.
    """
    path = Path(source)
    if str(source) in GPT2_SIZES or (path / "config.json").is_file():
        return str(source)
    if (path / "meta.json").is_file() or NAME.match(path.name):
        return path
    if path.is_dir():
        newest, skipped = latest(path)
        if newest is not None:
            for reason in skipped:
                print(f"passed over: {reason}", file=sys.stderr)
            return newest
        if (path / "best").is_dir() and not skipped:
            return path / "best"
        raise UserError(f"{source} holds no valid checkpoint" + "".join(f"; {reason}" for reason in skipped)
                        + f": python train_gpt2.py --log_dir {source} trains one; gpt2 is another model")
    kind = "is not a checkpoint directory" if path.exists() else "does not exist"
    raise UserError(f"{source} {kind}: name one of {', '.join(GPT2_SIZES)}, a log directory "
                    "(python train_gpt2.py makes one), a checkpoint in it, or a Hugging Face directory")


def load_model(source, device="cpu"):
    """The GPT that `source` names (see `resolve`), in eval mode on `device`. Raises UserError."""
    source = resolve(source)
    if isinstance(source, Path):
        return load(source, device)[0]
    try:
        return GPT.from_pretrained(source).to(device)
    except Exception as error:  # from a torn file to a pickle that is refused: transformers raises all kinds
        reason = first_line(error)
        if "weights_only" in str(error):  # torch's own words recommend to run it
            reason = "its weights are a pickle of more than tensors, which may be code of a stranger's"
        raise UserError(f"{source} can't be loaded ({reason}); without network, give -m a local directory"
                        ) from error


def tokenizer_path(source):
    """What `get_tokenizer` takes for the model `source`: the tokenizer.json beside its weights, or "gpt2"."""
    path = Path(resolve(source)) / "tokenizer.json"
    return str(path) if path.is_file() else "gpt2"


def load_model_and_tokenizer(source, device="cpu"):
    """The GPT that `source` names, as `load_model`, and its tiktoken.Encoding. Raises UserError."""
    source = resolve(source)
    model, tokenizer = load_model(source, device), get_tokenizer(tokenizer_path(source))
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"{source}: its tokenizer has {tokenizer.n_vocab} ids, the model "
                        f"{model.config.vocab_size}; put the tokenizer.json it was trained with beside it")
    model.config.num_tokens = tokenizer.n_vocab  # a Hugging Face config doesn't tell tokens from padding
    return model, tokenizer


def pick_device(name=None):
    """The device of that name, or the best torch finds here: "cuda", "mps" or "cpu". Raises UserError."""
    available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    name = name or available[0]
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in available or (":" in name and index not in map(str, range(count))):
        raise UserError(f"--device {name}: not on this machine, which has {', '.join(available)}")
    return name


def to_device(tensor, device):
    """A tensor of the CPU on a device; a GPU takes it from pinned memory, behind the work it has to do."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def main(args):
    if args.command == "export":
        from export import export  # transformers takes a second to import

        return export(args.source, args.directory, args.push_to_hub)
    directory = Path(args.directory)
    if (directory / "meta.json").is_file() or NAME.match(directory.name) or directory.name == "best":
        paths = [directory]
    else:
        paths = [*reversed(numbered(directory)), directory / "best"]
    paths = [path for path in paths if path.is_dir()]
    if not paths:
        raise UserError(f"{directory} holds no checkpoint")
    verify, damaged = args.command == "verify", 0
    for path in paths:
        try:
            meta = read_meta(path, digests=verify)
            size = sum(file["bytes"] for file in meta["files"].values()) / 1e6
            loss = "not evaluated" if meta.get("val_loss") is None else f"val loss {meta['val_loss']:.4f}"
            print(f"{path}: step {meta['step']}, {loss}, {size:,.1f} MB" + (", as written" if verify else ""))
        except (DamagedCheckpoint, OSError) as error:  # OSError: a run has just removed it
            damaged += 1
            print(f"{path}: damaged or gone: {error}")
    if damaged:
        sys.exit(1)


if __name__ == "__main__":
    run(main, args)
