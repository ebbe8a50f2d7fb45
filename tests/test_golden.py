"""The losses of two small runs, fixed: a change that moves them explains it in LOG.md."""

import pytest
from runs import ROOT
from same_bits import train, write_tokens
from test_variants import MODERN

LOSSES = [
    4.164567, 4.099739, 4.066081, 4.005558, 3.967658, 3.816101, 3.816634,
    3.606425, 3.609496, 3.607257, 3.490832, 3.432545, 3.295777, 3.233789,
    3.344836, 3.105901, 3.136670, 3.107419, 3.145302, 3.148543,
]
MODERN_LOSSES = []


@pytest.mark.parametrize("flags, losses", [([], LOSSES), (MODERN, MODERN_LOSSES)], ids=["GPT-2", "modern"])
def test_the_first_twenty_losses(tmp_path, flags, losses):
    write_tokens(tmp_path)
    log = train(ROOT, tmp_path, tmp_path / "log", *map(str, flags))
    assert [float(log[step, "train"]) for step in range(20)] == pytest.approx(losses, abs=1e-4)
