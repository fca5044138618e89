"""What each step bought: the stages of a run answer held-out prompts, and the exact judge decides.

    python evaluate.py --config tiny

Prints tables and writes <run>/evaluation.json; an estimate is always {"mean", "low", "high", "n"}, with its
95 % interval. Temperature 1, except in the keys that end in _greedy. `base_few_shot` is the pretrained model,
shown three examples of the category before each question; the others read the bare prompt."""
import json
import math
from itertools import product

from config import UserError, parse     # before torch: see there

import torch

import data
import training
import world
from ppo import Episodes, kl_estimates
from sft import held_out_loss, held_out_text, held_out_windows
from training import say

SETS = {"test_phrasing": "_unseen_phrasing", "test_combination": "_unseen_combination", "test": ""}
FEW_SHOT = "base_few_shot"


def estimate(values):
    """The mean of n numbers with its 95 % interval: Wilson's for a proportion, the normal one otherwise."""
    n, z = len(values), 1.96
    if not n:                                   # nothing was measured, so nothing is excluded
        return {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    mean = middle = sum(values) / n
    half = z * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    if all(v in (0, 1) for v in values):        # stays inside [0, 1], also where all are right
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"mean": mean, "low": middle - half, "high": middle + half, "n": n}


def few_shot_prompt(tokenizer, task, examples, room):
    """Worked examples and then the question, as a document -> ids; fewer examples where room is short."""
    texts = [f"Question: {t.prompt}\nAnswer: {'' if t is task else t.output}" for t in (*examples, task)]
    for n in range(len(examples), -1, -1):
        ids = [tokenizer.end, *tokenizer.encode("\n\n".join(texts[:n] + texts[-1:]))]
        if len(ids) <= room:
            break
    return ids[-room:]


def respond(model, tokenizer, tasks, few_shot, temperature, config, cast):
    """-> [Answer]: one to every task."""
    prompts = [data.encode_prompt(tokenizer, *t.parts) for t in tasks]
    if few_shot:                                # three examples each
        n, shown = model.config.block_size, world.tasks(9 * len(world.CATEGORIES), "train", config.seed + 1)
        prompts = [few_shot_prompt(tokenizer, t, [s for s in shown if s.category == t.category][i % 3::3],
                                   max(n - 64, n // 2)) for i, t in enumerate(tasks)]
    found = training.respond(model, tokenizer, prompts, 100, temperature, config.seed, cast,
                             config.batch_size)
    if few_shot:                                # a base goes on with the next question: its answer ends there
        cut = [a.text.split("\n\nQuestion:") for a in found]
        found = [a._replace(text=parts[0], ended=a.ended or len(parts) > 1) for a, parts in zip(found, cut)]
    return found


def by_group(tasks, values):
    """{"overall" and each category: estimate} of one value a task."""
    of = {c: [v for v, task in zip(values, tasks) if task.category == c] for c in world.CATEGORIES}
    return {name: estimate(members) for name, members in {"overall": values, **of}.items()}


def tabulate(tasks, verdicts):
    """The estimates of one stage on one set of prompts -> {name: estimate, or {category: estimate}}."""
    unsupported = [not v.supported for task, v in zip(tasks, verdicts) if not task.answerable]
    return {"accuracy": by_group(tasks, [v.right for v in verdicts]),
            "gold": by_group(tasks, [v.score for v in verdicts]), "hallucination": estimate(unsupported),
            **{name: estimate([getattr(v, name) for v in verdicts]) for name in ("stopped", "plain", "kept")}}


def kl(policy, reference, tokenizer, tasks, answers, cast):
    """KL(π‖π_ref) in nats an answer, from answers sampled of π: the mean of Σ_t k1."""
    first, device, found = 1 - policy.config.block_size, policy.wte.weight.device, []
    prompts = [data.encode_prompt(tokenizer, *t.parts)[first:] for t in tasks]
    for i in range(0, len(prompts), 64):
        e = Episodes(prompts[i:i + 64], [a.ids for a in answers[i:i + 64]], tokenizer.pad, device)
        with torch.no_grad():
            k1, _, _ = kl_estimates(e.logprobs(policy, cast), e.logprobs(reference, cast))
        found += (k1 * e.mask).sum(1).tolist()
    return estimate(found)


def pretraining_loss(model, texts, cast):
    """Held-out loss of step 0, in nats a token, on {name: ids}: what the alignment costs (InstructGPT 4.2)."""
    return {name: held_out_loss(model, held_out_windows(ids, model.config.block_size, 64), cast)
            for name, ids in texts.items()}


def show(title, columns, rows):
    """A table: columns [name], rows {name: [estimate]}, in percent."""
    say(f"\n{title}\n" + " " * 33 + "".join(f"{name[:10]:>11}" for name in columns))
    for name, estimates in rows.items():
        say(f"{name:33}" + "".join(f"{100 * e['mean']:10.1f}%" for e in estimates))


def main():
    config, _ = parse("evaluate", description=__doc__)
    folder, device = training.run_path(config), training.pick_device(config.device)
    training.set_up_cpu(config.threads)
    cast = training.autocast(device, training.pick_dtype(config.dtype, device)[0])
    stages = [s for s in ("base", "sft", "ppo_no_ptx", "ppo") if training.finished(folder, s)]
    if not stages:
        raise UserError(f"{folder} holds no model yet. Train one first: python sft.py --config tiny")
    report = {"seed": config.seed, "seconds": {}, "kl": {}, "pretraining_loss": {}, "win_rate": {}}
    sets = {name: world.tasks(config.per_category * len(world.CATEGORIES), name) for name in SETS}
    models, verdicts, tables, texts, test = {}, {}, {}, None, sets["test"]
    for stage in stages:
        model, tokenizer, facts = training.load_model(folder, stage, device)
        label = FEW_SHOT if stage == "base" else stage
        for (name, tasks), (temperature, greedy) in product(sets.items(), ((0.0, "_greedy"), (1.0, ""))):
            training.progress(f"  {label}: {name}{greedy}")
            found = respond(model, tokenizer, tasks, stage == "base", temperature, config, cast)
            judged = world.judge_many(tasks, [a.text for a in found], [a.ended for a in found])
            for key, value in tabulate(tasks, judged).items():
                tables.setdefault(key + SETS[name] + greedy, {})[label] = value
        for other, theirs in verdicts.items():      # found, judged: the last set's, test at temperature 1
            report["win_rate"][f"{label}_vs_{other}"] = by_group(
                test, [(a.score > b.score) + 0.5 * (a.score == b.score) for a, b in zip(judged, theirs)])
        models[stage], verdicts[label], report["seconds"][stage] = model, judged, facts["seconds"]
        texts = texts or held_out_text(tokenizer, 0)        # the stages of a run share their tokenizer
        report["pretraining_loss"][label] = pretraining_loss(model, texts, cast)
        if stage.startswith("ppo"):
            report["kl"][stage] = kl(model, models["sft"], tokenizer, test, found, cast)
    if training.finished(folder, "reward"):
        report["reward_model"] = json.loads((folder / "reward.json").read_text(encoding="utf8"))["measured"]
    report |= tables
    training.save_atomically(report, folder / "evaluation.json")

    for key in ("accuracy", "accuracy_greedy", "win_rate"):
        show(key, ("overall", *world.CATEGORIES), {row: found.values() for row, found in report[key].items()})
    show("overall, temperature 1", verdicts, {key: [e.get("overall", e) for e in found.values()]
                               for key, found in sorted(tables.items()) if "greedy" not in key})
    say("\nheld-out pretraining loss in nats a token, KL from the SFT model in nats an answer")
    for row, losses in report["pretraining_loss"].items():
        moved = f"   KL {report['kl'][row]['mean']:.2f}" if row in report["kl"] else ""
        say(f"{row:33}documents {losses['documents']:.3f}   prose {losses['prose']:.3f}{moved}")
    say(f"\n{len(test)} prompts a set; all numbers with their intervals are in {folder / 'evaluation.json'}")


if __name__ == "__main__":
    training.command(main)
