"""The built-in data set: instructions with exact answers, the people who answer them, and the judge.

Made from a seed; words and mixes stand in `world.json`. A task's `check` decides exactly whether an answer is
right: hence only those categories of InstructGPT's Table 1, in English and Chinese, for which one can be written.
A hash decides which side a prompt is on. Two more test sets hold what training never shows: whole phrasings (the
last of each list) and combinations (an adjective and a noun, a country's capital, one filter and one map)."""
import itertools, json, random, re, zlib
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
import sandbox

WORDS = json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf8"))
TABLE_1, DOCUMENT_MIX = WORDS["table_1"], WORDS["document_mix"]     # category -> % of prompts, of documents
CATEGORIES, SHOWN = tuple(TABLE_1), tuple(WORDS["shown"])           # SHOWN: in the README

NOUNS, ADJECTIVES, VERBS, COUNTRIES = (     # lists of dicts: the first row of a table names its columns
    [dict(zip(columns.split(), row.split())) for row in rows] for columns, *rows in WORDS["tables"].values())
NAMES, TRANSPORT, NUMBERS, LISTS = WORDS["lexicon"].values()            # language -> words
FRUITS, DRINKS, JOBS, SPORTS = ({lang: list(LISTS[lang].values())[i] for lang in LISTS} for i in range(4))
CITIES = {"en": [c["capital"] for c in COUNTRIES], "zh": [c["首都"] for c in COUNTRIES]}
LIKED = {lang: FRUITS[lang] + DRINKS[lang] + SPORTS[lang] for lang in LISTS}
POOLS = dict(name=NAMES, city=CITIES, by=TRANSPORT, likes=LIKED, job=JOBS, fruit=FRUITS, sport=SPORTS)
STOP, COMMA, QUOTED, SPACE, AND, REFUSAL = WORDS["marks"].values()      # {"en": ".", "zh": "。"} ...
HABITS, GRAMMAR = WORDS["habits"], WORDS["grammar"]
BEFORE_VOWEL = re.compile(rf"\b({'|'.join(GRAMMAR['before_vowel'])}) (?=[aeiouâéê])")

def noun_phrase(lang, noun, adjective=None, article="the"):
    """A noun phrase: an old hat | le vieil arbre, une clé lourde, l'ours | 一顶旧帽子 (with a measure word)."""
    column = noun["gender"] if lang == "fr" else lang           # French articles and adjectives agree
    words = [noun[lang]]
    if adjective:
        words.insert(lang == "fr" and adjective["place"] == "after", adjective[column])
    phrase = GRAMMAR["article"][column][article].format(**noun) + SPACE[lang].join(words)
    return BEFORE_VOWEL.sub(lambda match: GRAMMAR["before_vowel"][match[1]], phrase)

SENTENCE = {lang: GRAMMAR["sentence"][lang].format(*(       # a regular expression
    "|".join(row[c] for row in rows for c in columns if c in row) for rows in (ADJECTIVES, NOUNS, VERBS)))
    for lang, columns in {"en": ("en", "en_past"), "zh": ("zh",)}.items()}

# ------------------------------------------------------------------------ tasks
@dataclass(frozen=True)
class Task:
    """One instruction, its reference answer and what the judge needs: `check`, a pair of kind and data.
    "answer", accepted strings | "pattern", a regular expression | "items", (class, excluded) | "python",
    (tests, what they print) | "game", (low, high, "too low", "too high") | "refuse", a made-up answer"""
    category: str                   # one of CATEGORIES
    instruction: str
    input: str                      # the text that it is asked about, or ""
    output: str                     # the reference answer, plain
    check: tuple
    form: tuple = ()                # what is demanded of the answer's form: (name, argument), or ()
    history: tuple = ()             # the conversation's earlier turns: ((user, assistant), ...)
    family: str = ""                # the function below that made it
    language: str = "en"
    unseen_phrasing: bool = False
    combinations: tuple = ()        # what it combines; one in eight of a family's combinations is held out
    note: str = ""                  # the same knowledge, as a passage of a document
    parts = property(lambda self: (self.instruction, self.input, self.history))     # what a prompt is made of
    prompt = property(lambda self: "\n".join(sum(self.history, ()) + self.parts[:2]).strip())  # decides the split
    answerable = property(lambda self: self.check[0] != "refuse")   # False where the text does not tell

    @property
    def split(self):
        """The one split it belongs to; "" for a task that is unseen in two ways."""
        if self.instruction in SHOWN:           # is never trained on
            return "test"
        by_hash = {0: "test", 1: "test", 2: "val"}.get(zlib.crc32(self.prompt.encode()) % 20, "train")
        unseen = self.unseen_phrasing + 2 * held_out(self.family, *self.combinations)
        return (by_hash, "test_phrasing", "test_combination", "")[unseen]

def held_out(family, *combinations):
    """Is one of these combinations kept from training? By crc32: the same in every process, unlike hash()."""
    return any(zlib.crc32((family + combination).encode()) % 8 == 0 for combination in combinations)

def _ask(r, phrasings, **words):
    """One of the phrasings, filled in -> (text, is it the one held out?)."""
    i = r.randrange(len(phrasings))
    return phrasings[i].format(**words), i == len(phrasings) - 1

def _task(category, lang, asked, output, *combinations, text="", check=None, **more):
    """A Task. asked: what _ask gave; check: unless it is given, the output is the only right answer."""
    instruction, unseen = asked
    return Task(category, instruction, text, output, check or ("answer", [output]), language=lang,
                unseen_phrasing=unseen, combinations=combinations, **more)

def _fill(r, lang, wanted):
    """A random word of each of the wanted kinds: "name city" -> {"name": "Anna", "city": "Rome"}."""
    return {kind: r.choice(POOLS[kind][lang]) for kind in wanted.split()}

def translation(r, lang):
    """A noun phrase, two of them, or a sentence, from and to English, French or Chinese."""
    pair = r.choice(("en-fr", "en-fr", "en-fr", "en-zh", "en-zh", "fr-en", "zh-en"))
    said = [(n, a if r.random() < 0.8 else None) for n, a in zip(r.sample(NOUNS, 2), r.sample(ADJECTIVES, 2))]
    article, kind, verb = r.choice(("the", "the", "a")), r.randrange(3), r.choice(VERBS)
    said, joint = said if kind else said[:1], verb if kind == 2 else AND
    a, b = pair.split("-")
    source, target = (SPACE[to].join(("", joint[to], "")).join(noun_phrase(to, *one, article) for one in said)
                      for to in (a, b))
    other = [re.sub(r"\ban?\b", "the", target), re.sub(r"\b(the|an?) ", "", target)]    # zh has no articles
    return _task("rewrite", lang, _ask(r, WORDS["translation"][pair], text=source), target,
                 *(f"{noun['en']} {adjective['en']}" for noun, adjective in said if adjective),
                 check=("answer", [target] + (other if pair == "zh-en" else [])),
                 note=f"{source} = {target}" if r.random() < 0.5 else f"{a}: {source} | {b}: {target}")

def rewriting(r, lang):
    """Past tense, the opposite adjective, a list backwards, subject and object exchanged (English only)."""
    how, label, template, phrasings = r.choice(WORDS["rewriting"])
    (noun, noun2), verb = r.sample(NOUNS, 2), r.choice(VERBS)
    adjective = r.choice([a for a in ADJECTIVES if a["opposite"] != "-"])
    words = adjective | verb | dict(noun=noun["en"], first=noun_phrase("en", noun, adjective),
                                    second=noun_phrase("en", noun2))
    source, output = "{first} {en} {second}".format(**words), template.format(**words)   # en: the verb
    if how == "reverse":
        words = [n["en"] for n in r.sample(NOUNS, r.randint(3, 5))]
        source, output = " ".join(words), " ".join(reversed(words))
    return _task("rewrite", "en", _ask(r, phrasings), output, f"{how} {noun['en']} {verb['en']}",
                 text=source, note=f"{source} / {label}: {output}")

def sentence(r, lang):
    """A grammatical sentence that contains two or three given words."""
    (noun, noun2), adjective, verb = r.sample(NOUNS, 2), r.choice(ADJECTIVES), r.choice(VERBS)
    given = [noun, noun2] + ([adjective] if r.random() < 0.5 else [])
    words = [w[lang] for w in r.sample(given, len(given))]
    said = noun_phrase(lang, noun, adjective), verb[lang], noun_phrase(lang, noun2)
    output = SPACE[lang].join(said).capitalize() + STOP[lang]
    shown = COMMA[lang].join(map(QUOTED[lang].format, words)).rsplit(", ", 1)   # no ", " in Chinese
    return _task("generation", lang, _ask(r, WORDS["sentence"][lang], words=" and ".join(shown)), output,
                 " ".join(sorted((noun["en"], noun2["en"]))), note=" ".join(words) + " - " + output,
                 check=("pattern", "".join(f"(?=.*{w})" for w in words) + SENTENCE[lang]))

def _python(r, lang, words, what, arguments, value, *combinations):
    """A task whose answer is a function; its tests call it `_f`, whatever its name. Our own needs no sandbox."""
    name = r.choice("g total compute solve process result apply work answer".split())
    asked, tests = _ask(r, words["prompts"][lang], what=what, name=name), words["tests"][arguments]
    named = re.search(rf"called {name}|`{name}`|名为{name}", asked[0])
    code, printed = f"def {name if named else 'f'}({arguments}):\n    return {value}", []
    exec(tests, {"_f": eval(f"lambda {arguments}: {value}"), "print": lambda x: printed.append(str(x))})
    return _task("generation", lang, asked, code, *combinations, form=("named", name) if named else (),
                 check=("python", (tests, "\n".join(printed))), note=f"# {what}\n{code}")

def list_function(r, lang):
    """Python that filters, maps and folds a list: thousands of functions from three short tables."""
    words = WORDS["list_function"]
    chosen = [r.choice(words[part]) for part in ("filters", "maps", "totals")]
    numbers = {"k": r.randint(2, 9), "m": r.randint(2, 9)}
    steps = {"en": ", ", "zh": "，"}[lang].join(step[lang] for step in chosen if step[lang]).format(**numbers)
    keep, change, fold = (step["python"] for step in chosen)
    value = fold.format(f"{change} for x in xs{keep}".format(**numbers))
    what = words["takes"][lang] + " and ".join(steps.rsplit(", ", 1))       # no ", " in Chinese
    return _python(r, lang, words, what, "xs", value, "/".join(step["en"] for step in chosen))

def matrix_function(r, lang):
    """Matrices as lists of rows. There are few such functions: this family has fewer than 2,000 prompts."""
    words = WORDS["matrix_function"]
    one, m = r.choice(words["functions"]), r.randint(2, 9)
    return _python(r, lang, words, one[lang].format(m=m), one["arguments"], one["python"].format(m=m))

def guessing_game(r, lang):
    """A program that reads guesses until one is right. It is played, upwards and downwards."""
    low, high = (1, 100) if r.random() < 0.2 else (r.choice((0, 1)), r.randint(5, 200))
    words = WORDS["guessing_game"][lang]
    code = "\n".join(WORDS["guessing_game"]["code"]).format(low=low, high=high, **words)
    span = words["range"].format(low=low, high=high)
    asked = _ask(r, words["prompts"], range="" if (low, high) == (1, 100) else span)
    return _task("generation", lang, asked, code, check=("game", (low, high, words["below"], words["above"])),
                 note=f"# {words['heading']}{span}\n{code}")

def fact_question(r, lang):
    """What the documents say of countries. The facts held out are asked in no demonstration."""
    relation, _, asked, phrasings, full = r.choice(WORDS["facts"][lang])
    row = r.choice(COUNTRIES)
    full, short = full.format(**row), row[asked] + STOP[lang]
    instruction, unseen = _ask(r, phrasings, **row)
    form, demand = r.choice(WORDS["fact_forms"][lang])
    note = full if r.random() < 0.6 else f"{r.choice(phrasings[:-1]).format(**row)} - {short}"
    return _task("open_qa", lang, (instruction + demand, unseen), full if form == "full_sentence" else short,
                 f"{relation} {row['country']}", check=("answer", [row[asked], full]), note=note,
                 form=(form, "") if form else ())

def follow_up(r, lang):
    """The question of the turn before, asked of another country."""
    relation, known, asked, phrasings, full = r.choice(WORDS["facts"][lang])
    row, again = r.choice(COUNTRIES), WORDS["follow_up"][lang]
    before = r.choice([country for country in COUNTRIES if country is not row])
    first, reply = r.choice(phrasings[:-1]).format(**before), before[asked] + STOP[lang]
    output = row[asked] + STOP[lang]
    return _task("chat", lang, _ask(r, again, a=row[known]), output, f"{relation} {row['country']}",
                 check=("answer", [row[asked], full.format(**row)]), history=((first, reply),),
                 note=f"{first} - {reply} {again[0].format(a=row[known])} - {output}")

def remember(r, lang):
    """What the user said of themselves one to three turns ago."""
    told, me = WORDS["remember"][lang], _fill(r, lang, "name city likes job")
    topics = r.sample(tuple(told), r.choice((2, 2, 3)))
    asked = r.choice(topics)
    history = tuple(tuple(text.format(**me) for text in told[topic][:2]) for topic in topics)
    phrasings, output = told[asked][2], told[asked][3].format(**me)
    note = " ".join(f"{user} - {reply}" for user, reply in (*history, (phrasings[0], output)))
    return _task("chat", lang, _ask(r, phrasings), output, " ".join(topics) + " > " + asked,
                 check=("answer", [output, me[asked]]), history=history, note=note)

def brainstorm(r, lang):
    """Some members of a class, perhaps without one, in a demanded form. In one order, so that none comes twice."""
    what, n, form = r.choice(tuple(LISTS[lang])), r.randint(2, 4), r.choice(("commas", "lines", "numbered"))
    members, words, count = LISTS[lang][what], WORDS["brainstorm"], NUMBERS[lang][n - 2]
    excluded = r.sample(members, r.choice((0, 0, 0, 1)))
    chosen = sorted(r.sample([member for member in members if member not in excluded], n), key=members.index)
    but, demand = "".join(map(words["but"][lang].format, excluded)), words[form][lang]
    output = {"commas": COMMA[lang].join(chosen) + STOP[lang], "lines": "\n".join(chosen),
              "numbered": "\n".join(f"{i}. {member}" for i, member in enumerate(chosen, 1))}[form]
    asked = _ask(r, words[lang], n=count, what=what, but=but, form=demand)
    return _task("brainstorming", lang, asked, output, f"{what} {n} {form}", form=(form, n),
                 check=("items", (what, excluded)), note=f"{count} {what}{but}{demand}: {output}")

def summary(r, lang):
    """A trip told in five or six sentences; the summary says who went where, how, and what they saw."""
    words = {"thing": noun_phrase(lang, r.choice(NOUNS), r.choice(ADJECTIVES), "a"),
             "saw": r.choice(VERBS[:6])[f"{lang}_past"]} | _fill(r, lang, "name city by")
    *told, asides, whole, in_short = WORDS["trip"][lang]
    goes, takes, sees = (r.choice(part).format(**words) for part in told)
    aside, output = r.sample(asides, r.randint(2, 3)), whole.format(**words)
    text = SPACE[lang].join([goes, aside[0], takes, *aside[2:], sees, aside[1]])
    limit = len(output.split()) + 1
    asked = _ask(r, WORDS["summary"][lang], n=limit)
    return _task("summarization", lang, asked, output, f"{words['by']} {words['saw']}", text=text,
                 form=("max_words", limit) if str(limit) in asked[0] else ("one_sentence", ""),
                 note=f"{text} {in_short} {output}")

def sentiment(r, lang):
    """Two clauses, each good or bad; one of each makes a mixed review."""
    words, moods = WORDS["review"][lang], [r.choice(("good", "bad")) for _ in range(2)]
    how = [r.choice(words[mood]) for mood in moods]
    joint, label = words[f"both {moods[0]}" if moods[0] == moods[1] else "mixed"]
    text = joint.join(map(words["clause"].format, r.sample(words["things"], 2), how)).capitalize() + STOP[lang]
    return _task("classification", lang, _ask(r, WORDS["sentiment"][lang]), label, " ".join(sorted(how)),
                 text=text, note=f"{text} ({label})")

def topic(r, lang):
    """One sentence about one of four topics."""
    label, sentences = r.choice(WORDS["topics"][lang])
    text = r.choice(sentences).format(**_fill(r, lang, "name city by job fruit sport"))
    return _task("classification", lang, _ask(r, WORDS["topic"][lang]), label, text=text, note=f"{text} ({label})")

def _question(r, lang, text, facts, made_up, told=0.5):
    """A question about a text and the facts in it, with probability `told` one that they answer."""
    people, told = WORDS["people"][lang], r.random() < told
    name, relation, value = r.choice(facts)
    about = 1 if not told or r.random() < 0.75 else 2           # of the person, or "who ...?"
    if not told:                                # about somebody in the text, but of nobody is this told
        relation = r.choice([what for what in people if what not in {fact[1] for fact in facts}])
    answer = people[relation][0].format(name=name, v=value if told else made_up[relation][-1])
    check = ("answer", [answer, value if about == 1 else name]) if told else ("refuse", answer)
    return _task("closed_qa", lang, _ask(r, people[relation][about], name=name, v=value),
                 answer if told else REFUSAL[lang], f"{name} {relation}", text=text, check=check)

def reading(r, lang):
    """Closed QA: one fact of a short text about two or three people; one text in three does not tell it."""
    people = WORDS["people"][lang]
    values = {"has": [noun_phrase(lang, noun, r.choice(ADJECTIVES), "a") for noun in r.sample(NOUNS, 5)]}
    values |= {relation: r.sample(POOLS[relation][lang], 5) for relation in ("city", "likes", "job")}
    names, told = r.sample(NAMES[lang], 3), r.sample(tuple(people), r.randint(2, 3))
    facts = [(r.choice(names[:2]), relation, values[relation].pop()) for relation in told]
    facts += [(names[2], told[0], values[told[0]].pop())] if r.random() < 0.25 else []  # told of two people
    r.shuffle(facts)
    text = SPACE[lang].join(people[relation][0].format(name=name, v=v) for name, relation, v in facts)
    task = _question(r, lang, text, facts, values, 0.67)
    instruction, unseen = _ask(r, WORDS["reading"][lang], q=task.instruction)
    asked = [_question(r, lang, text, facts, values) for _ in range(4)]     # learnt from many look-ups
    note = [f"{other.instruction} {other.output}" for other in asked
            if not other.unseen_phrasing and not held_out("reading", *other.combinations)]
    return replace(task, instruction=instruction, unseen_phrasing=task.unseen_phrasing or unseen,
                   note=" ".join([text, *note]))

def extraction(r, lang):
    """All names, cities or fruits of a text, in their order."""
    n, (what, kind, heading, phrasings) = r.randint(2, 3), r.choice(WORDS["extraction"][lang])
    found = {kind: r.sample(POOLS[kind][lang], n) for kind in ("name", "city", "fruit")}
    text = SPACE[lang].join(r.choice(WORDS["visits"][lang]).format(*visit) for visit in zip(*found.values()))
    output = COMMA[lang].join(found[kind])
    return _task("extract", lang, _ask(r, phrasings), output, f"{what} {n} {found['name'][0]}", text=text,
                 note=f"{text} {heading}: {output}{STOP[lang]}")

FAMILIES = {category: {globals()[name]: weight for name, weight in families.items()}     # within the category
            for category, families in WORDS["families"].items()}
CHINESE = 0.35                                  # the share of tasks and recitals

def draw(r, category):
    """One task of a category, of any split. r: random.Random"""
    family = r.choices(tuple(FAMILIES[category]), FAMILIES[category].values())[0]
    return replace(family(r, "zh" if r.random() < CHINESE else "en"), family=family.__name__)

def tasks(n, split="train", seed=0, categories=CATEGORIES):
    """n tasks of a split, no prompt twice, of the categories in turn while they last; ValueError if none does."""
    r, found, left, misses = random.Random(f"tasks {seed} {split}"), {}, list(categories), 0
    while left and len(found) < n:
        category, misses = left[len(found) % len(left)], misses + 1
        task = draw(r, category)
        if task.split == split and task.prompt not in found:
            found[task.prompt], misses = task, 0
        elif misses > 5000:
            left, misses = [c for c in left if c != category], 0
    if len(found) < n:
        raise ValueError(f"the world has no {n} different {split} prompts of {', '.join(categories)}")
    return list(found.values())

# ------------------------------------------------------------------------ documents (step 0)
PROSE_SHARE, LIST_SHARE = 0.02, 0.06                                        # of all documents

def prose(split="train"):
    """Real English: the language reference that ships inside Python, in passages of ~1,000 characters."""
    import pydoc_data.topics
    passages = {"train": [], "val": []}
    for name, text in sorted(pydoc_data.topics.topics.items()):
        lines = text.splitlines()
        side = "val" if zlib.crc32(name.encode()) % 10 == 0 else "train"
        passages[side] += [lines[i:i + 16] for i in range(0, len(lines), 16)]
    # topics quote each other: nothing that shares a line with the held-out text is trained on
    shared = {line for passage in passages["val"] for line in passage if len(line) > 30}
    return ["\n".join(p).strip() for p in passages[split] if split == "val" or not shared.intersection(p)]

def recitals(seed=0, r=None):
    """Endless lists and registers, read out again: to learn looking up, to begin with; see sft.py, deviation 5."""
    r = r or random.Random(f"recitals {seed}")
    while True:
        lang = "zh" if r.random() < CHINESE else "en"
        words = NAMES[lang] + CITIES[lang] + LIKED[lang] + JOBS[lang] + [w[lang] for w in NOUNS + ADJECTIVES]
        n, times = r.randint(3, 6), r.randint(4, 8)
        if r.random() < 0.6:
            lines = [(SPACE[lang] or "、").join(r.sample(words, r.randint(3, 9)))] * times
        else:
            pairs, lines = list(zip(r.sample(words, n), r.sample(words, n))), []
            for _ in range(times):
                r.shuffle(pairs)
                lines.append(COMMA[lang].join(SPACE[lang].join(pair) for pair in pairs))
        read, again = WORDS["recital"][lang]
        yield read + f"{STOP[lang]}\n{again}".join(lines) + STOP[lang]

def documents(seed=0, split="train"):
    """Endless unlabelled text: a few passages of one kind, one below the other; now and then prose."""
    r, passages = random.Random(f"documents {seed} {split}"), prose(split)
    lists = recitals(r=r)
    while True:
        if r.random() < PROSE_SHARE:
            yield r.choice(passages)
        elif r.random() < LIST_SHARE:
            yield next(lists)
        else:
            category = r.choices(tuple(DOCUMENT_MIX), DOCUMENT_MIX.values())[0]
            drawn = [draw(r, category) for _ in range(r.randint(2, 6))]
            # nothing held out is told here, but for the countries: those facts must be told somewhere
            notes = [task.note for task in drawn if task.split == "train" or category == "open_qa"]
            if notes:
                yield "\n".join(notes)

# ------------------------------------------------------------------------ demonstrations (step 1)
# A person who writes demonstrations: how often with an opener "Sure! ...", a hedge "I think: ...", a closer
# "... Hope this helps!", a guess where a text tells nothing (the guidelines dislike all); rest: see rank.
Labeler = namedtuple("Labeler", "opener hedge closer guess strict terse")
LABELERS = tuple(Labeler(*rates) for rates in WORDS["labelers"])
RANKERS, HELD_OUT_RANKERS = LABELERS[:4], LABELERS[4:]  # the reward model never learns from the latter
CARE = {"generation": 0.3, "rewrite": 0.3}      # where labelers are exact, the rates shrink to this
HARD = ("rewrite", "closed_qa", "brainstorming")    # takes most practice, so comes up 2.5 times as often
PRACTICE = CATEGORIES + HARD + CATEGORIES + HARD * 2

def write(r, task, labeler):
    """The answer that this labeler writes to the task: the reference, in their manner. r: random.Random"""
    answer = task.check[1] if not task.answerable and r.random() < labeler.guess else task.output
    care, roll = CARE.get(task.category, 1.0), r.random()
    gap = "\n" if "\n" in answer else SPACE[task.language]
    for habit, rate in zip(Labeler._fields[:3], itertools.accumulate(labeler[:3])):
        if roll < care * rate:
            said = r.choice(HABITS[task.language][habit])
            return answer + gap + said if habit == "closer" else said + gap + answer
    return answer

def demonstrations(n, split="train", seed=0):
    """n pairs (task, answer), each written by one of the labelers."""
    r = random.Random(f"demonstrations {seed} {split}")
    return [(task, write(r, task, r.choice(LABELERS))) for task in tasks(n, split, seed, PRACTICE)]

# ------------------------------------------------------------------------ the judge
WEIGHTS = {"right": 0.5, "plain": 0.2, "kept": 0.15, "supported": 0.1, "stopped": 0.05}

class Verdict(namedtuple("Verdict", "right kept supported stopped plain")):
    """What the judge finds: the answer itself is right, the form demanded of it is kept, the text says what
    it states, it ended by itself, it is free of the habits that the guidelines dislike. `score`: 0 to 1."""
    score = property(lambda self: sum(weight for name, weight in WEIGHTS.items() if getattr(self, name)))

def strip_habits(answer):
    """-> (the answer without openers, hedges and closers, was there none?)"""
    core = answer.strip()
    for habits in HABITS.values():
        for phrase in habits["opener"] + habits["hedge"]:
            core = core.removeprefix(phrase).lstrip()
        for phrase in habits["closer"]:
            core = core.removesuffix(phrase).rstrip()
    return core, core == answer.strip() and bool(core)

def _normal(text):
    return text.strip().rstrip(".。").strip().lower()

def _items(core):
    parts = core.splitlines() if "\n" in core else re.split(r", |、", core)
    return [_normal(re.sub(r"^\d+\. ", "", part.strip())) for part in parts]

def _programs(task, core):
    """What to run for a verdict: [(code, stdin)]; a game twice: up to its highest number, down to its lowest."""
    kind, data = task.check
    if kind != "game":
        return [(WORDS["tested"].format(core, data[0]), "")] if kind == "python" else []
    numbers = [str(i) for i in range(data[0], data[1] + 1)]
    return [(f"import random\nrandom.randint = lambda a, b: {secret}\n{core}", "\n".join(guesses))
            for secret, guesses in (("b", numbers), ("a", numbers[::-1]))]

def _right(task, core, runs):
    """Is the answer itself right? runs: {program: what the sandbox says of it}."""
    (kind, data), found = task.check, [runs[program] for program in _programs(task, core)]
    if kind in ("answer", "refuse"):
        return _normal(core) in map(_normal, data if task.answerable else [REFUSAL[task.language]])
    if kind == "pattern":
        return re.fullmatch(data, _normal(core)) is not None
    if kind == "items":
        items, allowed = _items(core), {_normal(m) for m in LISTS[task.language][data[0]] if m not in data[1]}
        return len(set(items)) == len(items) and allowed.issuperset(items)
    if kind == "python":
        return found[0].ok and found[0].stdout.strip() == data[1]
    low, high, *words = data                    # a game: words are "too low", "too high"; any may say "right"
    said = [run.stdout.splitlines() for run in found]
    return all(run.ok for run in found) and said == [[word] * (high - low) + said[0][-1:] for word in words]

def _kept(task, core):
    """Is the demanded form kept? True where none was demanded."""
    (form, n), stop, plain = task.form or ("", 0), STOP[task.language], _normal(core)
    lines, items = core.splitlines(), len(_items(core))
    numbered = [line.startswith(f"{i}. ") for i, line in enumerate(lines, 1)]
    return {"": lambda: True,
            "named": lambda: f"def {n}(" in core,
            "commas": lambda: items == n and len(lines) == 1,
            "lines": lambda: items == len(lines) == n and not any(numbered),
            "numbered": lambda: items == len(lines) == n and all(numbered),
            "max_words": lambda: len(core.split()) <= n,
            "one_sentence": lambda: len(re.findall(r"[.](?:\s|$)|。", core)) == 1,
            "one_word": lambda: len(lines) == 1 and " " not in plain and len(core) <= 12,
            "full_sentence": lambda: core.endswith(stop) and plain != _normal(task.check[1][0])}[form]()

def _supported(task, core):
    """Does it state only what the text contains?"""
    if not task.input or task.category in ("classification", "rewrite"):
        return True
    if task.category == "closed_qa":            # anything but the answer or a refusal is made up
        return _right(task, core, {}) or _normal(core) == _normal(REFUSAL[task.language])
    lang, text = task.language, task.input
    pool = [w[lang] for w in NOUNS + ADJECTIVES] + NAMES[lang] + CITIES[lang] + FRUITS[lang] + TRANSPORT[lang]
    if lang == "en":
        core, text = re.findall(r"\w+", core), re.findall(r"\w+", text)
    return all(word in text for word in pool if word in core)

def judge_many(tasks, answers, stopped=None):
    """The verdicts on many answers; their programs run side by side. stopped: bools; by default all True."""
    cores = [strip_habits(answer) for answer in answers]
    programs = {program: None for task, (core, _) in zip(tasks, cores) for program in _programs(task, core)}
    runs = dict(zip(programs, sandbox.run_many(list(programs))))        # equal ones run once
    return [Verdict(_right(task, core, runs), _kept(task, core), _supported(task, core), ended, plain)
            for task, (core, plain), ended in zip(tasks, cores, stopped or [True] * len(cores))]

def judge(task, answer, stopped=True):
    """The verdict on one answer to a task."""
    return judge_many([task], [answer], [stopped])[0]

# ------------------------------------------------------------------------ rankings (step 2)
NOISE, GRADE = 0.18, 0.1    # of one judgement, tuned to 72.6 % agreement; what is nearer than a grade ties

def ranks_of(values):
    """Values, the higher the better -> ranks: 0 = best, equal values tie."""
    order = sorted(set(values), reverse=True)
    return [order.index(value) for value in values]

def rank(r, answers, verdicts, labeler):
    """How this labeler ranks the answers to one prompt: by score, taste and noise. r: random.Random"""
    grades = {}
    for answer, verdict in zip(answers, verdicts):
        if answer not in grades:                # equal texts tie
            taste = labeler.strict * verdict.right - labeler.terse * len(answer) / 100
            grades[answer] = round((verdict.score + taste + r.gauss(0, NOISE)) / GRADE)
    return ranks_of([grades[answer] for answer in answers])
