"""The model: equal to Hugging Face's GPT-2; its loss, its cache, its optimizer, refused settings."""

import copy
import math
import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as model_module
from kit import loss as loss_module
from kit.loss import LinearCrossEntropy, row_slices
from model import GPT, GPT2_SIZES, GPTConfig, KVCache

SMALL = dict(block_size=32, vocab_size=96, n_layer=2, n_head=4, n_embd=32)


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL)).eval()


def tokens(*shape, vocab=96, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def test_parameter_counts():
    with torch.device("meta"):
        sizes = {
            name: GPT(GPTConfig(vocab_size=50257, **shape)).num_params() for name, shape in GPT2_SIZES.items()
        }
        padded = GPT(GPTConfig())
    assert sizes == {
        "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200
    }
    assert padded.num_params() == 124_475_904
    assert padded.num_params(non_embedding=True) == 124_475_904 - 1024 * 768
    assert round(padded.flops_per_token(1024) / 1e6, 1) == 854.7  # 6 N + 12 L T C


@pytest.mark.parametrize("vocab_size, n_layer, n_head, n_embd", [
    (50257, 2, 2, 64), (50304, 3, 5, 40), (300, 1, 8, 64),
])
def test_logits_equal_transformers(tmp_path, vocab_size, n_layer, n_head, n_embd):
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    idx = tokens(2, 64, vocab=min(vocab_size, 50257))
    with torch.no_grad():
        expected, (logits, loss) = theirs(idx).logits, ours(idx)
        assert loss is None and logits.shape == (2, 64, vocab_size)
        assert (logits - expected).abs().max() < 1e-4
        ours.config.num_tokens = vocab_size  # theirs has no padding
        _, loss = ours(idx[:, :-1], idx[:, 1:])
        assert abs(loss - theirs(idx, labels=idx).loss) < 1e-4
    assert not ours.training and all(p.requires_grad for p in ours.parameters())


def test_the_loss_in_eval_mode_ignores_the_padding():
    torch.manual_seed(0)
    padded = GPT(GPTConfig(**{**SMALL, "vocab_size": 128}, num_tokens=96)).eval()
    state = {**padded.state_to_save(), "transformer.wte.weight": padded.lm_head.weight[:96].clone()}
    cut = GPT.from_state(GPTConfig(**SMALL), state)
    idx = tokens(2, 33)
    with torch.no_grad():
        losses = [model(idx[:, :-1], idx[:, 1:])[1] for model in (padded, cut)]
    assert abs(losses[0] - losses[1]) < 1e-5 and abs(losses[0] - math.log(96)) < 0.1


def test_save_pretrained_drops_the_padding(tmp_path):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(**{**SMALL, "vocab_size": 128}, num_tokens=100)).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    back = GPT.from_pretrained(tmp_path)
    idx = tokens(2, 32)
    with torch.no_grad():
        assert torch.allclose(ours(idx)[0][..., :100], theirs(idx).logits, atol=1e-5)
        assert torch.equal(ours(idx)[0][..., :100], back(idx)[0]) and back.config.vocab_size == 100


@pytest.mark.parametrize("change", [
    dict(activation_function="relu"), dict(scale_attn_by_inverse_layer_idx=True),
])
def test_a_gpt2_with_another_architecture_is_refused(tmp_path, change):
    config = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=1, n_head=2, **change)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(change))):
        GPT.from_pretrained(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    GPT(GPTConfig(**SMALL)).save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["transformer.h.0.mlp.c_fc.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks transformer.h.0.mlp.c_fc.weight"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, reason", [
    (dict(n_embd=30), "divisible"), (dict(n_layer=-1), "n_layer"), (dict(n_head=0), "n_head"),
    (dict(dropout=1.5), "dropout"), (dict(num_tokens=97), "num_tokens"), (dict(block_size=2.5), "block_size"),
])
def test_an_impossible_shape_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        GPTConfig(**{**SMALL, **change})


def test_a_token_does_not_change_earlier_logits(gpt):
    idx = tokens(1, 32)
    changed = idx.clone()
    changed[0, 20] += 1
    before, after = gpt(idx)[0], gpt(changed)[0]
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])


def test_the_initialization_gives_a_uniform_first_loss(gpt):
    _, loss = gpt(tokens(8, 32), tokens(8, 32, seed=1))
    assert abs(loss.item() - math.log(96)) < 0.1
    block = GPT(GPTConfig(block_size=8, vocab_size=96, n_layer=8, n_head=4, n_embd=256)).transformer.h[0]
    for weight, std in ((block.attn.c_attn.weight, 0.02), (block.mlp.c_proj.weight, 0.02 / 4)):
        assert abs(weight.std().item() / std - 1) < 0.02


def test_the_model_overfits_one_batch():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SMALL))
    x, y = tokens(4, 32), tokens(4, 32, seed=1)
    optimizer = gpt.configure_optimizers(0.0, 3e-3, "cpu")
    for _ in range(120):
        _, loss = gpt(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def plain_loss(gpt, x, y):
    logits, _ = gpt(x)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))


def test_chunked_loss_has_the_plain_gradients(gpt, monkeypatch):
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 48 * 96)  # five slices of 48 rows, the last of 16
    x, y = tokens(8, 32), tokens(8, 32, seed=1)
    results = []
    for loss in (plain_loss(gpt, x, y), gpt(x, y)[1]):
        gpt.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in gpt.parameters())])
    for plain, chunked in zip(*results):
        assert (plain - chunked).norm() <= 1e-6 * plain.norm()
    with torch.no_grad():
        assert torch.allclose(gpt(x, y)[1], plain_loss(gpt, x, y), rtol=1e-6)


def test_chunked_loss_under_autocast(gpt):
    x, y = tokens(8, 32), tokens(8, 32, seed=1)
    exact = plain_loss(gpt, x, y)
    exact.backward()
    expected = gpt.lm_head.weight.grad.clone()
    gpt.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = gpt(x, y)
    loss.backward()
    assert abs(loss - exact) < 0.01 * exact
    assert (gpt.lm_head.weight.grad - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("mark", [-1, -100])
def test_ignored_targets_do_not_count(gpt, monkeypatch, mark):
    """As in F.cross_entropy: the loss, its gradients and the evaluation, in several slices."""
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 48 * 96)
    x, y = tokens(8, 32), tokens(8, 32, seed=1)
    y[3], y[:, ::5] = mark, mark
    plain = F.cross_entropy(gpt(x)[0].view(-1, 96), y.view(-1), ignore_index=mark)
    loss = gpt(x, y)[1]
    assert torch.allclose(loss, plain, rtol=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(mean, list(gpt.parameters())) for mean in (loss, plain))):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    with torch.no_grad():
        assert torch.allclose(gpt(x, y)[1], plain, rtol=1e-6)
        each = gpt.token_losses(gpt.features(x).flatten(0, 1), y.flatten())
        assert torch.equal(each == 0, y.flatten() == mark)


def test_the_compiled_loss_ignores_targets_and_refuses_a_second_derivative_too():
    weight, x = torch.randn(96, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    y = tokens(40).where(tokens(40, vocab=3, seed=2) > 0, -100)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(x, weight, y):
        return LinearCrossEntropy.apply(x, weight, y, F.linear)

    gradients = [torch.autograd.grad(loss, (x, weight))
                 for loss in (loss_of(x, weight, y), F.cross_entropy(x @ weight.t(), y))]
    for ours, theirs in zip(*gradients):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    with pytest.raises(RuntimeError, match="create_graph|double backward"):  # torch's own words
        torch.autograd.grad(loss_of(x, weight, y), x, create_graph=True)[0].square().sum().backward()


def test_a_batch_without_a_target_has_the_loss_nan_and_no_gradient(gpt):
    """As in F.cross_entropy."""
    x, y = tokens(2, 8), torch.full((2, 8), -100)
    _, loss = gpt(x, y)
    loss.backward()
    assert loss.isnan() and all((p.grad == 0).all() for p in gpt.parameters())
    with torch.no_grad():
        assert gpt(x, y)[1].isnan()


def test_a_negative_target_that_means_nothing_is_refused(gpt):
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="out of bounds"):
            gpt(tokens(2, 8), torch.full((2, 8), -2))


def test_the_mean_over_all_targets_is_left_as_it_is():
    """Multiplied and divided by their number it could be another one."""
    mean = torch.tensor(0.1)
    assert mean * 13 / 13 != mean
    assert torch.equal(loss_module.mean_of_counted(mean, torch.ones(13, dtype=torch.bool)), mean)


def test_a_second_derivative_of_the_loss_is_refused(gpt):
    """It would silently lack the terms that lead through the gradients."""
    x, y = tokens(2, 8), tokens(2, 8, seed=1)
    with pytest.raises(RuntimeError, match="no second derivative.*F.cross_entropy"):
        gpt(x, y)[1].backward(create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):  # the remedy that the message names
        loss = plain_loss(gpt, x, y)
    gradients = torch.autograd.grad(loss, list(gpt.parameters()), create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward()


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_the_head_gradient_does_not_overflow_in_fp16(size):
    """The gradient of a common token's row is a sum over thousands of positions: here up to 600,000."""
    x, weight = size * (1 + torch.rand(2048, 16)), torch.randn(64, 16) / 100
    targets = torch.zeros(2048, dtype=torch.long)
    gradients = []
    for enabled in (True, False):
        head = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            (2048 * LinearCrossEntropy.apply(x, head, targets, F.linear)).backward()
        gradients.append(head.grad)
    assert (gradients[1].abs().max() > 2**16) == (size > 1)
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_has_the_precision_of_attention(gpt, monkeypatch, dtype):
    found, append = [], KVCache.append

    def watched(self, layer, k, v):
        keys, values = append(self, layer, k, v)
        found.append((keys.dtype, values.dtype, self.kv[layer].dtype))
        return keys, values

    monkeypatch.setattr(KVCache, "append", watched)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        gpt.generate(tokens(2, 5), 3)
    assert set(found) == {(dtype, dtype, dtype)}


def test_the_whole_training_pass_is_one_graph(gpt, monkeypatch):
    """A GPU compiles the loss with the rest: neither it nor its slices break the graph."""
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 100 * 96)
    x, y = tokens(8, 32), tokens(8, 32, seed=1)
    results = []
    for model in (gpt, torch.compile(gpt, backend="aot_eager", fullgraph=True)):
        gpt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, loss = model(x, y)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in gpt.parameters())])
    for plain, compiled in zip(*results):
        assert (plain - compiled).norm() <= 1e-2 * plain.norm()


@torch.no_grad()
def test_the_evaluation_pass_is_one_graph(gpt, monkeypatch):
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 100 * 96)
    x, y = tokens(8, 32), tokens(8, 32, seed=1)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        compiled = torch.compile(gpt, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            torch.testing.assert_close(compiled(x, y)[1], gpt(x, y)[1], rtol=tolerance, atol=0)


def test_the_loss_holds_one_slice_of_logits_and_no_copy_of_it(monkeypatch):
    """The largest tensor in the loss is a slice of the logits, allocated once and updated in place. All the
    slices have one size, since a short one would read the whole matrix for a few rows."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = {tensor.data_ptr() for tensor in tree_leaves((args, kwargs))
                     if isinstance(tensor, torch.Tensor)}
            self.sizes += [tensor.numel() for tensor in tree_leaves(result)
                           if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in given]
            return result

    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 100 * 4096)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=4096, n_layer=1, n_head=1, n_embd=8))
    x = tokens(2, 64)  # 128 rows: two slices of 64, not one of 100 and one of 28
    with Made() as made:
        gpt(x, x)[1].backward()
        with torch.no_grad():
            gpt(x, x)
    large = [size for size in made.sizes if size > 8 * 4096]  # more than the matrix itself
    assert large == [64 * 4096] * 4


def test_slices_cover_the_rows_in_multiples_of_16():
    for count in (0, 1, 16, 17, 1000, 4096, 32768):
        x = torch.empty(count, 1)
        slices = row_slices(x, 50304)
        assert [i for rows in slices for i in range(count)[rows]] == list(range(count))
        assert all(rows.start % 16 == 0 for rows in slices)
        sizes = [len(x[rows]) for rows in slices]
        assert not sizes or max(sizes) <= 2**25 / 50304 and max(sizes) - min(sizes) <= 16 * len(sizes)


def test_the_compiled_loss_in_bf16_holds_no_logits_in_fp32():
    """Log-softmax, exp and gradient are one kernel from bf16 to bf16: on a GPU bytes are time."""
    from torch._inductor.utils import run_and_get_code

    weight = torch.randn(4096, 16, requires_grad=True)
    x = torch.randn(64, 16, requires_grad=True)

    @torch.compile(fullgraph=True)
    def loss_of(x, weight, targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return LinearCrossEntropy.apply(x, weight, targets, F.linear)

    _, code = run_and_get_code(loss_of, x, weight, tokens(64, vocab=4096))
    made = re.findall(r"empty_strided_cpu\(\((\d+), (\d+)\).*torch\.(\w+)\)", code[0])
    assert {dtype for rows, columns, dtype in made if {rows, columns} == {"64", "4096"}} == {"bfloat16"}


def test_generating_with_the_cache_equals_generating_without(gpt):
    idx = tokens(3, 5)
    generated = gpt.generate(idx, 27, temperature=0)  # up to the block size
    for _ in range(27):
        logits, _ = gpt(idx)
        idx = torch.cat([idx, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, idx)


def test_beyond_the_context_generation_continues_from_the_last_half(gpt):
    idx = tokens(2, 40)  # longer than the block size itself
    generated = gpt.generate(idx, 45, temperature=0)
    window = idx[:, -32:]
    for _ in range(45):
        window = window if window.size(1) <= 32 else idx[:, -16:]
        new = gpt(window)[0][:, -1:].argmax(-1)
        idx, window = torch.cat([idx, new], dim=1), torch.cat([window, new], dim=1)
    assert torch.equal(generated, idx)
    one = GPT(GPTConfig(block_size=1, vocab_size=96, n_layer=1, n_head=1, n_embd=8)).eval()
    assert one.generate(tokens(1, 3), 5).shape == (1, 8)


def test_padding_is_never_sampled(gpt):
    gpt.config.num_tokens = 3
    gpt.lm_head.weight.data[3:] = 10 * gpt.lm_head.weight.data[0].abs()  # the padding would be likeliest
    for settings in (dict(temperature=0), dict(temperature=5.0), dict(top_k=50), dict(top_p=0.99)):
        assert gpt.generate(tokens(4, 3, vocab=3), 20, **settings).max() < 3
    assert GPTConfig().num_tokens == 50257


def test_only_the_top_k_candidates_are_drawn_from(monkeypatch):
    """A draw costs one random number for each candidate."""
    widths, multinomial = [], torch.multinomial

    def watched(probs, **settings):
        widths.append(probs.size(1))
        return multinomial(probs, **settings)

    monkeypatch.setattr(torch, "multinomial", watched)
    for top_k, top_p in ((5, None), (5, 0.9), (None, 1.0), (1000, None)):
        model_module.next_token(torch.randn(2, 100), 1.0, top_k, top_p, None)
    assert widths == [5, 5, 100, 100]


def test_temperature_top_k_and_top_p_give_the_expected_shares():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().repeat(4000, 1)

    def shares(**settings):
        settings = dict(temperature=1.0, top_k=None, top_p=None) | settings
        drawn = model_module.next_token(logits, generator=torch.Generator().manual_seed(0), **settings)
        return (drawn.flatten().bincount(minlength=4) / 4000)[[1, 3, 0, 2]].tolist()  # likeliest first

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.81) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert (shares(top_p=1e-9) == shares(top_k=1) == shares(temperature=0) == shares(temperature=1e-30)
            == [1, 0, 0, 0])
    assert shares(temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)


@pytest.mark.parametrize("settings, reason", [
    (dict(temperature=-1), "temperature"), (dict(temperature=math.nan), "temperature"),
    (dict(top_k=0), "top_k"), (dict(top_p=0), "top_p"), (dict(top_p=1.1), "top_p"),
    (dict(max_new_tokens=-1), "max_new_tokens"),
])
def test_impossible_sampling_settings_are_refused(gpt, settings, reason):
    with pytest.raises(ValueError, match=reason):
        gpt.generate(tokens(1, 3), **{"max_new_tokens": 1, **settings})
    with pytest.raises(ValueError, match="at least one token"):
        gpt.generate(tokens(1, 0), 1)


def test_the_same_generator_draws_the_same(gpt):
    draws = [gpt.generate(tokens(2, 3), 20, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)


def test_the_fused_update_equals_adamw(gpt):
    plain = copy.deepcopy(gpt)
    fused = gpt.configure_optimizers(0.1, 1e-2, "cpu")
    groups = [{"params": [p for p in plain.parameters() if (p.dim() >= 2) == matrices], "weight_decay": decay}
              for matrices, decay in ((True, 0.1), (False, 0.0))]
    unfused = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    for _ in range(5):
        for one, other in zip(gpt.parameters(), plain.parameters()):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        fused.step()
        unfused.step()
    for one, other in zip(gpt.parameters(), plain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_only_matrices_have_weight_decay(gpt):
    decayed, plain = gpt.configure_optimizers(0.1, 1e-3, "cpu").param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0) and decayed["fused"]
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in plain["params"]} == {1}
    assert sum(p.numel() for p in decayed["params"] + plain["params"]) == gpt.num_params()
    assert decayed["betas"] == (0.9, 0.95) and decayed["eps"] == 1e-8


def test_mfu_and_summary_of_the_124M():
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
    assert gpt.estimate_mfu(500_000, 1024, "NVIDIA H100 80GB HBM3") == pytest.approx(
        854.7e6 * 500_000 / 989e12, rel=1e-3
    )
    assert (gpt.estimate_mfu(500_000, 1024, "NVIDIA H100 PCIe")
            > gpt.estimate_mfu(500_000, 1024, "NVIDIA H100"))
    for unknown in ("a card of tomorrow", "NVIDIA L40", "NVIDIA T400"):
        assert gpt.estimate_mfu(500_000, 1024, unknown) is None
    summary = gpt.summary()
    assert "124,475,904" in summary and "transformer.h.11" in summary and "(2304, 768)" in summary
