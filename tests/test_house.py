"""The house: a file imports only files above it, nothing but the promised packages, and it can be read on a screen."""
import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = ("config", "attention", "model", "sandbox", "data", "world", "training", "sft", "reward", "ppo", "sample", "evaluate")
PACKAGES = {"torch", "numpy", "tiktoken"}
DRAWING = {"matplotlib"}            # only inside the function that draws
SCRIPTS = {"sft", "reward", "ppo", "sample", "evaluate"}
WIDTH, FUNCTION, MAIN, LINES = 115, 60, 80, 3000

FILES = [name for name in ORDER if (ROOT / f"{name}.py").exists()]


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf8")


def imports(tree):
    """[(top-level name of the module, is it imported at the top of the file?)]"""
    at_top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports: there is no package"
            yield node.module.split(".")[0], id(node) in at_top


def test_every_file_has_its_place():
    """A new file at the top level must be put into the reading order, here and in the README."""
    assert {p.stem for p in ROOT.glob("*.py")} <= set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_files_above_it(name):
    """Reading order is import order: who reads top to bottom never meets a name that comes later."""
    above = ORDER[:ORDER.index(name)]
    for module, at_top in imports(ast.parse(source(name))):
        if module in ORDER:
            assert module in above, f"{name}.py imports {module}.py, which comes later"
        elif module in DRAWING:
            assert not at_top, f"{name}.py needs {module} before anything is drawn"
        else:
            assert module in PACKAGES or module in sys.stdlib_module_names, f"{name}.py imports {module}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_fits_the_screen(name):
    """Lines of at most WIDTH characters, functions of one screen."""
    text = source(name)
    wide = [f"{name}.py:{i} has {len(line)}" for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]
    assert not wide, wide
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (MAIN if node.name == "main" else FUNCTION), f"{name}.{node.name}: {length} lines"


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is_for(name):
    """And so does every class; equations need the words beside them."""
    tree = ast.parse(source(name))
    assert ast.get_docstring(tree)
    if name in SCRIPTS:
        assert "training.command(main)" in source(name), "a UserError must end in one line, not in a traceback"


def test_the_whole_is_short():
    assert sum(len(source(name).splitlines()) for name in FILES) <= LINES


@pytest.mark.parametrize("path", [*sorted(SCRIPTS), *sorted(f"benchmarks/{p.stem}" for p in (ROOT / "benchmarks").glob("*.py"))])
def test_config_comes_before_torch(path):
    """config.py sets how threads wait, and torch reads it once. Usual mistake: imports in the order of the alphabet."""
    found = [module for module, at_top in imports(ast.parse(source(path))) if at_top]
    heavy = [i for i, module in enumerate(found) if module in ("torch", "attention", "model", "data", "world", "training")]
    assert not heavy or {*found[:heavy[0]]} & {"config", "commands", *SCRIPTS}, path


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch brings another OpenMP")
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_threads_wait_as_config_says(name):
    """The usual mistake: torch is imported before config.py has set how its threads wait, a third of the speed."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    said = subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], env=env | {"OMP_DISPLAY_ENV": "verbose"},
                          capture_output=True, text=True).stderr
    assert "GOMP_SPINCOUNT = '1000'" in said or "GOMP" not in said, said
