"""The whole recipe with several seeds: mean, lowest and highest of every number that evaluate.py gives.

    python evaluate.py --config tiny --seeds 3 [--out runs/tiny]

Runs what is missing of it, in runs/<config>/seed<S>/ (a stopped run goes on), prints the tables as they stand
in the README, and writes <out>/evaluation.json: {"mean", "low", "high", "n"} over the seeds.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import commands  # noqa: E402
import evaluate  # noqa: E402
import training  # noqa: E402

STEPS = (("sft", "sft.py"), ("reward", "reward.py"), ("ppo", "ppo.py"), ("ppo_no_ptx", "ppo.py", "--ptx-coef", "0"),
         ("", "evaluate.py"))


def run(config, seed, folder):
    """The stages that this seed's run lacks, and its evaluation -> what evaluation.json holds."""
    for stage, script, *more in STEPS:
        if not training.finished(folder, stage):
            commands.python(script, "--config", config, "--seed", seed, "--out", folder, *more)
    report = json.loads((folder / "evaluation.json").read_text(encoding="utf8"))
    return {key: value for key, value in report.items() if key != "made_of"}       # file times have no mean


def merge(values):
    """The same nested report of several seeds -> one: every estimate and number its mean, lowest and highest."""
    first = values[0]
    if isinstance(first, dict) and "low" not in first:
        return {key: merge([v[key] for v in values]) for key in first if all(key in v for v in values)}
    numbers = [v["mean"] if isinstance(v, dict) else v for v in values]
    if not all(isinstance(number, (int, float)) for number in numbers):
        return first                            # answers and curves: the first seed's
    n = len(numbers)
    return {"mean": sum(numbers) / n, "low": min(numbers), "high": max(numbers), "n": n}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = (args.out or Path("runs") / args.config).resolve()
    report = merge([run(args.config, seed, folder / f"seed{seed}") for seed in range(1, args.seeds + 1)])
    training.save_atomically(report, folder / "evaluation.json")
    for table in evaluate.tables(report):
        print("\n" + evaluate.markdown(*table))
    print(f"\nmean (lowest to highest) of {args.seeds} seeds; all numbers: {folder / 'evaluation.json'}")


if __name__ == "__main__":
    training.command(main)
