"""Checkpoints: their format, and the command that lists, verifies and exports them. No pickle is involved.

    python checkpoint.py list log        # what a run has saved: step, validation loss, size
    python checkpoint.py verify log      # the same, and check every byte
    python checkpoint.py export log DIR  # write the newest as a Hugging Face directory

    LOG_DIR/ckpt_000250/      the newest few, each with everything that a run needs to continue
        model.safetensors       weights, fp32, under GPT-2's names
        optimizer.safetensors   the optimizer's tensors
        tokenizer.json          the tokenizer, unless it is GPT-2's
        meta.json               step, config, the run's identity, and a digest of each file and of itself
    LOG_DIR/best/             the same without the optimizer: the lowest validation loss so far

The checkpoint named N is the state after exactly the batches 0..N-1. It is written under a temporary name and
then renamed, so a checkpoint under its final name is complete; every load checks the digests.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kit.flags import MODEL, Parser, as_flags, from_command_line


def parse_args(argv=None):
    parser = Parser(
        description="Show the checkpoints of a run (exit status 1: one is damaged), or export one."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("list", "check file sizes"), ("verify", "check every byte")):
        command = commands.add_parser(name, help=f"show the checkpoints of a run and {what}")
        command.add_argument("directory", metavar="DIR", help="a run's log directory, or one checkpoint")
    command = commands.add_parser("export", help="write a model as a Hugging Face directory; can upload it")
    command.add_argument("source", metavar="MODEL", help=MODEL)
    command.add_argument("directory", metavar="DIR", help="the new directory")
    command.add_argument("--push_to_hub", metavar="USER/NAME", help="also upload it to this repository")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = from_command_line(parse_args)

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from kit import huggingface, nanogpt, recipe, record
from kit.divergence import remedy
from kit.files import (
    UserError,
    digest,
    first_line,
    name_in_errors,
    run_script,
    share_tensors,
    sync,
    temporary_path,
)
from kit.optim import load_state, state_tensors
from kit.ranks import Ranks
from kit.sharding import local, shard_like, whole_on_cpu
from model import GPT, GPT2_SIZES, GPTConfig
from tokenizer import END_OF_TEXT, get_tokenizer, ordinary_tokens, special_tokens, without_tokens

FORMAT = "gpt2 checkpoint, version 1"
NAME = re.compile(r"ckpt_(\d{6,})$")

# the temporary names of a run's files and directories, which a crash leaves behind (digits only: `discard`)
LEFTOVER = re.compile(r"\.(\d+|(ckpt_\d+|best)(\.old)?|log\.txt|run\.json|profile\.txt|curves\.png|"
                      r"source_\w+\.zip)\.tmp")

# types of the values in meta.json
KINDS = dict(step=int, config=dict, files=dict, identity=dict, val_loss=(float, type(None)), best_val=float,
             smoothed=(float, type(None)), lowest=float, diverged=bool, dtype=str, scaler=dict, skipped=int)
REQUIRED = ("step", "config", "files")
SCALER = dict(scale=float, growth_factor=float, backoff_factor=float, growth_interval=int,
              _growth_tracker=int)  # of a GradScaler's state, for fp16
NO_MMAP = f"(os error {errno.ENODEV})"  # in safetensors' errors, which have no errno


class DamagedCheckpoint(UserError):
    """A checkpoint that differs from what was written, or is incomplete."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    val_loss: float | None = None  # the last one measured
    best_val: float = math.inf  # the lowest, of those after step 0
    skipped: int = 0  # steps skipped because loss or gradient was not finite
    smoothed: float | None = None  # a running mean of the training loss
    lowest: float = math.inf  # its minimum
    diverged: bool = False  # whether it is far above that, or above a uniform guess

    @classmethod
    def of(cls, meta):
        """The progress that a checkpoint's meta.json records."""
        return cls(**{name: meta[name] for name in cls.__dataclass_fields__ if name in meta})


def contents(model, progress, tokenizer="gpt2", optimizer=None, **meta):
    """What a checkpoint of model (and optimizer) contains: (tensors by file, tokenizer, values of meta.json).

    progress: a Progress. tokenizer: "gpt2" or the path of a tokenizer.json. meta: further plain values.
    """
    tensors = {"model.safetensors": model.state_to_save()}
    if optimizer is not None:
        tensors["optimizer.safetensors"] = state_tensors(optimizer)
    return tensors, tokenizer, dict(config=asdict(model.config), **asdict(progress), **meta)


def save(path, *model, **more):
    """Write a checkpoint of the `contents` that these arguments give. See `write`."""
    write(path, *contents(*model, **more))


def write(path, tensors, tokenizer, meta):
    """Write a checkpoint with these `contents` as the directory `path`, completely or not at all.

    Raises OSError if it can't be written, for example on a full disk.
    """
    path = Path(path)
    temporary, replaced = temporary_path(path), temporary_path(path.with_name(path.name + ".old"))
    for leftover in (temporary, replaced):
        discard(leftover)
    try:
        temporary.mkdir(parents=True)
        for name, content in tensors.items():
            content = {key: tensor.detach().contiguous() for key, tensor in content.items()}
            save_file(content, temporary / name)
        if tokenizer != "gpt2":
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        files = {file.name: {"bytes": file.stat().st_size, "digest": digest(file)}
                 for file in temporary.iterdir()}
        body = dict(format=FORMAT, **meta, files=files)
        text = json.dumps({**body, "self": text_digest(body)}, indent=1)
        with name_in_errors(path):
            (temporary / "meta.json").write_text(text, encoding="utf-8")
        share_tensors(temporary)
        for written in (*temporary.iterdir(), temporary):
            sync(written)
        if path.exists():  # a directory can't be renamed over another one
            os.rename(path, replaced)
        os.rename(temporary, path)
        sync(path.parent)
        discard(replaced)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written ({error})") from error
    finally:
        discard(temporary)


def discard(path):
    """Remove a directory if it exists. It is renamed first: half a checkpoint never has a valid name."""
    garbage = path.with_name(f".{time.time_ns()}.tmp")
    if path.exists():
        with contextlib.suppress(OSError):
            os.rename(path, garbage)
        shutil.rmtree(garbage, ignore_errors=True)


def text_digest(body):
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def read_meta(path, digests=True):
    """A checkpoint's meta.json as a dict, after its files were checked (without digests: only their sizes).

    Raises DamagedCheckpoint with the reason.
    """
    path = Path(path)
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("self") != text_digest(meta):
            raise DamagedCheckpoint(f"{path}/meta.json is damaged: its digest is not the one it states")
        if meta["format"] != FORMAT:
            raise DamagedCheckpoint(f"{path} has the format {meta['format']!r}, not {FORMAT!r}")
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
        raise DamagedCheckpoint(f"{path} is not a complete checkpoint ({error!r})") from error
    return meta


def load(path, device="cpu"):
    """Read a checkpoint: (model in eval mode on `device`, meta.json as a dict). Raises DamagedCheckpoint."""
    meta = read_meta(path)
    return build_model(path, meta, lambda: load_tensors(Path(path) / "model.safetensors", device)), meta


def build_model(path, meta, read_tensors):
    """The GPT of a checkpoint: its meta.json as a dict, and a function that returns its tensors by name.

    Raises DamagedCheckpoint.
    """
    try:
        state = read_tensors()
        if any(tensor.dtype != torch.float32 for tensor in state.values()):
            raise ValueError("not all of them are float32")
        return GPT.from_state(GPTConfig(**meta["config"]), state)
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DamagedCheckpoint(f"{path}: the weights do not fit the model ({reason})") from error


def load_tensors(path, device="cpu"):
    """The tensors of a .safetensors file by their names, also where files can't be mapped into memory."""
    try:
        return load_file(path, device=device)
    except OSError as error:
        if NO_MMAP not in str(error):
            raise
        tensors = load_bytes(path.read_bytes())
        return {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass
class Source:
    """The checkpoint from which all ranks continue. Rank 0 sends it to them, unless all can read it."""

    path: Path
    meta: dict
    on_all_ranks: bool = True
    ranks: Ranks | None = None

    def tensors(self, name):
        """The tensors of one of its files, on the CPU of all ranks."""
        path = self.path / name
        if self.on_all_ranks:
            return load_tensors(path)
        return self.ranks.tensors_from_first(load_tensors(path) if self.ranks.is_first else {})

    def model(self):
        """Its GPT, in eval mode, on the CPU. Raises DamagedCheckpoint."""
        return build_model(self.path, self.meta, lambda: self.tensors("model.safetensors"))

    def load_optimizer(self, optimizer):
        """Load its optimizer tensors; learning rate and decay stay the optimizer's own.

        Raises DamagedCheckpoint.
        """
        try:
            load_state(optimizer, self.tensors("optimizer.safetensors"), shard_like)
        except (SafetensorError, ValueError) as error:
            message = f"{self.path}: the optimizer's state can't be loaded ({error})"
            raise DamagedCheckpoint(message) from error


def numbered(log_dir):
    """The numbered checkpoints of a log directory, newest first."""
    found = [(int(NAME.match(path.name)[1]), path)
             for path in Path(log_dir).glob("ckpt_*") if NAME.match(path.name)]
    return [path for _, path in sorted(found, reverse=True)]


def latest(log_dir, to_resume=False):
    """The newest valid checkpoint of a log directory or None, and why each newer one is invalid (a list).

    to_resume: a checkpoint without an optimizer is invalid.
    """
    problems = []
    for path in numbered(log_dir):
        try:
            if "optimizer.safetensors" not in read_meta(path)["files"] and to_resume:
                raise DamagedCheckpoint(f"{path} has no optimizer.safetensors, which a resumed run needs")
            return path, problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    return None, problems


def find_for_resume(log_dir, ranks):
    """The Source of the newest checkpoint that a run can continue from; None, with a message, without any.

    Rank 0 chooses it. Raises UserError, on all ranks, if there are checkpoints but none is valid.
    """
    newest, problems = None, []
    if ranks.is_first:
        clean(log_dir)
        newest, problems = latest(log_dir, to_resume=True)
    ranks.barrier()  # reading takes a while
    newest, problems = ranks.from_first((newest, problems))
    ranks.say(*(f"skipped damaged checkpoint: {problem}" for problem in problems))
    if newest is None and problems:
        raise UserError(f"--resume: no checkpoint in {log_dir} is valid; start again with another --log_dir")
    if newest is None:
        ranks.say(f"{log_dir} contains no checkpoint: starting at step 0")
        return None
    meta = ranks.from_first(read_meta(newest, digests=False) if ranks.is_first else None)
    lacking = False
    try:
        lacking = not ranks.is_first and read_meta(newest, digests=ranks.local_rank == 0) != meta
    except DamagedCheckpoint:  # it is not on this machine's disk
        lacking = True
    ranks.barrier()  # another machine's disk may be slow
    on_all_ranks = not ranks.max(lacking)
    if not on_all_ranks:
        ranks.say(f"not all ranks can read {newest}: rank 0 sends it")
    return Source(newest, meta, on_all_ranks, ranks)


def prune(log_dir, keep, step, keep_every=0):
    """Remove the checkpoints up to `step`, except the newest `keep` and those at multiples of keep_every.

    Checkpoints beyond `step` are damaged ones that the run will replace. What can't be removed stays.
    """
    steps = {path: int(NAME.match(path.name)[1]) for path in numbered(log_dir)}
    for path in [path for path in steps if steps[path] <= step][keep:]:
        if not keep_every or steps[path] % keep_every:
            discard(path)


def clean(log_dir):
    """Clean up after a crash during a save: restore what was being replaced, remove what is incomplete."""
    leftovers = [path for path in Path(log_dir).glob(".*.tmp") if LEFTOVER.fullmatch(path.name)]
    for replaced in leftovers:
        path = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old.tmp"))
        if replaced.name.endswith(".old.tmp") and not path.exists():
            os.rename(replaced, path)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


class Saver:
    """Writes the checkpoints of a run and removes old ones. All ranks call it; rank 0 writes."""

    def __init__(self, args, identity, tokenizer, raw_model, precision, run, ranks):
        self.args, self.raw_model, self.run, self.ranks = args, raw_model, run, ranks
        self.precision, self.tokenizer, self.identity = precision, tokenizer, identity

    def save(self, name, progress, optimizer=None):
        """Write log_dir/name, in the background if the run has one.

        Raises UserError, and writes nothing, if a weight is not finite.
        """
        self.ranks.wait_for_gpu()
        weights = map(local, self.raw_model.state_to_save().values())
        if self.ranks.max(not all(tensor.isfinite().all() for tensor in weights)):
            raise UserError(f"before step {progress.step} the weights are not finite, no checkpoint was "
                            f"saved. {remedy(self.precision)}")
        self.run.background.wait()  # one copy in memory at a time
        self.ranks.barrier()  # sharded tensors need rank 0, which may have waited for long
        tensors, *others = contents(
            self.raw_model, progress, self.tokenizer, optimizer, identity=self.identity,
            dtype=self.precision.name, scaler=self.precision.scaler.state_dict())
        tensors = {file: whole_on_cpu(each, self.ranks, copy=self.run.background.on)
                   for file, each in tensors.items()}
        if self.ranks.is_first:
            self.run.background.submit(self.write, self.run.log_dir / name, progress.step, tensors, *others)
        self.ranks.barrier()

    def write(self, path, step, *contents):
        """Write a checkpoint with these `contents`, and remove old ones."""
        self.run.sync_log()
        write(path, *contents)
        prune(self.run.log_dir, self.args.keep, step, self.args.keep_every)
        self.ranks.say(f"step {step}: saved {path}")


def newest_run(say=True):
    """The log directory among log* with the newest checkpoint. say: name it on stderr.

    Raises UserError if there is none.
    """
    found = [path for name in ("best", "ckpt_*") for path in Path().glob(f"log*/{name}/meta.json")]
    if not found:
        raise UserError("no run found in log*: train one with python train_gpt2.py @configs/modern_demo.txt, "
                        "or name a model, as in -m gpt2")
    newest = str(max(found, key=lambda path: path.stat().st_mtime).parent.parent)
    if say:
        print(f"using -m {newest} (the newest run)", file=sys.stderr)
    return newest


def resolve(source):
    """What `-m SOURCE` means: a checkpoint (Path), or a model of another program (str).

    That is a Hugging Face directory, a name on its hub such as "gpt2", or a file of nanoGPT or build-nanogpt.
    A log directory means its newest valid checkpoint. Raises UserError if it is none of these.
    """
    path = Path(source)
    theirs = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if str(source) in GPT2_SIZES or theirs or path.is_file():
        return str(source)
    if (path / "meta.json").is_file() or path.exists() and NAME.match(path.name):
        return path
    if path.is_dir():
        newest, problems = latest(path)
        if newest is not None:
            for problem in problems:
                print(f"skipped damaged checkpoint: {problem}", file=sys.stderr)
            return newest
        if (path / "best").is_dir() and not problems:
            return path / "best"
        if (path / "best").is_dir():
            remedy = f"{source}/best may still be valid"
        elif others := sorted(path.glob("*.pt")):
            remedy = f"to use a checkpoint of another program, name its file, for example {others[-1]}"
        elif record.is_run(path):
            remedy = f"train one with python train_gpt2.py --log_dir {source}, or use -m gpt2"
        else:
            remedy = huggingface.MODELS
        raise UserError(f"{source} contains no valid checkpoint" + "".join(f"; {p}" for p in problems)
                        + f": {remedy}")
    if huggingface.HUB_NAME.fullmatch(str(source)) and not NAME.match(path.name):
        return str(source)
    raise UserError(f"{source} does not exist: {huggingface.MODELS}")


def load_model(source, device="cpu"):
    """The GPT that `source` names (see `resolve`), in eval mode on `device`. Raises UserError."""
    source = resolve(source)
    if isinstance(source, Path):
        return load(source, device)[0]
    read = nanogpt.read_gpt2 if Path(source).is_file() else huggingface.read_gpt2
    try:
        shape, state = read(source)
        return GPT.from_state(GPTConfig(**shape), state).to(device)
    except UserError:
        raise
    except Exception as error:  # transformers raises many types, from a truncated file to a refused pickle
        reason = first_line(error)
        if NO_MMAP in reason:
            raise UserError(f"{source}: its file system can't map files into memory; copy it to another "
                            "one") from error
        if "weights_only" in str(error):  # torch's own message recommends running the pickle
            reason = "its weights are a pickle that holds more than tensors, which may run code"
        elif isinstance(error, RuntimeError):  # torch's list of what does not fit starts in the second line
            reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} can't be loaded ({reason}): it is incomplete or not a GPT-2; download it "
                        "again, or name another model") from error


def tokenizer_path(source):
    """The argument of `get_tokenizer` for a model: its tokenizer.json or directory, or "gpt2"."""
    source = resolve(source)
    if isinstance(source, Path):
        path = source / "tokenizer.json"
        return str(path) if path.is_file() else "gpt2"
    if source in GPT2_SIZES or Path(source).is_file():
        return "gpt2"
    return huggingface.tokenizer_of(source)


def load_model_and_tokenizer(source, device="cpu"):
    """The GPT that `source` names, as `load_model`, and its tiktoken.Encoding. Raises UserError.

    Special tokens that the model has no embedding for are left out, with a message.
    """
    source = resolve(source)
    model, tokenizer = load_model(source, device), get_tokenizer(tokenizer_path(source))
    rows = model.config.vocab_size
    lacking = [token for token, i in special_tokens(tokenizer).items() if i >= rows]
    if tokenizer.n_vocab - len(lacking) > rows or END_OF_TEXT in lacking:
        raise UserError(f"{source}: its tokenizer has {tokenizer.n_vocab} ids, the model only {rows}; put "
                        "the tokenizer.json it was trained with next to it")
    if lacking:  # a tokenizer was given a [PAD], for example, and the model was not resized
        print(f"{source}: the model has no embedding for {', '.join(lacking)} of its tokenizer: left out",
              file=sys.stderr)
        tokenizer = without_tokens(tokenizer, lacking)
    model.config.num_tokens = tokenizer.n_vocab  # a Hugging Face config doesn't tell tokens from padding
    return model, tokenizer


def check_tokenizer(source, tokenizer, data_dir, say):
    """Raise UserError unless the data's tokenizer gives every text the same ids as that of `source`.

    say: called with a line if the model has special tokens that the data's tokenizer lacks.
    """
    theirs = get_tokenizer(tokenizer_path(source))
    ours, special = special_tokens(tokenizer), special_tokens(theirs)
    if ordinary_tokens(tokenizer) != ordinary_tokens(theirs) or not ours.items() <= special.items():
        raise UserError(f"--data_dir {data_dir}: its tokenizer is not the one of {source}: prepare the data "
                        "again with the model's, fineweb_edu.py --tokenizer FILE")
    lacking = ", ".join(token for token in special if token not in ours)
    if lacking:
        say(f"this run uses the tokenizer of {data_dir}; unlike that of {source}, it lacks {lacking}")


def load_to_train(args, data, say):
    """The model that --init_from names, for the data of a run; its shape overrides the flags.

    args: the flags of train_gpt2.py. data: its Data. say: called with messages for the user. Raises UserError
    if the model does not fit the data, or lacks a variant that a flag asks for.
    """
    model = load_model(args.init_from)
    if args.sequence_length > model.config.block_size:
        raise UserError(f"--sequence_length {args.sequence_length}: {args.init_from} reads at most "
                        f"{model.config.block_size} tokens; use --sequence_length {model.config.block_size}")
    if data.num_tokens > model.config.vocab_size:
        raise UserError(f"--data_dir {args.data_dir}: its tokenizer has {data.num_tokens} ids, "
                        f"{args.init_from} only {model.config.vocab_size}: prepare the data with the "
                        "model's tokenizer")
    wanted = {name: getattr(args, name) for name in recipe.MODEL_VARIANTS
              if getattr(args, name) not in (recipe.VARIANTS[name], getattr(model.config, name))}
    if wanted:  # perhaps by a config, so leaving the flags out is no remedy
        found = {name: getattr(model.config, name) for name in wanted}
        raise UserError(f"{args.init_from} does not have {' '.join(as_flags(wanted))}: add "
                        + " ".join(as_flags(found)))
    if data.tokenizer:
        check_tokenizer(args.init_from, data.tokenizer, args.data_dir, say)
    if args.crop_to:
        crop_positions(model, args.crop_to, args.init_from, say)
    config = replace(model.config, num_tokens=data.num_tokens, dropout=args.dropout)
    return GPT.from_state(config, model.state_dict())  # rebuilt, because its layers contain the dropout


def crop_positions(model, block_size, source, say):
    """Shorten the context of a model, in place, to block_size tokens: its first positions. Raises UserError.

    say: called with a line if that changes the model.
    """
    learned = model.config.block_size
    if block_size > learned:
        raise UserError(f"--block_size {block_size}: {source} has learned only {learned} positions; leave "
                        "the flag out")
    if block_size < learned:
        say(f"--block_size {block_size}: the model keeps the first {block_size} of the {learned} positions "
            f"of {source}")
    model.config.block_size = block_size
    if model.config.position == "learned":
        positions = model.transformer.wpe
        positions.weight = torch.nn.Parameter(positions.weight[:block_size].detach().clone())
        positions.num_embeddings = block_size


def export(source, directory, push_to_hub=None):
    """Write the model that `source` names (see `resolve`) as a new Hugging Face directory.

    push_to_hub: a repository to upload it to as well. Raises UserError.
    """
    directory = Path(directory)
    huggingface.check_target(directory, push_to_hub)
    source = resolve(source)
    model, encoding = load_model_and_tokenizer(source)
    record = (read_meta(source, digests=False), source.parent) if isinstance(source, Path) else ()
    card = huggingface.model_card(model, push_to_hub or directory.name, source, *record)
    huggingface.write_directory(directory, model, encoding, card)
    print(f"wrote {source} to {directory} as a Hugging Face model")
    if push_to_hub:
        print(f"uploaded: {huggingface.upload(directory, push_to_hub)}")


def show(directory, verify):
    """Print a line for each checkpoint of a directory; exit with status 1 if one is damaged."""
    paths = [path for path in (*reversed(numbered(directory)), directory / "best") if path.is_dir()]
    if not paths and directory.is_dir() and (NAME.match(directory.name) or directory.name == "best"
                                             or (directory / "meta.json").is_file()):
        paths = [directory]
    if not paths:
        raise UserError(f"{directory} {'contains no checkpoint' if directory.exists() else 'does not exist'}")
    damaged = 0
    for path in paths:
        try:
            meta = read_meta(path, digests=verify)
            size = sum(file["bytes"] for file in meta["files"].values()) / 1e6
            known = meta.get("val_loss")  # perhaps of an earlier step
            loss = "not evaluated" if known is None else f"latest val loss {known:.4f}"
            verified = ", verified" if verify else ""
            print(f"{path}: step {meta['step']}, {loss}, {size:,.1f} MB{verified}")
        except (DamagedCheckpoint, OSError) as error:  # OSError: a running job may have just removed it
            damaged += 1
            print(f"{path}: damaged or removed: {error}")
    if damaged:
        sys.exit(1)


def main(args):
    if args.command == "export":
        export(args.source, args.directory, args.push_to_hub)
    else:
        show(Path(args.directory), verify=args.command == "verify")


if __name__ == "__main__":
    run_script(main, args)
