"""The alignment tax on few-shot tasks (InstructGPT 4.2, Table 14): what the base could do, and each stage still can.

    python benchmarks/tax.py runs/tiny

A base knows no instructions: it is asked as its documents are written. Three passages of a family are shown, and the
beginning of a fourth, "the capital of Peru is"; greedy decoding has to go on with the answer. Nothing asked here was
in a training document, except the countries' facts. Adds "few_shot_tasks" to the run's evaluation.json: {stage:
{"overall" and each category: estimate}}, and prints it in Markdown.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import parse  # noqa: E402  (before torch: see there)

import commands  # noqa: E402
import evaluate  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402

PER_CATEGORY, EXAMPLES = 120, 3


def unfinished(task):
    """A document's passage up to its answer -> (beginning, answer without its last stop), or None where it ends otherwise."""
    answer = task.output.rstrip(".。")
    begin = task.note.rfind(answer)
    if begin <= 0 or len(task.note) - begin - len(answer) > 1:
        return None
    return task.note[:begin].rstrip(" "), answer


def questions():
    """-> [(task, text to go on with, answer)], from held-out tasks, as many of each category"""
    shown = {}
    for task in world.tasks(1500, "train", 17):
        shown.setdefault((task.family, task.language), []).append(task.note)
    found, left = [], dict.fromkeys(world.CATEGORIES, PER_CATEGORY)
    for task in world.tasks(3 * PER_CATEGORY * len(left), "test", 17):
        notes, cut = shown.get((task.family, task.language), ()), unfinished(task)
        if cut and len(notes) >= EXAMPLES and left[task.category]:
            i = left[task.category] = left[task.category] - 1
            examples = [notes[(i + k) % len(notes)] for k in range(EXAMPLES)]
            found.append((task, "\n".join([*examples, cut[0]]), cut[1]))
    return found


def right(asked, texts):
    """Does each text go on with its answer, or, where there are several, with one that the judge accepts? -> bools"""
    lines = [text.strip().split("\n")[:answer.count("\n") + 1] for text, (_, _, answer) in zip(texts, asked)]
    verdicts = world.judge_many([task for task, _, _ in asked], ["\n".join(part) for part in lines])
    return [v.right or text.strip().startswith(answer) for v, text, (_, _, answer) in zip(verdicts, texts, asked)]


table = partial(commands.table, "few-shot tasks, %")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run, asked = Path(sys.argv[1]), questions()
    config, _ = parse("evaluate", ["--out", str(run)])
    (device, cast, _), report = training.compute(config), {}
    for stage in commands.stages(run):
        model, tokenizer, _ = training.load_model(run, stage, device)
        prompts = [[tokenizer.end, *tokenizer.encode(text)] for _, text, _ in asked]
        training.progress(f"  {stage}: {len(asked):,} passages", always=True)
        found = training.respond(model, tokenizer, prompts, 60, 0, 0, cast)
        report[stage] = evaluate.by_group([task for task, _, _ in asked], right(asked, [a.text for a in found]))
    commands.add_to_evaluation(run, few_shot_tasks=report)
    print("\n" + evaluate.markdown(*table(report)))


if __name__ == "__main__":
    training.command(main)
