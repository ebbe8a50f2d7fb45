"""What replaces parts of GPT-2: each against an independent computation, and every combination in use."""

import dataclasses
import math
import shutil

import make
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import (
    ROOT,
    Run,
    assert_close,
    assert_refused,
    assert_same_end,
    flags_of,
    kill_all,
    read_log,
    run_here,
    run_script,
    run_until_killed,
    start_script,
    train,
    wait_for_line,
)
from test_hellaswag import check_against_naive
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import train_gpt2
from kit import loss, optim, recipe, variants
from kit.files import UserError
from kit.flags import as_flags
from kit.packed import pack
from model import GPT, GPTConfig
from tokenizer import get_tokenizer
from train_gpt2 import get_lr, parse_args

EVERYTHING = dict(mlp="swiglu", norm="rmsnorm", position="rope", qk_norm=True, tie_embeddings=False,
                  logit_softcap=4.0, value_residual=True, embedding_norm=True, x0_shortcut=True,
                  zero_init=True, bias=False)
LLAMA = dict(mlp="swiglu", norm="rmsnorm", position="rope", bias=False)
# each part alone, and several
VARIANTS = [{name: value} for name, value in EVERYTHING.items()] + [{"mlp": "relu2"}, LLAMA, EVERYTHING]
MODERN = [*as_flags(EVERYTHING), "--optimizer", "muon", "--schedule", "wsd"]
each_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=[*EVERYTHING, "relu2", "swiglu_rmsnorm", "everything"])


def trained_looking(seed=0, **config):
    """A small model with no weight at its initial value: zeros and ones would hide mistakes."""
    model = make.small_gpt(seed=seed, **config)
    for p in model.parameters():
        p.data += torch.randn_like(p) * (0.3 if p.dim() < 2 else 0.1)
    return model


def ids(*shape, seed=0):
    return torch.randint(512, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------ each part, computed in another way


def test_rmsnorm():
    norm = variants.norm(GPTConfig(norm="rmsnorm", n_embd=16, n_head=2))
    norm.weight.data.normal_()
    x = torch.randn(3, 5, 16)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert not dict(norm.named_parameters()).keys() - {"weight"}  # no bias


def test_activations():
    x = torch.randn(4, 10)
    torch.testing.assert_close(variants.relu2(x), x.clamp(min=0) ** 2)
    gate, value = x[:, :5], x[:, 5:]
    torch.testing.assert_close(variants.swiglu(x), gate * torch.sigmoid(gate) * value)


@pytest.mark.parametrize("n_embd", [64, 96, 128, 192, 200, 256, 384, 768, 1024, 1280, 1600])
@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_has_the_parameters_of_gelu(n_embd, bias):
    with torch.device("meta"):
        counts = [GPT(GPTConfig(n_embd=n_embd, n_head=2, n_layer=1, mlp=mlp, bias=bias)).transformer.h[0].mlp
                  for mlp in ("gelu", "swiglu")]
    gelu, swiglu = (sum(p.numel() for p in mlp.parameters()) for mlp in counts)
    assert abs(swiglu / gelu - 1) < 0.01


def test_rotary_positions_are_multiplications_of_complex_numbers():
    config = GPTConfig(position="rope", n_embd=24, n_head=2)
    x, positions = torch.randn(2, 2, 7, 12), torch.arange(3, 10)
    as_complex = torch.complex(x[..., :6], x[..., 6:])
    frequencies = torch.tensor([10000 ** (-2 * i / 12) for i in range(6)])
    turned = as_complex * torch.polar(torch.ones(7, 6), positions[:, None] * frequencies)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(variants.rotate(x, variants.rotary_angles(config, positions)), expected)
    batched = variants.rotary_angles(config, torch.stack((positions, positions + 5)))
    torch.testing.assert_close(variants.rotate(x, batched)[0], expected[0])


def test_attention_with_rotary_positions_depends_on_distances_only():
    gpt, idx = trained_looking(position="rope"), ids(2, 9)
    torch.testing.assert_close(gpt.features(idx, torch.arange(9) + 5), gpt.features(idx))
    swapped = idx[:, [1, 0, *range(2, 9)]]  # without any positions, the last token would not notice
    assert (gpt.features(swapped) - gpt.features(idx))[:, -1].norm() > 0.01


def test_attention_with_qk_norm_does_not_depend_on_the_size_of_queries_and_keys():
    gpt, idx = trained_looking(qk_norm=True, bias=False), ids(2, 9)
    before = gpt.features(idx)
    for block in gpt.transformer.h:
        block.attn.c_attn.weight.data[:32] *= 100
    torch.testing.assert_close(gpt.features(idx), before, rtol=0, atol=1e-3)


def test_a_value_residual_mixes_in_the_first_values():
    gpt, idx = trained_looking(value_residual=True, n_layer=3), ids(2, 9)
    seen = {}

    def keep(layer):
        def hook(module, inputs, outputs):
            seen[layer] = outputs[..., 32:]

        return hook

    for layer, block in enumerate(gpt.transformer.h):
        block.attn.c_attn.register_forward_hook(keep(layer))
    attention = F.scaled_dot_product_attention
    used = []

    def watched(q, k, v, **settings):
        used.append(v.transpose(1, 2).flatten(2))
        return attention(q, k, v, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        gpt.features(idx)
    for layer in range(3):
        own, first = gpt.transformer.h[layer].attn.adapt.mix if layer else (1, 0)
        torch.testing.assert_close(used[layer], own * seen[layer] + first * seen[0])


def test_the_shortcut_and_the_norm_of_the_embedding():
    gpt, idx = trained_looking(x0_shortcut=True, embedding_norm=True, n_layer=2), ids(2, 9)
    parts = gpt.transformer
    x = x0 = parts.ln_e(parts.wte(idx) + parts.wpe.weight[:9])
    for block in parts.h:
        a, b = block.shortcut.mix
        x = a * x + b * x0
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    torch.testing.assert_close(gpt.features(idx), parts.ln_f(x))


def test_the_softcap_bends_logits_and_the_loss_has_its_gradient(monkeypatch):
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", 48 * 512)  # several slices
    gpt, x, y = trained_looking(logit_softcap=1.0, num_tokens=500), ids(8, 16) % 500, ids(8, 16, seed=1) % 500
    features = gpt.features(x)
    logits = gpt(x)[0]
    torch.testing.assert_close(logits, torch.tanh(gpt.lm_head(features)))
    assert logits.abs().max() > 0.7  # where the cap bends
    y[0, :5] = -1
    plain = F.cross_entropy(logits[..., :500].flatten(0, 1), y.flatten(), ignore_index=-1)
    means = gpt(x, y)[1], plain
    for ours, theirs in zip(*(torch.autograd.grad(mean, list(gpt.parameters())) for mean in means)):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_zero_init_leaves_the_embedding_as_it_is():
    gpt, idx = make.small_gpt(zero_init=True, tie_embeddings=False), ids(2, 9)
    x = gpt.transformer.wte(idx) + gpt.transformer.wpe.weight[:9]
    torch.testing.assert_close(gpt.features(idx), gpt.transformer.ln_f(x))
    assert not gpt.lm_head.weight.any() and make.small_gpt(zero_init=True).lm_head.weight.any()


@pytest.mark.parametrize("change, reason", [
    (dict(mlp="swish"), "mlp must be 'gelu' or 'relu2' or 'swiglu'"), (dict(norm=None), "norm must be"),
    (dict(qk_norm=1), "qk_norm must be True or False"), (dict(logit_softcap=-1.0), "logit_softcap"),
    (dict(logit_softcap=math.inf), "logit_softcap"),
    (dict(position="rope", n_embd=6, n_head=2), "must be even"),
])
def test_an_unknown_part_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        GPTConfig(**change)


# --------------------------------------------------------------------------------------------------- in use


@each_variant
def test_summary_counts_every_parameter_once(variant):
    gpt = make.small_gpt(**variant)
    rows = [line.rsplit(maxsplit=1) for line in gpt.summary().splitlines() if line.startswith(("tra", "lm_"))]
    counted = sum(int(count.replace(",", "")) for name, count in rows if name != "trainable")
    assert counted == gpt.num_params() == sum(p.numel() for p in set(gpt.parameters()))


def check_flops(config):
    """Training takes three times the FLOPs of the forward pass, counted by torch on meta tensors."""
    with torch.device("meta"):
        gpt = GPT(config)
        with FlopCounterMode(display=False) as counter:
            gpt(torch.zeros(3, config.block_size, dtype=torch.long))
    assert counter.get_total_flops() * 3 == gpt.flops_per_token(config.block_size) * 3 * config.block_size


@each_variant
def test_flops_per_token_are_those_of_the_matmuls(variant):
    check_flops(GPTConfig(**dict(block_size=64, vocab_size=512, n_layer=2, n_head=2, n_embd=64) | variant))


@pytest.mark.parametrize("size", ["gpt2_124M", "gpt2_350M", "gpt2_774M", "gpt2_1558M", "swiglu_rmsnorm"])
def test_flops_per_token_of_every_size(size):
    check_flops(train_gpt2.model_config(parse_args([f"@{ROOT}/configs/{size}.txt"])))


@each_variant
def test_the_cache_changes_no_token(variant):
    gpt = trained_looking(block_size=32, scale=3, **variant)
    idx = ids(3, 5)
    generated = gpt.generate(idx, 27, temperature=0)
    for _ in range(27):
        idx = torch.cat([idx, gpt(idx)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, idx) and len(generated.unique()) > 10


@each_variant
@torch.no_grad()
def test_packed_layers_compute_the_same(variant):
    gpt, idx = trained_looking(**variant), ids(3, 16)
    expected, generated = gpt(idx)[0], gpt.generate(idx[:, :4], 10, temperature=0)
    pack(gpt)
    torch.testing.assert_close(gpt(idx)[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(gpt.generate(idx[:, :4], 10, temperature=0), generated)


@each_variant
@torch.no_grad()
def test_int8_layers_compute_nearly_the_same(variant):
    gpt, idx = trained_looking(**variant), ids(3, 16)
    expected = gpt(idx)[0]
    pack(gpt, int8=True)
    assert 0 < (gpt(idx)[0] - expected).std() < 0.1 * expected.std()  # 0: int8 is not used
    assert gpt.generate(idx[:, :4], 10, temperature=0).shape == (3, 14)


@each_variant
@torch.no_grad()
def test_hellaswag_rows_restart_their_positions(variant, texts, learned):
    gpt = trained_looking(block_size=64, **variant)
    examples = make.hellaswag_rows(texts, 12)
    check_against_naive(gpt, get_tokenizer(learned), examples)


@each_variant
def test_a_checkpoint_brings_the_same_model_back(variant, tmp_path):
    gpt, idx = trained_looking(**variant), ids(2, 9)
    again = checkpoint.load_model(make.small_checkpoint(tmp_path, gpt))
    assert again.config == gpt.config and torch.equal(again(idx)[0], gpt(idx)[0])
    assert again.state_to_save().keys() == gpt.state_to_save().keys()


parts_of_models = st.fixed_dictionaries(
    {name: st.sampled_from(choices) for name, choices in variants.CHOICES.items()}
    | {name: st.booleans() for name in variants.SWITCHES} | {"logit_softcap": st.sampled_from([0.0, 3.0])})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(parts_of_models)
def test_any_combination_trains_and_generates(parts):
    gpt = trained_looking(**parts)
    optimizer = gpt.configure_optimizers(0.1, 1e-2, "cpu", "muon")
    idx = ids(4, 17)
    losses = []
    for _ in range(6):
        mean_loss = gpt(idx[:, :-1], idx[:, 1:])[1]
        mean_loss.backward()
        assert all(p.grad is not None for p in gpt.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_loss.item())
    assert losses[-1] < losses[0]
    generated = gpt.generate(idx[:, :6], 10, temperature=0)
    assert torch.equal(generated[:, -1:], gpt(generated[:, :-1])[0][:, -1:].argmax(-1))


def test_every_part_is_checked_has_a_flag_and_is_known_to_the_export():
    flags = vars(parse_args([]))
    fields = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
    gpt2 = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "num_tokens"}
    parts = fields.keys() - gpt2
    assert parts == {*variants.CHOICES, *variants.SWITCHES, "logit_softcap"}
    assert all(name in recipe.SHAPE and flags[name] == fields[name] for name in parts - {"gelu"})
    assert {*recipe.MODEL_VARIANTS} == parts - {"gelu", "bias"}
    assert variants.beyond_gpt2(GPTConfig(**EVERYTHING)).keys() == parts - {"gelu", "bias", "zero_init"}


def test_a_variant_that_init_from_lacks_is_refused(shards, tmp_path, learned):
    make.small_checkpoint(tmp_path / "log", make.small_gpt(block_size=32), tokenizer=learned)
    flags = ["--init_from", tmp_path / "log", "--norm", "rmsnorm", "--embedding_norm"]
    process = run_here(train_gpt2, *flags_of(shards, tmp_path / "new", *flags))
    assert_refused(process, "does not have --norm rmsnorm --embedding_norm: add --norm layernorm "
                            "--no-embedding_norm")
    remedy = ["--norm", "layernorm", "--no-embedding_norm", "--max_steps", 1]
    train(shards, tmp_path / "new", *flags, *remedy)


@pytest.mark.parametrize("name", [*variants.ACTIVATIONS, *variants.NORMS])
def test_every_activation_and_norm_trains(name):
    part = {"mlp" if name in variants.ACTIVATIONS else "norm": name}
    gpt, idx = trained_looking(**part), ids(2, 9)
    gpt(idx[:, :-1], idx[:, 1:])[1].backward()
    assert all(p.grad.any() for p in gpt.parameters())


@pytest.mark.parametrize("variant", [LLAMA, EVERYTHING], ids=["swiglu_rmsnorm", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_variant_compiles_to_one_graph_with_the_same_gradients(variant, dtype):
    gpt, x, y = trained_looking(**variant).train(), ids(2, 16), ids(2, 16, seed=1)
    results = []
    for model in (gpt, torch.compile(gpt, backend="aot_eager", fullgraph=True)):
        gpt.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(x, y)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in gpt.parameters())])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for plain, compiled in zip(*results):
        assert (plain - compiled).norm() <= tolerance * plain.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_variant_trains_in_16_bits_like_in_32(shards, tmp_path, dtype):
    log = train(shards, tmp_path / "16", *MODERN, "--dtype", dtype)
    exact = train(shards, tmp_path / "32", *MODERN)
    losses = [key for key in exact if key[1] in ("train", "val")]
    assert_close({key: log[key] for key in losses}, {key: exact[key] for key in losses}, tolerance=0.1)


# ---------------------------------------------------------------------------------------- optimizer, schedule


@pytest.mark.parametrize("columns", [16, 24, 32, 128])  # from twice the rows on, in another order
def test_orthogonalize_changes_the_singular_values_alone(columns):
    x = torch.randn(3, 16, columns)
    x[0, 0] = 0
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / x.norm(dim=(1, 2)).unsqueeze(1)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert s[1:].max() < 1.3 and (columns < 128 or s[1:].min() > 0.6)
    torch.testing.assert_close(optim.orthogonalize(x), (u * s.unsqueeze(1) @ v).float(), rtol=0, atol=1e-4)
    assert optim.orthogonalize(torch.zeros(1, 4, columns)).eq(0).all()


@pytest.mark.parametrize("max_stack", [optim.MAX_STACK, 600, 1])  # all of a shape at once, two, one
def test_muon_updates_as_torch_does(monkeypatch, max_stack):
    """torch.optim.Muon orthogonalizes in bf16, one matrix at a time, and does not cut c_attn into three."""
    monkeypatch.setattr(optim, "MAX_STACK", max_stack)
    weights = [torch.nn.Parameter(torch.randn(size)) for size in ((16, 16), (64, 16), (16, 64), (16, 16))]
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    before = [weight.detach().clone() for weight in weights]
    ours = optim.Muon(dict.fromkeys(weights, 1), 0.1, 0.2, 0.9, 0.2)
    theirs = torch.optim.Muon(copies, lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for weight, copy in zip(weights, copies):
            weight.grad = torch.randn_like(weight)
            copy.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    for weight, copy, first in zip(weights, copies, before):
        assert (weight - copy).norm() < 0.03 * (copy - first).norm()


def test_muon_takes_the_matrices_of_the_blocks_and_cuts_what_is_stacked():
    gpt = make.small_gpt(**EVERYTHING)
    adamw, muon = gpt.configure_optimizers(0.1, 1e-3, "cpu", "muon").optimizers
    names = {p: name for name, p in gpt.named_parameters()}
    cut = {names[p].split(".", 3)[3]: count for p, count in muon.matrices.items()}
    assert cut == {"attn.c_attn.weight": 3, "attn.c_proj.weight": 1, "mlp.c_fc.weight": 2,
                   "mlp.c_proj.weight": 1}
    assert len(muon.matrices) == 8
    rest = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert rest == set(names.values()) - {names[p] for p in muon.matrices}
    p = gpt.transformer.h[0].attn.c_attn.weight
    for each in gpt.parameters():
        each.grad = torch.randn_like(each)
    before, update = p.detach().clone(), p.grad * (1 - 0.95) * 0.95 + p.grad * 0.05
    muon.step()
    expected = torch.cat([optim.orthogonalize(part[None])[0] for part in update.chunk(3)])
    torch.testing.assert_close(before * (1 - 1e-4) - p, 1e-3 * 0.2 * 4 * expected, rtol=1e-3, atol=1e-6)


def test_ranks_share_any_number_of_matrices(tmp_path):
    script = tmp_path / "share.py"
    script.write_text("""
import torch
from kit.ranks import Ranks
ranks, computed = Ranks("cpu", 60), []
for count in (1, 2, 5):
    items = torch.arange(2.0 * count).view(count, 2)
    shared = ranks.share(lambda part: (computed.append(len(part)), part * 3)[1], items)
    assert torch.equal(shared, items * 3)
assert computed == [[1, 1, 3], [1, 2]][ranks.rank], computed
ranks.leave()
""")
    run_script("torchrun", 2, script, env={"PYTHONPATH": str(ROOT)})


def test_the_schedule_wsd():
    args = parse_args("--schedule wsd --max_steps 100 --warmup_steps 10 --max_lr 1 --min_lr 0.2 "
                      "--decay_fraction 0.4".split())
    assert [get_lr(step, args) for step in (0, 9, 10, 59, 60)] == [0.1, 1, 1, 1, 1]
    assert [get_lr(step, args) for step in (80, 100)] == pytest.approx([0.6, 0.2])
    args.decay_fraction = 1.0  # begins at the end of the warm-up
    assert [get_lr(step, args) for step in (9, 10, 55)] == pytest.approx([1, 1, 0.6])


def test_a_run_extended_in_its_stable_phase_continues_exactly(shards, tmp_path):
    flags = ["--schedule", "wsd", "--decay_fraction", 0.25, "--optimizer", "muon"]
    whole = train(shards, tmp_path / "whole", *flags, "--max_steps", 16)
    train(shards, tmp_path / "log", *flags, "--max_steps", 12)
    for name in ("ckpt_000012", "best"):  # step 8 is in the stable phase of both
        shutil.rmtree(tmp_path / "log" / name)
    flags += ["--max_steps", 16, "--resume", "--allow_change", "max_steps"]
    assert train(shards, tmp_path / "log", *flags) == whole


# --------------------------------------------------------------------------------------------------- resumed


COMPILED = [pytest.param([*flags, "--compile"], id=f"{name} compiled", marks=pytest.mark.slow)
            for name, flags in (("swiglu_rmsnorm", as_flags(LLAMA)), ("modern", MODERN))]


@pytest.mark.parametrize("flags", [
    pytest.param(as_flags(LLAMA), id="swiglu_rmsnorm"), pytest.param(MODERN, id="modern"), *COMPILED])
def test_a_killed_variant_resumes_in_the_same_bits(shards, tmp_path, flags):
    whole = Run(tmp_path / "whole", train(shards, tmp_path / "whole", *flags))
    run_until_killed("train_gpt2.py", *flags_of(shards, tmp_path / "log", *flags), fault="at_step(7, kill)")
    run_script("train_gpt2.py", *flags_of(shards, tmp_path / "log", *flags), "--resume")
    assert_same_end(tmp_path / "log", whole)


@pytest.mark.parametrize("flags", [
    pytest.param(as_flags(LLAMA), id="swiglu_rmsnorm", marks=pytest.mark.slow),
    pytest.param(MODERN, id="modern"), *COMPILED])
def test_two_ranks_train_the_same_variant_and_a_killed_one_resumes_in_the_same_bits(shards, tmp_path, flags):
    alone = train(shards, tmp_path / "alone", *flags)
    run_script("torchrun", 2, "train_gpt2.py", *flags_of(shards, tmp_path / "whole", *flags))
    whole = Run(tmp_path / "whole", read_log(tmp_path / "whole"))
    assert_close(whole.log, alone)
    command = ["torchrun", 2, "train_gpt2.py", *flags_of(shards, tmp_path / "log", *flags)]
    process = start_script(*command)
    wait_for_line(process, "step     6 |")
    kill_all(process)
    run_script(*command, "--resume")
    assert_same_end(tmp_path / "log", whole)


# --------------------------------------------------------------------------------------------------- exported


BEYOND = ("mlp", "norm", "position", "qk_norm", "logit_softcap", "value_residual", "embedding_norm",
          "x0_shortcut")


@pytest.mark.parametrize("variant", [*({name: EVERYTHING[name]} for name in BEYOND), EVERYTHING],
                         ids=[*BEYOND, "everything"])
def test_what_transformers_has_no_class_for_is_not_exported(variant, tmp_path):
    with pytest.raises(UserError) as refused:
        trained_looking(**variant).save_pretrained(tmp_path / "out")
    named = set(variant) & set(BEYOND)
    if variant is EVERYTHING:  # the rest would fit into a Qwen3
        named -= {"mlp", "norm", "position", "qk_norm"}
    assert all(f"{name} {variant[name]}" in str(refused.value) for name in named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more, kind", [
    (dict(), "llama"), (dict(tie_embeddings=False), "llama"), (dict(bias=True), "llama"),
    (dict(qk_norm=True), "qwen3"), (dict(qk_norm=True, tie_embeddings=False), "qwen3"),
], ids=str)
def test_a_published_class_that_fits_computes_the_same(more, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    gpt = trained_looking(**{**LLAMA, **more}, block_size=32, n_embd=48, num_tokens=500)
    idx = ids(2, 32) % 500
    gpt.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == kind and theirs.config.pad_token_id is None  # it would not be trained
    with torch.no_grad():
        assert (theirs(idx).logits - gpt(idx)[0][..., :500]).abs().max() < 1e-4


def test_a_run_with_variants_is_exported_with_a_card_that_names_them(learned, tmp_path):
    flags = {**LLAMA, "optimizer": "muon", "max_steps": 2}
    gpt = trained_looking(**LLAMA)
    path = make.small_checkpoint(tmp_path / "log", gpt, tokenizer=learned, identity=recipe.identity_of(flags))
    checkpoint.export(path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A GPT-2 with mlp swiglu, norm rmsnorm, position rope of" in card
    assert "| optimizer | muon |" in card and "muon_momentum" not in card and "| schedule" not in card
