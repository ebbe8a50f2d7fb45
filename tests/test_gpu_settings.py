"""What a GPU runs and a CPU does not, run on the CPU: the loss inside the compiled graph, in 16 bits."""

import make
import pytest
import torch
from runs import Run, assert_same_end, flags_of, read_log, run_script, train

from model import GPT, GPTConfig

FLAGS = ["--compile", "--hellaswag_every", 4, "--sample_every", 4]


@pytest.mark.parametrize("ranks, dtype", [
    (1, "bfloat16"), pytest.param(2, "bfloat16", marks=pytest.mark.slow),
    pytest.param(1, "float16", marks=pytest.mark.slow),
])
def test_the_graph_of_a_gpu_trains_evaluates_saves_and_resumes(shards, texts, tmp_path, ranks, dtype):
    """Nothing is compiled after the warm-up, the loss is that of an uncompiled run, and so is the rest."""
    make.write_jsonl(tmp_path / "hellaswag.jsonl", make.hellaswag_rows(texts, 1))
    script = ["torchrun", 2, "train_gpt2.py"] if ranks == 2 else ["train_gpt2.py"]
    flags = [*FLAGS, "--dtype", dtype, "--hellaswag_data", tmp_path / "hellaswag.jsonl",
             "--micro_batch_size", 4 // ranks]

    def command(name):
        return *script, *flags_of(shards, tmp_path / name, *flags)

    words = run_script(*command("whole"), fault="compiled_as_on_a_gpu()").stdout
    assert f"{dtype} on cpu" in words and ", compiled" in words
    whole = Run(tmp_path / "whole", read_log(tmp_path / "whole"))
    plain = train(shards, tmp_path / "plain", "--dtype", dtype)
    for key in plain:
        if key[1] in ("train", "val"):
            assert float(whole.log[key]) == pytest.approx(float(plain[key]), rel=2e-3)
    assert (12, "hella") in whole.log and words.count("Hello") >= 4

    killed = run_script(*command("killed"), fault="compiled_as_on_a_gpu(); at_step(6, kill)", check=False)
    assert killed.returncode != 0
    run_script(*command("killed"), "--resume", fault="compiled_as_on_a_gpu()")
    assert_same_end(tmp_path / "killed", whole)


def kept_for_backward(n_layer, n_embd, tokens, vocab_size):
    """What the forward graph of a training step keeps for the backward pass, by torch's partitioner.

    (name, shape, bytes) of each tensor, inputs and parameters excepted.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    forward_graphs = []

    def forward_compiler(graph, inputs):
        forward_graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=forward_compiler, bw_compiler=lambda graph, _: make_boxed_func(graph),
                           partition_fn=min_cut_rematerialization_partition,
                           decompositions=select_decomp_table())
    torch._dynamo.reset()
    model = GPT(GPTConfig(tokens // 2, vocab_size, n_layer, n_embd // 32, n_embd))
    x, y = torch.randint(vocab_size, (2, 2, tokens // 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.compile(model, backend=backend, fullgraph=True)(x, y)[1].backward()
    _, *kept = next(node for node in forward_graphs[0].nodes if node.op == "output").args[0]
    made = [(node.name, node.meta["val"]) for node in kept if node.op != "placeholder"]
    return [(name, tuple(t.shape), t.numel() * t.element_size()) for name, t in made]


def test_the_graph_of_a_gpu_keeps_no_logits_and_a_known_amount_per_layer():
    """38 bytes per token, layer and unit of width, beside the weights in 16 bits."""
    n_embd, tokens, vocab_size = 64, 256, 5120
    one, two = (kept_for_backward(n_layer, n_embd, tokens, vocab_size) for n_layer in (1, 2))
    assert one and not [name for name, shape, _ in two if vocab_size in shape and tokens in shape]
    layer = sum(size for *_, size in two) - sum(size for *_, size in one)
    activations = layer - 2 * 12 * n_embd**2
    assert 30 < activations / (tokens * n_embd) < 39
