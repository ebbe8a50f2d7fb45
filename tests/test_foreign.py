"""Other people's Hugging Face models: tokenizers and weights are read exactly, or refused in one line."""

import json
import shutil

import hub
import make
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from runs import assert_refused, run_here, run_script
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

import fineweb_edu
import sample
from checkpoint import check_tokenizer, export, load_model, load_model_and_tokenizer
from kit.files import UserError
from model import GPT, GPTConfig
from tokenizer import get_tokenizer, special_tokens

TEXTS = ["The tréś was <user>  12345 o'clock,\n\n\tit's  e\u0301 ﬁ\u00a0½",
         "日本語 हिन्दी 🙂\r\n   end ", " a",
         "I'LL we'll 007"]


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.fixture(scope="session")
def other_bpe(texts):
    """A byte-level BPE of 600 ids as other people train them: special tokens first, then bytes and merges."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator((text.upper() for text in texts), trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return bpe


def write_model(directory, vocab_size=600, config=(), **files):
    """A Hugging Face GPT-2 of random weights; files: the content of further .json files by their names."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=16, n_head=2, initializer_range=0.5,
        **{"n_layer": 1, "eos_token_id": 0, **dict(config)})).eval()
    theirs.save_pretrained(directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return theirs


def assert_same_ids(directory, ours):
    """Our tokenizer of a directory encodes like AutoTokenizer, and knows the same special tokens."""
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode(text, allowed_special="all") == theirs(text)["input_ids"]
        assert ours.decode(ours.encode_ordinary(text)) == text
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == ours.eot_token
    assert theirs.get_added_vocab().items() <= special_tokens(ours).items()


def test_a_vocabulary_without_tokenizer_json_is_read(tmp_path, other_bpe):
    write_model(tmp_path / "hf")
    other_bpe.model.save(str(tmp_path / "hf"))
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "hf").iterdir()}
    model, tokenizer = load_model_and_tokenizer(tmp_path / "hf")
    assert model.config.num_tokens == tokenizer.n_vocab == 600 and tokenizer.eot_token == 0
    assert special_tokens(tokenizer) == {"<|endoftext|>": 0, "<pad>": 1}
    assert_same_ids(tmp_path / "hf", tokenizer)
    export(tmp_path / "hf", tmp_path / "again")
    assert_same_ids(tmp_path / "again", tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").pad_token_id == 1


def test_gigatoken_encodes_like_a_tokenizer_whose_special_tokens_come_first(tmp_path, other_bpe, texts):
    other_bpe.save(str(tmp_path / "tokenizer.json"))
    data = make.write_jsonl(tmp_path / "data.jsonl", texts[:20])
    command = ["--input", data, "--tokenizer", tmp_path / "tokenizer.json", "--val_tokens", 100]
    process = run_here(fineweb_edu, *command, "--data_dir", tmp_path / "data")
    assert process.returncode == 0, process.stderr
    paths = sorted((tmp_path / "data").glob("*.npy"), key=lambda path: path.stem[-6:])
    ids = np.concatenate([np.load(path) for path in paths])
    tokenizer = get_tokenizer(str(tmp_path / "tokenizer.json"))
    assert ids.tolist() == [i for text in texts[:20] for i in (0, *tokenizer.encode_ordinary(text))]


def add_token(spec, content, i):
    spec["added_tokens"].append({**spec["added_tokens"][0], "content": content, "id": i})


def split_digits(spec):
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}


def swap_merges(spec):
    merges = spec["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def intercept_merge(spec):
    """A token whose merge never happens, because one before it takes its first two letters."""
    spec["model"]["vocab"].update({"QZ": 600, "ZX": 601, "QZX": 602})
    spec["model"]["merges"] += [["Q", "Z"], ["Z", "X"], ["Q", "ZX"]]


def drop_byte(spec):
    """Without a token for a byte that no merge uses."""
    vocab = spec["model"]["vocab"]
    last = next(token for token, i in vocab.items() if i == len(vocab) - 1)
    vocab[last] = vocab.pop("Ń")
    spec["model"]["merges"].pop()


def add_bos(spec):
    spec["post_processor"] = json.loads(processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]).__getstate__())


CHANGES = {
    "the normalizer .*NFC": lambda spec: spec.update(normalizer=json.loads(normalizers.NFC().__getstate__())),
    "pre_tokenizer splits": split_digits,
    "splits text": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "splits text differently": lambda spec: spec["pre_tokenizer"].update(use_regex=False),
    "order of its ids": swap_merges,
    "do not make its token 'QZX'": intercept_merge,
    "do not make its token 'zzz'": lambda spec: spec["model"]["vocab"].update(zzz=600),
    "256 bytes": drop_byte,
    "encodes text differently": add_bos,
    "no <|endoftext|>": lambda spec: spec["added_tokens"][0].update(content="</s>") or spec["model"][
        "vocab"].update({"</s>": spec["model"]["vocab"].pop("<|endoftext|>")}),
    "0, 1, 2": lambda spec: add_token(spec, "[X]", 700),
    "ordinary token": lambda spec: add_token(spec, "TH", spec["model"]["vocab"]["TH"]),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_tokenizer_that_encodes_in_another_way_is_refused(tmp_path, other_bpe, reason):
    spec = json.loads(other_bpe.to_str())
    CHANGES[reason](spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=f"tokenizer.json: .*{reason}") as refusal:
        get_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("file, content, reason", [
    ("tokenizer_config", {"add_prefix_space": True}, "add_prefix_space"),
    ("tokenizer_config", {"add_bos_token": True}, "add_bos_token"),
    ("tokenizer_config", {"eos_token": {"content": "</s>"}}, "'</s>'"),
    ("special_tokens_map", {"eos_token": "<pad>"}, "'<pad>'"),
    ("generation_config", {"eos_token_id": [0, 1]}, "'<pad>'"),
    ("added_tokens", {"<pad>": 5}, "two ids"),
])
def test_settings_beside_the_vocabulary_are_not_ignored(tmp_path, other_bpe, file, content, reason):
    other_bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / f"{file}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=reason):
        get_tokenizer(str(tmp_path))


def added(**flags):
    return {"content": "<pad>", "special": True, **flags}


@pytest.mark.parametrize("files, reason", [
    ({"tokenizer": added(lstrip=True)}, "has lstrip"), ({"tokenizer": added(rstrip=True)}, "has rstrip"),
    ({"tokenizer": added(single_word=True)}, "has single_word"),
    ({"tokenizer": added(special=False)}, "is not special"),
    ({"tokenizer_config": {"added_tokens_decoder": {"1": added(lstrip=True)}}}, "has lstrip"),
    ({"tokenizer_config": {"added_tokens_decoder": {"1": added(special=False)}}}, "is not special"),
    ({"special_tokens_map": {"mask_token": added(lstrip=True)}}, "has lstrip"),
    ({"special_tokens_map": {"additional_special_tokens": [added(rstrip=True)]}}, "has rstrip"),
    ({"added_tokens": {"<user>": 600}}, "'<user>' is not special"),
    # these make no difference
    ({"tokenizer": added(normalized=True)}, None),  # there is no normalizer
    ({"tokenizer": added(special=False), "special_tokens_map": {"pad_token": "<pad>"}}, None),
    ({"added_tokens": {"<user>": 600},
      "special_tokens_map": {"additional_special_tokens": ["<user>"]}}, None),
    ({"added_tokens": {"<pad>": 1}}, None),
])
def test_properties_of_added_tokens_are_not_ignored(tmp_path, other_bpe, files, reason):
    """They decide which texts become the token, and which spaces beside it are dropped."""
    spec = json.loads(other_bpe.to_str())
    spec["added_tokens"][1] |= files.get("tokenizer", {})
    for name, content in {**files, "tokenizer": spec}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    if reason:
        with pytest.raises(UserError, match=reason) as refusal:
            get_tokenizer(str(tmp_path))
        assert "\n" not in str(refusal.value)
    else:
        write_model(tmp_path, 601)
        assert_same_ids(tmp_path, get_tokenizer(str(tmp_path)))


def test_only_a_directory_without_any_tokenizer_file_has_gpt2s(tmp_path, other_bpe, gpt2_tokenizer, capsys):
    write_model(tmp_path / "hf", 50257)
    assert load_model_and_tokenizer(tmp_path / "hf")[1] is gpt2_tokenizer
    assert "hf has no tokenizer: GPT-2's is used" in capsys.readouterr().err
    for name in ("spiece.model", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_text("{}")
        get_tokenizer.cache_clear()
        with pytest.raises(UserError, match="neither a tokenizer.json nor a vocab.json"):
            load_model_and_tokenizer(tmp_path / "hf")
        (tmp_path / "hf" / name).unlink()
    write_model(tmp_path / "small")
    with pytest.raises(UserError, match="has no tokenizer, and 600 token ids"):
        load_model_and_tokenizer(tmp_path / "small")
    write_model(tmp_path / "cut", 590)
    other_bpe.save(str(tmp_path / "cut" / "tokenizer.json"))
    with pytest.raises(UserError, match="its tokenizer has 600 ids, the model only 590"):
        load_model_and_tokenizer(tmp_path / "cut")


def add_tokens(directory, bpe, *tokens):
    """Save a tokenizer as a fine-tune leaves it: with more special tokens, the first of them for padding."""
    bpe.save(str(directory / "bpe.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "bpe.json"), eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    theirs.add_special_tokens({"pad_token": tokens[0], "extra_special_tokens": list(tokens[1:])})
    theirs.save_pretrained(directory)
    (directory / "bpe.json").unlink()


def test_added_tokens_travel_through_a_fine_tune_and_its_export(tmp_path, learned, other_bpe, shards):
    write_model(tmp_path / "hf", 516, dict(eos_token_id=511))
    add_tokens(tmp_path / "hf", tokenizers.Tokenizer.from_file(learned), "[PAD]", "<user>", "<|startoftext|>")
    model, tokenizer = load_model_and_tokenizer(tmp_path / "hf")
    ids = {"<|endoftext|>": 511, "[PAD]": 512, "<user>": 513, "<|startoftext|>": 514}
    assert special_tokens(tokenizer) == ids
    assert_same_ids(tmp_path / "hf", tokenizer)
    assert model.config.num_tokens == 515 and tokenizer.encode_ordinary("<user>") != [513]

    make.small_checkpoint(tmp_path / "log", model, tokenizer=tmp_path / "hf" / "tokenizer.json")
    export(tmp_path / "log", tmp_path / "out")
    assert_same_ids(tmp_path / "out", tokenizer)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = theirs.generation_config
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (511, 511, 512)
    assert their_tokenizer.pad_token == "[PAD]" and their_tokenizer.bos_token_id == 511
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in saved  # transformers 4 can't read the list that version 5 writes
    assert theirs.config.vocab_size == 515 and theirs.config.eos_token_id == 511

    # data that was encoded without the added tokens has the same ids, other data has not
    other_bpe.save(str(tmp_path / "other.json"))
    said, other_encoding = [], get_tokenizer(str(tmp_path / "other.json"))
    check_tokenizer(tmp_path / "hf", get_tokenizer(learned), shards, said.append)
    assert "it lacks [PAD], <user>, <|startoftext|>" in said[0]
    with pytest.raises(UserError, match="not the one of"):
        check_tokenizer(tmp_path / "hf", other_encoding, shards, said.append)


@pytest.mark.parametrize("rows, kept", [(512, []), (513, ["[PAD]"]), (514, ["[PAD]", "<user>"])])
def test_special_tokens_without_an_embedding_are_left_out(tmp_path, learned, capsys, rows, kept):
    """Many fine-tunes add a [PAD] to the tokenizer and leave the model as it was."""
    write_model(tmp_path / "hf", rows, dict(eos_token_id=511))
    add_tokens(tmp_path / "hf", tokenizers.Tokenizer.from_file(learned), "[PAD]", "<user>")
    model, tokenizer = load_model_and_tokenizer(tmp_path / "hf")
    lacking = ", ".join(token for token in ("[PAD]", "<user>") if token not in kept)
    assert capsys.readouterr().err == (f"{tmp_path / 'hf'}: the model has no embedding for {lacking} of its "
                                       "tokenizer: left out\n" if lacking else "")
    assert list(special_tokens(tokenizer)) == ["<|endoftext|>", *kept]
    assert model.config.num_tokens == tokenizer.n_vocab == rows
    ids = sample.encode_prompt("a [PAD]<user>", tokenizer)
    assert ids.max() < rows and tokenizer.decode(ids[0].tolist()) == "a [PAD]<user>"
    export(tmp_path / "hf", tmp_path / "out")
    assert_same_ids(tmp_path / "out", tokenizer)
    assert load_model_and_tokenizer(tmp_path / "out")[1].n_vocab == rows


def test_an_end_of_text_without_an_embedding_is_refused(tmp_path, learned):
    write_model(tmp_path / "hf", 511)
    add_tokens(tmp_path / "hf", tokenizers.Tokenizer.from_file(learned), "[PAD]")
    with pytest.raises(UserError, match="its tokenizer has 513 ids, the model only 511"):
        load_model_and_tokenizer(tmp_path / "hf")


def test_a_batch_of_prompts_goes_through_the_exported_pipeline(tmp_path, small_run):
    export(small_run, tmp_path / "hf")
    generate = transformers.pipeline("text-generation", str(tmp_path / "hf"), device="cpu")
    prompts, settings = ["A", "The try statement of a"], dict(max_new_tokens=5, do_sample=False)
    alone = [generate(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    assert [row[0]["generated_text"] for row in generate(prompts, batch_size=2, **settings)] == alone


def test_an_export_has_the_files_that_other_programs_read(tmp_path, small_run):
    export(small_run, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 32
    theirs = tokenizers.Tokenizer(models.BPE.from_file(*(str(tmp_path / "hf" / name)
                                                         for name in ("vocab.json", "merges.txt"))))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = load_model_and_tokenizer(small_run)[1]
    assert all(theirs.encode(text).ids == ours.encode_ordinary(text) for text in TEXTS)
    assert theirs.token_to_id("<|endoftext|>") == ours.eot_token


# --------------------------------------------------------------------------------------- Hugging Face weights


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("equal", [True, False])
def test_a_head_stored_beside_the_embedding_is_tied_only_if_both_are_equal(tmp_path, format, equal):
    theirs = write_model(tmp_path)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    state["lm_head.weight"] += 0 if equal else 0.01
    (tmp_path / "model.safetensors").unlink()
    if format == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, idx = load_model(tmp_path), torch.arange(20).view(1, 20)
    expected = theirs.transformer(idx).last_hidden_state @ state["lm_head.weight"].T
    assert (model(idx)[0] - expected).abs().max() < 1e-4 and model.config.tie_embeddings == equal
    model.save_pretrained(tmp_path / "again")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again").eval()
    assert (again(idx).logits - expected).abs().max() < 1e-4


def test_more_layers_than_the_config_has_are_refused(tmp_path):
    write_model(tmp_path, config=dict(n_layer=2))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    with pytest.raises(UserError, match=r"has .*h\.1\..*n_layer=1"):
        load_model(tmp_path)


@pytest.mark.parametrize("how", ["an adapter", "an adapter beside a config.json", "tensors among others"])
def test_an_adapter_is_named_as_one(tmp_path, how):
    if how != "an adapter":
        theirs = write_model(tmp_path)
    if how == "tensors among others":
        name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight"
        state = {f"base_model.model.{name}": tensor.clone() for name, tensor in theirs.state_dict().items()}
        safetensors.torch.save_file({**state, name: torch.zeros(8, 16)}, tmp_path / "model.safetensors")
    else:
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    process = run_here(sample, "-m", tmp_path, "-d", "cpu", "-p", "x")
    assert_refused(process, f"{tmp_path} is the adapter of a fine-tune", "merge_and_unload()")


def test_a_model_whose_vocabulary_was_extended_gives_all_its_tokens(tmp_path):
    theirs = write_model(tmp_path, 50260)
    model, idx = GPT.from_pretrained(tmp_path), torch.tensor([[50258, 5, 50259]])
    assert model.config.num_tokens == 50260
    with torch.no_grad():
        expected = theirs(idx, labels=idx).loss
        assert abs(model(idx[:, :-1], idx[:, 1:])[1] - expected) < 1e-4


def test_a_model_with_the_exact_gelu_is_computed_and_exported_with_it(tmp_path, other_bpe):
    theirs = write_model(tmp_path / "hf", config=dict(activation_function="gelu"))
    other_bpe.save(str(tmp_path / "hf" / "tokenizer.json"))
    model, idx = load_model(tmp_path / "hf"), torch.arange(20).view(1, 20)
    export(tmp_path / "hf", tmp_path / "again")
    with torch.no_grad():
        expected = theirs(idx).logits
        assert (model(idx)[0] - expected).abs().max() < 1e-5
        model.transformer.h[0].mlp.activation = torch.nn.GELU("tanh")
        assert (model(idx)[0] - expected).abs().max() > 1e-4
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again").eval()
        assert (again(idx).logits - expected).abs().max() < 1e-5
    assert again.config.activation_function == "gelu"
    with pytest.raises(ValueError, match="gelu"):
        GPTConfig(gelu="relu")


def test_no_refusal_of_a_directory_asks_for_a_directory(tmp_path):
    for file, content in (("config.json", '{"model_type": "llama"}'), ("config.json", "{"),
                          ("model.safetensors", "x")):
        write_model(tmp_path)
        (tmp_path / file).write_text(content)
        process = run_here(sample, "-m", tmp_path, "-d", "cpu", "-p", "x")
        assert_refused(process, tmp_path)
        assert "give -m a local directory" not in process.stderr


# ------------------------------------------------------------------------------------------ the hub, by name


@pytest.fixture
def hub_model(tmp_path, other_bpe):
    """The files of a small GPT-2 with its own tokenizer, {name: bytes}."""
    write_model(tmp_path / "model")
    other_bpe.save(str(tmp_path / "model" / "tokenizer.json"))
    shutil.copyfile(tmp_path / "model" / "model.safetensors", tmp_path / "model" / "pytorch_model.bin")
    return {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}


def test_a_gpt2_of_the_hub_is_downloaded_by_its_name_and_found_without_a_network(tmp_path, hub_model,
                                                                                     monkeypatch):
    flags = ["-d", "cpu", "--max_new_tokens", 8, "-p", "THE"]
    with hub.serve_model(hub_model, "someone/tiny-gpt2") as server:
        env = hub.environment(server, tmp_path)
        online = run_script("sample.py", "-m", "someone/tiny-gpt2", *flags, env=env)
        missing = run_script("sample.py", "-m", "someone/else", *flags, env=env, check=False)
    assert not any(path.endswith("pytorch_model.bin") for _, path in server.asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    offline, local = (run_here(sample, "-m", model, *flags)
                      for model in ("someone/tiny-gpt2", tmp_path / "model"))
    assert online.stdout == offline.stdout == local.stdout
    assert_refused(missing, "someone/else does not exist here", "no public model", "log directory")


def test_without_a_network_an_unknown_name_is_refused_in_one_line(tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    process = run_script("sample.py", "-m", "logs/best", "-p", "x", env=env, check=False, timeout=60)
    assert_refused(process, "logs/best does not exist here", "can't be reached", "log directory")


def test_a_mistyped_checkpoint_is_not_looked_for_on_the_hub():
    for name in ("logs/ckpt_000100", "ckpt_000100", "./log_x", "a/b/c"):
        with pytest.raises(UserError, match=f"{name} does not exist: name a log directory"):
            load_model(name)
