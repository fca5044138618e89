"""What the experiments of this folder share: running the project's commands, what a run's files say, a table."""
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config  # noqa: E402, F401  (before torch: see there)

import evaluate  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402


def python(*words):
    """`python words` in the project's folder; where it fails the experiment stops, to go on from there another time."""
    words = [*map(str, words)]
    print("\n$ python " + " ".join(words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        sys.exit(f"error: python {' '.join(words)} failed. The same command goes on from there")


def stages(run):
    """The finished stages of a run, in their order; of an empty one the base, whose absence then is said in one line."""
    return [stage for stage in training.MADE_BY if training.finished(run, stage)] or ["base"]


def stored_config(run, stage, kind):
    """The config that a stage of a run was made with; kind: its class."""
    said = json.loads((run / f"{stage}.json").read_text(encoding="utf8"))["config"]
    return kind(**{field.name: said[field.name] for field in fields(kind) if field.name in said})


def add_to_evaluation(run, **found):
    """Writes what an experiment found into the run's evaluation.json, beside what is there."""
    path = run / "evaluation.json"
    report = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    training.save_atomically(report | found, path)


def table(title, report):
    """{stage: {"overall" and each category: estimate}} -> (title, columns, {stage: [str]})"""
    return title, ("overall", *world.CATEGORIES), {
        stage: [evaluate.cell(e, 100, int(name == "overall"), name == "overall") for name, e in row.items()]
        for stage, row in report.items()}
