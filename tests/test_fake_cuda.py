"""Devices and dtypes of a GPU's code path without a GPU: fake tensors, which have a device but no memory.

Skipped unless torch was built for CUDA. It needs no GPU, but an environment of its own (several GB):

    python -m venv ENV && ENV/bin/pip install "torch>=2.14,<2.16" -r requirements-dev.txt
    ENV/bin/python -m pytest -n 0 tests/test_fake_cuda.py

The backward pass itself can't run, since autograd's engine asks the driver for the device. The backward of
the loss is called directly.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import hellaswag
from kit.loss import LinearCrossEntropy
from kit.validation import inference
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")
SHAPE = dict(block_size=64, vocab_size=512, n_layer=2, n_head=2, n_embd=32)
MODERN = dict(norm="rmsnorm", mlp="swiglu", position="rope", qk_norm=True, tie_embeddings=False,
              embedding_norm=True, value_residual=True, x0_shortcut=True, logit_softcap=15.0)


@pytest.fixture(params=[{}, MODERN], ids=["gpt2", "modern"])
def model(request, monkeypatch):
    """A GPT of fake tensors on cuda:0. Their values are unknown: read back, they are 1 or True."""
    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: True)
    monkeypatch.setattr(FakeTensor, "item", lambda tensor: 1)
    monkeypatch.setattr(FakeTensor, "pin_memory", lambda tensor: tensor)
    # autocast would switch itself off
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode():
        with torch.device("cuda"):  # Module.to refuses fake tensors
            model = GPT(GPTConfig(**SHAPE, **request.param))
        yield model


def assert_on_gpu(tensors, dtype=torch.float32):
    found = {(str(tensor.device), tensor.dtype) for tensor in tensors}
    assert found == {("cuda:0", dtype)}


def autocast():
    return torch.autocast("cuda", dtype=torch.bfloat16)


def test_the_loss_and_its_gradients(model, monkeypatch):
    saved = []
    real = LinearCrossEntropy.forward

    def forward(ctx, *args):
        ctx.save_for_backward = lambda *tensors: saved.append(tensors)
        return real(ctx, *args)

    monkeypatch.setattr(LinearCrossEntropy, "forward", staticmethod(forward))
    ids = torch.zeros((4, 64), dtype=torch.int64, device="cuda")
    with autocast():
        assert_on_gpu([model(ids, ids)[1]])
        assert_on_gpu([model(ids)[0]], torch.float32 if model.config.logit_softcap else torch.bfloat16)
    context = SimpleNamespace(saved_tensors=saved[0], x_dtype=torch.float32)
    with torch.no_grad():
        dx, dw, *_ = LinearCrossEntropy.backward(context, torch.ones((), device="cuda"))
    assert_on_gpu([dx, dw])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_and_the_clipping(model, optimizer):
    optimizer = model.configure_optimizers(0.1, 1e-3, "cuda", optimizer)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert_on_gpu([torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)])
        optimizer.step()
    assert_on_gpu(model.parameters())


def test_validation_hellaswag_and_samples(model):
    precision = SimpleNamespace(autocast=autocast())
    ids = torch.zeros((4, 64), dtype=torch.int64, device="cuda")
    rows = [hellaswag.Row([1, 2, 3], [[4, 5], [6], [7], [8]], [0, 1, 2, 3])]
    with inference(model, precision, None):
        with torch.no_grad():
            assert_on_gpu([model(ids, ids)[1]])
        assert_on_gpu([hellaswag.score_batch(model, rows, "cuda")])
    for settings in (dict(temperature=0), dict(top_k=50, top_p=0.9)):
        with autocast(), contextlib.closing(model.stream(ids[:, :60], 8, **settings)) as stream:
            assert_on_gpu(stream, torch.int64)
