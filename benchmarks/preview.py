"""What the project understands of a data file: its kind, its lengths, and three examples as the model reads them.

    python data.py FILE[,FILE...] [--tokenizer runs/tiny/tokenizer.json]

What is learnt stands in ⟦ ⟧: the loss mask, made visible. Without a tokenizer lengths are in characters.
"""
import re
import shlex
import sys
from itertools import groupby, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError  # noqa: E402  (before torch: see there)

import numpy as np  # noqa: E402

import data  # noqa: E402
import training  # noqa: E402


def render(tokenizer, ids, mask):
    """Ids as text: special tokens by name, what the mask marks in ⟦ ⟧, a long stretch without its middle."""
    shown = ""
    for marked, stretch in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        text = tokenizer.encoding.decode([i for i, _ in stretch])
        text = re.sub("(?s)^(.{300}).+(.{300})$", r"\1 [...] \2", text)
        shown += f"⟦{text}⟧" if marked else text
    return shown


def main():
    """How data files are understood: their kind, their lengths, three examples as the model reads them."""
    names, option, path = (*(sys.argv[1:] or ["-"]), "--tokenizer", "runs/tiny/tokenizer.json")[:3]
    if names in ("-h", "--help"):
        sys.exit(print(__doc__))
    if names.startswith("-") or option != "--tokenizer":
        raise UserError("needed: python data.py FILE[,FILE...], and perhaps --tokenizer RUN/tokenizer.json")
    known = len(sys.argv) > 2 or Path(path).exists()
    tokenizer = data.Tokenizer.load(path) if known else data.Tokenizer(data.train_bpe([], 256))     # else of bytes
    kind, step, skipped = data.kind_of(names), "sft.py", {}
    if kind == "comparisons":
        (found, skipped), step = data.read_comparisons(names), "reward.py --out runs/tiny"
        kind += " of " + " and ".join(map(str, sorted({len(ranks) for *_, ranks in found}))) + " answers"
        records = [[(f"rank {rank}: ", *data.encode_example(tokenizer, *parts, answer, history))
                    for rank, answer in sorted(zip(ranks, answers))] for *parts, history, answers, ranks in found]
    elif kind == "prompts":
        step = "ppo.py --out runs/tiny"
        records = [[("", data.encode_prompt(tokenizer, *parts), repeat(False))] for parts in data.read_prompts(names)]
    elif kind == "demonstrations":
        records = [[("", *data.encode_example(tokenizer, *parts))] for parts in data.read_demonstrations(names)]
    else:
        first = next(data.read_text(names))         # shown is its first part: the memory may not hold all
        records = [[("", [*tokenizer.encode(text), tokenizer.end], repeat(True))] for text in first]
    count, sizes = len(records), [len(ids) if known else len(tokenizer.decode(ids))
                                  for record in records for _, ids, _ in record]
    if kind == "text":
        sizes = [len(data.pack(tokenizer, [text])) if known else len(text)
                 for part in data.read_text(names) for text in part]
        count = len(sizes)
    print(f"{names}: {count:,} {kind}; skipped:",
          ", ".join(f"{n:,} {why}" for why, n in skipped.items()) or "none")
    print(f"lengths: mean {np.mean(sizes):,.0f}, longest {max(sizes):,}", "tokens" if known else "characters")
    print("three of them, with ⟦ ⟧ about what is learnt, in comparisons about what is scored:")
    for i in sorted({0, len(records) // 2, len(records) - 1}):
        print(f"\n--- {i + 1}", *(label + render(tokenizer, *encoded) for label, *encoded in records[i]), sep="\n")
    print(f"\nNext: python {step} --data {shlex.quote(names)}")


if __name__ == "__main__":
    training.command(main)
