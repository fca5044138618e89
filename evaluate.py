"""What each step bought: the stages of a run answer held-out prompts, and the exact judge decides.

    python evaluate.py --config tiny

Prints the table and writes it to <run>/evaluation.json, nested objects; an estimate is always {"mean", "low", "high",
"n"}, with its 95 % interval. Temperature 1, except in the keys that end in _greedy. Rows: `base_few_shot` is the
pretrained model, shown three examples of the category before each question; the others read the bare prompt.
"""
import math
import time

import data
import training
import world
from config import UserError, parse
from training import say

SETS = {"test": "", "test_phrasing": "_unseen_phrasing", "test_combination": "_unseen_combination"}
FEW_SHOT = "base_few_shot"


def estimate(values):
    """The mean of n numbers with its 95 % interval: Wilson's for a proportion, the normal one otherwise."""
    n, mean = len(values), sum(values) / max(1, len(values))
    if not n:                                   # nothing was measured, so nothing is excluded
        return {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    z = 1.96
    if all(v in (0, 1) for v in values):        # stays inside [0, 1], also where all are right
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    else:
        middle, half = mean, z * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return {"mean": mean, "low": middle - half, "high": middle + half, "n": n}


def few_shot_prompt(tokenizer, task, examples, room):
    """Three worked examples of the category and then the question, as a document -> ids; fewer where room is short."""
    def text(t, answer):
        return f"Question: {t.prompt}\nAnswer: {answer}"
    for n in range(len(examples), -1, -1):
        ids = [tokenizer.end] + tokenizer.encode("\n\n".join([text(t, t.output) for t in examples[:n]] + [text(task, "")]))
        if len(ids) <= room:
            return ids
    return ids[-room:]


def prompts_of(tokenizer, tasks, few_shot, config, context):
    """What the model reads of each task; what is longer than the context loses its beginning."""
    if not few_shot:
        return [data.encode_prompt(tokenizer, *t.parts)[1 - context:] for t in tasks]
    shown = world.tasks(9 * len(world.CATEGORIES), "train", config.seed + 1)
    by_category = {c: [t for t in shown if t.category == c] for c in world.CATEGORIES}
    room = max(context - 64, context // 2)
    return [few_shot_prompt(tokenizer, t, by_category[t.category][i % 3::3], room) for i, t in enumerate(tasks)]


def respond(model, tokenizer, tasks, few_shot, temperature, config, cast):
    """-> [Answer]: one to every task."""
    prompts = prompts_of(tokenizer, tasks, few_shot, config, model.config.block_size)
    answers = training.respond(model, tokenizer, prompts, 100, temperature, config.seed, cast, config.batch_size)
    if few_shot:                                # a base goes on with the next question: its answer ends before it
        cut = [a.text.split("\n\nQuestion:") for a in answers]
        answers = [a._replace(text=parts[0], ended=a.ended or len(parts) > 1) for a, parts in zip(answers, cut)]
    return answers


def tabulate(tasks, verdicts):
    """The estimates of one stage on one set of prompts -> {name: {category: estimate}}."""
    groups = {"overall": range(len(tasks))}
    groups |= {c: [i for i, t in enumerate(tasks) if t.category == c] for c in world.CATEGORIES}
    found = {name: {g: estimate([float(getattr(verdicts[i], attribute)) for i in members]) for g, members in groups.items()}
             for name, attribute in (("accuracy", "right"), ("gold", "score"))}
    for name in ("stopped", "plain", "kept"):
        found[name] = estimate([float(getattr(v, name)) for v in verdicts])
    unanswerable = [float(not v.supported) for t, v in zip(tasks, verdicts) if not t.answerable]
    found["hallucination"] = estimate(unanswerable)
    return found


def show(title, columns, rows):
    """A table: columns [name], rows {stage: [estimate]}, in percent."""
    say(f"\n{title}\n" + " " * 14 + "".join(f"{name:>11}" for name in columns))
    for stage, estimates in rows.items():
        say(f"{stage:14}" + "".join(f"{100 * e['mean']:10.1f}%" for e in estimates))


def main():
    config, _ = parse("evaluate", description=__doc__)
    started, folder = time.perf_counter(), training.run_path(config)
    training.set_up_cpu(config.threads)
    device = training.pick_device(config.device)
    cast = training.autocast(device, training.pick_dtype(config.dtype, device)[0])
    stages = [s for s in ("base", "sft", "ppo_no_ptx", "ppo") if training.finished(folder, s)]
    if not stages:
        raise UserError(f"{folder} holds no model yet. Train one first: python sft.py --config tiny")
    report = {"seed": config.seed, "seconds": {}}
    sets = {name: world.tasks(config.per_category * len(world.CATEGORIES), name) for name in SETS}
    for stage in stages:
        model, tokenizer, facts = training.load_model(folder, stage, device)
        report["seconds"][stage] = facts["seconds"]
        label = FEW_SHOT if stage == "base" else stage
        for set_name, suffix in SETS.items():
            for temperature, greedy in ((1.0, ""), (0.0, "_greedy")):
                training.progress(f"  {label}: {set_name}{greedy}")
                answers = respond(model, tokenizer, sets[set_name], stage == "base", temperature, config, cast)
                verdicts = world.judge_many(sets[set_name], [a.text for a in answers], [a.ended for a in answers])
                for name, value in tabulate(sets[set_name], verdicts).items():
                    report.setdefault(name + suffix + greedy, {})[label] = value
    rows, columns = list(report["accuracy"]), ("overall", *world.CATEGORIES)
    names = [name.replace("tion", ".").replace("ing", ".")[:10] for name in columns]
    show("accuracy at temperature 1", names, {row: [report["accuracy"][row][c] for c in columns] for row in rows})
    show("accuracy, greedy", names, {row: [report["accuracy_greedy"][row][c] for c in columns] for row in rows})
    keys = {"accuracy": "accuracy", "phrasing": "accuracy_unseen_phrasing", "combinat.": "accuracy_unseen_combination",
            "gold": "gold", "greedy": "gold_greedy"}
    more = {"plain": "plain", "stopped": "stopped", "made up": "hallucination"}
    show("overall: accuracy, also on unseen phrasings and combinations; gold (mean score), also greedy; habits and ends",
         [*keys, *more], {row: [report[key][row]["overall"] for key in keys.values()]
                          + [report[key][row] for key in more.values()] for row in rows})
    training.save_json(report, folder / "evaluation.json")
    say(f"\n{report['accuracy'][rows[0]]['overall']['n']} prompts a set; all numbers with their 95 % intervals are in "
        f"{folder / 'evaluation.json'} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    training.command(main)
