"""All experiments of one run, those that its evaluation.json lacks: what `python evaluate.py --full` adds to it.

    python benchmarks/full.py runs/tiny

About half an hour on two cores; where it is stopped the same command goes on.
"""
import argparse
import json
from pathlib import Path

import commands  # (before torch: see there)
import training

# experiment: its key in evaluation.json, minutes
FULL = {"over_optimisation": ("gold_proxy", 3), "instructions": ("attempted", 1), "tax": ("few_shot_tasks", 1),
        "folds": ("labeler_folds", 8), "sweep ppo.py --ptx-coef 0": ("sweep_ptx_coef", 5),
        "sweep sft.py --epochs 1 2 4 8 16": ("sweep_epochs", 15), "report": ("", 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    known = json.loads((run / "evaluation.json").read_text(encoding="utf8"))
    left = {experiment: minutes for experiment, (key, minutes) in FULL.items() if key not in known}
    for i, (experiment, minutes) in enumerate(left.items()):
        print(f"\n{experiment}: about {minutes} minutes, {sum([*left.values()][i:])} with what follows", flush=True)
        name, *flags = experiment.split()
        commands.python(f"benchmarks/{name}.py", run.resolve(), *flags)


if __name__ == "__main__":
    training.command(main)
