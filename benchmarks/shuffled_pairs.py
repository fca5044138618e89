"""InstructGPT's footnote 5, repeated: all pairs of a prompt as one batch element, or as rows of their own, shuffled.

    python benchmarks/shuffled_pairs.py runs/tiny [--prompts 1500]

Two reward models learn once from the same rankings of the run's comparisons: first one element a prompt, then every pair
(winner, loser) an element of its own, in random order, so that each answer comes up K - 1 times. Both see the same number
of pairs in a step. Measured on held-out prompts: accuracy in the judge's order and the ranking loss on pairs of held-out
labelers' rankings, against the same loss on what was trained on.
"""
import argparse
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from config import parse  # noqa: E402  (before torch: see there)

import torch  # noqa: E402

import data  # noqa: E402
import reward  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402


def pairs_of(groups):
    """[(ids, ranks)] -> one group of two for every pair that is ranked, in the groups' order."""
    return [((ids[i], ids[j]), (0, 1)) for ids, ranks in groups
            for i in range(len(ids)) for j in range(len(ids)) if ranks[i] < ranks[j]]


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("run")
    flags.add_argument("--prompts", type=int, default=1500)
    flags = flags.parse_args()
    config, _ = parse("reward", ["--out", flags.run])
    device, cast, _ = training.compute(config)
    folder = Path(flags.run)
    sft, tokenizer, _ = training.load_model(folder, "sft", device)
    files = sorted(folder.glob("comparisons-*.jsonl"))
    if not files:
        sys.exit(f"error: {folder} has no comparisons. Make them first: python reward.py --out {folder}")
    comparisons = data.read_comparisons(files[-1])[0][:flags.prompts]
    groups = reward.encode_groups(tokenizer, comparisons, sft.config.block_size)
    pairs = pairs_of(groups)
    random.Random(0).shuffle(pairs)
    per_step = round(config.batch_prompts * len(pairs) / len(groups))
    tasks = world.tasks(300, "val", config.seed)
    answers = reward.sample_groups([sft], tokenizer, tasks, config, (config.seed, "val"), cast, mixed=False)
    print(f"{len(groups)} prompts, {len(pairs)} pairs, {per_step} pairs a step")
    for name, elements, batch in (("one element a prompt", groups, config.batch_prompts), ("shuffled pairs", pairs, per_step)):
        torch.manual_seed(training.seed_of(config.seed, "reward"))
        model = reward.RewardModel(sft, tokenizer.assistant).to(device)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            changed = dataclasses.replace(config, batch_prompts=batch, out=place)
            reward.train(changed, Path(place), model, elements, tokenizer.pad, cast)
        seconds = time.perf_counter() - start
        found = reward.measure(model, tokenizer, tasks, answers, config.seed, sft.config.block_size, cast)
        trained = reward.score_many(model, [ids for ids, _ in groups[:300]], tokenizer.pad, cast)
        seen = reward.accuracy(trained, reward.preferred(reward.table([ranks for _, ranks in groups[:300]])))
        print(f"{name}: {seconds:.0f} s; of the pairs trained on {100 * seen:.1f} % in the labelers' order, of held-out pairs "
              f"{100 * found['accuracy_labelers']:.1f} %; in the judge's order {100 * found['accuracy_gold']:.1f} %")


if __name__ == "__main__":
    training.command(main)
