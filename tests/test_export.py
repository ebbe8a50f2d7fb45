"""checkpoint.py export writes a Hugging Face model with the same ids, logits and text."""

import base64
import http.server
import json
import os

import hub
import make
import pytest
import torch
from huggingface_hub import ModelCard
from runs import assert_refused, run_here, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import checkpoint
from checkpoint import export, load_model_and_tokenizer
from kit.huggingface import model_card

TEXTS = ["The try statement\n\nspecifies  exception handlers", " ünï 😀 \t<b>'s</b>", "def f(x):\n    pass"]


def check_export(directory, model, tokenizer):
    """Same ids, logits and greedy text, also when loaded again; a padded vocabulary is cut."""
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(directory)
    assert their_tokenizer.eos_token_id == tokenizer.eot_token == theirs.generation_config.eos_token_id
    assert len(their_tokenizer) == theirs.config.vocab_size == tokenizer.n_vocab == model.config.num_tokens
    assert their_tokenizer.model_max_length == model.config.block_size
    for text in TEXTS:
        ids = tokenizer.encode_ordinary(text)
        assert their_tokenizer(text)["input_ids"] == ids and their_tokenizer.decode(ids) == text
    idx = torch.tensor([tokenizer.encode_ordinary(TEXTS[0])])
    with torch.no_grad():
        logits = model(idx)[0][..., : tokenizer.n_vocab]
        assert (theirs(idx).logits - logits).abs().max() < 1e-4
    again, tokenizer_again = load_model_and_tokenizer(directory)
    assert tokenizer_again.encode_ordinary(TEXTS[1]) == tokenizer.encode_ordinary(TEXTS[1])
    with torch.no_grad():
        assert torch.allclose(again(idx)[0], logits, atol=1e-5)
    expected = model.generate(idx, 10, temperature=0)[0].tolist()
    generate = pipeline("text-generation", str(directory), device="cpu")
    text = generate(TEXTS[0], max_new_tokens=10, min_new_tokens=10, do_sample=False)[0]["generated_text"]
    # the pipeline never draws <|endoftext|> here, nor does this model
    assert tokenizer.eot_token not in expected and text == tokenizer.decode(expected)


def test_an_exported_run_with_a_learned_tokenizer(whole, tmp_path, shards):
    log_dir, figures = whole
    run_script("checkpoint.py", "export", log_dir, tmp_path / "hf", env={"HF_HUB_OFFLINE": "1"})
    check_export(tmp_path / "hf", *load_model_and_tokenizer(log_dir))
    files = {path.name: path for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "vocab.json", "merges.txt", "README.md"} == files.keys()
    card = files["README.md"].read_text()
    assert "| steps | 12 |" in card and "| max_lr | 0.003 |" in card and "| files | topics |" in card
    for step, stream in ((11, "train"), (12, "val"), (12, "val_bpb")):
        assert f"{float(figures[step, stream]):.4f} at step {step} |" in card
    # all files have the same permissions
    assert len({path.stat().st_mode for path in files.values()}) == 1
    ckpt = checkpoint.numbered(log_dir)[0]
    assert len({path.stat().st_mode for path in ckpt.iterdir()}) == 1
    # the card of an earlier step has no later figures
    export(checkpoint.numbered(log_dir)[1], tmp_path / "earlier")
    assert "| steps | 8 |" in (tmp_path / "earlier" / "README.md").read_text()
    assert "at step 12" not in (tmp_path / "earlier" / "README.md").read_text()


@pytest.mark.parametrize("bias", [True, False])
def test_an_exported_model_with_gpt2s_tokenizer_and_a_padded_vocabulary(tmp_path, gpt2_tokenizer, bias):
    model = make.small_gpt(64, 50304, scale=8, bias=bias)  # greedy choices without ties
    export(make.small_checkpoint(tmp_path, model), tmp_path / "hf")
    check_export(tmp_path / "hf", model, gpt2_tokenizer)


def test_results_are_in_the_front_matter_of_the_card(whole, learned, tmp_path):
    log_dir = tmp_path / "log"
    make.small_checkpoint(log_dir, checkpoint.load_model(whole.log_dir), step=12, tokenizer=learned)
    (log_dir / "log.txt").write_text("0 hella 0.2400000000\n12 hella 0.2955000000\n")
    record = {"data_source": {"dataset": "HuggingFaceFW/fineweb-edu"}, "hellaswag_examples": 200}
    (log_dir / "run.json").write_text(json.dumps(record))
    export(log_dir, tmp_path / "of_some")
    card = ModelCard.load(tmp_path / "of_some" / "README.md")
    assert card.data.eval_results is None and "200 examples | 0.2955 at step 12" in card.text
    (log_dir / "run.json").write_text(json.dumps({**record, "hellaswag_examples": 10042}))
    export(log_dir, tmp_path / "hf")
    data = ModelCard.load(tmp_path / "hf" / "README.md").data
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"] and data.pipeline_tag == "text-generation"
    [result] = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("HellaSwag", "acc_norm", 0.2955)


def test_an_export_that_is_not_possible_is_refused(whole, tmp_path):
    assert_refused(run_here(checkpoint, "export", whole.log_dir, tmp_path), tmp_path, "new directory")
    env = {"HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    command = ["checkpoint.py", "export", whole.log_dir, tmp_path / "hf", "--push_to_hub", "me/x"]
    assert_refused(run_script(*command, check=False, env=env), "--push_to_hub", "hf auth login")
    process = run_here(checkpoint, "export", tmp_path / "no", tmp_path / "hf")
    assert_refused(process, "no", "does not exist")
    assert os.listdir(tmp_path) == []


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that an upload of small files needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked[self.path] = body
        if self.server.status != 200:
            return self.reply(self.server.status, {"error": "busy"})
        reply = {}
        if self.path.endswith("/preupload/main"):
            reply = {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False}
                               for file in json.loads(body)["files"]]}
        elif self.path.endswith("/commit/main"):
            reply = {"commitUrl": "http://127.0.0.1/me/tiny/commit/1", "commitOid": "1"}
        elif self.path == "/api/repos/create":
            reply = {"url": "http://127.0.0.1/me/tiny"}
        self.reply(200, reply)

    def do_GET(self):
        self.reply(200, {"id": "me/tiny", "siblings": []})

    def reply(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_push_to_hub_uploads_all_files(whole, tmp_path):
    command = ["checkpoint.py", "export", whole.log_dir, tmp_path / "hf", "--push_to_hub", "me/tiny"]
    with hub.serve(Hub, asked={}, status=200) as server:
        env = {**hub.environment(server, tmp_path), "HF_TOKEN": "hf_x"}
        assert "uploaded: http" in run_script(*command, env=env).stdout
        server.status = 403
        command[3] = tmp_path / "other"
        refused = run_script(*command, check=False, env=env)
    lines = map(json.loads, server.asked["/api/models/me/tiny/commit/main"].splitlines())
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines if line["key"] == "file"}
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert b'"text-generation", "me/tiny"' in sent["README.md"]
    assert_refused(refused, "--push_to_hub me/tiny", "403", "the export is complete in")
    assert len(list((tmp_path / "other").iterdir())) == 8


def test_a_model_card_counts_many_files_and_holds_no_path(small_run, tmp_path):
    model = checkpoint.load_model(small_run)
    files = [{"name": f"/home/me/secret/part|{i}.txt"} for i in range(300)]
    (tmp_path / "run.json").write_text(json.dumps({"data_source": {"files": files, "note": "a|b\nc"}}))
    card = model_card(model, "my_gpt2", tmp_path, {"step": 3}, tmp_path)
    assert "| files | 300 files: part\\|0.txt, part\\|1.txt, part\\|2.txt, ... |" in card
    assert "| note | a\\|b c |" in card and "secret" not in card
    card = model_card(model, "my_gpt2", tmp_path)
    assert f"| weights from | {tmp_path.name} |" in card and str(tmp_path) not in card
    assert "| weights from | someone/tiny-gpt2 |" in model_card(model, "my_gpt2", "someone/tiny-gpt2")
    assert 'generate("Hello, I\'m a language model,"' in card
    record = {"data_source": {"dataset": str(tmp_path)}, "flags": {"sample_prompt": 'He said "no"'}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    card = model_card(model, "my_gpt2", small_run, {"step": 3}, tmp_path)
    assert str(tmp_path) not in card and f"| files of | {tmp_path.name} |" in card
    assert r'generate("He said \"no\""' in card
