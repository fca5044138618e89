"""The built-in data set: instructions with exact answers, the people who answer them, and the judge.

Everything is made from a seed: no download, and every claim can be measured, because each task carries a `check` that
decides exactly whether an answer is right. Tasks are named by those categories of InstructGPT's Table 1 that can be
judged so. The words and the phrasings stand in `world.json`; this file puts them together:

    tasks           instruction + input -> reference answer; English and Chinese, French as a target language
    documents       unlabelled text for step 0: the same facts and skills, never in the prompt template; and real prose
    demonstrations  the answers of simulated labelers, who have habits that the guidelines dislike
    judge           is it right, was the demanded form kept, is it supported by the text, did it stop, is it plain

No prompt is on two sides: a hash of the prompt decides its side. Two more test sets hold what training never shows:
whole phrasings (the last one of each list in `world.json`), and whole combinations (an adjective with a noun, the
capital of one country, one filter with one map).
"""
import json
import random
import re
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import sandbox

CATEGORIES = ("generation", "open_qa", "brainstorming", "chat", "rewrite", "summarization",
              "classification", "closed_qa", "extract")
TABLE_1 = dict(zip(CATEGORIES, (45.6, 12.4, 11.2, 8.4, 6.6, 4.2, 3.5, 2.6, 1.9)))  # % of prompts
SPLITS = ("train", "val", "test", "test_phrasing", "test_combination")
SHOWN = ("Translate the following English text to French: 'the red cat and the big house'",
         "请生成一个函数，用于计算两个矩阵的乘积", "请根据用户输入生成一个简单的猜数字游戏")

# ------------------------------------------------------------------------ words and grammar

WORDS = json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf8"))


def _table(name):
    """The rows of one table of the lexicon, as dicts; its columns are named in its key: "verbs (en past fr zh)"."""
    key = next(k for k in WORDS["lexicon"] if k.startswith(name + " ("))
    columns = key[len(name) + 2:-1].split()
    return [dict(zip(columns, row.split())) for row in WORDS["lexicon"][key]]


NOUNS, ADJECTIVES, VERBS, COUNTRIES = map(_table, ("nouns", "adjectives", "verbs", "countries"))
NAMES, TRANSPORT, NUMBERS = ({lang: words.split() for lang, words in WORDS["lexicon"][key].items()}
                             for key in ("names", "transport", "numbers"))
LISTS = {lang: {what: words.split(", ") for what, words in lists.items()}
         for lang, lists in WORDS["lexicon"]["lists"].items()}
EUROPE = [country for country in COUNTRIES if country["continent"] == "Europe"]
LISTS["en"]["European countries"] = [country["country"] for country in EUROPE]
LISTS["zh"]["欧洲国家"] = [country["国"] for country in EUROPE]
CITIES = {"en": [c["capital"] for c in COUNTRIES], "zh": [c["首都"] for c in COUNTRIES]}
FRUITS, DRINKS, JOBS, SPORTS = ({"en": LISTS["en"][en], "zh": LISTS["zh"][zh]} for en, zh in (
    ("fruits", "水果"), ("drinks", "饮料"), ("jobs", "职业"), ("sports", "运动")))
LIKED = {lang: FRUITS[lang] + DRINKS[lang] + SPORTS[lang] for lang in ("en", "zh")}
STOP, SPACE, COMMA = {"en": ".", "zh": "。"}, {"en": " ", "zh": ""}, {"en": ", ", "zh": "、"}
REFUSAL = {"en": "The text does not say.", "zh": "文中没有提到。"}


def french(noun, adjective=None, article="the"):
    """A French noun phrase: gender, the adjective's place, elision (l'ours), and bel, nouvel, vieil."""
    def vowel(word):
        return word[0] in "aeiouâéê"
    words = [noun["fr"]]
    if adjective and adjective["place"] == "after":
        words.append(adjective[noun["gender"]])
    elif adjective:
        form = adjective[noun["gender"]]
        if noun["gender"] == "m" and vowel(noun["fr"]):
            form = {"beau": "bel", "nouveau": "nouvel", "vieux": "vieil"}.get(form, form)
        words.insert(0, form)
    if article == "the" and vowel(words[0]):
        return "l'" + " ".join(words)
    articles = {"the": {"m": "le", "f": "la"}, "a": {"m": "un", "f": "une"}}
    return " ".join([articles[article][noun["gender"]]] + words)


def english(noun, adjective=None, article="the"):
    """An English noun phrase: "a big house", "an old hat"."""
    words = ([adjective["en"]] if adjective else []) + [noun["en"]]
    return " ".join(["an" if article == "a" and words[0][0] in "aeiou" else article] + words)


def chinese(noun, adjective=None, article="the"):
    """A Chinese noun phrase: no article, and a measure word after "one"."""
    measure = "一" + noun["measure"] if article == "a" else ""
    return measure + (adjective["zh"] if adjective else "") + noun["zh"]


PHRASE = {"en": english, "fr": french, "zh": chinese}


def _any(words):
    return "(?:" + "|".join(words) + ")"


EN_THING = f"(?:the|an?) (?:{_any(a['en'] for a in ADJECTIVES)} )?{_any(n['en'] for n in NOUNS)}"
ZH_THING = f"(?:一.)?{_any(a['zh'] for a in ADJECTIVES)}?{_any(n['zh'] for n in NOUNS)}"
SENTENCE = {"en": f"{EN_THING} {_any(v[t] for v in VERBS for t in ('en', 'past'))} {EN_THING}",
            "zh": f"{ZH_THING}{_any(v['zh'] for v in VERBS)}了?{ZH_THING}"}

# ------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Task:
    """One instruction, with its reference answer and what the judge needs.

    category     one of CATEGORIES; family: the function below that made it
    instruction  what is asked; input: the text that it is asked about, or ""
    output       the reference answer, plain
    check        (kind, data): "answer", accepted strings | "pattern", a regular expression | "items",
                 (class, excluded) | "python", (lines that test it, what they print) | "game", (low, high,
                 "too low", "too high")
                 | "refuse", what a careless labeler would answer
    form         what the instruction demands of the answer's form: (name, argument), or ()
    history      the conversation's earlier turns: ((user, assistant), ...)
    """
    category: str
    instruction: str
    input: str
    output: str
    check: tuple
    form: tuple = ()
    history: tuple = ()
    family: str = ""
    language: str = "en"
    unseen_phrasing: bool = False
    combinations: tuple = ()        # what it combines; one in eight of a family's combinations is held out
    note: str = ""                  # the same knowledge, as a passage of a document

    @property
    def prompt(self):
        """All that the model is shown, as one string: what the split goes by."""
        turns = [text for turn in self.history for text in turn]
        return "\n".join(turns + [self.instruction, self.input]).strip()

    @property
    def split(self):
        """The one split it belongs to; "" for a task that is unseen in two ways."""
        unseen_combination = held_out(self.family, *self.combinations)
        if self.instruction in SHOWN:
            return "test"                       # the README's prompts are never trained on
        if self.unseen_phrasing or unseen_combination:
            both = self.unseen_phrasing and unseen_combination
            return "" if both else "test_phrasing" if self.unseen_phrasing else "test_combination"
        return {0: "test", 1: "test", 2: "val"}.get(_hash(self.prompt) % 20, "train")

    @property
    def answerable(self):
        """False where the text does not tell the answer: what hallucination is measured on."""
        return self.check[0] != "refuse"


def _hash(text):
    return zlib.crc32(text.encode())            # the same in every process, unlike hash()


def held_out(family, *combinations):
    """Is one of these combinations kept from training?"""
    return any(_hash(family + combination) % 8 == 0 for combination in combinations)


def _phrase(r, phrasings, **words):
    """One of the phrasings, filled in -> (text, is it the one held out?)."""
    i = r.randrange(len(phrasings))
    return phrasings[i].format(**words), i == len(phrasings) - 1


def translation(r, lang):
    """A noun phrase, two of them, or a sentence, from and to English, French or Chinese."""
    pair = r.choice(("en-fr", "en-fr", "en-fr", "en-zh", "en-zh", "fr-en", "zh-en"))
    (noun, noun2), (adjective, adjective2) = r.sample(NOUNS, 2), r.sample(ADJECTIVES, 2)
    adjective, adjective2 = (a if r.random() < 0.8 else None for a in (adjective, adjective2))
    article, kind, verb = r.choice(("the", "the", "a")), r.randrange(3), r.choice(VERBS)

    def say(code):
        joint = {"en": " and ", "fr": " et ", "zh": "和"}[code]
        if kind == 2:
            joint = verb["zh"] if code == "zh" else f" {verb[code]} "
        first = PHRASE[code](noun, adjective, article)
        return first + (joint + PHRASE[code](noun2, adjective2, article) if kind else "")

    source, target = (say(code) for code in pair.split("-"))
    said = [(noun, adjective), (noun2, adjective2)][:2 if kind else 1]
    pairs = [f"{n['en']} {a['en']}" for n, a in said if a]
    instruction, unseen = _phrase(r, WORDS["translation"][pair], text=source)
    accepted = [target]
    if pair == "zh-en":                         # Chinese has no article: "the" and none are right too
        accepted += [re.sub(r"\ban?\b", "the", target), re.sub(r"\b(the|an?) ", "", target)]
    note = f"{source} = {target}" if r.random() < 0.5 else "{2}: {0} | {3}: {1}".format(
        source, target, *pair.split("-"))
    return Task("rewrite", instruction, "", target, ("answer", accepted), language=lang, note=note,
                unseen_phrasing=unseen, combinations=tuple(pairs))


def rewriting(r, lang):
    """Past tense, the opposite adjective, a list backwards, subject and object exchanged (English only)."""
    how = r.choice(tuple(WORDS["rewriting"]))
    (noun, noun2), verb = r.sample(NOUNS, 2), r.choice(VERBS)
    adjective = r.choice([a for a in ADJECTIVES if a["opposite"] != "-"])
    opposite = next(a for a in ADJECTIVES if a["en"] == adjective["opposite"])
    first, second = english(noun, adjective), english(noun2)
    source = f"{first} {verb['en']} {second}"
    if how == "reverse":
        words = [n["en"] for n in r.sample(NOUNS, r.randint(3, 5))]
        source, output = " ".join(words), " ".join(reversed(words))
    else:
        output = {"past": f"{first} {verb['past']} {second}", "swap": f"{second} {verb['en']} {first}",
                  "opposite": f"{english(noun, opposite)} {verb['en']} {second}"}[how]
    instruction, unseen = _phrase(r, WORDS["rewriting"][how])
    label = {"past": "yesterday", "opposite": "the opposite", "reverse": "backwards", "swap": "the other way"}
    return Task("rewrite", instruction, source, output, ("answer", [output]), unseen_phrasing=unseen,
                combinations=(f"{how} {noun['en']} {verb['en']}",), note=f"{source} / {label[how]}: {output}")


def sentence(r, lang):
    """A grammatical sentence that contains two or three given words."""
    (noun, noun2), adjective, verb = r.sample(NOUNS, 2), r.choice(ADJECTIVES), r.choice(VERBS)
    given = [noun, noun2] + ([adjective] if r.random() < 0.5 else [])
    words = [w[lang] for w in r.sample(given, len(given))]
    if lang == "en":
        output = f"{english(noun, adjective)} {verb['en']} {english(noun2)}.".capitalize()
        shown = ", ".join(words[:-1]) + " and " + words[-1]
    else:
        output = f"{chinese(noun, adjective)}{verb['zh']}{chinese(noun2)}。"
        shown = "、".join(f"“{w}”" for w in words)
    instruction, unseen = _phrase(r, WORDS["sentence"][lang], words=shown)
    contains = "".join(f"(?=.*{w})" for w in words)
    return Task("generation", instruction, "", output, ("pattern", contains + SENTENCE[lang]), language=lang,
                unseen_phrasing=unseen, combinations=(" ".join(sorted((noun["en"], noun2["en"]))),),
                note=" ".join(words) + " - " + output)


def _python(r, lang, prompts, what, code, tests, combinations=()):
    """A task whose answer is a function; in `tests` it is called `_f`, whatever name it was given."""
    name = r.choice("g total compute solve process result apply work answer".split())
    instruction, unseen = _phrase(r, prompts[lang], what=what, name=name)
    named = bool(re.search(rf"called {name}|`{name}`|名为{name}", instruction))
    code = code.replace("NAME", name if named else "f")
    return Task("generation", instruction, "", code, ("python", (tests, _expected(code, tests))),
                form=("named", name) if named else (), unseen_phrasing=unseen, language=lang,
                combinations=combinations, note=f"# {what}\n{code}")


@lru_cache(maxsize=None)
def _expected(code, tests):
    """What the reference prints. It needs no sandbox: we wrote it."""
    printed, scope = [], {"print": lambda value: printed.append(str(value))}
    exec("\n".join((code, LAST_FUNCTION, tests)), scope)
    return "\n".join(printed)


LAST_FUNCTION = "_f = [v for v in list(globals().values()) if type(v).__name__ == 'function' and v is not print][-1]"
LIST_TESTS = ("for _xs in ([3, -4, 8, 11, -7, 2, 6], [1, -2, 12, -9, 10, 5, -1, -6], "
              "[10, 11, -10, -11, 0, 4, 7]): print(_f(_xs))")


def list_function(r, lang):
    """Python that filters, maps and folds a list: thousands of functions from three short tables."""
    words = WORDS["list_function"]
    chosen = [r.choice(words[part]) for part in ("filters", "maps", "totals")]
    k, m, column = r.randint(2, 9), r.randint(2, 9), ("en", "zh").index(lang)
    steps = [step[column].format(k=k, m=m) for step in chosen if step[column]]
    if lang == "en":
        what = "takes a list, " + (", ".join(steps[:-1]) + " and " if steps[1:] else "") + steps[-1]
    else:
        what = "接收一个列表，" + "，".join(steps)
    keep, change, fold = (step[2].format("{}", k=k, m=m) for step in chosen)
    inner = f"{change} for x in xs" + (f" if {keep}" if keep else "")
    return _python(r, lang, words["prompts"], what, f"def NAME(xs):\n    return {fold.format(inner)}",
                   LIST_TESTS, combinations=("/".join(step[0] for step in chosen),))


def matrix_function(r, lang):
    """Matrices as lists of rows. There are few such functions, so this family has fewer than 2,000 prompts."""
    en, zh, arguments, code = r.choice(WORDS["matrix_function"]["functions"])
    m = r.randint(2, 9)
    calls = ("_a, _b", "_b, _a") if arguments == "a, b" else ("_a", "_b")
    tests = "\n".join(["_a, _b = [[1, 2], [3, 4]], [[0, 5], [6, -7]]"] + [f"print(_f({c}))" for c in calls])
    return _python(r, lang, WORDS["matrix_function"]["prompts"], (en if lang == "en" else zh).format(m=m),
                   f"def NAME({arguments}):\n    return {code.format(m=m)}", tests)


def guessing_game(r, lang):
    """A program that reads guesses until one is right. It is played, upwards and downwards."""
    low, high = (1, 100) if r.random() < 0.2 else (r.choice((0, 1)), r.randint(5, 200))
    right, below, above, span = {"en": ("right", "too low", "too high", f" from {low} to {high}"),
                                 "zh": ("猜对了", "太小", "太大", f"，范围是{low}到{high}")}[lang]
    code = (f"import random\nn = random.randint({low}, {high})\nwhile True:\n    g = int(input())\n"
            f"    if g == n:\n        print(\"{right}\")\n        break\n"
            f"    print(\"{below}\" if g < n else \"{above}\")")
    shown = "" if (low, high) == (1, 100) else span
    instruction, unseen = _phrase(r, WORDS["guessing_game"][lang], range=shown)
    heading = "guessing game" if lang == "en" else "猜数字"
    return Task("generation", instruction, "", code, ("game", (low, high, below, above)), unseen_phrasing=unseen,
                language=lang, note=f"# {heading}{span}\n{code}")


def _fact(r, lang):
    """A fact about a country -> (relation, country, known value, asked value, phrasings, full sentence)."""
    relation, (known, asked, phrasings, full) = r.choice(tuple(WORDS["facts"][lang].items()))
    row = r.choice(COUNTRIES)
    return relation, row, row[known], row[asked], phrasings, full.format(a=row[known], b=row[asked])


def fact_question(r, lang):
    """What the documents say of countries. The facts held out are asked in no demonstration."""
    relation, row, known, answer, phrasings, full = _fact(r, lang)
    instruction, unseen = _phrase(r, phrasings, a=known)
    form, demand = r.choice(tuple(WORDS["fact_forms"][lang].items()))
    output = full if form == "full_sentence" else answer + STOP[lang]
    note = full if r.random() < 0.6 else f"{r.choice(phrasings[:-1]).format(a=known)} - {answer}{STOP[lang]}"
    return Task("open_qa", instruction + demand, "", output, ("answer", [answer, full]), note=note,
                form=(form, "") if form else (), unseen_phrasing=unseen, language=lang,
                combinations=(f"{relation} {row['country']}",))


def brainstorm(r, lang):
    """So many members of a class, all different, perhaps without one of them, in a demanded form."""
    what, n, form = r.choice(tuple(LISTS[lang])), r.randint(2, 4), r.choice(("commas", "lines", "numbered"))
    excluded = r.sample(LISTS[lang][what], r.choice((0, 0, 0, 1)))
    allowed = [member for member in LISTS[lang][what] if member not in excluded]
    chosen = sorted(r.sample(allowed, n), key=allowed.index)    # in one order: so nobody writes a thing twice
    count, words = NUMBERS[lang][n - 2], WORDS["brainstorm"]
    but = words["but"][lang].format(excluded[0]) if excluded else ""
    instruction, unseen = _phrase(r, words[lang], n=count, what=what, but=but, form=words[form][lang])
    output = {"commas": COMMA[lang].join(chosen) + STOP[lang], "lines": "\n".join(chosen),
              "numbered": "\n".join(f"{i}. {member}" for i, member in enumerate(chosen, 1))}[form]
    return Task("brainstorming", instruction, "", output, ("items", (what, excluded)), form=(form, n),
                unseen_phrasing=unseen, language=lang, combinations=(f"{what} {n} {form}",),
                note=f"{count} {what}{but}{words[form][lang]}: {output}")


def remember(r, lang):
    """What the user said of themselves one to three turns ago."""
    told = WORDS["remember"][lang]
    me = {"name": r.choice(NAMES[lang]), "city": r.choice(CITIES[lang]), "likes": r.choice(LIKED[lang]),
          "job": r.choice(JOBS[lang])}
    topics = r.sample(tuple(told), r.choice((2, 2, 3)))
    asked = r.choice(topics)
    history = tuple(tuple(text.format(v=me[t]) for text in told[t][:2]) for t in topics)
    instruction, unseen = _phrase(r, told[asked][2])
    output = told[asked][3].format(v=me[asked])
    note = " ".join(f"{user} - {reply}" for user, reply in history) + f" {told[asked][2][0]} - {output}"
    return Task("chat", instruction, "", output, ("answer", [output, me[asked]]), history=history, note=note,
                unseen_phrasing=unseen, language=lang, combinations=(" ".join(topics) + " > " + asked,))


def follow_up(r, lang):
    """The question of the turn before, asked of another country."""
    relation, row, known, answer, phrasings, full = _fact(r, lang)
    before = r.choice([country for country in COUNTRIES if country is not row])
    key, asked = WORDS["facts"][lang][relation][:2]
    first = (r.choice(phrasings[:-1]).format(a=before[key]), before[asked] + STOP[lang])
    instruction, unseen = _phrase(r, WORDS["follow_up"][lang], a=known)
    output = answer + STOP[lang]
    again = WORDS["follow_up"][lang][0].format(a=known)
    return Task("chat", instruction, "", output, ("answer", [answer, full]), history=(first,), language=lang,
                unseen_phrasing=unseen, combinations=(f"{relation} {row['country']}",),
                note=f"{first[0]} - {first[1]} {again} - {output}")


def summary(r, lang):
    """A trip told in five or six sentences; the summary says who went where, how, and what they saw."""
    noun, adjective, verb = r.choice(NOUNS), r.choice(ADJECTIVES), r.choice(VERBS[:6])
    words = {"name": r.choice(NAMES[lang]), "city": r.choice(CITIES[lang]), "by": r.choice(TRANSPORT[lang]),
             "saw": verb["past"] if lang == "en" else verb["zh"] + "了",
             "thing": PHRASE[lang](noun, adjective, "a")}
    goes, takes, sees, asides, whole = WORDS["trip"][lang]
    goes, takes, sees = (r.choice(part).format(**words) for part in (goes, takes, sees))
    aside = r.sample(asides, r.randint(2, 3))
    text = SPACE[lang].join([goes, aside[0], takes, *aside[2:], sees, aside[1]])
    output = whole.format(**words)
    limit = len(output.split()) + 1
    instruction, unseen = _phrase(r, WORDS["summary"][lang], n=limit)
    form = ("max_words", limit) if str(limit) in instruction else ("one_sentence", "")
    return Task("summarization", instruction, text, output, ("answer", [output]), form=form, language=lang,
                unseen_phrasing=unseen, combinations=(f"{words['by']} {words['saw']}",),
                note=f"{text} {'In short:' if lang == 'en' else '总之：'} {output}")


def sentiment(r, lang):
    """Two clauses, each good or bad; one of each makes a mixed review."""
    words = WORDS["review"][lang]
    moods = [r.choice(("good", "bad")) for _ in range(2)]
    how = [r.choice(words[mood].split()) for mood in moods]
    first, second = (words["clause"].format(what=a, how=b) for a, b in zip(r.sample(words["things"].split(), 2), how))
    joint = words["and"] if moods[0] == moods[1] else words["but"]
    text = first[0].upper() + first[1:] + joint + second + STOP[lang]
    label = words["labels"].split()[2 if moods[0] != moods[1] else moods[0] == "bad"]
    instruction, unseen = _phrase(r, WORDS["sentiment"][lang])
    return Task("classification", instruction, text, label, ("answer", [label]), unseen_phrasing=unseen,
                language=lang, combinations=(" ".join(sorted(how)),), note=f"{text} ({label})")


def topic(r, lang):
    """One sentence about one of four topics."""
    label, sentences = r.choice(tuple(WORDS["topics"][lang].items()))
    text = r.choice(sentences).format(
        name=r.choice(NAMES[lang]), city=r.choice(CITIES[lang]), by=r.choice(TRANSPORT[lang]),
        job=r.choice(JOBS[lang]), fruit=r.choice(FRUITS[lang]), sport=r.choice(SPORTS[lang]))
    instruction, unseen = _phrase(r, WORDS["topic"][lang])
    return Task("classification", instruction, text, label, ("answer", [label]), unseen_phrasing=unseen,
                language=lang, note=f"{text} ({label})")


def _question(r, lang, facts, answered):
    """A question about a text -> (question, answer, is its phrasing held out?, name, relation)."""
    people = WORDS["people"][lang]
    name, relation, value = r.choice(facts)
    if not answered:                            # about somebody in the text, but the text does not tell it
        told = {(who, what) for who, what, _ in facts}
        name, relation = r.choice([(who, what) for who in sorted({f[0] for f in facts}) for what in people
                                   if (who, what) not in told])
        question, unseen = _phrase(r, people[relation][1], name=name)
        return question, REFUSAL[lang], unseen, name, relation
    about = 1 if r.random() < 0.75 else 2       # of the person, or "who ...?"
    question, unseen = _phrase(r, people[relation][about], name=name, v=value)
    return question, people[relation][0].format(name=name, v=value), unseen, name, relation


def reading(r, lang):
    """Closed QA: one fact of a short text about two or three people; one text in four does not tell it."""
    people = WORDS["people"][lang]
    things = [PHRASE[lang](noun, r.choice(ADJECTIVES), "a") for noun in r.sample(NOUNS, 5)]
    values = {"city": r.sample(CITIES[lang], 5), "likes": r.sample(LIKED[lang], 5),
              "job": r.sample(JOBS[lang], 5), "has": things}
    names, told = r.sample(NAMES[lang], 3), r.sample(tuple(people), r.randint(2, 3))
    cells = [(r.choice(names[:2]), relation) for relation in told]
    if r.random() < 0.25:                       # and in one text of four, one thing is told of two people
        cells.append((names[2], told[0]))
    facts = [(name, relation, values[relation].pop()) for name, relation in cells]
    r.shuffle(facts)
    text = SPACE[lang].join(people[relation][0].format(name=name, v=v) for name, relation, v in facts)
    answered = r.random() < 0.75
    question, output, unseen, name, relation = _question(r, lang, facts, answered)
    instruction, unseen_frame = _phrase(r, WORDS["reading"][lang], q=question)
    made_up = people[relation][0].format(name=name, v=values[relation].pop())
    short = next((name if value in question else value for who, what, value in facts if (who, what) == (name, relation)), "")
    check = ("answer", [output, short]) if answered else ("refuse", made_up)
    # a document asks four questions of its text: looking up is learnt from many look-ups
    asked = [_question(r, lang, facts, answered=i < 3 or r.random() < 0.3) for i in range(4)]
    note = " ".join([text] + [f"{q} {a}" for q, a, hidden, who, what in asked
                              if not hidden and not held_out("reading", f"{who} {what}")])
    return Task("closed_qa", instruction, text, output, check, language=lang, note=note,
                unseen_phrasing=unseen or unseen_frame, combinations=(f"{name} {relation}",))


def extraction(r, lang):
    """All names, cities or fruits of a text, in their order."""
    n, (what, (heading, phrasings)) = r.randint(2, 3), r.choice(tuple(WORDS["extraction"][lang].items()))
    found = {"names": r.sample(NAMES[lang], n), "cities": r.sample(CITIES[lang], n),
             "fruits": r.sample(FRUITS[lang], n)}
    text = SPACE[lang].join(r.choice(WORDS["visits"][lang]).format(name=name, city=city, fruit=fruit)
                            for name, city, fruit in zip(*found.values()))
    output = COMMA[lang].join(found[what])
    instruction, unseen = _phrase(r, phrasings)
    return Task("extract", instruction, text, output, ("answer", [output]), unseen_phrasing=unseen,
                language=lang, combinations=(f"{what} {n} {found['names'][0]}",),
                note=f"{text} {heading}: {output}{STOP[lang]}")


FAMILIES = {    # function -> how often it is drawn within its category
    "generation": {sentence: 4, list_function: 4, matrix_function: 2, guessing_game: 2},
    "open_qa": {fact_question: 1}, "brainstorming": {brainstorm: 1}, "chat": {remember: 2, follow_up: 1},
    "rewrite": {translation: 3, rewriting: 2}, "summarization": {summary: 1},
    "classification": {sentiment: 2, topic: 1}, "closed_qa": {reading: 1}, "extract": {extraction: 1}}


def draw(r, category):
    """One task of a category, of any split. r: random.Random"""
    families = FAMILIES[category]
    family = r.choices(tuple(families), families.values())[0]
    task = family(r, "zh" if r.random() < 0.35 else "en")
    return replace(task, family=family.__name__)


def tasks(n, split="train", seed=0, categories=CATEGORIES):
    """n tasks of one split with n different prompts, from the categories in turn.

    A category that has no further prompt (open_qa has about 1,500 to train on) is passed over from then on; ValueError
    where none has any.
    """
    r, seen, found, left, misses = random.Random(f"tasks {seed} {split}"), set(), [], list(categories), 0
    while len(found) < n:
        category = left[len(found) % len(left)]
        task = draw(r, category)
        if task.split == split and task.prompt not in seen:
            seen.add(task.prompt)
            found.append(task)
            misses = 0
        elif (misses := misses + 1) > 5000:
            left = [c for c in left if c != category]
            misses = 0
            if not left:
                raise ValueError(f"the world has no {n} different {split} prompts of {', '.join(categories)}")
    return found


# ------------------------------------------------------------------------ documents (step 0)

DOCUMENT_MIX = {"generation": 15, "open_qa": 9, "brainstorming": 10, "chat": 6, "rewrite": 25, "summarization": 4,
                "classification": 3, "closed_qa": 24, "extract": 4}     # % of the built-in documents
PROSE_SHARE, LIST_SHARE = 0.02, 0.06                                    # of all documents


def prose(split="train"):
    """Real English: the language reference that ships inside Python, a list of passages of ~1,000 characters."""
    import pydoc_data.topics
    passages = {"train": [], "val": []}
    for name, text in sorted(pydoc_data.topics.topics.items()):
        lines = text.splitlines()
        side = passages["val" if _hash(name) % 10 == 0 else "train"]
        side += [lines[i:i + 16] for i in range(0, len(lines), 16)]
    # topics quote each other: nothing that shares a line with the held-out text is trained on
    shared = {line for passage in passages["val"] for line in passage if len(line) > 30}
    passages["train"] = [passage for passage in passages["train"] if not shared.intersection(passage)]
    return ["\n".join(passage).strip() for passage in passages["train" if split == "train" else "val"]]


def recital(r, lang):
    """A list read out again, or pairs in other orders: pure practice in looking things up in the context."""
    words = NAMES[lang] + CITIES[lang] + LIKED[lang] + JOBS[lang] + [w[lang] for w in NOUNS + ADJECTIVES]
    read, again = WORDS["recital"][lang]
    n, times = r.randint(3, 6), r.randint(4, 8)
    if r.random() < 0.6:
        lines = [(SPACE[lang] or "、").join(r.sample(words, r.randint(3, 9)))] * times
    else:
        pairs, lines = list(zip(r.sample(words, n), r.sample(words, n))), []
        for _ in range(times):
            r.shuffle(pairs)
            lines.append(COMMA[lang].join(SPACE[lang].join(pair) for pair in pairs))
    return "\n".join((again if i else read) + line + STOP[lang] for i, line in enumerate(lines))


def recitals(seed=0):
    """Endless lists and registers, to begin with: see sft.py, deviation 5."""
    r = random.Random(f"recitals {seed}")
    while True:
        yield recital(r, "zh" if r.random() < 0.35 else "en")


def documents(seed=0, split="train"):
    """Endless unlabelled text: a few passages of one kind, one below the other; one document in ten is prose."""
    r, passages = random.Random(f"documents {seed} {split}"), prose(split)
    while True:
        if r.random() < PROSE_SHARE:
            yield r.choice(passages)
            continue
        if r.random() < LIST_SHARE:
            yield recital(r, "zh" if r.random() < 0.35 else "en")
            continue
        category = r.choices(tuple(DOCUMENT_MIX), DOCUMENT_MIX.values())[0]
        drawn = [draw(r, category) for _ in range(r.randint(2, 6))]
        # nothing held out is told here, but for the countries: those facts must be told somewhere
        notes = [task.note for task in drawn if task.split == "train" or category == "open_qa"]
        if notes:
            yield "\n".join(notes)


# ------------------------------------------------------------------------ demonstrations (step 1)

HABITS = WORDS["habits"]


@dataclass(frozen=True)
class Labeler:
    """A person who writes demonstrations. The rates of the habits that the guidelines dislike:

    opener "Sure! ...", hedge "I think: ...", closer "... Hope this helps!"; guess: how often a question that the
    text does not answer is answered all the same.
    """
    opener: float
    hedge: float
    closer: float
    guess: float


LABELERS = (Labeler(0.55, 0.10, 0.10, 0.3), Labeler(0.10, 0.55, 0.10, 0.5), Labeler(0.15, 0.10, 0.50, 0.4),
            Labeler(0.35, 0.20, 0.20, 0.6), Labeler(0.05, 0.05, 0.05, 0.0), Labeler(0.40, 0.25, 0.15, 0.4))
CARE = {"generation": 0.3, "rewrite": 0.3}      # where labelers are used to being exact, the rates shrink to this


def write(r, task, labeler):
    """The answer that this labeler writes to the task: the reference, in their manner. r: random.Random"""
    answer = task.output
    if not task.answerable and r.random() < labeler.guess:
        answer = task.check[1]
    care, roll = CARE.get(task.category, 1.0), r.random()
    habits, gap = HABITS[task.language], "\n" if "\n" in answer else SPACE[task.language]
    if roll < care * labeler.opener:
        return r.choice(habits["opener"]) + gap + answer
    if roll < care * (labeler.opener + labeler.hedge):
        return r.choice(habits["hedge"]) + gap + answer
    if roll < care * (labeler.opener + labeler.hedge + labeler.closer):
        return answer + gap + r.choice(habits["closer"])
    return answer


HARD = ("rewrite", "closed_qa", "brainstorming")    # what takes most practice is demonstrated 2.5 times as often


def demonstrations(n, split="train", seed=0):
    """n pairs (task, answer), each written by one of the labelers."""
    r = random.Random(f"demonstrations {seed} {split}")
    drawn = tasks(n, split, seed, CATEGORIES + HARD + CATEGORIES + HARD * 2)
    return [(task, write(r, task, r.choice(LABELERS))) for task in drawn]


# ------------------------------------------------------------------------ the judge

WEIGHTS = {"right": 0.5, "plain": 0.2, "kept": 0.15, "supported": 0.1, "stopped": 0.05}


@dataclass(frozen=True)
class Verdict:
    """What the judge finds in one answer; `score` is between 0 and 1."""
    right: bool         # the answer itself
    kept: bool          # what the instruction demanded of its form
    supported: bool     # it states nothing that the text does not contain
    stopped: bool       # it ended by itself
    plain: bool         # free of the habits that the guidelines dislike

    @property
    def score(self):
        return sum(weight for name, weight in WEIGHTS.items() if getattr(self, name))


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


def _right(task, core, runs):
    """Is the answer itself right? `runs`: what the sandbox says of its code."""
    kind, data = task.check
    if kind == "answer":
        return _normal(core) in map(_normal, data)
    if kind == "refuse":
        return _normal(core) == _normal(REFUSAL[task.language])
    if kind == "pattern":
        return re.fullmatch(data, _normal(core)) is not None
    if kind == "items":
        what, excluded = data
        items, members = _items(core), [_normal(member) for member in LISTS[task.language][what]]
        return (len(set(items)) == len(items) and all(item in members for item in items)
                and not any(_normal(e) in items for e in excluded))
    if kind == "python":
        return runs[0].ok and runs[0].stdout.strip() == data[1]
    return _played(*runs, *data)


def _played(up, down, low, high, below, above):
    """A guessing game: the secret was the highest number and was approached upwards, then the lowest, downwards."""
    n, up_says, down_says = high - low, up.stdout.splitlines(), down.stdout.splitlines()
    return (up.ok and down.ok and up_says[:-1] == [below] * n and down_says[:-1] == [above] * n
            and up_says[-1:] == down_says[-1:] != [])


def _kept(task, core):
    """Is the demanded form kept? True where none was demanded."""
    form, argument = task.form or ("", None)
    lines = core.splitlines()
    if form in ("commas", "lines", "numbered"):
        numbers = [line.startswith(f"{i}. ") for i, line in enumerate(lines, 1)]
        return len(_items(core)) == argument and {
            "commas": len(lines) == 1, "lines": len(lines) == argument and not any(numbers),
            "numbered": len(lines) == argument and all(numbers)}[form]
    if form == "max_words":
        return len(core.split()) <= argument
    if form == "one_sentence":
        return len(re.findall(r"[.](?:\s|$)|。", core)) == 1
    if form == "one_word":
        return len(lines) == 1 and " " not in _normal(core) and len(core) <= 12
    if form == "full_sentence":
        return _normal(core) != _normal(task.check[1][0]) and core.endswith(STOP[task.language])
    return form == "" or f"def {argument}(" in core     # form "named"


def _supported(task, core, right):
    """Does it state only what the text contains?"""
    if not task.input or task.category == "classification" or task.category == "rewrite":
        return True
    if task.category == "closed_qa":            # anything but the answer or a refusal is made up
        return right or _normal(core) == _normal(REFUSAL[task.language])
    lang, text = task.language, task.input
    content = [*NAMES[lang], *CITIES[lang], *FRUITS[lang], *TRANSPORT[lang], *(w[lang] for w in NOUNS + ADJECTIVES)]
    if lang == "en":
        core, text = re.findall(r"\w+", core), re.findall(r"\w+", text)
    return all(word in text for word in content if word in core)


def _programs(task, core):
    """What must be run to judge an answer: [(code, stdin)]."""
    kind, data = task.check
    if kind == "python":
        return [("\n".join((core, LAST_FUNCTION, data[0])), "")]
    if kind == "game":
        numbers, secret = [str(i) for i in range(data[0], data[1] + 1)], "import random\nrandom.randint = lambda a, b: "
        return [(f"{secret}b\n{core}", "\n".join(numbers)), (f"{secret}a\n{core}", "\n".join(reversed(numbers)))]
    return []


def judge_many(tasks, answers, stopped=None):
    """The verdicts on many answers, their programs run side by side. stopped: list of bool; default all True."""
    cores = [strip_habits(answer) for answer in answers]
    programs = [_programs(task, core) for task, (core, _) in zip(tasks, cores)]
    distinct = list(dict.fromkeys(p for needed in programs for p in needed))
    runs = dict(zip(distinct, sandbox.run_many(distinct))) if distinct else {}
    verdicts = []
    for i, (task, (core, plain)) in enumerate(zip(tasks, cores)):
        right = _right(task, core, [runs[p] for p in programs[i]])
        verdicts.append(Verdict(right, _kept(task, core), _supported(task, core, right),
                                stopped[i] if stopped is not None else True, plain))
    return verdicts


def judge(task, answer, stopped=True):
    """The verdict on one answer to a task."""
    return judge_many([task], [answer], [stopped])[0]
