"""fp32 matmuls on the CPU: by oneDNN where it is faster, and still in fp32."""

import make
import pytest
import torch

from kit import device
from kit.device import compile_model, tune
from kit.packed import onednn_is_faster, pack

only_where_faster = pytest.mark.skipif(not onednn_is_faster(), reason="MKL is as fast on this processor")


@pytest.fixture
def precision():
    """A function that returns the matmul precision, which is restored at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def gpt():
    return make.small_gpt(64, 1024, n_embd=128).train()


def step(model):
    """The loss of 8 x 64 tokens, and all gradients."""
    idx = torch.randint(1024, (8, 65), generator=torch.Generator().manual_seed(1))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_onednn_gives_the_same_training_step(precision):
    model = gpt()
    plain = step(model)
    tune("cpu", training=True)
    for value, expected in zip(step(model), plain):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


@only_where_faster
@pytest.mark.parametrize("rows, fan_in, fan_out", [(1024, 768, 2304), (1024, 3072, 768), (512, 768, 50304)])
def test_matmuls_of_the_models_shapes_stay_fp32(precision, rows, fan_in, fan_out):
    tune("cpu", training=True)
    assert precision() == "medium"
    x, w, g = torch.randn(rows, fan_in), torch.randn(fan_out, fan_in), torch.randn(rows, fan_out)
    for a, b in ((x, w.t()), (w.t(), g.t()), (g.t(), x)):
        a, b = (part[:64] if part is a else part[:, :64] for part in (a, b))  # float64 is slow
        exact = a.double() @ b.double()
        # fp32 rounds each addition by 2**-24; bf16 inputs would be off by 2**-9
        assert (a @ b - exact).norm() < 2**-18 * exact.norm()


@only_where_faster
def test_a_step_asks_onednn_for_each_matmul_once(precision, capfd):
    """MKL does none of them, and none is done twice."""
    model = gpt()
    tune("cpu", training=True)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        step(model)
    lines = [line.split(",") for line in capfd.readouterr().out.splitlines() if ",exec,cpu,matmul," in line]
    # A x B as 512x128:128x384; attention's small matmuls have at most 64 rows
    shapes = [line[-2] for line in lines if "512" in line[-2]]
    assert len(shapes) == 3 * (4 * 2 + 1), shapes  # forward, dX and dW of nine layers


@pytest.mark.parametrize("faster, exact, expected", [
    (False, True, "highest"), (True, True, "medium"), (True, False, "highest")])
def test_onednn_is_used_only_where_it_is_faster_and_exact(precision, monkeypatch, faster, exact, expected):
    monkeypatch.setattr(device, "onednn_is_faster", lambda: faster)
    monkeypatch.setattr(torch, "equal", lambda a, b: exact)
    tune("cpu", training=True)
    assert precision() == expected


@pytest.mark.parametrize("bf16, amx, expected", [
    (True, False, True), (True, True, False), (False, False, False)])
def test_onednn_is_faster_on_amd_only(monkeypatch, bf16, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert onednn_is_faster() is expected


PRIVATE = [(torch.cpu, "_is_avx2_supported"), (torch.cpu, "_is_avx512_bf16_supported"),
           (torch.cpu, "_is_amx_tile_supported"), (torch.cpu, "_is_vnni_supported"),
           (torch, "quantize_per_channel"), (torch.ops, "mkldnn"), (torch.ops, "quantized")]


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("owner, name", PRIVATE, ids=[name for _, name in PRIVATE])
def test_a_torch_without_a_private_name_gives_the_same_results(monkeypatch, owner, name, int8):
    """A later version may lack it. That may cost speed, but not results or an error.

    Without VNNI's name, int8 inputs have 7 bits, as on processors without VNNI: twice the rounding.
    """
    idx = torch.randint(500, (2, 12))

    def error_of_packed():
        model = make.with_biases(make.small_gpt(scale=8))
        expected = model(idx)[0]
        pack(model, int8)
        return (model(idx)[0] - expected).norm() / expected.norm()

    with torch.no_grad():
        usual = error_of_packed()
        if owner is torch.ops:
            monkeypatch.setattr(torch.ops, name, object())  # once deleted, torch would look it up again
        else:
            monkeypatch.delattr(owner, name)
        tune("cpu", training=True)
        factor = 2.4 if name == "_is_vnni_supported" else 1.2
        assert error_of_packed() < max(factor * usual, 1e-5) and usual < (0.2 if int8 else 1e-5)


def test_without_inductors_private_settings_the_model_still_compiles(monkeypatch):
    model, idx = make.small_gpt(), torch.randint(500, (2, 12))
    with monkeypatch.context() as patch:
        patch.setattr(device, "INDUCTOR_OPTIONS", {"no such option": True})
        patch.setattr(device, "PARTITIONER_CONFIG", "torch._no_such_module")
        compiled = compile_model(model, "cpu")
    assert torch.allclose(compiled(idx, idx)[1], model(idx, idx)[1], atol=1e-5)
