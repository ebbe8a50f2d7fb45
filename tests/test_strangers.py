"""Checkpoints and shards from a stranger: none runs code, none allocates absurd amounts of memory."""

import pickle
import re

import make
import pytest
import torch
from runs import assert_refused, copy_run, flags_of, run_here, run_script, sources, train
from safetensors.torch import load_file, save

import checkpoint
import hellaswag
import train_gpt2
from kit.files import UserError


@pytest.fixture
def attack(tmp_path):
    """A pickle that makes a file when it is loaded; the test fails if it was."""
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    yield pickle.dumps(Attack(), protocol=2)  # torch.save's protocol
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def malicious_run(tmp_path, attack):
    """A log directory with checkpoints that each hold the attack in place of one file."""
    for name in ("meta.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"):
        directory = tmp_path / "log" / f"ckpt_{len(name):06d}"
        directory.mkdir(parents=True)
        (directory / name).write_bytes(attack)
    return tmp_path / "log"


@pytest.fixture
def malicious_hf(tmp_path, attack):
    """A Hugging Face directory whose weights are the attack."""
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}')
    (directory / "pytorch_model.bin").write_bytes(attack)
    return directory


def test_a_malicious_pickle_is_never_loaded_as_a_model(tmp_path, attack, malicious_run, malicious_hf):
    (tmp_path / "ckpt.pt").write_bytes(attack)
    for source in (tmp_path / "ckpt.pt", malicious_run, malicious_hf, *malicious_run.iterdir()):
        with pytest.raises(UserError):
            checkpoint.load_model(source)


def test_the_scripts_refuse_a_malicious_pickle(tmp_path, attack, malicious_hf):
    (tmp_path / "ckpt.pt").write_bytes(attack)
    data = make.write_jsonl(tmp_path / "data.jsonl", [make.ROW])
    process = run_here(hellaswag, "--data", data, "-m", tmp_path / "ckpt.pt")
    assert_refused(process, "ckpt.pt", "not a checkpoint")
    assert_refused(run_script("sample.py", "-m", malicious_hf, check=False), "hf", "may run code")


def test_a_run_never_resumes_from_a_malicious_pickle(shards, malicious_run):
    with pytest.raises(UserError, match="no checkpoint .* is valid"):
        train(shards, malicious_run, "--resume")


def test_a_run_never_loads_a_shard_that_is_a_pickle(shards, tmp_path, attack):
    data = make.copy_shards(shards, tmp_path / "data")
    next(data.glob("*_train_*")).write_bytes(attack)
    (data / "manifest.json").unlink()
    with pytest.raises(UserError):
        train(data, tmp_path / "new")


def test_nanogpts_meta_pkl_is_never_loaded(tmp_path, attack):
    make.write_raw(tmp_path / "char", train=range(60), val=range(60))
    (tmp_path / "char" / "meta.pkl").write_bytes(attack)
    for flags in ([], ["--data_tokenizer", "gpt2"]):
        process = run_here(train_gpt2, *flags_of(tmp_path / "char", tmp_path / "log", *flags))
        assert_refused(process, "meta.pkl", "python fineweb_edu.py --input", "char/input.txt")


def test_no_unsafe_load_in_the_sources():
    unsafe = re.compile(r"torch\.load\b|torch\.jit|from torch import.*\bload\b|weights_only *= *False|"
                        r"import.*\b(pickle|dill|joblib|shelve|marshal|yaml)\b|from (pickle|dill|joblib)|"
                        r"allow_pickle *= *True|trust_remote_code|\b(?<!\.)eval\(|\bexec\(|shell=True|"
                        r"os\.system")
    for path in sources():
        found = [line for line in path.read_text().splitlines() if unsafe.search(line)]
        if path.name == "peers.py":  # runs the script of a peer, which is its purpose
            found = [line for line in found if "exec(compile(tree" not in line]
        if path.name == "nanogpt.py":  # reads the pickles of others, and never more than their tensors
            safe = 'saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)'
            found = [line for line in found if line.strip() != safe]
        assert not found, (path, found)


@pytest.mark.parametrize("change", [dict(n_embd=10**6), dict(n_layer=10**9), dict(block_size=10**12)])
def test_absurd_shapes_in_a_checkpoint_are_refused_before_memory_is_allocated(tmp_path, monkeypatch, change):
    path = make.small_checkpoint(tmp_path)
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters",
                        lambda self: self.weight.is_meta or pytest.fail("allocated"))
    make.change_meta(path, lambda meta: meta["config"].update(change))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="do not fit"):
        checkpoint.load(path)


@pytest.mark.parametrize("change", [
    {"3.exp_avg": torch.zeros(1)}, {"3.exp_avg": torch.zeros(512, 16, dtype=torch.bfloat16)},
    {"3.step": None}, {"no number": torch.zeros(1)},
], ids=["another shape", "another dtype", "missing", "another name"])
def test_absurd_optimizer_tensors_are_refused(shards, whole, tmp_path, change):
    """AdamW would write beyond the end of a tensor that is shorter than its parameter."""
    log_dir = copy_run(whole.log_dir, tmp_path / "log", without="ckpt_000012")
    path = log_dir / "ckpt_000008" / "optimizer.safetensors"
    tensors = {name: tensor for name, tensor in {**load_file(path), **change}.items() if tensor is not None}
    make.change_listed_file(path, save(tensors))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="optimizer's tensors do not fit"):
        train(shards, log_dir, "--resume")


@pytest.mark.parametrize("header", [
    b'{"transformer.wte.weight":{"dtype":"F32","shape":[100000000000,100000],"data_offsets":[0,40]}}',
    b'{"transformer.wte.weight":{"dtype":"F32","shape":[10],"data_offsets":[0,40000000000000]}}', None,
], ids=["shape", "offset", "header length"])
def test_absurd_sizes_in_a_tensor_file_are_refused(tmp_path, header):
    path = make.small_checkpoint(tmp_path)
    length = len(header) if header else 2**62
    content = length.to_bytes(8, "little") + (header or b"{}") + b"\0" * 40
    make.change_listed_file(path / "model.safetensors", content)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="ckpt_000002"):
        checkpoint.load(path)
