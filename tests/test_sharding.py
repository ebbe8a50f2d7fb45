"""--shard: what else a run does with its model, and the flags that sharding does not support.

Faults of sharded runs are in test_training_faults.py and test_divergence.py.
"""

from types import SimpleNamespace

import make
import pytest
import torch
import torch.distributed as dist
from runs import assert_close, assert_refused, flags_of, read_log, run_script, train

import train_gpt2
from kit import recipe, sharding
from kit.files import UserError
from model import GPT, GPTConfig


def test_a_sharded_run_evaluates_and_samples_like_one_process(shards, texts, tmp_path):
    """HellaSwag, samples and a last round of validation in which one of the ranks has no window.

    The whole copy of the model that HellaSwag takes needs no memory afterwards.
    """
    rows = make.write_jsonl(tmp_path / "rows.jsonl", make.hellaswag_rows(texts, count=12))
    more = ["--hellaswag_every", 4, "--hellaswag_data", rows, "--sample_every", 12, "--max_steps", 12,
            "--val_tokens", 9 * 32]
    train(shards, tmp_path / "one", *more)
    find_copies = ('before(DataLoaderLite, "micro_batches", lambda loader, *_, **__: loader.position > 0, '
                   'lambda: print("copies:", [model.lm_head.weight.device.type for model in gc.get_objects() '
                   'if type(model) is GPT]))')
    process = run_script("torchrun", 2, "train_gpt2.py", *flags_of(
        shards, tmp_path / "log", *more, "--shard", "--checkpoint_activations"),
        fault=f"import gc\nif RANK == 1: {find_copies}")
    assert "copies: []" in process.stdout or "copies: ['meta']" in process.stdout
    assert_close(read_log(tmp_path / "log"), read_log(tmp_path / "one"))
    assert process.stdout.count("step 12: samples\nHello, I'm a language model,") == 1


def test_gradients_of_ddp_stay_in_its_buckets():
    """Also those of micro-batches before the last, which are not averaged yet."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = SimpleNamespace(distributed=True, group=dist.group.WORLD)
        model = sharding.distribute(make.small_gpt(32, n_layer=2), ranks)
        x = torch.zeros(1, 8, dtype=torch.long)
        for is_last in (True, True, False):  # the buckets are regrouped in the second step
            sharding.zero_grad(model)
            sharding.sync_gradients(model, on=is_last)
            model(x, x)[1].backward()
        gradients = [p.grad for p in model.parameters()]
        assert len({g.untyped_storage().data_ptr() for g in gradients}) < len(gradients) / 2
        sharding.zero_grad(model)
        assert not any(g.any() for g in gradients)
    finally:
        dist.destroy_process_group()


def test_layers_that_share_tensors_are_sharded(shards, tmp_path):
    variants = ["--value_residual", "--x0_shortcut", "--position", "rope", "--no-tie_embeddings"]
    run_script("torchrun", 2, "train_gpt2.py", *flags_of(shards, tmp_path / "log", *variants, "--shard"))
    assert_close(read_log(tmp_path / "log"), train(shards, tmp_path / "one", *variants))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_are_compiled_between_hooks_that_are_not(checkpointed):
    """FSDP's hooks, around each block, break the graph. One graph serves all blocks."""
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=3, n_head=2, n_embd=16))
    model.checkpoint_activations = checkpointed
    for block in model.transformer.h:
        block.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    graphs, idx = [], torch.zeros(1, 8, dtype=torch.long)

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    torch.compile(model, backend=backend)(idx, idx)[1].backward()
    assert sum("scaled_dot_product_attention" in graph for graph in graphs) == 1
    torch.compiler.reset()


@pytest.mark.slow
def test_a_sharded_run_compiles(shards, tmp_path):
    flags = flags_of(shards, tmp_path / "log", "--shard", "--compile", "--checkpoint_activations")
    process = run_script("torchrun", 2, "train_gpt2.py", *flags)
    assert "cpu" in process.stdout and ", compiled" in process.stdout
    assert_close(read_log(tmp_path / "log"), train(shards, tmp_path / "one"))


def test_a_sharded_run_ends_if_its_compilation_fails(shards, tmp_path):
    """After an error inside, FSDP would drop the gradients of the embeddings without a word."""
    flags = flags_of(shards, tmp_path / "log", "--shard", "--compile")
    process = run_script("torchrun", 2, "train_gpt2.py", *flags, fault="failing_backward_compilation()",
                         check=False)
    assert process.returncode == 1 and "shared memory): use --no-compile" in process.stderr
    assert "step     0 |" not in process.stdout


@pytest.mark.parametrize("flags, words", [
    (["--optimizer", "muon"], "--optimizer muon"), (["--dtype", "float16"], "--dtype float16"),
    (["--micro_batch_size", "auto"], "--micro_batch_size auto"),
])
def test_what_sharding_does_not_support_is_refused(shards, tmp_path, flags, words):
    assert_refused(run_script("train_gpt2.py", *flags_of(shards, tmp_path / "log", "--shard", *flags),
                              check=False), "--shard does not support", words)


def test_ranks_of_a_sharded_model_need_equally_many_micro_batches():
    flags = "--micro_batch_size 4 --sequence_length 32 --total_batch_size 512".split()
    args, sharded = train_gpt2.parse_args(flags), train_gpt2.parse_args([*flags, "--shard"])
    assert [recipe.count_micro_batches(*case) for case in ((args, 3), (sharded, 2))] == [4, 4]
    with pytest.raises(UserError, match="the same number for each of 3 ranks; use --total_batch_size 384 or"):
        recipe.count_micro_batches(sharded, 3)


def test_a_save_in_the_background_may_take_longer_than_the_timeout(shards, tmp_path):
    """Rank 0 waits for it before the next one; the other ranks wait for rank 0."""
    fault = 'if RANK == 0: before(checkpoint, "write", lambda *_: True, lambda: time.sleep(4))'
    flags = flags_of(shards, tmp_path / "log", "--shard", "--background", "--timeout", 2, "--save_every", 1,
                     "--max_steps", 2)
    assert "finished" in run_script("torchrun", 2, "train_gpt2.py", *flags, fault=fault).stdout


def test_one_process_is_not_sharded(shards, whole, tmp_path):
    assert train(shards, tmp_path / "log", "--shard") == whole.log
