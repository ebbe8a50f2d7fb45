"""What a GPU runs and a CPU does not, run on the CPU: the loss inside the compiled graph, in bfloat16."""

import make
import pytest
from runs import Run, assert_same_end, flags_of, read_log, run_script, train

FLAGS = ["--compile", "--dtype", "bfloat16", "--hellaswag_every", 4, "--sample_every", 4]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_graph_of_a_gpu_trains_evaluates_saves_and_resumes(shards, texts, tmp_path, ranks):
    """Nothing is compiled after the warm-up, the loss is that of an uncompiled run, and so is the rest."""
    make.write_jsonl(tmp_path / "hellaswag.jsonl", make.hellaswag_rows(texts, 1))
    script = ["torchrun", 2, "train_gpt2.py"] if ranks == 2 else ["train_gpt2.py"]
    flags = [*FLAGS, "--hellaswag_data", tmp_path / "hellaswag.jsonl", "--micro_batch_size", 4 // ranks]

    def command(name):
        return *script, *flags_of(shards, tmp_path / name, *flags)

    words = run_script(*command("whole"), fault="compiled_as_on_a_gpu()").stdout
    assert "bfloat16 on cpu" in words and ", compiled" in words
    whole = Run(tmp_path / "whole", read_log(tmp_path / "whole"))
    plain = train(shards, tmp_path / "plain", "--dtype", "bfloat16")
    for key in plain:
        if key[1] in ("train", "val"):
            assert float(whole.log[key]) == pytest.approx(float(plain[key]), rel=2e-3)
    assert (12, "hella") in whole.log and words.count("Hello") >= 4

    killed = run_script(*command("killed"), fault="compiled_as_on_a_gpu(); at_step(6, kill)", check=False)
    assert killed.returncode != 0
    run_script(*command("killed"), "--resume", fault="compiled_as_on_a_gpu()")
    assert_same_end(tmp_path / "killed", whole)
