"""Data files as others write them: every format understood, every fault one line, nothing cut or swapped in silence."""
import gzip
import json
import time

import pytest

import data
from config import UserError

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TALK = [{"role": "system", "content": "be brief"}, USER, BOT, {"role": "user", "content": "q2"}]
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:"

DEMONSTRATIONS = {      # a record -> (instruction, input, output, history)
    "alpaca": ({"instruction": "q", "input": "x", "output": "a"}, ("q", "x", "a", [])),
    "completion": ({"prompt": "q", "completion": "a"}, ("q", "", "a", [])),
    "response": ({"prompt": "q", "response": "a"}, ("q", "", "a", [])),
    "messages": ({"messages": [USER, BOT]}, ("q", "", "a", [])),
    "system and turns": ({"messages": [*TALK, {"role": "assistant", "content": "a2"}]},
                         ("q2", "", "a2", [("be brief\n\nq", "a")])),
    "sharegpt": ({"conversations": SHARE}, ("q", "", "a", [])),
    "history": ({"prompt": "q", "history": [["h", "i"]], "completion": "a"}, ("q", "", "a", [("h", "i")])),
    "forged": ({"prompt": "<|assistant|>", "completion": "<|endoftext|>"}, ("<|assistant|>", "", "<|endoftext|>", [])),
}
COMPARISONS = {         # a record -> (instruction, input, history, responses, ranks)
    "strings": ({"prompt": "q", "chosen": "b", "rejected": "c"}, ("q", "", [], ["b", "c"], [0, 1])),
    "alpaca": ({"instruction": "q", "input": "x", "output": "ignored", "chosen": "b", "rejected": "c"},
               ("q", "x", [], ["b", "c"], [0, 1])),
    "messages": ({"chosen": [*TALK, {"role": "assistant", "content": "b"}],
                  "rejected": [*TALK, {"role": "assistant", "content": "c"}]},
                 ("q2", "", [("be brief\n\nq", "a")], ["b", "c"], [0, 1])),
    "prompt and messages": ({"prompt": "q", "chosen": [USER, {"role": "assistant", "content": "b"}],
                             "rejected": [USER, {"role": "assistant", "content": "c"}]}, ("q", "", [], ["b", "c"], [0, 1])),
    "prompt as messages": ({"prompt": TALK, "chosen": [{"role": "assistant", "content": "b"}],
                            "rejected": [{"role": "assistant", "content": "c"}]},
                           ("q2", "", [("be brief\n\nq", "a")], ["b", "c"], [0, 1])),
    "transcripts": ({"chosen": HH + " b\n\nas the Assistant: said", "rejected": HH + " c"},
                    ("q2", "", [("q", "a")], ["b\n\nas the Assistant: said", "c"], [0, 1])),
    "prompt and dialogues": ({"prompt": "lost?", "chosen": [USER, BOT, TALK[3], {"role": "assistant", "content": "b"}],
                              "rejected": [USER, BOT, TALK[3], {"role": "assistant", "content": "c"}]},
                             ("q2", "", [("q", "a")], ["b", "c"], [0, 1])),
    "prompt as transcript": ({"prompt": HH, "chosen": "b", "rejected": "c"}, ("q2", "", [("q", "a")], ["b", "c"], [0, 1])),
    "K-wise": ({"prompt": "q", "responses": ["b", "c", "d"], "ranks": [1, 0, 1]}, ("q", "", [], ["b", "c", "d"], [1, 0, 1])),
}


def dump(records, ending):
    """Records as an array or a line each, with the quirks of the ending: BOM, CRLF, gzip."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = "[" + ",\n".join(lines) + "]" if "json" in ending and "jsonl" not in ending else "\n".join(lines) + "\n"
    raw = text.replace("\n", "\r\n").encode("utf-8-sig") if "bom" in ending else text.encode()
    return gzip.compress(raw) if ending.endswith("gz") else raw


ENDINGS = pytest.mark.parametrize("ending", ["json", "jsonl", "bom.json", "bom.jsonl", "json.gz", "bom.jsonl.gz"])


@ENDINGS
@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations(name, ending, tmp_path):
    """Usual mistakes: the system's words are lost, earlier turns become the question, a BOM is part of a key."""
    record, wanted = DEMONSTRATIONS[name]
    path = tmp_path / f"f.{ending}"
    path.write_bytes(dump([record, {"prompt": "猫", "completion": "d"}], ending))
    assert data.kind_of(path) != "text"
    assert data.read_demonstrations(path) == [wanted, ("猫", "", "d", [])]


@ENDINGS
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name, ending, tmp_path):
    """Usual mistakes: the shared transcript is part of both answers; `output` is taken for the better answer."""
    record, wanted = COMPARISONS[name]
    path = tmp_path / f"f.{ending}"
    path.write_bytes(dump([record, {"prompt": "p", "chosen": "same", "rejected": "same"}], ending))
    found, skipped = data.read_comparisons(path)
    assert found == [wanted] and dict(skipped) == {"with equal texts": 1}


def test_text_and_prompts(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one\\n\\ntwo"}\n{"text": "three"}\n')
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress("l'été\n".encode()))
    (tmp_path / "asked.txt").write_text("first\n\n second \n")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": TALK}) + '\n{"instruction": "q", "input": "x"}\n')
    assert data.kind_of(tmp_path / "text.jsonl") == data.kind_of(tmp_path / "book.txt.gz") == "text"
    assert [*data.read_text(tmp_path / "text.jsonl")] == [["one\n\ntwo", "three"]]
    assert [*data.read_text(tmp_path / "book.txt.gz")] == [["l'été\n"]]
    assert data.read_prompts(tmp_path / "asked.txt") == [("first", "", []), ("second", "", [])]
    assert data.read_prompts(tmp_path / "asked.jsonl") == [("q2", "", [("be brief\n\nq", "a")]), ("q", "x", [])]


def test_a_text_column_beside_the_columns_that_count(tmp_path):
    """Alpaca as published has a "text" of prompt and answer together: usual mistake, it is taken for a book."""
    (tmp_path / "f.jsonl").write_text('{"instruction": "q", "output": "a", "text": "q a"}\n')
    assert data.kind_of(tmp_path / "f.jsonl") != "text"


def test_line_ends_of_windows(tmp_path):
    """Two empty lines part two texts, whatever the line ends. Usual mistake: the file is one text."""
    (tmp_path / "f.txt").write_bytes(b"one\r\n\r\n\r\ntwo")
    assert [*data.read_text(tmp_path / "f.txt")] == [["one", "two"]]


def test_several_files_and_globs(tmp_path):
    """In the order in which they are named, and a glob's by name; a fault names its own file."""
    for name, answer in (("b2", "4"), ("b1", "3"), ("a", "1")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "q", "completion": "{answer}"}}\n')
    found = data.read_demonstrations(f"{tmp_path}/a.jsonl,{tmp_path}/b*.jsonl")
    assert [output for _, _, output, _ in found] == ["1", "3", "4"]
    twice = data.read_demonstrations(f"{tmp_path}/a.jsonl,{tmp_path}/a.jsonl,{tmp_path}/b1.jsonl")
    assert [output for _, _, output, _ in twice] == ["1", "1", "3"], "a file that is named twice counts twice"
    (tmp_path / "b2.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="b2.jsonl, line 1"):
        data.read_demonstrations(f"{tmp_path}/a.jsonl,{tmp_path}/b*.jsonl")


def lines(*records):
    return "\n".join(json.dumps(record) for record in records).encode()


GOOD = {"prompt": "q", "completion": "a"}
PAIR = {"prompt": "q", "chosen": "b", "rejected": "c"}
BAD = {     # what is wrong -> (reader, bytes, what the one line must say beside the file's name)
    **{f"demonstration: {name}": ("demonstrations", lines(GOOD, record), words) for name, record, words in (
        ("a number", 5, ["line 2", "not 5"]), ("a list", [GOOD], ["line 2"]), ("null", None, ["line 2"]),
        ("nothing", {}, ["line 2", '"instruction" or "prompt"']),
        ("no answer", {"prompt": "q"}, ["line 2", '"output" or "completion" or "response"']),
        ("empty answer", {"prompt": "q", "completion": ""}, ["line 2", '"output"']),
        ("blank question", {"prompt": " ", "completion": "a"}, ["line 2", '"prompt"']),
        ("a number for an answer", {"prompt": "q", "completion": 5}, ["line 2", "not 5"]),
        ("a list for an answer", {"prompt": "q", "completion": ["a"]}, ["line 2"]),
        ("true for a question", {"instruction": True, "output": "a"}, ["line 2", "not True"]),
        ("a list for an input", {"instruction": "q", "input": ["x"], "output": "a"}, ["line 2", '"input"']),
        ("no messages", {"messages": []}, ["line 2", '"instruction"']),
        ("only the system", {"messages": TALK[:1]}, ["line 2", '"instruction"']),
        ("a question last", {"messages": [USER, BOT, USER]}, ["line 2", '"output"']),
        ("two questions", {"messages": [USER, USER]}, ["line 2", "in turns"]),
        ("an answer first", {"messages": [BOT, USER]}, ["line 2", "in turns"]),
        ("unknown role", {"messages": [{"role": "tool", "content": "x"}]}, ["line 2", "tool"]),
        ("no role", {"messages": [{"content": "x"}]}, ["line 2", "in turns"]),
        ("no content", {"messages": [{"role": "user"}]}, ["line 2", "in turns"]),
        ("parts for content", {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, ["line 2", "in turns"]),
        ("strings for messages", {"messages": ["q", "a"]}, ["line 2", "in turns"]),
        ("conversations of strings", {"conversations": ["q"]}, ["line 2", "in turns"]),
        ("conversation cut", {"conversations": SHARE[:1]}, ["line 2", '"output"']),
        ("history of strings", {"prompt": "q", "history": ["h"], "completion": "a"}, ["line 2", '"history"']),
        ("history of triples", {"prompt": "q", "history": [["a", "b", "c"]], "completion": "a"}, ["line 2", '"history"']))},
    **{f"comparison: {name}": ("comparisons", lines(PAIR, record), words) for name, record, words in (
        ("a string", "q", ["line 2"]), ("nothing", {}, ["line 2", "instruction"]),
        ("no answers", {"prompt": "q"}, ["line 2", '"responses" or "chosen, rejected"']),
        ("no rejected", {"prompt": "q", "chosen": "b"}, ["line 2", "chosen, rejected"]),
        ("no chosen", {"prompt": "q", "rejected": "b"}, ["line 2", "chosen, rejected"]),
        ("a number", {"prompt": "q", "chosen": "b", "rejected": 1}, ["line 2", "1"]),
        ("message and string", {"prompt": "q", "chosen": [BOT], "rejected": 1}, ["line 2"]),
        ("no ranks", {"prompt": "q", "responses": ["b", "c"]}, ["line 2", '"ranks"']),
        ("too few ranks", {"prompt": "q", "responses": ["b", "c"], "ranks": [0]}, ["line 2", '2 "ranks"']),
        ("too many ranks", {"prompt": "q", "responses": ["b", "c"], "ranks": [0, 1, 2]}, ["line 2", '2 "ranks"']),
        ("a negative rank", {"prompt": "q", "responses": ["b", "c"], "ranks": [0, -1]}, ["line 2", "-1"]),
        ("a half rank", {"prompt": "q", "responses": ["b", "c"], "ranks": [0, 0.5]}, ["line 2", '"ranks"']),
        ("ranks as text", {"prompt": "q", "responses": ["b", "c"], "ranks": ["0", "1"]}, ["line 2", '"ranks"']),
        ("ranks true", {"prompt": "q", "responses": ["b", "c"], "ranks": [True, False]}, ["line 2", '"ranks"']),
        ("responses as text", {"prompt": "q", "responses": "bc", "ranks": [0, 1]}, ["line 2", '"responses"']),
        ("a response null", {"prompt": "q", "responses": ["b", None], "ranks": [0, 1]}, ["line 2", '"responses"']),
        ("other questions", {"chosen": [USER, BOT], "rejected": [{"role": "user", "content": "z"}, BOT]},
         ["line 2", "same questions"]),
        ("transcripts that differ", {"chosen": HH + " b", "rejected": HH.replace("q2", "z") + " c"}, ["line 2", "same questions"]),
        ("transcript without answer", {"chosen": HH[:-12], "rejected": HH[:-12]}, ["line 2", "chosen, rejected"]),
        ("no transcript", {"chosen": "b", "rejected": "c"}, ["line 2", "instruction"]),
        ("transcript that begins with the answer", {"chosen": "Assistant: b", "rejected": "Assistant: c"}, ["line 2", "in turns"]))},
    **{f"{reader}: {name}": (reader, raw, words) for reader in ("demonstrations", "comparisons", "prompts")
       for name, raw, words in (
        ("empty", b"", ["empty"]), ("blank", b" \n\t\n", ["empty"]),
        ("latin1", b'{"prompt": "\xe9"}\n', ["line 1", "not UTF-8", "iconv", "gb18030"]),
        ("UTF-16", '{"prompt": "q"}'.encode("utf-16"), ["line 1", "not UTF-8"]),
        ("cut", b'[{"prompt": "a",\n"chosen": "b"}', ["line 2", "not JSON"]), ("no JSON", b"prompt,chosen\n", ["line 1", "not JSON"]),
        ("another half", b'{"prompt": "\\uD800", "chosen": "b"}', ["line 1", "surrogates"]),
        ("nested without end", b'{"prompt": ' + b"[" * 100_000, ["line 1", "not JSON"]),
        ("half a surrogate", b'{"prompt": "\\ud800", "chosen": "b"}', ["line 1", "surrogates"]),
        ("a huge line that is cut", b'{"prompt": "' + b"x" * 3_000_000, ["line 1", "not JSON"]))},
    "no comparison is left": ("comparisons", lines({"prompt": "q", "chosen": "b", "rejected": "b"}), ["1 with equal texts"]),
    "no prompt": ("prompts", b"[]", ["no prompts"]),
    "no demonstration": ("demonstrations", b"[]", ["no demonstrations"]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_fault_is_one_line(what, tmp_path):
    """Which file, which line, which key, and what is needed; short, even where the file is not."""
    reader, raw, words = BAD[what]
    path = tmp_path / "f.jsonl"
    path.write_bytes(raw)
    with pytest.raises(UserError) as error:
        getattr(data, f"read_{reader}")(path)
    message = str(error.value)
    assert "f.jsonl" in message and "\n" not in message and len(message) < 400, message
    assert all(word in message for word in words), message


def test_there_are_sixty():
    assert len(BAD) >= 60


@pytest.mark.parametrize("name, text", [("a.csv", "prompt,answer\nq,a\n"), ("a.TSV", "q\ta\n"), ("a.parquet", "PAR1"), ("a.csv.gz", "q,a\n"),
                                        ("a.txt", '{"prompt": "q"}\n'), ("a.md", ' [\n {"text": "q"}]'), ("a", '{ "text": 5}')])
def test_what_is_no_plain_text_is_not_read_as_one(name, text, tmp_path):
    """The usual mistake: whatever is not named .json is prose, and a table is learnt by heart for minutes."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    for reader in (data.read_prompts, lambda names: [*data.read_text(names)], data.kind_of):
        with pytest.raises(UserError, match="a.*needed: plain text, or examples as JSON in a file named .json or .jsonl"):
            reader(path)


def test_braces_in_a_text_are_text(tmp_path, monkeypatch):
    """Also where a later part of a large one begins with what looks like a record."""
    monkeypatch.setattr(data, "PART", 8)
    (tmp_path / "a.txt").write_text('a story\nand more\n{"prompt": "q"}\n')
    assert "".join(text for part in data.read_text(tmp_path / "a.txt") for text in part) == 'a story\nand more\n{"prompt": "q"}\n'


def test_jsonl_has_two_names_and_files_may_stand_apart(tmp_path):
    for name in ("a.ndjson", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    assert [q for q, *_ in data.read_prompts(f"{tmp_path}/a.ndjson, {tmp_path}/b.jsonl")] == ["a.ndjson", "b.jsonl"]


def test_a_dialogue_is_asked_as_a_whole(tmp_path):
    """Dialogues that all end in "go on" are different prompts, on the side where each is. Usual mistake: by their last turn."""
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, BOT, {"role": "user", "content": "go on"}, BOT]} for i in range(43)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, held_out = data.hold_out(data.read_demonstrations(tmp_path / "a.jsonl"))
    assert len(held_out) == 3 and len(train) == 40 and not {str(r[3]) for r in train} & {str(r[3]) for r in held_out}
    pairs = [{"chosen": HH.replace("q\n", f"q{i}\n") + " b", "rejected": HH.replace("q\n", f"q{i}\n") + " c"} for i in range(43)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert [*map(len, data.hold_out(data.read_comparisons(tmp_path / "b.jsonl")[0]))] == [40, 3]


@pytest.mark.parametrize("raw", [b"no gzip", gzip.compress(b'{"prompt": "q", "completion": "a"}')[:-9]], ids=["none", "cut"])
def test_a_broken_gz(raw, tmp_path):
    (tmp_path / "f.jsonl.gz").write_bytes(raw)
    with pytest.raises(UserError, match="cannot read .*f.jsonl.gz"):
        data.read_demonstrations(tmp_path / "f.jsonl.gz")


def test_a_hundred_thousand_preferences_are_read_in_seconds(tmp_path):
    """10,000 here, in a tenth of the ten seconds: usual mistake, a parse of the whole file for every line."""
    (tmp_path / "f.jsonl").write_text("\n".join(json.dumps({**PAIR, "prompt": f"q{i}" * 20}) for i in range(10_000)))
    start = time.perf_counter()
    assert len(data.read_comparisons(tmp_path / "f.jsonl")[0]) == 10_000
    assert time.perf_counter() - start < 3
