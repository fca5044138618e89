"""Human feedback: rankings with ties as people type them, a blind order that is undone, a file that nothing is lost from,
and a page that no other site can write to."""
import contextlib
import http.client
import json
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, benchmark

import data
import reward
import sample
import training
import world
from config import SampleConfig, UserError

ranking = benchmark("rank")
TOKENIZER = data.Tokenizer(data.train_bpe([""], 256))
MODEL = SimpleNamespace(config=SimpleNamespace(block_size=101), num_params=lambda: 7)
PROMPTS = [("Name a tree.", "", ()), ("Who?", "Anna likes tea.", ()), ("And Ben?", "", (("Who is Anna?", "A cook."),)),
           ("把“猫”翻译成英文", "", ()), ("Say hello.", "", ())]
QUALITY = {f"answer {letter}": i for i, letter in enumerate("edcba")}      # what this person likes: 0 is the best


def rank(monkeypatch, path, ask, built_in=PROMPTS, drawn=tuple(sorted(QUALITY)), **changes):
    """One session; `ask` sits at the keyboard -> (the texts that were asked, which answers were shown to each)."""
    asked = []

    def person(place, text, shown):
        asked.append((text, tuple(shown)))
        return ask(text, shown)
    monkeypatch.setattr(sample, "answers", lambda model, tokenizer, prompt, n, *rest: list(drawn)[:n])
    monkeypatch.setattr(world, "tasks", lambda *args: [SimpleNamespace(parts=parts) for parts in built_in])
    monkeypatch.setattr(ranking, "keyboard", person)
    config = SampleConfig(**{"rank": str(path), "num_samples": 5} | changes)
    ranking.rank(MODEL, TOKENIZER, "sft", config, contextlib.nullcontext(), "runs/mine")
    return asked


def by_quality(text, shown):
    return [QUALITY[answer] for answer in shown]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


# ---------------------------------------------------------------- what people type

@pytest.mark.parametrize("line, ranks", [
    ("2 > 1 = 3 > 4", [1, 0, 1, 2]), ("2 1=3 4", [1, 0, 1, 2]), ("2>1=3>4", [1, 0, 1, 2]), ("21=34", [1, 0, 1, 2]),
    ("  4 3\t2 1 \n", [3, 2, 1, 0]), ("3=1=4>2", [0, 1, 0, 0]), ("1 = 2 = 3 = 4", [0] * 4), (" s ", [0] * 4),
])
def test_a_ranking(line, ranks):
    """The usual mistake: the place of an answer is taken for its number; and a tie uses up a rank."""
    assert ranking.parse_ranking(line, 4) == ranks


@pytest.mark.parametrize("line, k, why", [
    ("", 2, "needed"), ("hello", 2, "needed"), ("1 >", 2, "needed"), ("= 1 2", 2, "needed"), ("1 > = 2", 2, "needed"),
    ("1 < 2", 2, "needed"), ("1 2 3", 2, "numbers 1 to 2"), ("0 1 2", 2, "needed"), ("1 2 s", 2, "needed"),
    ("1 2", 3, "answer 3 is missing"), ("2 1 = 2 3", 3, "answer 2 is there twice"), ("1 -2", 2, "needed"), ("² 1", 2, "needed"),
])
def test_a_mistyped_ranking(line, k, why):
    with pytest.raises(ValueError, match=why) as error:
        ranking.parse_ranking(line, k)
    assert "\n" not in str(error.value)


def test_at_the_keyboard(monkeypatch, capsys):
    """A mistyped line costs one line and is asked again; the answers are not shown a second time."""
    typed = iter(["2 2", "1 >", "2 > 1"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert ranking.keyboard("3/7", "Who?", ["Anna", "Ben"]) == [1, 0]
    out = capsys.readouterr().out
    assert out.startswith("\n=== 3/7 Who?\n[1] Anna\n[2] Ben\n") and out.count("[1]") == 1 and out.count("\n") == 6
    monkeypatch.setattr("builtins.input", lambda prompt: " q")
    with pytest.raises(EOFError):
        ranking.keyboard("3/7", "Who?", ["Anna", "Ben"])


# ---------------------------------------------------------------- a session

def test_the_order_is_blind_and_undone(monkeypatch, tmp_path):
    """The usual mistake: the numbers shown are written, and each answer gets another one's rank."""
    asked = rank(monkeypatch, tmp_path / "out.jsonl", by_quality)
    orders = [shown for _, shown in asked]
    assert all(sorted(shown) == sorted(QUALITY) for shown in orders) and len(set(orders)) > 2
    assert sum(shown == tuple(sorted(QUALITY)) for shown in orders) < 2
    for row in rows(tmp_path / "out.jsonl"):
        assert row["ranks"] == [QUALITY[answer] for answer in row["responses"]]
    assert asked == rank(monkeypatch, tmp_path / "again.jsonl", by_quality), "interrupted, the same question looks the same"


def test_reward_reads_what_was_ranked(monkeypatch, tmp_path):
    """Ties and skipped prompts are rows of the same file; a row that has only ties is no comparison."""
    ways = iter([[1, 0, 1], [0, 0, 0], [2, 1, 0], [0, 1, 1], [0, 1, 2]])
    asked = rank(monkeypatch, tmp_path / "out.jsonl", lambda text, shown: next(ways), num_samples=3)
    found, skipped = data.read_comparisons(tmp_path / "out.jsonl")
    assert [(instruction, input, tuple(history)) for instruction, input, history, *_ in found] == PROMPTS[:1] + PROMPTS[2:]
    assert sum(skipped.values()) == 1
    ranks = [dict(zip(shown, way)) for (_, shown), way in zip(asked, ([1, 0, 1], 0, [2, 1, 0], [0, 1, 1], [0, 1, 2])) if way]
    assert [dict(zip(responses, ranked)) for *_, responses, ranked in found] == ranks
    assert [(row["stage"], row["seed"]) for row in rows(tmp_path / "out.jsonl")] == [("sft", 1)] * 5


@pytest.mark.parametrize("stop", [KeyboardInterrupt, EOFError])
def test_interrupted_and_continued(stop, monkeypatch, tmp_path, capsys):
    """A row is in the file before the next question; Ctrl-C loses nothing; and nothing is asked twice, skipped or not."""
    path = tmp_path / "out.jsonl"

    def one_and_a_skip(text, shown):
        done = path.read_text(encoding="utf8").count("\n")
        if done == 2:
            raise stop
        return [0] * len(shown) if done else by_quality(text, shown)
    first = rank(monkeypatch, path, one_and_a_skip)
    assert len(first) == 3 and len(rows(path)) == 2
    assert "1 ranked" in (out := capsys.readouterr().out) and f"python reward.py --out runs/mine --data {path}" in out
    second = rank(monkeypatch, path, by_quality, PROMPTS[::-1] + PROMPTS[:1])
    assert [text for text, _ in first[:2] + second[::-1]] == [
        "Name a tree.", "Who?\n\nAnna likes tea.", "you> Who is Anna?\n\nmodel> A cook.\n\nAnd Ben?", "把“猫”翻译成英文", "Say hello."]
    assert "3 prompts to rank" in capsys.readouterr().out
    assert rank(monkeypatch, path, by_quality) == [] and len(rows(path)) == 5


def test_equal_answers_are_shown_once(monkeypatch, tmp_path, capsys):
    """And where all are equal there is nothing to rank; nor is there where the prompt does not fit."""
    path, long = tmp_path / "out.jsonl", [("ha" * 50, "", ())]
    asked = rank(monkeypatch, path, lambda text, shown: [0, 1], PROMPTS[:1] + long, ["yes", "no", "yes", "yes"], num_samples=1)
    assert [sorted(shown) for _, shown in asked] == [["no", "yes"]] and sorted(rows(path)[0]["responses"]) == ["no", "yes"]
    assert "too long a prompt: 'haha" in capsys.readouterr().out
    assert rank(monkeypatch, path, by_quality, PROMPTS[1:3], ["yes"] * 5) == [] and len(rows(path)) == 1
    assert capsys.readouterr().out.count("left out, all answers equal: '") == 2


def test_the_prompts_of_a_file(monkeypatch, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"instruction": "Who?", "input": "Anna."}\n{"prompt": "Hello"}\n{"prompt": "Hello"}\n')
    asked = rank(monkeypatch, tmp_path / "out.jsonl", by_quality, prompts=str(tmp_path / "in.jsonl"))
    assert [text for text, _ in asked] == ["Who?\n\nAnna.", "Hello"]


ROW = '{"instruction": "Who?", "input": "", "history": [], "responses": ["a", "b"], "ranks": [0, 1], "stage": "", "seed": 1}'


@pytest.mark.parametrize("content, line", [
    (ROW + "\n" + ROW[:40], 2), (f"[{ROW}]", 1), (ROW.split(', "resp')[0] + "}\n", 1), ("null\n", 1), (ROW + "\n\n", 2),
    (ROW + "\n" + ROW.replace("Who", "Qui é") + "\n", 2), ("1 > 2", 1),
])
def test_a_broken_file_stays_as_it_is(content, line, monkeypatch, tmp_path):
    """The usual mistake: OUT is opened for writing first, or the prompts' own file is named and appended to."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"out.jsonl, line {line}: .*another file$") as error:
        rank(monkeypatch, path, by_quality)
    assert "\n" not in str(error.value) and path.read_bytes() == content.encode("latin-1")


def test_a_last_line_without_its_end(monkeypatch, tmp_path):
    (tmp_path / "out.jsonl").write_text(ROW)
    rank(monkeypatch, tmp_path / "out.jsonl", by_quality, PROMPTS[:1])
    assert [row["instruction"] for row in rows(tmp_path / "out.jsonl")] == ["Who?", "Name a tree."]


@pytest.mark.parametrize("flags, words", [
    (["--rank", "{}"], ["directory"]), (["--rank", "{}/no/out.jsonl"], ["no/out.jsonl", "No such"]),
    (["--prompts", "in.jsonl"], ["--rank"]), (["--rank", "{}/a", "--prompt", "Who?"], ["--prompts"]), (["--rank"], ["value"]),
    (["--rank", "{}/a", "--num-samples", "10"], ["2 to 9"]),
])
def test_what_cannot_be_ranked(flags, words, run, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "finished", lambda *args: True)
    monkeypatch.setattr(training, "load_model", lambda *args: (MODEL, TOKENIZER, {}))
    done = run("sample", "--out", tmp_path, *(flag.format(tmp_path) for flag in flags))
    assert done.code == 2 and all(word in done.out.splitlines()[-1] for word in words) and "Traceback" not in done.out
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- in a browser

@contextlib.contextmanager
def serving(work, capsys):
    """work() runs in a thread -> the address that it printed; afterwards it has ended by itself."""
    thread, out = threading.Thread(target=work, daemon=True), ""
    thread.start()
    while not (found := re.search(r"http://\S+", out)):
        assert thread.is_alive(), out
        out += capsys.readouterr().out
        time.sleep(0.01)
    yield found[0]
    thread.join(5)
    assert not thread.is_alive()


def request(url, line=None, **headers):
    """-> (status, body, headers); status 0: the connection was closed without a reply."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, line, headers), timeout=5) as reply:
            return reply.status, reply.read().decode(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, "", error.headers
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError):
        return 0, "", {}


def test_a_round_in_the_browser(monkeypatch, capsys, tmp_path):
    """Page, question, ranking, the next question ...; the person there sees the same blind order, and it is undone."""
    path = tmp_path / "out.jsonl"
    with serving(lambda: rank(monkeypatch, path, by_quality, serve=True), capsys) as home:
        status, page, headers = request(home)
        assert status == 200 and page == (ROOT / "benchmarks" / "rank_page.html").read_text(encoding="utf8") and headers["Content-Type"] == "text/html"
        orders = []
        for n, parts in enumerate(PROMPTS, 1):
            status, body, headers = request(home + "question")
            place, text, shown = json.loads(body)
            assert headers["Content-Type"] == "application/json" and place == f"{n}/5" and parts[0] in text
            orders.append(shown)
            order = "s" if n == 2 else " > ".join(sorted("12345", key=lambda i: QUALITY[shown[int(i) - 1]]))
            assert request(home + place, order.encode())[0] == 200
    assert len(set(map(tuple, orders))) > 2
    assert [row["ranks"] for row in rows(path)] == [
        [0] * 5 if n == 1 else [QUALITY[answer] for answer in row["responses"]] for n, row in enumerate(rows(path))]


def test_serve_is_a_flag_of_sample(monkeypatch, capsys, tmp_path):
    """`sample.py --rank OUT.jsonl --serve`: a page instead of the keyboard. Usual mistake: the flag is read and nothing changes."""
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("the keyboard was asked"))
    monkeypatch.setattr(sample, "answers", lambda model, tokenizer, prompt, n, *rest: sorted(QUALITY)[:n])
    monkeypatch.setattr(world, "tasks", lambda *args: [SimpleNamespace(parts=PROMPTS[0])])
    monkeypatch.setattr(training, "finished", lambda *args: True)
    monkeypatch.setattr(training, "load_model", lambda *args: (MODEL, TOKENIZER, {}))
    monkeypatch.setattr("sys.argv", ["sample.py", "--serve", "--threads", "2", "--rank", str(path), "--stage", "sft"])
    with serving(sample.main, capsys) as home:
        assert request(home)[0] == 200
        place, _, shown = json.loads(request(home + "question")[1])
        assert request(home + place, b"2 > 1 = 3 > 4")[0] == 200
    assert rows(path)[0]["ranks"] == [1, 0, 1, 2] and len(shown) == 4


def test_what_the_server_refuses(capsys):
    """Another site in the same browser can send requests here: it lacks the token, or its name stands in Host."""
    given = []

    def work():
        given.append(list(ranking.browser()("1/2", "Who?", ["<b>a</b>", "b"])))
    with serving(work, capsys) as home:
        port, root = int(home.split(":")[2].split("/")[0]), "/".join(home.split("/")[:3])
        assert len(home.split("/")[3]) >= 32
        for url in (root, f"{root}/question", f"{root}/rank_page.html", f"{root}/x{home.split('/')[3]}/", home + "sample.py",
                    home + "../sample.py", home + "1/2", home[:-1]):
            assert request(url)[0] == 403, url
        for url in (f"{root}/1/2", f"{root}/{'x' * 43}/1/2", home, home + "question", home + "2/2"):
            assert request(url, b"2 > 1")[0] == 403, url
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}"):
            assert request(home + "question", Host=host)[0] == request(home + "1/2", b"2 > 1", Host=host)[0] == 403, host
        for line in (b"", b"2 > 2", b"<script>", b"\xff", b"1 " * 10 ** 5):
            assert request(home + "1/2", line)[0] == 0, line[:9]
        with pytest.raises(OSError):                    # bound to 127.0.0.1 alone, not to every address
            socket.create_connection(("127.0.0.2", port), timeout=1).close()
        with socket.create_connection(("127.0.0.1", port)):     # an idle connection holds nobody up for long
            assert json.loads(request(home + "question")[1]) == ["1/2", "Who?", ["<b>a</b>", "b"]]
        assert not given and request(home + "1/2", b"2 > 1")[0] == 200
    assert given == [[1, 0]]


def test_the_page_reads_no_text_as_html_and_needs_no_other_site():
    page = (ROOT / "benchmarks" / "rank_page.html").read_text(encoding="utf8")
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval|https?:|//[a-z]|src=", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and len(page.splitlines()) < 150


# ---------------------------------------------------------------- and what becomes of it
def scores_of(model, tokenizer, rows):
    """The reward model's scores of the ranked answers -> (N,K)"""
    ids = [reward.encode(tokenizer, (row["instruction"], row["input"], row["history"]), row["responses"]) for row in rows]
    return reward.score_many(model, ids, tokenizer.pad, contextlib.nullcontext())


@pytest.mark.parametrize("where", ["keyboard", "page"])
def test_five_rankings_change_the_reward_models_order(where, tiny_run, run, tmp_path, monkeypatch, capsys):
    """Your preferences, your reward model: five prompts ranked, at the keyboard or on the page, reward.py --data on the
    file (twelve epochs: five prompts are few steps); then it orders these answers as this person does."""
    folder, path = shutil.copytree(tiny_run.folder, tmp_path / "run"), tmp_path / "ranks.jsonl"
    (tmp_path / "asked.txt").write_text("".join(f"Say {word}.\n" for word in ("yes", "no", "much", "little", "nothing")))
    flags = ("--out", folder, "--rank", path, "--prompts", tmp_path / "asked.txt", "--stage", "sft", "--num-samples", 4,
             "--temperature", 1, "--max-new-tokens", 7)
    if where == "keyboard":
        done = run("sample", *flags, stdin="4 > 3 > 2 = 1\n" * 5)
        assert done.code == 0 and "5 ranked" in done.out, done.out
    else:
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, flags), "--serve"])
        with serving(sample.main, capsys) as home:
            for _ in range(5):
                place, *_ = json.loads(request(home + "question")[1])
                assert request(home + place, b"4 > 3 > 2 = 1")[0] == 200
    ranked = rows(path)
    assert len(ranked) == 5 and all(row["ranks"] == [2, 2, 1, 0] for row in ranked)
    sft, tokenizer, _ = training.load_model(folder, "sft")
    torch.manual_seed(7)
    before = reward.RewardModel(sft, tokenizer.assistant)
    done = run("reward", "--data", path, "--epochs", 12, "--out", folder, "--dtype", "fp32", "--threads", 2, "--batch-prompts", 1,
               "--lr", 0.02, "--matrix-lr", 0.02)
    assert done.code == 0, done.out
    after = reward.RewardModel(sft)
    after.load_state_dict(training.load(folder / "reward.pt"))
    wanted = reward.preferred(torch.tensor([row["ranks"] for row in ranked]))
    was, now = (scores_of(model, tokenizer, ranked) for model in (before, after))
    assert reward.accuracy(now[1:], wanted[1:]) == 1, "the first prompt is held out"
    assert reward.accuracy(now, wanted) > reward.accuracy(was, wanted) + 0.2
