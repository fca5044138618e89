"""A conversation with a model, turn by turn; an answer is shown while it is made.

    python sample.py --config tiny --chat
"""
import codecs
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import UserError  # noqa: E402  (before torch: see there)

import sample  # noqa: E402
from training import say  # noqa: E402


def stream(tokenizer, shown):
    """-> on_token of `generate`: prints an answer while it is made, and keeps its pieces in the list `shown`."""
    decoder = codecs.getincrementaldecoder("utf8")("replace")   # a character whose bytes are not all there waits
    def heard(new):
        ids = [i for i in new if i is not None and i < tokenizer.end]
        shown.append(decoder.decode(tokenizer.encoding.decode_bytes(ids)))
        print(shown[-1], end="", flush=True)
    return heard


def chat(model, tokenizer, stage, config, cast):
    """Turn by turn, until an empty line or Ctrl-D. Ctrl-C stops the answer, not the program."""
    say("Chat. An empty line ends it; Ctrl-C stops an answer.")
    history, room = [], model.config.block_size // 2
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for turn, question in enumerate(iter(lambda: input("you> ").strip(), "")):
            while len(prompt := sample.encode(tokenizer, stage, question, "", history)) > room and history:
                history.pop(0)                      # the oldest turn goes: an answer needs room
            print("model> ", end="", flush=True)
            try:
                heard = stream(tokenizer, shown := [])
                sample.answers(model, tokenizer, prompt, 1, config, cast, turn, on_token=heard)
            except (KeyboardInterrupt, UserError) as why:
                print(f" [{str(why) or 'stopped'}]", end="")
            print()
            history.append((question, "".join(shown)))
    say("bye")
