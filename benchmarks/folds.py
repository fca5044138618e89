"""Does the reward model learn its labelers' taste, or what people agree on? (InstructGPT 3.5: 5 folds over labelers)

    python benchmarks/folds.py runs/tiny

The labelers in five groups, each held out once: the answers that step 2 ranked are ranked anew by the other labelers,
a reward model learns from these rankings, and is measured on new ones, of its own labelers and of those held out.
Adds "labeler_folds" to the run's evaluation.json and prints a table in Markdown. About a minute a fold on two cores.
"""
import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import RewardConfig, parse  # noqa: E402  (before torch: see there)

import torch  # noqa: E402

import commands  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import reward  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402

FOLDS = 5


def folds(labelers, n=FOLDS):
    """-> [(those who train, those held out)], n of them: everyone is held out once."""
    return [([x for i, x in enumerate(labelers) if i % n != k], list(labelers[k::n])) for k in range(n)]


def ranked_anew(r, judged, labelers):
    """Groups of (text, Verdict) -> their ranks, each group by one of these labelers."""
    return [world.rank(r, *zip(*group), r.choice(labelers)) for group in judged]


def stored(run, config):
    """The answers that step 2 ranked -> [(question's parts, [(text, Verdict)])]"""
    tasks = world.tasks(config.prompts, "train", config.seed + 1000, world.PRACTICE)
    of = {json.dumps(task.parts): task for task in tasks}
    path = max(run.glob("comparisons-*.jsonl"), key=lambda p: p.stat().st_mtime)
    rows = [(of[json.dumps(parts)], answers) for *parts, answers, _ in data.read_comparisons(path)[0]]
    flat = [(task, text) for task, answers in rows for text in answers]
    verdicts = iter(world.judge_many(*zip(*flat)))
    return [(task, [(text, next(verdicts)) for text in answers]) for task, answers in rows]


def table(report):
    """A {name: accuracy} for each fold -> (title, columns, {name: [str]})"""
    return f"reward model, mean of {len(report)} folds (95 % interval)", ["%"], {
        name.replace("_", " "): [evaluate.cell(evaluate.estimate([fold[name] for fold in report]))] for name in report[0]}


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run = Path(sys.argv[1])
    config = commands.stored_config(run, "reward", RewardConfig)
    device, cast, _ = training.compute(config)
    sft, tokenizer, _ = training.load_model(run, "sft", device)
    size, rows = sft.config.block_size, stored(run, config)
    tests = world.tasks(config.eval_prompts, "val", config.seed)
    answers = reward.sample_groups([sft], tokenizer, tests, config, (config.seed, "folds"), cast, mixed=False)
    ids = [reward.encode(tokenizer, task.parts, [text for text, _ in group], size) for task, group in zip(tests, answers)]
    report = []
    for k, (inside, outside) in enumerate(folds(world.LABELERS)):
        r = random.Random(f"folds {config.seed} {k}")
        ranks = ranked_anew(r, [group for _, group in rows], inside)
        comparisons = [(*task.parts, [text for text, _ in group], rank)
                       for (task, group), rank in zip(rows, ranks) if len(set(rank)) > 1]
        torch.manual_seed(training.seed_of(config.seed, "folds", k))
        model = reward.RewardModel(sft, tokenizer.assistant if config.likelihood else None, config.likelihood).to(device)
        with tempfile.TemporaryDirectory() as folder:
            reward.train(replace(config, fresh=True), folder, model, reward.encode_groups(tokenizer, comparisons, size),
                         tokenizer.pad, cast)
        scores = reward.score_many(model, ids, tokenizer.pad, cast)
        report.append({name: reward.accuracy(scores, reward.preferred(reward.table(ranked_anew(r, answers, who))))
                       for name, who in (("own_labelers", inside), ("held_out_labelers", outside))})
        print(f"fold {k + 1} of {FOLDS}: " + ", ".join(f"{name} {100 * v:.1f} %" for name, v in report[-1].items()), flush=True)
    commands.add_to_evaluation(run, labeler_folds=report)
    print("\n" + evaluate.markdown(*table(report)))


if __name__ == "__main__":
    training.command(main)
