"""Shards of other programs: nanoGPT's, llm.c's, modded-nanogpt's, and prepared shards that were renamed."""

import make
import pytest

from fineweb_edu import prepare
from kit.shards import source_of


@pytest.mark.parametrize("directory, prefix", [
    ("edu_fineweb10B", "edufineweb"), ("fineweb10B", "fineweb"), ("finewebedu10B", "finewebedu"),
    ("my", "my"),
])
def test_shards_have_the_names_that_the_other_programs_look_for(tmp_path, texts, learned, directory, prefix):
    (tmp_path / "a.txt").write_text(texts[0])
    prepare([tmp_path / "a.txt"], tmp_path / directory, {}, learned, file_format="bin")
    names = sorted(path.name for path in (tmp_path / directory).glob("*.bin"))
    assert names == [f"{prefix}_train_000001.bin", f"{prefix}_val_000000.bin"]


def test_the_names_of_fineweb_edu_are_known(tmp_path):
    for prefix in ("finewebedu", "edu_fineweb", "edufineweb", "fineweb"):
        (tmp_path / prefix).mkdir()
        make.write_shards(tmp_path / prefix, prefix, train_000001=range(9))
        assert ("dataset" in source_of(tmp_path / prefix)) == ("edu" in prefix)
