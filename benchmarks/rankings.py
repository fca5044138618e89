"""How many rankings a reward model needs: reward.py --data on 20, 50, ... of a file's, measured on others of the file.

    python benchmarks/rankings.py runs/mine preferences.json --counts 20 50 150 700
    python benchmarks/rankings.py runs/tiny runs/tiny/comparisons-*.jsonl --held-out 400 --likelihood 0

The run needs its stage sft; the file is as reward.py --data takes it. For each of --seeds (default 3) its prompts are shuffled
anew and --held-out (300) of them held out. Further flags go to reward.py. Prints Markdown: % of the held-out pairs in the right
order, mean (lowest-highest); nothing is written into the run.
"""
import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import commands  # (before torch: see there)
import data
import evaluate
import training
from config import UserError

FIELDS = ("instruction", "input", "history", "responses", "ranks")


def split(comparisons, held_out, counts, seed):
    """-> (records to measure on, {count: records to learn from}), the smaller sets inside the larger; no prompt on both sides."""
    shuffled = random.Random(seed).sample(comparisons, len(comparisons))
    others = {json.dumps(record[:3]) for record in shuffled[:held_out]}
    rest = [record for record in shuffled if json.dumps(record[:3]) not in others]
    if len(rest) < max(counts):
        raise UserError(f"{len(rest)} comparisons are left beside those held out: --counts asks for {max(counts)}")
    return [record for record in shuffled if json.dumps(record[:3]) in others], {n: rest[:n] for n in counts}


def accuracy(run, learn, measure, seed, flags):
    """The share of held-out pairs that reward.py's model orders so, after these records."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (*run.glob("sft.*"), run / "tokenizer.json"):
            shutil.copy(path, folder)
        for name, records in (("learn", learn), ("measure", measure)):
            training.save_atomically([dict(zip(FIELDS, record)) for record in records], Path(folder, f"{name}.jsonl"))
        commands.python("reward.py", "--out", folder, "--seed", seed, "--data", f"{folder}/learn.jsonl",
                        "--data-eval", f"{folder}/measure.jsonl", *flags)
        return json.loads(Path(folder, "reward.json").read_text(encoding="utf8"))["measured"]["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("file")
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 50, 200, 1000])
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args, flags = parser.parse_known_args()
    comparisons, found = data.read_comparisons(args.file)[0], {n: [] for n in args.counts}
    for seed in range(1, args.seeds + 1):
        held_out, sets = split(comparisons, args.held_out, args.counts, seed)
        for n, records in sets.items():
            found[n].append(accuracy(args.run, records, held_out, seed, flags))
    cells = [evaluate.cell({"mean": sum(row) / len(row), "low": min(row), "high": max(row)}, 100, 0) for row in found.values()]
    print("\n" + evaluate.markdown("rankings", [*map(str, found)], {" ".join(flags) or "as it is": cells}))


if __name__ == "__main__":
    training.command(main)
