"""A stage of a run as a folder that other GPT-2 programs read, and --init does.

    python sample.py --out runs/mine --stage ppo --export gpt2-mine/

model.safetensors and config.json (model.save_gpt2); and, where the run has GPT-2's tokenizer, vocab.json, merges.txt, and
added_tokens.json with the turns, which GPT-2 does not know: a prompt is <|user|>question<|assistant|>, the answer ends with
<|endoftext|>.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config  # noqa: E402, F401  (before torch: see there)

from data import GPT2_PATTERN, SPECIALS  # noqa: E402
from model import save_gpt2  # noqa: E402
from training import say  # noqa: E402


def letters():
    """The character by which GPT-2's files write each byte: itself where it can be seen, else one from U+0100 on."""
    seen = {b: chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    return seen | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in seen)}


def parts_of(token, ranks):
    """The two tokens that were merged into this one: from its bytes on, the earliest merge comes first."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(1, len(parts)), key=lambda i: ranks.get(parts[i - 1] + parts[i], len(ranks)))
        parts[i - 1:i + 1] = [parts[i - 1] + parts[i]]
    return parts


def vocabulary(tokenizer):
    """GPT-2's tokenizer as published -> {name of the file: its text}"""
    letter = letters()
    spelled = {token: "".join(letter[b] for b in token) for token in tokenizer.ranks}
    merges = [" ".join(spelled[part] for part in parts_of(token, tokenizer.ranks))
              for token in sorted(tokenizer.ranks, key=tokenizer.ranks.get) if len(token) > 1]
    ids = {spelled[token]: i for token, i in tokenizer.ranks.items()} | {SPECIALS[0]: tokenizer.end}
    added = dict(zip(SPECIALS[1:], (tokenizer.pad, tokenizer.user, tokenizer.assistant)))
    return {"vocab.json": json.dumps(ids), "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "added_tokens.json": json.dumps(added)}


def export(model, tokenizer, folder):
    """Writes the folder, and says what is in it."""
    save_gpt2(model, folder)
    theirs = tokenizer.pattern == GPT2_PATTERN
    files = vocabulary(tokenizer) if theirs else {}
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf8")
    say(f"{folder}: " + ", ".join(["model.safetensors", "config.json", *files]) + ("" if theirs else
        "; no vocab.json: this run's tokenizer cuts words by a rule of its own, which GPT-2's programs lack"))
