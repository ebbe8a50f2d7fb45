"""HellaSwag: the fast evaluation predicts the same as one example at a time, in both protocols; groups of
examples, comparisons of two models, refused files and flags."""

import json
import math

import make
import pytest
import torch
import torch.nn.functional as F
from runs import assert_refused, run_here, run_script

import hellaswag
from kit import published, scores
from tokenizer import get_tokenizer


def naive_scores(model, tokenizer, example):
    """The protocol as tutorials implement it, one ending at a time: the sums and means of the losses."""
    sums, means = [], []
    for ending in example["endings"]:
        ids = tokenizer.encode_ordinary(example["ctx"])
        scored = tokenizer.encode_ordinary(" " + ending)
        sequence = torch.tensor((ids + scored)[-(model.config.block_size + 1) :])
        with torch.no_grad():
            logits, _ = model(sequence[None, :-1])
        losses = F.cross_entropy(logits[0], sequence[1:], reduction="none")[-len(scored) :]
        sums.append(losses.double().sum().item())
        means.append(losses.double().mean().item())
    return sums, means


def argmin(values):
    return values.index(min(values))


def check_against_naive(model, tokenizer, examples, **settings):
    result = hellaswag.evaluate(model, tokenizer, examples, **settings)
    scores = [naive_scores(model, tokenizer, example) for example in examples]
    assert result["predictions"] == [argmin(sums) for sums, _ in scores]
    assert result["predictions_norm"] == [argmin(means) for _, means in scores]
    labels = [example["label"] for example in examples]
    n = len(examples)
    assert result["n"] == n
    for name, predictions in (("acc", "predictions"), ("acc_norm", "predictions_norm")):
        p = sum(a == b for a, b in zip(result[predictions], labels)) / n
        assert result[name] == pytest.approx(p)
        assert result[f"{name}_stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    return result


def gpt(block_size, vocab_size, seed=0):
    return make.small_gpt(block_size, vocab_size, n_head=4, n_embd=64, seed=seed, scale=4)


@pytest.fixture
def examples(texts):
    return make.hellaswag_rows(texts)


def test_predictions_equal_one_example_at_a_time(learned, examples):
    tokenizer = get_tokenizer(learned)
    for batch_tokens in (None, 1, 700):
        result = check_against_naive(gpt(512, 512), tokenizer, examples, batch_tokens=batch_tokens)
        assert result["endings_cut"] == 0


def test_examples_longer_than_the_context_keep_their_end(learned, examples):
    tokenizer = get_tokenizer(learned)
    examples[3]["endings"][2] = " ".join(["a very long ending"] * 30)  # alone longer than the context
    result = check_against_naive(gpt(24, 512), tokenizer, examples)
    lengths = [
        len(tokenizer.encode_ordinary(e["ctx"])) + len(tokenizer.encode_ordinary(" " + ending))
        for e in examples for ending in e["endings"]
    ]
    assert result["endings_cut"] == sum(length > 25 for length in lengths) > 20


def test_predictions_on_real_examples_equal_one_at_a_time(real_data, gpt2_tokenizer):
    examples = list(hellaswag.iterate_examples(real_data / "hellaswag_val_sample.jsonl"))
    assert len(examples) == 2009
    check_against_naive(gpt(128, 50257), gpt2_tokenizer, examples[:60])


@pytest.mark.parametrize("given, query, ending", [
    # from the two sources of the official file: captions of ActivityNet, pages of WikiHow
    (dict(ctx_a="A man sits.", ctx_b="he", ctx="another text"), "Roofs: A man sits. He", "b"),
    (dict(ctx_a="A man.", ctx_b="the man in a BMW"), "Roofs: A man. The man in a bmw", "b"),
    (dict(ctx_a="[header] How to nail [title] Buy nails.  Long ones. [step]  Use", ctx_b=""),
     "Roofs: How to nail. Buy nails. Long ones.  Use", "b"),
    (dict(ctx_a="Nail it. [step]", ctx_b=""), "Roofs: Nail it. ", "b"),
    (dict(ctx_a="A.", ctx_b="", ending=" [title] Nail. [substeps] it  now "), "Roofs: A.",
     " Nail. it now"),
    # a row with ctx only
    (dict(ctx="It rains. A man sits on a roof. he"), "Roofs: It rains. A man sits on a roof. He", "b"),
    (dict(ctx='"It rains!" then they'), 'Roofs: "It rains!" Then they', "b"),
    (dict(ctx="Buy nails. Use a Hammer."), "Roofs: Buy nails. Use a Hammer.", "b"),
    (dict(ctx="Buy nails. Use a Hammer"), "Roofs: Buy nails. Use a Hammer", "b"),
])
def test_the_text_that_the_harness_protocol_reads(given, query, ending):
    endings = [given.get("ending", "b"), "c", "d", "e"]
    example = {"activity_label": "Roofs", "ctx": "", **given, "endings": endings}
    assert hellaswag.context_and_endings(example, "harness") == (query, [ending, "c", "d", "e"])


def check_harness_against_naive(model, tokenizer, examples):
    """The harness's way: encode context and ending together, cut after the context, sum per character."""
    result = hellaswag.evaluate(model, tokenizer, examples, protocol="harness")
    for i, example in enumerate(examples):
        query, endings = hellaswag.context_and_endings(example, "harness")
        context = query.rstrip()
        sums = []
        for ending in endings:
            start = len(tokenizer.encode_ordinary(context))
            sequence = tokenizer.encode_ordinary(query + " " + ending)[-(model.config.block_size + 1) :]
            count = len(tokenizer.encode_ordinary(query + " " + ending)) - start
            with torch.no_grad():
                logits, _ = model(torch.tensor([sequence[:-1]]))
            losses = F.cross_entropy(logits[0], torch.tensor(sequence[1:]), reduction="none")
            sums.append(-losses[-count:].double().sum().item())
        norm = [value / len(ending) for value, ending in zip(sums, endings)]
        assert result["loglikelihoods"][i] == pytest.approx(sums, abs=1e-3)
        assert result["loglikelihoods_norm"][i] == pytest.approx(norm, abs=1e-3)
        assert result["predictions"][i] == sums.index(max(sums))
        assert result["predictions_norm"][i] == norm.index(max(norm))
    return result


def test_harness_protocol_equals_one_ending_at_a_time(learned, examples):
    tokenizer = get_tokenizer(learned)
    result = check_harness_against_naive(gpt(512, 512), tokenizer, make.official_rows(examples))
    assert result != hellaswag.evaluate(gpt(512, 512), tokenizer, make.official_rows(examples))
    cut = check_harness_against_naive(gpt(64, 512), tokenizer, make.official_rows(examples))
    assert cut["endings_cut"] > result["endings_cut"] == 0


def test_harness_protocol_on_real_examples(real_data, gpt2_tokenizer):
    """No token spans the end of the context, thanks to GPT-2's pattern: true for the whole sample."""
    examples = list(hellaswag.iterate_examples(real_data / "hellaswag_val_sample.jsonl"))
    capitalised = 0
    for example in examples:
        query, endings = hellaswag.context_and_endings(example, "harness")
        context, rendered = hellaswag.render_example(example, gpt2_tokenizer, "harness")
        for ending, ids in zip(endings, rendered):
            assert gpt2_tokenizer.encode_ordinary(f"{query} {ending}") == context + ids
        capitalised += not query.endswith(example["ctx"]) and query.lower().endswith(example["ctx"].lower())
    assert capitalised == 649  # all contexts that do not end like a sentence
    check_harness_against_naive(gpt(128, 50257), gpt2_tokenizer, examples[:1] + examples[-4:])


def made_up(*right):
    """Examples and a result: acc_norm is right where `right` says so, acc is right everywhere."""
    examples = [{"label": i % 4, "activity_label": "archery" if i % 2 else "bowling", "split": "val"}
                for i in range(len(right))]
    result = {"predictions": [e["label"] for e in examples],
              "predictions_norm": [(e["label"] + (not ok)) % 4 for e, ok in zip(examples, right)]}
    return examples, {"model": "m", "protocol": "completion", "endings_cut": 0, **result,
                      **scores.accuracies(examples, result)}


def test_the_accuracy_of_a_group_is_that_of_its_examples(capsys):
    examples, result = made_up(True, False, True, False, False)
    groups = scores.accuracies_by(examples, result, "activity")
    assert list(groups) == ["bowling", "archery"]  # the largest first
    assert [(g["n"], g["acc"], g["acc_norm"]) for g in groups.values()] == [(3, 1, 2 / 3), (2, 1, 0)]
    assert groups["bowling"]["acc_norm_stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert list(scores.accuracies_by(examples, result, "split")) == ["val"]
    examples[0]["split_type"] = "zeroshot"  # the official field takes precedence
    assert list(scores.accuracies_by(examples, result, "split")) == ["val", "zeroshot"]
    scores.print_groups([{**result, "groups": groups}], "activity", most=1)
    printed = capsys.readouterr().out
    assert "bowling" in printed and "archery" not in printed
    assert "in the output of --json: 1 group of at most 2 examples" in printed


@pytest.mark.parametrize("value, error, text", [
    (0.28594, 0.0045, "0.2859 ± 0.0045"), (0.25, 0.0993, "0.250 ± 0.099"), (0.3, 0.25, "0.30 ± 0.25"),
    (1.0, 0.0, "1.00"), (0.25, 1e-6, "0.2500 ± 0.0000"),
])
def test_a_result_has_the_digits_that_its_error_carries(value, error, text):
    assert scores.with_error(dict(acc=value, acc_stderr=error), "acc") == text


@pytest.mark.parametrize("p, text", [(1, "p = 1.00;"), (0.034, "p = 0.03;"), (2e-5, "p = 2e-05;")])
def test_a_comparison_is_readable(capsys, p, text):
    values = dict(difference=-0.5, p=p, only_a=[3], only_b=[])
    scores.print_comparison({"acc": values, "acc_norm": values}, "completion")
    assert text + " only A got 1 example right, only B 0\n" in capsys.readouterr().out


def test_mcnemar_is_the_exact_test_and_its_approximation():
    assert scores.mcnemar(0, 0) == scores.mcnemar(4, 4) == 1
    assert scores.mcnemar(1, 9) == scores.mcnemar(9, 1) == 22 / 1024  # 2 (1 + 10) / 2 ** 10
    assert scores.mcnemar(0, 10) == 2 / 1024
    # with many examples: the normal approximation with continuity correction
    assert scores.mcnemar(2400, 2600) == pytest.approx(math.erfc(199 / 5000**0.5 / 2**0.5), rel=1e-2)


def test_comparison_of_two_results(capsys):
    examples, a = made_up(True, False, True, False, True, False)
    _, b = made_up(True, True, False, True, True, True)
    comparison = scores.compare(examples, a, b)
    assert comparison["acc"] == dict(difference=0, p=1, only_a=[], only_b=[])
    norm = comparison["acc_norm"]
    assert (norm["only_a"], norm["only_b"]) == ([2], [1, 3, 5])
    assert norm["difference"] == pytest.approx(2 / 6) and norm["p"] == 10 / 16
    scores.print_comparison(comparison, "completion")
    printed = capsys.readouterr().out
    assert "acc_norm +0.3333" in printed and "p = 0.62;" in printed and ": 1 2 3 5" in printed


def test_contexts_are_read_once_and_only_endings_reach_the_head(learned, examples, calls_of):
    """Counts the tokens through the blocks and the rows through the head."""
    tokenizer, model = get_tokenizer(learned), gpt(512, 512)
    read, scored = calls_of(model, "features"), calls_of(model, "token_losses")
    hellaswag.evaluate(model, tokenizer, examples)
    rendered = [hellaswag.render_example(example, tokenizer) for example in examples]
    endings = sum(len(ending) for _, four in rendered for ending in four)
    shared = sum(len(context) for context, _ in rendered) + endings - 4 * len(examples)
    assert sum(len(x) for x, _ in scored) == endings
    tokens = sum(ids.numel() for ids, *_ in read)
    assert shared <= tokens < 1.35 * shared  # little padding: rows of similar length share a batch


def test_the_command_on_a_checkpoint(tmp_path, examples, learned):
    """On one process and on two ranks the result is the same."""
    make.small_checkpoint(tmp_path / "log", gpt(64, 512), step=0, tokenizer=learned)
    data = make.write_jsonl(tmp_path / "data.jsonl", examples)
    command = ["hellaswag.py", "-m", tmp_path / "log", "-d", "cpu", "--data", data, "--limit", 30]
    process = run_script(*command, "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    last = process.stdout.splitlines()[-1]
    assert result["n"] == 30 and f"acc {scores.with_error(result, 'acc')}, " in last
    run_script("torchrun", 2, *command, "--json", tmp_path / "two.json")
    assert json.loads((tmp_path / "two.json").read_text()) == result


@pytest.fixture
def two_models(tmp_path, examples, learned):
    """Two log directories, and a function that runs the command in this process on official rows."""
    for name, seed in (("one", 0), ("two", 1)):
        make.small_checkpoint(tmp_path / name, gpt(64, 512, seed), step=0, tokenizer=learned)
    data = make.write_jsonl(tmp_path / "data.jsonl", make.official_rows(examples))

    def run(*flags):
        flags = [*flags, "-d", "cpu", "--data", data, "--json", tmp_path / "out.json"]
        hellaswag.main(hellaswag.parse_args(list(map(str, flags))))
        return json.loads((tmp_path / "out.json").read_text())

    return tmp_path / "one", tmp_path / "two", run


def test_a_packed_model_and_prepared_tokens_give_the_same_scores(learned, examples):
    tokenizer, model = get_tokenizer(learned), make.with_biases(gpt(64, 512))  # some endings are cut
    plain = hellaswag.evaluate(model, tokenizer, examples)
    rendered = hellaswag.render(examples, tokenizer, 64)
    assert hellaswag.evaluate(model, None, examples, rendered=rendered) == plain
    hellaswag.pack(model)
    packed = hellaswag.evaluate(model, tokenizer, examples)
    assert packed["predictions"] == plain["predictions"] and packed["endings_cut"] > 0
    for name in ("loglikelihoods", "loglikelihoods_norm"):
        torch.testing.assert_close(torch.tensor(packed[name]), torch.tensor(plain[name]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("faster", [False, True])
def test_the_command_packs_the_models_where_that_is_faster(two_models, monkeypatch, calls_of, faster):
    one, two, run = two_models
    monkeypatch.setattr(hellaswag, "onednn_is_faster", lambda: faster)
    packed = calls_of(hellaswag, "pack")
    plain = run("-m", one)
    assert run("--compare", one, two)["acc"] == plain["acc"]
    assert len(packed) == (3 if faster else 0)


def test_the_command_prints_both_protocols(two_models, learned, examples, capsys, monkeypatch):
    one, _, run = two_models
    monkeypatch.setattr(hellaswag, "HELLASWAG_EXAMPLES", len(examples))  # as if these were all
    result = run("-m", one, "--protocol", "both", "--by", "split", "--show", 2)
    printed = capsys.readouterr().out
    for protocol in hellaswag.PROTOCOLS:
        expected = hellaswag.evaluate(gpt(64, 512), get_tokenizer(learned), make.official_rows(examples),
                                      protocol=protocol)
        nested = result[protocol]
        assert all(nested[key] == expected[key] for key in ("predictions", "predictions_norm", "endings_cut"))
        assert list(nested["groups"]) == ["indomain", "zeroshot"] and nested["groups"]["zeroshot"]["n"] == 10
        assert f"({protocol}): HellaSwag acc {scores.with_error(expected, 'acc')}, " in printed
        for suffix in ("", "_norm"):
            assert f"{expected[f'loglikelihoods{suffix}'][1][2]:9.3f}" in printed
        for figure in (*published.HELLASWAG["gpt2"][protocol], *published.HELLASWAG["gpt2-xl"][protocol]):
            assert f"{figure:.4f}" in printed
    assert {key: result[key] for key in ("n", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr")} == {
        key: result["completion"][key] for key in ("n", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr")}
    assert "loglikelihoods" not in json.dumps(result)
    # four columns of twelve characters, each with one choice
    lines = printed.partition("example 1:")[0].rstrip().splitlines()[-4:]
    choices = [result[protocol][f"predictions{suffix}"][0] for protocol in hellaswag.PROTOCOLS
               for suffix in ("", "_norm")]
    assert len(set(choices)) > 1
    assert choices == [[line[12 * i] for line in lines].index(">") for i in range(4)]
    assert ["  * " in line for line in lines].index(True) == examples[0]["label"]
    assert "".join(lines).count(">") == 4 and "".join(lines).count("  * ") == 1


def test_published_results_stand_only_beside_those_of_the_whole_set(two_models, capsys):
    one, _, run = two_models
    run("-m", one, "--limit", 39)
    printed = capsys.readouterr().out
    assert "gpt2-xl" not in printed and printed.count("\n") == 1 and "± " in printed


def test_the_fingerprint_tells_examples_and_their_order():
    rows = [make.ROW, {**make.ROW, "label": 2}]
    assert hellaswag.fingerprint(rows) == hellaswag.fingerprint(list(rows))
    assert len({hellaswag.fingerprint(other) for other in (rows, rows[::-1], rows[:1], [])}) == 4


@pytest.mark.parametrize("acc, noise", [(0.25, True), (0.31, True), (0.34, False), (0.1, False)])
def test_a_result_at_chance_is_called_so(capsys, acc, noise):
    result = dict(model="m", protocol="completion", n=100, endings_cut=0, acc=acc, acc_norm=0.26,
                  acc_stderr=0.04, acc_norm_stderr=0.04)
    scores.print_result(result)
    assert ("chance" in capsys.readouterr().out) == noise


def test_the_command_compares_two_models(two_models, capsys):
    one, two, run = two_models
    alone = run("-m", two)
    assert run("-m", one)["predictions"] != alone["predictions"]
    capsys.readouterr()
    result = run("--compare", one, two, "--show", 1)
    printed = capsys.readouterr().out
    assert result["model"] == str(one) and result["other"] == alone
    norm = result["comparison"]["completion"]["acc_norm"]
    assert norm["difference"] == alone["acc_norm"] - result["acc_norm"]
    assert (len(norm["only_b"]) - len(norm["only_a"])) / 40 == pytest.approx(norm["difference"])
    differing = sorted(norm["only_a"] + norm["only_b"])
    assert f"example {differing[0]}:" in printed and printed.count("\nexample ") == 1
    run("--compare", one, one / "ckpt_000000", "--show", 1)  # the same model: there is nothing to show
    assert "log-likelihoods" not in capsys.readouterr().out


def test_with_json_to_stdout_nothing_else_is_printed(tmp_path, two_models, capsys):
    one, _, _ = two_models
    hellaswag.main(hellaswag.parse_args(
        ["-m", str(one), "-d", "cpu", "--data", str(tmp_path / "data.jsonl"), "--limit", "3", "--json", "-"]))
    assert json.loads(capsys.readouterr().out)["n"] == 3


@pytest.mark.parametrize("content, flags, words", [
    ("", [], ["data.jsonl", "no examples"]),
    (None, [], ["data.jsonl"]),
    (make.ROW, [], ["nothing", "gpt2-xl"]),
    # the row has neither an activity_label nor a split
    (make.ROW, ["--protocol", "both"], ["data.jsonl: example 1", "--protocol", "activity_label"]),
    (make.ROW, ["--by", "split"], ["data.jsonl: example 1", "--by", "split_type"]),
    (make.ROW, ["--compare", "a", "b"], ["--compare", "-m"]),
], ids=["empty file", "no file", "model", "protocol", "by", "compare"])
def test_a_mistake_is_refused(tmp_path, content, flags, words):
    data = tmp_path / "data.jsonl"
    if content is not None:
        make.write_jsonl(data, [content] if content else [])
    process = run_here(hellaswag, "-m", tmp_path / "nothing", "--data", data, *flags)
    assert_refused(process, *words)


@pytest.mark.parametrize("flags, word", [
    (["--compare", "a"], "--compare"), (["--compare", "a", "a/"], "--compare"), (["--show", "0"], "--show"),
    (["--protocol", "tokens"], "--protocol"), (["--by", "label"], "--by"), (["--limit", "0"], "--limit"),
])
def test_a_wrong_value_of_a_flag_is_refused(flags, word, capsys):
    with pytest.raises(SystemExit) as exit:
        hellaswag.parse_args(flags)
    assert exit.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]
