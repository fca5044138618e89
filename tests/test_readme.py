"""The README says what is there: its commands have these flags, and the files and functions that it names exist."""
import ast
import re
from dataclasses import fields

import pytest
from conftest import ROOT

from config import CONFIGS, flag

TEXT = (ROOT / "README.md").read_text(encoding="utf8")
COMMANDS = sorted({(script, *re.findall(r"--[a-z][a-z-]*", rest)) for script, rest in re.findall(
    r"\b((?:benchmarks/)?\w+\.py)((?: +[^`&|#\n]+)?)", TEXT) if "--" in rest})


def test_there_are_two_set_up_commands():
    """.ci/run runs exactly these: what is indented in their section."""
    section = TEXT.split("## Two commands")[1].split("\n## ")[0]
    install, check = re.findall("^    (.*)$", section, re.M)
    assert install.endswith("&& python sft.py --config tiny") and check.endswith("&& python -m pytest -q")


@pytest.mark.parametrize("script, flags", [(script, flags) for script, *flags in COMMANDS])
def test_its_commands_have_these_flags(script, flags):
    """Usual mistake: a flag is renamed, and the README keeps the old one."""
    known, step = {}, script.removesuffix(".py")
    for name, kind in CONFIGS.items():
        known[name] = {flag(field.name) for field in fields(kind)}
    known["benchmarks/sweep"] = set().union(*known.values())        # hands them on
    known = known.get(step) or set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text(encoding="utf8")))
    assert known >= {*flags}, flags


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`([\w/]+\.py:\w+)`", TEXT))))
def test_what_it_names_is_there(place):
    path, name = place.split(":")
    tree = ast.parse((ROOT / path).read_text(encoding="utf8"))
    assert name in {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("path", sorted({*re.findall(r"`((?:tests/|benchmarks/)?\w+\.py)`", TEXT), *re.findall(r"\]\(([\w/.]+)\)", TEXT)}))
def test_the_files_that_it_names_are_there(path):
    assert (ROOT / path).exists()
