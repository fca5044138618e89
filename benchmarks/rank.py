"""Rankings by a person, at the keyboard or on a page in a browser; `reward.py --data` learns from them.

    python sample.py --config tiny --rank mine.jsonl --stage sft --temperature 1
    python sample.py --config tiny --rank mine.jsonl --stage sft --temperature 1 --serve

K answers to a prompt are shown in blind order. Each ranking is appended to the file at once, so that a session can be
stopped and continued; nothing is asked twice. The page is rank_page.html beside this file, served to this machine alone.
"""
import contextlib
import http.server
import json
import operator
import random
import re
import secrets
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError  # noqa: E402  (before torch: see there)

import data  # noqa: E402
import sample  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402
from training import say  # noqa: E402

KEYS = ("instruction", "input", "history", "responses", "ranks", "stage", "seed")   # of a row


def parse_ranking(line, k):
    """"2 > 1 = 3" or "2 1=3" -> [1, 0, 1], the ranks of k answers: 0 = best, equal = tie; "s": all tie."""
    names = [str(n) for n in range(1, k + 1)]
    text = "=".join(names) if line.strip() == "s" else "".join(line.split())
    if not re.fullmatch(f"[1-{k}]([>=]?[1-{k}])*", text):
        raise ValueError(f"needed: the numbers 1 to {k}, best first, as in 2 > 1 or, a tie, 2 = 1; s skips")
    if wrong := [name for name in names if text.count(name) != 1]:
        raise ValueError(f"answer {wrong[0]} is {'there twice' if wrong[0] in text else 'missing'}")
    places = re.findall("[1-9](?:=[1-9])*", text)                           # "2", "1=3"
    return [rank for name in names for rank, tied in enumerate(places) if name in tied]


def keyboard(place, text, shown):
    """Shows a prompt and its answers -> their ranks, as typed. EOFError at q and at Ctrl-D."""
    say("\n".join([f"\n=== {place} {text}", *(f"[{i}] {answer}" for i, answer in enumerate(shown, 1))]))
    while (line := input("best first> ")).strip() != "q":
        try:
            return parse_ranking(line, len(shown))
        except ValueError as why:
            say(f"{why}")
    raise EOFError


def browser():
    """Serves rank_page.html to this machine -> ask(place, text, shown) -> ranks, as `keyboard` does."""
    page, asked, ranks = Path(__file__).with_name("rank_page.html").read_bytes(), ["", "", []], []

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout, log_message = 0.5, lambda *args: None      # seconds: browsers keep spare connections open

        def do_GET(self):
            line = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 99)).decode()
            replies = {f"GET {home}": page, f"GET {home}question": json.dumps(asked).encode(),
                       f"POST {home}{asked[0]}": b""}       # a tab that is late names another place
            wanted = f"{self.command} {self.headers['Host']}{self.path}"
            if wanted not in replies:
                return self.send_error(403)
            if self.command == "POST":
                ranks[:] = parse_ranking(line, len(asked[2]))
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if replies[wanted] is page else "application/json")
            self.end_headers()
            self.wfile.write(replies[wanted])
        do_POST = do_GET

    def ask(*question):
        asked[:], ranks[:] = question, []
        while not ranks:                        # one request at a time; while the model writes, they wait
            server.handle_request()
        return ranks
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None    # nonsense, or a tab that is closed: only its connection ends
    # Another site in that browser cannot guess the token; if its own name leads here, it sends that as Host.
    home = f"127.0.0.1:{server.server_port}/{secrets.token_urlsafe()}/"
    say(f"open http://{home} in a browser on this machine; Ctrl-C here ends")
    return ask


def rank(model, tokenizer, stage, config, cast, folder):
    """A person ranks K answers to each prompt, in blind order, equal ones shown once; each row is kept at once."""
    k, path, known, ranked = 4 if config.num_samples == 1 else config.num_samples, config.rank, set(), 0
    ask = browser() if config.serve else keyboard
    prompts = (data.read_prompts(config.prompts) if config.prompts else
               [task.parts for task in world.tasks(500, "val", config.seed)])
    with open(path, "ab+") as file, contextlib.suppress(EOFError, KeyboardInterrupt):
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                known.add(json.dumps(operator.itemgetter(*KEYS)(json.loads(line))[:3]))
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{path}, line {number}: needed: {', '.join(KEYS)}, as --rank writes them. "
                                "Mend or remove the line, or name another file") from None
        if lines and not line.endswith(b"\n"):
            file.write(b"\n")
        left = {key: parts for parts in prompts if (key := json.dumps(parts)) not in known}
        say(f"{len(left)} prompts to rank, best first, like 2 > 1 = 3 (a tie) or 2 1=3; s skips, q quits")
        for i, (key, (instruction, input, history)) in enumerate(left.items(), 1):
            prompt, seed = sample.encode(tokenizer, stage, instruction, input, history), training.seed_of(key)
            fits = len(prompt) < model.config.block_size
            texts = list(dict.fromkeys(sample.answers(model, tokenizer, prompt, k, config, cast, seed) if fits else ()))
            if len(texts) < 2:
                say(f"left out, {'all answers equal' if texts else 'too long a prompt'}: {instruction!r:.60}")
                continue
            texts = random.Random(key).sample(texts, len(texts))        # the first is often the commonest
            turns = [f"{who}> {said}" for turn in history for who, said in zip(("you", "model"), turn)]
            text = "\n\n".join(filter(None, [*turns, instruction, input]))
            ranks = ask(f"{i}/{len(left)}", text, texts)
            row = zip(KEYS, (instruction, input, history, texts, ranks, stage, config.seed))
            file.write(json.dumps(dict(row), ensure_ascii=False).encode() + b"\n")
            file.flush()
            ranked += len(set(ranks)) > 1
    say(f"\n{ranked} ranked. The same command goes on; then: python reward.py --out {folder} --data {path}")
