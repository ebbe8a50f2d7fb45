"""Any flags, files and settings give a correct result, or one error line and nothing half written."""

import contextlib
import copy
import gzip
import io
import json
import math
import os
import shlex
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import faulty
import make
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from runs import TINY, one_thread, run_here

import checkpoint
import fineweb_edu
import hellaswag
import sample
import train_gpt2
from checkpoint import Progress
from fineweb_edu import encode, encode_fast
from kit import sources
from kit.files import UserError
from kit.shards import open_shards, tokenizer_of, verify
from model import GPT, GPTConfig
from tokenizer import get_tokenizer
from train_gpt2 import DataLoaderLite, get_lr, parse_args

ANY_TEXT = st.text(st.characters(), max_size=40)  # with surrogates, unlike st.text()
KNOWN = st.sampled_from(["<|endoftext|>", "<|endoftext", "\r\n", "\x85 \xa0", "'ll", "\ud83d", "e\u0301 ",
                         "return the object", " of the function\n", "statement"])
TEXT = st.lists(ANY_TEXT | KNOWN, max_size=4).map("".join)
ARGUMENT = TEXT.map(lambda text: text.replace("\0", ""))  # no command line can hold a zero byte
FLOAT = st.floats() | st.floats(0, 1) | st.sampled_from([0.0, 1e-50, 1e-6, 0.1, 1.0, 1e30, 1e300])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=4,
)


def cases(count):
    """So many cases, the same ones in each run; too_slow is off because a case may train a model."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, since small models do not gain from two; no fsync, since no case is a power failure."""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@contextlib.contextmanager
def folder():
    """A new directory for a case; tmp_path would be the same for all cases of a test."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@st.composite
def changed(draw, tree):
    """A JSON tree with one or two values anywhere in it replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        node, child = None, tree
        while isinstance(child, (dict, list)) and child and (node is None or draw(st.booleans())):
            node = child
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            child = node[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"])) if node is not None else None
        if how == "replace":
            near = draw(st.integers(-2, 2))
            is_near = isinstance(child, (int, float)) and draw(st.booleans())
            node[key] = child + near if is_near else draw(JSON)
        elif how == "remove":
            del node[key]
        elif how == "add":
            value = draw(JSON)
            node.append(value) if isinstance(node, list) else node.update({draw(ANY_TEXT): value})
    return tree


def deepened(text):
    """Replace the word "deep" by JSON that is too deep to parse, which no failure should print."""
    return text.replace("deep", "[" * 100_000)


def run(module, *flags):
    """Run a script in this process; return its status and stdout. A refusal must be one line."""
    process = run_here(module, *flags)
    if process.returncode == 2:
        lines = process.stderr.strip().split("\n")
        usage = process.stderr.startswith("usage:")
        assert "error: " in lines[-1] and len(lines) <= 1 + usage, process.stderr
        assert "[Errno" not in lines[-1], process.stderr
    return process.returncode, process.stdout


# ------------------------------------------------------------------------------------------ flags and configs


@cases(150)
@given(st.fixed_dictionaries({
    "max_lr": FLOAT, "min_lr": FLOAT,
    "warmup_steps": st.integers(-1, 50) | st.just(10**400),
    "max_steps": st.integers(0, 50) | st.just(10**400),
}), st.integers(0, 60))
def test_the_learning_rate_stays_between_zero_and_the_larger_of_its_ends(flags, step):
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = parse_args([f"--{flag}={value}" for flag, value in flags.items()])
    except SystemExit as refusal:
        assert refusal.code == 2
        assert not all(0 <= value < 1e6 for value in flags.values()) or flags["max_steps"] == 0
        return
    lr, most = get_lr(min(step, args.max_steps), args), max(args.max_lr, args.min_lr)
    assert math.isfinite(lr) and 0 <= lr <= most * (1 + 1e-15)
    if step == args.warmup_steps < args.max_steps:
        assert lr == pytest.approx(args.max_lr, rel=1e-12)
    if args.warmup_steps < args.max_steps <= step:
        assert lr == pytest.approx(args.min_lr, rel=1e-12, abs=1e-15 * most)


LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).map(
    lambda text: " ".join(text.splitlines()))
FLAGS = st.dictionaries(
    st.sampled_from(["data_dir", "log_dir", "sample_prompt", "device", "init_from"]), LINE
).map(lambda flags: [f"--{flag}={value}" for flag, value in flags.items()])


@cases(100)
@given(FLAGS, st.booleans(), st.sampled_from(["", "\n", " # a comment", "\n# 'tis one\n"]))
def test_flags_in_a_config_file_mean_what_they_mean_on_the_command_line(flags, one_line, end):
    with folder() as path:
        text = (" " if one_line else "\n").join(map(shlex.quote, flags)) + end
        (path / "config.txt").write_text(text, encoding="utf-8")
        assert parse_args([f"@{path}/config.txt"]) == parse_args(flags)
        later = ["--seed", "7", "--sample_prompt", "later"]
        assert parse_args([f"@{path}/config.txt", *later]) == parse_args([*flags, *later])


@cases(150)
@given(st.lists(st.binary(max_size=12) | st.sampled_from(
    [b"--seed 1", b"--data_dir", b"--log_dir a\0b", b"@config.txt", b"@nested.txt", b"@a\0b", b"'", b"\xff",
     b"--max_lr=-inf", b"--se", b"# @no", b"\n", b" ", "--sample_prompt \u2028".encode()]
), max_size=5).map(b"".join), st.lists(st.sampled_from(["@config.txt", "@", "@.", "--seed=2"]), max_size=2))
def test_any_config_file_is_read_or_refused_in_one_line(content, flags):
    with folder() as path, contextlib.chdir(path), contextlib.redirect_stderr(io.StringIO()) as err:
        Path("config.txt").write_bytes(content)
        Path("nested.txt").write_bytes(b"--seed 3")
        try:
            args = parse_args(["@config.txt", *flags])
            assert isinstance(args.seed, int) and "\0" not in args.data_dir + args.log_dir
        except SystemExit as refusal:
            assert refusal.code == 2 and "error: " in err.getvalue()


SIZE = st.integers(1, 8) | st.sampled_from([-1, 0, 10**30, True, None, 2.0, math.nan, "3", [1], "", 12])


@cases(200)
@given(st.fixed_dictionaries({}, optional=dict(
    {name: SIZE for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "num_tokens")},
    dropout=FLOAT | JSON, bias=st.booleans(),
)))
def test_any_config_is_a_model_or_a_value_error(values):
    values = {"block_size": 4, "vocab_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, **values}
    try:
        config = GPTConfig(**values)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        sizes = [values[name] for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")]
        if all(type(size) is int and size > 0 for size in sizes) and values["n_embd"] % values["n_head"] == 0:
            assert "num_tokens" in values or "dropout" in values
        return
    assert 1 <= config.num_tokens <= config.vocab_size and config.n_embd % config.n_head == 0
    if max(config.block_size, config.vocab_size, config.n_layer, config.n_embd) < 100:
        logits, _ = GPT(config).eval()(torch.zeros(2, min(3, config.block_size), dtype=torch.int64))
        assert logits.shape == (2, min(3, config.block_size), config.vocab_size) and logits.isfinite().all()


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 3))
    vocab = draw(st.integers(1, 70))
    return GPTConfig(draw(st.integers(1, 9)), vocab, draw(st.integers(1, 2)), heads,
                     heads * draw(st.integers(1, 6)), draw(st.floats(0, 0.9)), draw(st.booleans()),
                     draw(st.none() | st.integers(1, vocab)))


# ------------------------------------------------------------------------------------- generating and prompts


@cases(150)
@given(configs(), st.integers(1, 3), st.integers(1, 3) | st.integers(0, 12), st.integers(-1, 14),
       st.sampled_from([0, 0.5, 1.0, 5.0]) | FLOAT,
       st.none() | st.integers(1, 4) | st.integers(-1, 80) | st.just(10**30),
       st.none() | st.sampled_from([0.1, 0.5]) | FLOAT, st.integers(0, 2**63 - 1))
def test_generate_keeps_the_prompt_and_adds_known_ids_or_refuses(config, B, T, n, temperature, k, p, seed):
    torch.manual_seed(0)
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.data *= 8  # far from uniform, so that a token that is too unlikely shows
    idx = torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
    allowed = (T > 0 and n >= 0 and temperature >= 0 and math.isfinite(temperature) and (k is None or k >= 1)
               and (p is None or 0 < p <= 1))
    try:
        out = model.generate(idx, n, temperature, k, p, torch.Generator().manual_seed(seed))
    except ValueError as error:
        assert not allowed and "\n" not in str(error)
        return
    assert allowed and out.shape == (B, T + n) and torch.equal(out[:, :T], idx)
    assert (out[:, T:] < config.num_tokens).all() and (out[:, T:] >= 0).all()
    for t in range(T, min(T + n, config.block_size)):  # until then it has dropped no context
        logits = model(out[:, :t])[0][:, -1, : config.num_tokens]
        likelier = logits > logits.gather(1, out[:, t : t + 1]) + 1e-3
        assert (likelier.sum(dim=1) < (1 if temperature < 1e-6 else k or config.vocab_size)).all()
        if p and not k and temperature > 1e-3:
            probs = (logits / temperature).softmax(dim=-1)
            assert ((probs * likelier).sum(dim=1) < p + 1e-3).all()


@pytest.fixture(scope="module")
def log_dir(shards, tmp_path_factory):
    """A run of two steps that was stopped after the first."""
    log_dir = tmp_path_factory.mktemp("properties") / "log"
    flags = [*TINY, "--max_steps", "2", "--save_every", "1", "--val_every", "1"]
    status, _ = run(train_gpt2, *flags, "--data_dir", shards, "--log_dir", log_dir)
    assert status == 0
    shutil.rmtree(log_dir / "ckpt_000002")
    return log_dir


@cases(120)
@given(st.data(), st.none() | ARGUMENT | st.integers(20, 60).map("word ".__mul__), st.booleans(),
       st.booleans())
def test_any_prompt_is_continued_or_refused_in_one_line(log_dir, data, prompt, from_file, int8):
    flags = data.draw(st.fixed_dictionaries({"max_new_tokens": st.integers(-1, 40)}, optional={
        "num_samples": st.integers(0, 4), "temperature": FLOAT, "top_k": st.integers(-1, 600), "top_p": FLOAT,
        "seed": st.integers(-1, 2**63),
    }))
    raw = data.draw(st.binary(max_size=12)) if from_file else b""
    with folder() as path:
        argv = ["-m", str(log_dir), "-d", "cpu", *(f"--{flag}={value}" for flag, value in flags.items())]
        if from_file:
            content = (prompt or "").encode("utf-8", "replace") + raw
            (path / "prompt").write_bytes(content)
            argv += ["-p", f"@{path}/prompt"]
            try:
                prompt = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            except UnicodeDecodeError:
                prompt = False
        elif prompt is not None:
            argv += [f"--prompt={prompt}"]
            prompt = False if prompt.startswith("@") else prompt
        status, printed = run(sample, *argv, *["--int8"] * int8)
    n, k, p = flags.get("num_samples", 1), flags.get("top_k", 1), flags.get("top_p", 1)
    allowed = (prompt is not False and n >= 1 and 0 <= flags.get("seed", 0) < 2**63 and k >= 1 and 0 < p <= 1
               and flags["max_new_tokens"] >= 0 and 0 <= flags.get("temperature", 1) < math.inf)
    assert status == (0 if allowed else 2)
    if allowed:
        start = (sample.PROMPT if prompt is None else prompt).encode("utf-8", "replace").decode()
        others = n - 1 if flags["max_new_tokens"] else 0
        assert printed.startswith(start) and printed.count("-" * 40 + "\n" + start) >= others


# ------------------------------------------------------------------------------------------------ checkpoints


@cases(40)
@given(configs(), st.integers(0, 10**9), st.booleans(), st.floats(allow_nan=False), st.integers(0, 2**31))
def test_a_checkpoint_comes_back_for_any_config(config, step, with_optimizer, val_loss, seed):
    torch.manual_seed(seed)
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, "cpu") if with_optimizer else None
    if optimizer:
        x = torch.zeros(2, config.block_size, dtype=torch.int64)
        model(x, x)[1].backward()
        optimizer.step()
    with folder() as path:
        checkpoint.save(path / f"ckpt_{step:06d}", model, Progress(step, val_loss), optimizer=optimizer)
        newest, skipped = checkpoint.latest(path, to_resume=with_optimizer)
        again, meta = checkpoint.load(newest)
        assert not skipped and (meta["step"], meta["val_loss"]) == (step, val_loss) and again.config == config
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters()))
        assert [child.name for child in path.iterdir()] == [newest.name]
        if optimizer:
            fresh = again.configure_optimizers(0.1, 1e-3, "cpu")
            checkpoint.Source(newest, meta).load_optimizer(fresh)
            state, came = (o.state_dict()["state"] for o in (optimizer, fresh))
            assert state.keys() == came.keys()
            assert all(torch.equal(state[i][key], came[i][key]) for i in state for key in state[i])


@cases(200)
@given(st.data())
def test_any_meta_json_is_a_checkpoint_or_a_damaged_one(log_dir, data):
    saved = json.loads((log_dir / "ckpt_000001" / "meta.json").read_text())
    files_changed = changed(saved["files"]).map(lambda files: {**saved, "files": files})
    meta = data.draw(changed(saved) | changed(saved) | files_changed | JSON, label="meta.json")
    with folder() as path:
        shutil.copytree(log_dir / "ckpt_000001", path / "ckpt_000001")
        make.write_meta(path / "ckpt_000001", meta)
        try:
            model, read = checkpoint.load(path / "ckpt_000001")
            # compared as text, because NaN differs from itself
            assert all(json.dumps(meta[key]) == json.dumps(value) for key, value in read.items())
            assert model.config == GPTConfig(**meta["config"])
            assert all(saved["files"][name].items() <= entry.items() for name, entry in read["files"].items())
            assert "model.safetensors" in read["files"]
            valid = True
        except checkpoint.DamagedCheckpoint as error:
            assert "\n" not in str(error) and "ckpt_000001" in str(error)
            valid = False
        newest, skipped = checkpoint.latest(path)
        assert (newest is None) == (len(skipped) == 1) and not (valid and newest is None)
        for command in ("list", "verify"):
            status, printed = run(checkpoint, command, path)
            assert printed.count("\n") == 1 and status == (0 if newest else 1) or command == "list"


@cases(60)
@given(st.data())
def test_resuming_with_any_meta_json_finishes_or_is_refused_in_one_line(shards, log_dir, data):
    meta = json.loads((log_dir / "ckpt_000001" / "meta.json").read_text())
    meta = data.draw(changed(meta), label="meta.json")
    flags = [*TINY, "--max_steps", "2", "--save_every", "1", "--val_every", "1", "--resume"]
    with folder() as path:
        shutil.copytree(log_dir, path / "log")
        make.write_meta(path / "log" / "ckpt_000001", meta)
        flags += ["--data_dir", str(shards), "--log_dir", str(path / "log")]
        flags += ["--dtype", data.draw(st.sampled_from(["float32", "float16"]))]
        status, printed = run(train_gpt2, *flags)
        assert status in (0, 2) and ("finished" in printed) == (status == 0)
        if status == 0:
            assert checkpoint.load(path / "log" / "ckpt_000002")[1]["step"] == 2


# -------------------------------------------------------------------------------------------------- HellaSwag

EXAMPLE = {"ctx": "A man", "endings": ["runs.", "sits.", "", "a b"], "label": 2, "ind": 4}


@cases(200)
@given(st.lists((changed(EXAMPLE) | st.just(EXAMPLE) | JSON).map(json.dumps), max_size=3),
       st.just(b"") | st.binary(max_size=5))
@example(["deep"], b"")
@example([json.dumps(EXAMPLE), "1" * 5000], b"")
def test_any_hellaswag_file_is_read_or_refused_with_its_line(lines, raw):
    with folder() as path:
        (path / "some.jsonl").write_bytes(deepened("\n".join(lines)).encode() + raw)
        try:
            examples = list(hellaswag.iterate_examples(path / "some.jsonl"))
        except UserError as error:
            assert "some.jsonl" in str(error) and "\n" not in str(error)
            assert raw or not lines or any(line != json.dumps(EXAMPLE) for line in lines)
            return
    assert examples
    for line, item in zip(lines, examples):
        assert raw or item == json.loads(line)
        assert isinstance(item["ctx"], str) and item["ctx"] and [*map(type, item["endings"])] == [str] * 4
        assert item["label"] in range(4)


@st.composite
def questions(draw):
    words = st.lists(st.sampled_from("the cat's house is 12 réd <|endoftext|> \ud800 ,".split()), max_size=14)
    return {"ctx": draw(words.map(" ".join)) or "x", "label": draw(st.integers(0, 3)),
            "endings": [draw(words.map(" ".join)) for _ in range(4)]}


@cases(80)
@given(st.lists(questions(), min_size=1, max_size=4), st.integers(1, 40),
       st.sampled_from([None, 1, 30, 10**6]))
def test_hellaswag_predicts_what_one_ending_at_a_time_does(learned, examples, block_size, batch_tokens):
    torch.manual_seed(0)
    tokenizer, model = get_tokenizer(learned), GPT(GPTConfig(block_size, 512, 1, 2, 16)).eval()
    for p in model.parameters():
        p.data *= 8  # far from uniform, so that the endings differ
    result = hellaswag.evaluate(model, tokenizer, examples, batch_tokens)
    cut = 0
    for i, item in enumerate(examples):
        sums, means = [], []
        for ending in item["endings"]:
            scored = tokenizer.encode_ordinary(" " + ending)
            ids = tokenizer.encode_ordinary(item["ctx"]) + scored
            cut += len(ids) > block_size + 1
            ids = torch.tensor(ids[-(block_size + 1) :])
            losses = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")[-len(scored) :]
            sums.append(losses.sum().item())
            means.append(losses.mean().item())
        # equal endings have equal scores up to rounding: either is right
        assert sums[result["predictions"][i]] <= min(sums) + 1e-3
        assert means[result["predictions_norm"][i]] <= min(means) + 1e-3
    assert result["n"] == len(examples) and result["endings_cut"] == cut
    for name, predictions in (("acc", "predictions"), ("acc_norm", "predictions_norm")):
        right = sum(guess == item["label"] for guess, item in zip(result[predictions], examples))
        assert result[name] == pytest.approx(right / len(examples))


# ----------------------------------------------------------------------------------------------------- shards


@cases(150)
@given(st.lists(st.tuples(st.booleans(), TEXT), min_size=1, max_size=6))
def test_the_fast_tokenizer_makes_the_ids_of_tiktoken(learned, batch):
    assert encode_fast(batch, learned).tolist() == encode(batch, learned).tolist()


@cases(80)
@given(st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=3), st.data(),
       st.sampled_from([3, 7, 20, 50, 10**8]), st.none() | st.integers(1, 120),
       st.integers(1, 40) | st.just(2**24), st.none() | st.integers(1, 6))
def test_the_shards_are_the_ids_of_the_documents(learned, contents, data, shard_size, val_tokens, batch_chars,
                                                 stop_at):
    encoding = get_tokenizer(learned)
    with folder() as path, faulty.put_in():
        faulty.small_batches(batch_chars)
        inputs, stream = [], []
        for number, texts in enumerate(contents):
            kind = data.draw(st.sampled_from(["jsonl", "jsonl.gz", "txt", "parquet"]))
            inputs.append(path / f"{number}.{kind}")
            if kind.startswith("jsonl"):
                with (gzip.open if kind.endswith(".gz") else open)(inputs[-1], "wt") as file:
                    file.write("\n".join(json.dumps({"text": text}) for text in texts))
            else:
                texts = [text.encode("utf-8", "replace").decode() for text in texts]
                if kind == "txt":
                    texts = ["".join(texts) or "x"]
                    inputs[-1].write_bytes(texts[0].encode())
                else:
                    make.write_text_column(inputs[-1], texts, row_group_size=2)
            for text in texts:
                stream += [encoding.eot_token, *encoding.encode_ordinary(text)]

        def go():
            fineweb_edu.prepare(inputs, path / "data", {}, learned, "text", shard_size, val_tokens)

        if stop_at:  # as if killed when there were so many shards
            with faulty.put_in(), contextlib.suppress(KeyboardInterrupt, UserError):
                faulty.before_shard(stop_at, faulty.interrupt)
                go()
        by_size = shard_size if len(stream) >= 2 * shard_size else max(1, len(stream) // 10)
        expected_val = val_tokens or by_size
        try:
            go()
        except UserError as error:
            assert len(stream) <= expected_val and "leaves nothing to train on" in str(error)
            with pytest.raises(UserError, match="not complete|no train shards"):
                open_shards(path / "data", "train")
            return
        val, train = ([ids for _, ids in open_shards(path / "data", split)] for split in ("val", "train"))
        assert np.concatenate(val + train).tolist() == stream and sum(map(len, val)) == expected_val
        for shards in (val, train):
            assert all(len(ids) == shard_size for ids in shards[:-1]) and 0 < len(shards[-1]) <= shard_size
        assert verify(path / "data") == len(stream) and not list((path / "data").glob(".*"))


@cases(120)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 5),
       st.integers(1, 4), st.integers(0, 2**63 - 1), st.sampled_from(["train", "val"]))
def test_the_loader_visits_each_window_once_an_epoch(lengths, T, B, ranks, seed, split):
    with folder() as path:
        starts, first = [], 0
        for number, length in enumerate(lengths):
            np.save(path / f"x_{split}_{number:06d}.npy", np.arange(first, first + length, dtype=np.uint16))
            starts += range(first, first + length - T, T)
            first += length
        loaders = []
        try:
            for rank in range(ranks):
                loaders.append(DataLoaderLite(B, T, rank, ranks, split, path, seed))
        except UserError as error:
            assert not starts and f"--sequence_length {T}" in str(error)
            return
        pairs = [loader.next_batch() for _ in range(len(starts)) for loader in loaders]  # B * ranks epochs
        x, y = (np.concatenate([pair[i].numpy() for pair in pairs]) for i in (0, 1))
        assert np.array_equal(x, x[:, :1] + np.arange(T)) and np.array_equal(y, x + 1)
        epochs = x[:, 0].reshape(B * ranks, len(starts))
        assert loaders[0].num_windows == len(starts)
        assert (epochs == starts).all() if split == "val" else (np.sort(epochs) == starts).all()


@pytest.fixture(scope="module")
def interrupted(learned, tmp_path_factory):
    """The arguments of a preparation that was stopped before its last shards were written."""
    path = tmp_path_factory.mktemp("interrupted")
    (path / "in.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = [path / "in.txt"], path / "data", {}, learned, "text", 60, 60
    with faulty.put_in():
        faulty.without_last_shards()
        fineweb_edu.prepare(*arguments)
    return arguments


@cases(200)
@given(st.data())
def test_any_manifest_opens_its_shards_or_is_refused_in_one_line(shards, interrupted, data):
    source = data.draw(st.sampled_from([shards, interrupted[1]]))
    manifest = json.loads((source / "manifest.json").read_text())
    text = data.draw((changed(manifest) | changed(manifest) | JSON).map(json.dumps) | st.just("deep"))
    with folder() as path:
        data_dir = path / "data"
        shutil.copytree(source, data_dir)
        (data_dir / "manifest.json").write_text(deepened(text))

        def answer(ask, *arguments):
            try:
                return ask(*arguments)
            except UserError as error:
                assert str(error)

        opened = answer(open_shards, data_dir, "train")
        assert opened is None or json.loads(text)["complete"] is True and all(
            np.array_equal(ids, np.load(source / file.name)) for file, ids in opened)
        total = answer(verify, data_dir)
        assert total in (None, sum(len(np.load(file)) for file in source.glob("*.npy")))
        name = answer(tokenizer_of, data_dir)
        assert name in (None, "gpt2", str(data_dir / "tokenizer.json"))
        answer(fineweb_edu.prepare_demo, data_dir)
        before = {file.name for file in data_dir.iterdir()}
        answer(fineweb_edu.prepare, interrupted[0], data_dir, *interrupted[2:])
        assert not list(data_dir.glob(".*.tmp")) and before <= {file.name for file in data_dir.iterdir()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "hub_files", lambda *_: [str(interrupted[0][0])])
            flags = ["--data_dir", str(data_dir), "--dataset", "a/b", "--tokenizer", interrupted[3]]
            assert run(fineweb_edu, *flags)[0] == 2


@pytest.fixture(scope="module")
def two_parts(learned, tmp_path_factory):
    """The arguments of `merge` for two parts of one file each, and their stream."""
    path = tmp_path_factory.mktemp("parts")
    files, text = [path / "a.txt", path / "b.txt"], "The quick brown fox jumps over the lazy dog. " * 20
    for number, file in enumerate(files, start=1):
        file.write_text(text)
        source = {"files": [{"name": "a.txt"}, {"name": "b.txt"}]}
        fineweb_edu.prepare(files, path / "data/parts" / f"{number}-of-2", source, learned, shard_size=100,
                            part=[number, 2])
    ids = [get_tokenizer(learned).eot_token, *get_tokenizer(learned).encode_ordinary(text)]
    return (path / "data", {"files": ["a.txt", "b.txt"]}, learned), 2 * ids


@cases(200)
@given(st.data())
def test_any_manifest_of_a_part_is_merged_or_refused_in_one_line(two_parts, data):
    (source, *arguments), stream = two_parts
    manifest = json.loads((source / "parts/2-of-2/manifest.json").read_text())
    text = data.draw((changed(manifest) | changed(manifest) | JSON).map(json.dumps) | st.just("deep"))
    with folder() as path:
        shutil.copytree(source, path / "data")
        (path / "data/parts/2-of-2/manifest.json").write_text(deepened(text))
        try:
            fineweb_edu.merge(path / "data", *arguments, shard_size=100)
        except UserError as error:
            assert str(error)
            return
        joined = [ids for split in ("val", "train") for _, ids in open_shards(path / "data", split)]
        assert np.concatenate(joined).tolist() == stream


# --------------------------------------------------------------------------------------------------- training


EVERY = st.integers(0, 3)
RATE = st.floats(0, 1)
SOUND = dict(
    seed=st.integers(0, 2**63 - 1), dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    total_batch_size=st.sampled_from([256, 512]), micro_batch_size=st.sampled_from([1, 2, 4, 8]),
    sequence_length=st.sampled_from([8, 16, 32]), block_size=st.sampled_from([32, 40]),
    n_layer=st.integers(1, 2), n_head=st.sampled_from([1, 2, 4]), n_embd=st.sampled_from([4, 32, 40]),
    vocab_size=st.sampled_from([512, 640]), dropout=st.floats(0, 0.9), max_lr=RATE, min_lr=RATE,
    weight_decay=RATE, grad_clip=RATE, warmup_steps=st.integers(0, 3), max_steps=st.integers(1, 2),
    val_every=EVERY, sample_every=EVERY, save_every=EVERY, hellaswag_every=EVERY, keep=st.integers(2, 3),
    keep_every=EVERY, skip_bad_steps=EVERY, timeout=st.sampled_from([1, 2.5, 1e6]),
    val_tokens=st.sampled_from([40, 500]), sample_prompt=ARGUMENT | st.just("\udcff"),
    bias=st.booleans(), optimizer=st.sampled_from(["adamw", "muon"]), decay_fraction=st.floats(0.01, 1),
    schedule=st.sampled_from(["cosine", "wsd"]), norm=st.sampled_from(["layernorm", "rmsnorm"]),
    mlp=st.sampled_from(["gelu", "swiglu", "relu2"]),
)
HUGE = [10**30, 10**400]
ODD = {name: [-1, 0, 1, 7, 33, "1.5", "", *HUGE] for name in SOUND} | dict(
    {name: [1e18, 1e30, 1e-50, 1e300, -0.1, "nan", "inf"]
     for name in ("max_lr", "min_lr", "weight_decay", "grad_clip")},
    dropout=[1.0, 1e-50, -0.1, "nan"], dtype=["int4"], seed=[-1, 2**63], val_tokens=[7, 10**15, *HUGE],
    sample_prompt=["@none"], bias=[], optimizer=["sgd", ""], schedule=["linear"], norm=["", "batchnorm"],
    mlp=["relu"], decay_fraction=[0, 1, 1.5, -1, "nan", *HUGE],
    timeout=[0, 0.5, -1, 1e8, 1e9, 1e30, "nan", "inf", *HUGE],
    max_steps=[-1, 0, *HUGE], n_layer=[-1, 0, 3],  # many layers or steps would only take long
    **{name: [-1, 0, 1, 7, 33, 10**15, *HUGE] for name in ("vocab_size", "block_size", "n_embd")},
)


ODD_ONES = [(name, value) for name in ODD for value in ODD[name]]
ODD_ONES += [("log_dir", "l\udcff g"), ("log_dir", "a" * 300), ("data_dir", "none"), ("data_dir", "d" * 5000)]


@cases(60)
@given(st.fixed_dictionaries({}, optional=SOUND))
def test_any_sound_flags_train_and_write_all_that_they_promise(shards, flags):
    check_run(shards, flags)


@cases(len(ODD_ONES) + 1)
@given(st.none() | st.sampled_from(ODD_ONES))
def test_an_odd_flag_trains_or_is_refused_before_anything_is_written(shards, odd):
    flags = dict(val_every=1, sample_every=1, hellaswag_every=1, save_every=1)
    check_run(shards, flags | dict([odd] if odd else []))


def check_run(shards, flags):
    """A run with these flags ends with all that it promises, or is refused and writes nothing."""
    values = dict(
        seed=1, dtype="float32", total_batch_size=256, micro_batch_size=4, sequence_length=32, block_size=32,
        n_layer=1, n_head=2, n_embd=32, vocab_size=512, dropout=0.0, max_lr=3e-3, min_lr=6e-5,
        weight_decay=0.1, grad_clip=1.0, warmup_steps=1, max_steps=1, val_every=0, sample_every=0,
        save_every=0, hellaswag_every=0, keep=2, keep_every=0, skip_bad_steps=0, timeout=600, val_tokens=500,
        sample_prompt="The", bias=True, optimizer="adamw", schedule="cosine", decay_fraction=0.4,
        norm="layernorm", mlp="gelu", data_dir=str(shards), log_dir="log",
    ) | flags
    args = Namespace(**values)
    rates = [args.max_lr, args.min_lr, args.weight_decay, args.grad_clip]
    sizes = [args.n_layer, args.n_head, args.n_embd, args.vocab_size, args.block_size, args.sequence_length,
             args.micro_batch_size, args.total_batch_size, args.max_steps, args.val_tokens]
    counts = [args.seed, args.warmup_steps, args.val_every, args.sample_every, args.save_every,
              args.hellaswag_every, args.keep, args.keep_every, args.skip_bad_steps]
    meant = (
        args.data_dir == str(shards) and args.log_dir == "log" and args.dtype != "int4"
        and args.optimizer in ("adamw", "muon") and args.schedule in ("cosine", "wsd")
        and args.norm in ("layernorm", "rmsnorm") and args.mlp in ("gelu", "swiglu", "relu2")
        and not isinstance(args.decay_fraction, str) and 0.001 <= args.decay_fraction <= 1
        and not any(isinstance(value, str) for value in [*rates, *sizes, *counts, args.dropout, args.timeout])
        and 1 <= args.timeout <= 1e8
        and all(size > 0 for size in sizes)
        and all(0 <= n < 2**63 for n in [*counts, args.val_tokens]) and all(0 <= r < 1e100 for r in rates)
        and max(sizes[:-1]) < 10**6 and args.n_embd % args.n_head == 0 and args.vocab_size >= 512
        and args.sequence_length <= min(args.block_size, args.val_tokens) and 0 <= args.dropout < 1
        and args.total_batch_size % (args.micro_batch_size * args.sequence_length) == 0 and args.keep >= 2
    )
    with folder() as path:
        (path / "hellaswag.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
        values.update(log_dir=path / args.log_dir, data_dir=path / args.data_dir, device="cpu",
                      hellaswag_data=path / "hellaswag.jsonl")
        argv = [f"--{flag}={value}" for flag, value in values.items() if flag != "bias"]
        argv += ["--bias" if args.bias else "--no-bias", "--no-compile", "--no-plot"]
        status, printed = run(train_gpt2, *argv)
        log_dir = values["log_dir"]
        if status == 2 and not os.path.isdir(log_dir):  # Path.is_dir raises where a name is too long
            assert not meant and [child.name for child in path.iterdir()] == ["hellaswag.jsonl"]
            return
        assert meant
        written = {child.name for child in log_dir.iterdir() if not child.name.startswith("source_")}
        lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
        log = {(int(step), stream): float(value) for step, stream, value in lines}
        if status:  # absurd rates: the loss is not finite, and no checkpoint holds such weights
            assert max(rates) > 1
            assert written <= {".lock", "log.txt", "run.json", "best", "ckpt_000001"}
            assert all(p.isfinite().all() for name in written if (log_dir / name).is_dir()
                       for p in checkpoint.load(log_dir / name)[0].parameters())
            return

        def due(interval, first=0):
            laps = range(first, args.max_steps + 1)
            return [step for step in laps if interval and (step % interval == 0 or step == args.max_steps)]

        steps = range(args.max_steps)
        expected = [(step, stream) for step in steps for stream in ("train", "norm", "lr", "tok/s")]
        expected += [(step, stream) for step in due(args.val_every) for stream in ("val", "val_bpb")]
        expected += [(step, "hella") for step in due(args.hellaswag_every)]
        assert sorted(log) == sorted(expected) and len(lines) == len(expected)
        assert abs(log[0, "train"] - math.log(args.vocab_size or 512)) < 1
        assert all(log[step, "lr"] == pytest.approx(get_lr(step, args), abs=1e-9, rel=1e-9) for step in steps)
        assert "finished" in printed and all(f"step {step:5d} | loss" in printed for step in steps)
        names = {f"ckpt_{step:06d}" for every in (args.save_every, args.keep_every)
                 for step in due(every, first=1)}
        if any(log[step, "val"] < math.inf for step in due(args.val_every, first=1)):
            names.add("best")
        assert written == {".lock", "log.txt", "run.json"} | names
        assert all(isinstance(checkpoint.load(log_dir / name)[0], GPT) for name in names)
        prompt = args.sample_prompt.encode("utf-8", "replace").decode()
        assert printed.count("-" * 40 + "\n" + prompt) >= 3 * len(due(args.sample_every, first=1))
