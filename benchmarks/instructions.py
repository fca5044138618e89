"""Does an answer do what it was told? (InstructGPT Figure 4: "attempts correct instruction", "follows explicit constraints")

    python benchmarks/instructions.py runs/tiny

An answer attempts its task where it is an answer of the kind that was asked for, right or wrong: code for code, French for
French, a job for a job, words of the text for what is taken from the text. `attempts` decides by the world's own word
lists, and is therefore as exact as the judge. Adds "attempted" {stage: {"overall" and each category: estimate}} and
"constraints" {stage: {each demanded form: how often it is kept}} to the run's evaluation.json, and prints both in
Markdown. The answers are evaluate.py's: the same prompts, temperature 1, the same random numbers.
"""
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import SFTConfig, parse  # noqa: E402  (before torch: see there)

import commands  # noqa: E402
import evaluate  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402

FROM_THE_PROMPT = ("sentence", "rewriting", "summary", "extraction")     # families that are told which words to use


def _kinds():
    """{a word in lower case: the kinds of word that it is}"""
    tables = {"noun": world.NOUNS, "adjective": world.ADJECTIVES, "verb": world.VERBS}
    forms = {"en": ("en", "en_past"), "fr": ("fr", "m", "f"), "zh": ("zh", "zh_past")}
    members = {f"{kind} {lang}": [row[c] for row in rows for c in columns if c in row]
               for kind, rows in tables.items() for lang, columns in forms.items()}
    members |= {column: [row[column] for row in world.COUNTRIES] for column in world.COUNTRIES[0]}
    members |= {"refusal": [text.rstrip(".。") for text in world.REFUSAL.values()], "code": ["def", "lambda", "import"],
                "game": ["input"]}
    for lang in ("en", "zh"):
        review, topics = world.WORDS["review"][lang], world.WORDS["topics"][lang]
        members |= world.LISTS[lang] | {
            f"name {lang}": world.NAMES[lang], f"city {lang}": world.CITIES[lang], f"liked {lang}": world.LIKED[lang],
            f"transport {lang}": world.TRANSPORT[lang], f"topic {lang}": [topic for topic, _ in topics],
            f"mood {lang}": [review[both][1] for both in ("both good", "both bad", "mixed")]}
    found = {}
    for kind, words in members.items():
        for word in words:
            found.setdefault(word.lower(), set()).add(kind)
    return found


KINDS = _kinds()
# The longest word counts, as a language's name may begin with its country's. Chinese has no word boundaries.
KNOWN = re.compile("|".join(rf"\b{re.escape(word)}\b" if re.search("[a-z]", word) else re.escape(word)
                            for word in sorted(KINDS, key=len, reverse=True)))


def known_words(text):
    """The world's words in a text, in lower case, as a set."""
    return set(KNOWN.findall(text.lower()))


def kinds(text):
    """The kinds of words in a text, as a set."""
    return set().union(*(KINDS[word] for word in known_words(text)))


def attempts(task, answer):
    """Is this an answer of the kind that the task asks for? -> bool"""
    core, _ = world.strip_habits(answer)
    found, code = kinds(core), {"code", "game"}
    # Any accepted answer will do; where the text leaves the question open, also an invented one.
    right = {"answer": task.check[1], "refuse": [task.check[1]]}.get(task.check[0], [task.output])
    wanted = [kinds(text) for text in right]
    if "refusal" in found:
        return task.family == "reading"
    if code & found.union(*wanted):
        return code & wanted[0] == code & found
    if task.family == "brainstorm":
        return task.check[1][0] in found
    if task.family in FROM_THE_PROMPT and not known_words(task.prompt) & known_words(core):
        return False
    return any(2 * len(one & found) >= len(one) for one in wanted)


table = partial(commands.table, "attempts the task, %")


def constraints_table(constraints):
    """{stage: {form: estimate}} -> (title, columns, {stage: [str]})"""
    forms = next(iter(constraints.values()))
    return "demanded form kept, %", [f"{form} (n = {e['n']})" for form, e in forms.items()], {
        stage: [evaluate.cell(e, 100, 0, False) for e in row.values()] for stage, row in constraints.items()}


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run, attempted, constraints = Path(sys.argv[1]), {}, {}
    seed = commands.stored_config(run, "sft", SFTConfig).seed
    config, _ = parse("evaluate", ["--out", str(run), "--seed", str(seed)])
    device, cast, _ = training.compute(config)
    tasks = world.tasks(config.per_category * len(world.CATEGORIES), "test")
    for stage in commands.stages(run):
        model, tokenizer, _ = training.load_model(run, stage, device)
        label = "base_few_shot" if stage == "base" else stage
        training.progress(f"  {label}: {len(tasks):,} prompts", always=True)
        found = evaluate.respond(model, tokenizer, tasks, evaluate.SHOTS.get(label), 1.0, config, cast)
        verdicts = world.judge_many(tasks, [a.text for a in found], [a.ended for a in found])
        attempted[label] = evaluate.by_group(tasks, [attempts(t, a.text) for t, a in zip(tasks, found)])
        constraints[label] = {form: evaluate.estimate([v.kept for t, v in zip(tasks, verdicts) if t.form[:1] == (form,)])
                              for form in sorted({task.form[0] for task in tasks if task.form})}
    commands.add_to_evaluation(run, attempted=attempted, constraints=constraints)
    for one in (table(attempted), constraints_table(constraints)):
        print("\n" + evaluate.markdown(*one))


if __name__ == "__main__":
    training.command(main)
