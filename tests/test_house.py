"""The layout of the project: who imports whom, and how long a file may be."""

import ast
import re

import pytest
from runs import ROOT

FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for path in (*ROOT.glob("*.py"), *ROOT.glob("kit/*.py")) if path.stem != "__init__"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(tree):
    """The names of all modules that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


IMPORTS = {name: set(imported(tree)) & FILES.keys() for name, tree in TREES.items()}


@pytest.mark.parametrize("name", FILES)
def test_no_module_imports_itself_through_others(name):
    reached, new = set(), set(IMPORTS[name])
    while new:
        reached |= new
        new = {further for module in new for further in IMPORTS[module]} - reached
    assert name not in reached


def test_kit_imports_no_script():
    for name in IMPORTS:
        if name.startswith("kit."):
            outside = {module for module in IMPORTS[name] if not module.startswith("kit.")}
            assert outside <= {"model", "tokenizer"}


def test_the_root_holds_model_py_and_scripts():
    scripts = {name for name, path in FILES.items() if 'if __name__ == "__main__":' in path.read_text()}
    assert {name for name in FILES if "." not in name} - scripts == {"model"}
    assert not any(name.startswith("kit.") for name in scripts)


def test_only_ranks_and_sharding_know_torch_distributed():
    for name, tree in TREES.items():
        names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if "torch.distributed" in names or any(module.startswith("torch.distributed") or "parallel" in module
                                               for module in imported(tree) if module):
            assert name in ("kit.ranks", "kit.sharding")


def test_model_py_does_not_print():
    assert not any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(TREES["model"]))


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    most = {"train_gpt2": 600, "model": 430}.get(name, 650)
    assert len(FILES[name].read_text().splitlines()) <= most
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 110, node.name


def test_the_table_of_faults_names_tests_that_exist():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    table = text.partition("## Faults, ")[2]
    rows = [line.rstrip("| ").rpartition("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    names = re.findall(r"`(\w+)`", "".join(rows))
    assert len(names) > 30 and all(f"def test_{name}(" in tests for name in names)


@pytest.mark.parametrize("name", FILES)
def test_no_linter_rule_is_switched_off_in_a_file(name):
    assert "noqa" not in FILES[name].read_text(encoding="utf-8")
