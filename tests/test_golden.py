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
MODERN_LOSSES = [
    4.158883, 4.136565, 4.084736, 3.996345, 3.880984, 3.711015, 3.597600,
    3.412264, 3.279353, 3.184551, 3.028204, 2.930288, 2.800316, 2.680636,
    2.700378, 2.465709, 2.474818, 2.468708, 2.437182, 2.388331,
]


@pytest.mark.parametrize("flags, losses", [([], LOSSES), (MODERN, MODERN_LOSSES)], ids=["GPT-2", "modern"])
def test_the_first_twenty_losses(tmp_path, flags, losses):
    write_tokens(tmp_path)
    log = train(ROOT, tmp_path, tmp_path / "log", *map(str, flags))
    assert [float(log[step, "train"]) for step in range(20)] == pytest.approx(losses, abs=1e-4)
