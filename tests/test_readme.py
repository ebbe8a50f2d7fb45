"""The README's commands, run in order in a copy of the project. Blocks that need more say so above them."""

import re
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
# a block, and the comment above it that says why it is not run
SKIPPED = r"(<!-- the README's test skips this block: [^\n]+ -->\n)?"
BLOCKS = re.findall(SKIPPED + r"```(sh|python)\n(.*?)```", README, re.DOTALL)
SCRIPTS = [*ROOT.glob("*.py"), ROOT / "kit/formats.py"]  # which has those of all that read texts
FLAGS = set(re.findall(r'"(--[a-z_0-9]+)"', "".join(path.read_text() for path in SCRIPTS)))


def test_the_blocks_run_in_order(tmp_path, texts, gpt2_tokenizer):
    """With a few steps instead of all: what is tested is that each command works after those before it."""
    copy = shutil.copytree(ROOT, tmp_path / "gpt2", ignore=shutil.ignore_patterns(
        ".*", "log*", "data", "tests", "__pycache__", "edu_fineweb10B"))
    (copy / "my.txt").write_text("\n".join(texts[:30]))
    shorter = {"demo.txt\n": "demo.txt --max_steps 4 --save_every 4 --val_every 4 --val_tokens 4096\n",
               "--max_steps 200": "--max_steps 2 --warmup_steps 1 --val_tokens 1024",
               "python ": f"{sys.executable} "}
    ran = 0
    for skipped, language, text in BLOCKS:
        if skipped:
            continue
        for old, new in shorter.items():
            text = text.replace(old, new)
        command = ["bash", "-ec", text] if language == "sh" else [sys.executable, "-c", text]
        process = subprocess.run(command, cwd=copy, env=environment(), capture_output=True, text=True,
                                 stdin=subprocess.DEVNULL, timeout=280)
        assert process.returncode == 0, text + process.stdout + process.stderr
        ran += 1
    assert ran >= 3


def test_the_readme_is_short_and_names_flags_and_files_that_exist():
    assert len(README.splitlines()) <= 250
    named = {f"--{name}" for name in re.findall(r"(?<![\w-])--(?:no-)?([a-z]\w+)", README)}
    others = {"--standalone", "--nproc_per_node", "--index", "--model", "--model_args", "--tasks",  # not ours
              "--eval_only", "--init_from", "--start", "--num_samples"}
    recipe = (ROOT / "kit/recipe.py").read_text() + (ROOT / "kit/flags.py").read_text()
    assert not {flag for flag in named - FLAGS - others if f'"{flag[2:]}"' not in recipe}
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert name.startswith("http") or (ROOT / name).exists(), name


DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_the_documents_work(path):
    for name in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert name.startswith("http") or (path.parent / name).exists(), name
