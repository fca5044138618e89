"""Text <-> tokens <-> batches: tokenizer, prompt template, file formats, masks. Axes: B batch, T tokens."""
import base64, glob, gzip, json, random, re, runpy, zlib
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock
import numpy as np
import tiktoken
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from torch.nn.utils.rnn import pad_sequence
from config import UserError

BENCHMARKS = Path(__file__).parent / "benchmarks"       # measurements, and the pages that few readers need
# Merges never cross these cuts: words with their leading space, digits one by one, punctuation, white space;
# Latin letters apart from others, so that Chinese sticks to no Latin word. Both re and tiktoken cut by it.
PATTERN = r" ?[A-Za-zÀ-ɏ]+|[^\W\d_A-Za-zÀ-ɏ]+|\d| ?[^\s\w]+|_+|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PART = 1 << 22      # bytes of a text that are in memory at once, and of its ids
JSON = ".json", ".jsonl", ".ndjson"
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>")

def train_bpe(texts, size):
    """Byte-pair encoding (Sennrich et al. 2016): texts -> {token bytes: rank}, at most `size` of them."""
    # Begin with the 256 bytes; again and again, make the most frequent pair of neighbours one new token.
    words = Counter(word for text in texts for word in re.findall(PATTERN, text))
    spelled = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(words.items())]
    ranks = {bytes([i]): i for i in range(256)}
    count, where = Counter(), defaultdict(set)      # of each pair: how often, and words that may contain it
    def tally(i, sign):
        parts, n = spelled[i]
        for pair in zip(parts, parts[1:]):
            count[pair] += sign * n
            where[pair].add(i)
    for i in range(len(spelled)):
        tally(i, 1)
    while len(ranks) < size and (most := max(count.values(), default=0)) > 1:     # once is no pattern
        best = max(pair for pair, n in count.items() if n == most)      # a tie must not depend on the hash seed
        ranks[best[0] + best[1]] = len(ranks)
        for i in where.pop(best):                   # recount only these words
            tally(i, -1)
            parts, _ = spelled[i]
            for j in range(len(parts)):             # parts gets shorter: past its end there is no pair
                if tuple(parts[j:j + 2]) == best:
                    parts[j:j + 2] = [best[0] + best[1]]
            tally(i, 1)
    return ranks

class Tokenizer:
    """Text <-> token ids. The special tokens stand above all others, and no text can spell them."""
    def __init__(self, ranks, pattern=PATTERN):
        first = max(ranks.values()) + 1             # in GPT-2 50,256, the end of a text to its weights
        ids = {name: first + i for i, name in enumerate(SPECIALS)}
        self.end, self.pad, self.user, self.assistant = ids.values()
        self.size, self.ranks, self.pattern = first + len(ids), ranks, pattern
        self.dtype = np.min_scalar_type(self.size - 1)      # of many ids, in an array
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)

    def encode(self, text):
        """str -> list of ids. "<|user|>" in a text is characters like any others: nobody can forge a turn."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """ids -> str, without the special tokens; bytes that are no UTF-8 (yet) become U+FFFD."""
        return self.encoding.decode([i for i in ids if i < self.end])

    def save(self, path):
        ranked = [base64.b64encode(token).decode() for token in sorted(self.ranks, key=self.ranks.get)]
        Path(path).write_text(json.dumps({"pattern": self.pattern, "tokens": ranked}), encoding="utf8")

    @classmethod
    def load(cls, path):
        try:
            saved = json.loads(Path(path).read_text(encoding="utf8"))
            return cls({base64.b64decode(t): i for i, t in enumerate(saved["tokens"])}, saved["pattern"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no tokenizer ({error}). Train it: python sft.py --fresh") from None

    @classmethod
    def gpt2(cls):
        """tiktoken's GPT-2 encoding, which it downloads once."""
        try:
            return cls(tiktoken.get_encoding("gpt2")._mergeable_ranks, GPT2_PATTERN)
        except Exception as error:                  # requests' errors, and tiktoken's own
            raise UserError(f"cannot download GPT-2's tokenizer ({type(error).__name__}). Fill TIKTOKEN_CACHE_DIR "
                            "by tiktoken.get_encoding('gpt2') elsewhere, or use --tokenizer bpe") from None

    @classmethod
    def published(cls, path):
        """GPT-2's encoding as published: merges.txt and vocab.json in this folder, or beside this file."""
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        try:
            with mock.patch.dict("os.environ", TIKTOKEN_CACHE_DIR=""):      # no copies: the files may change
                ranks = data_gym_to_mergeable_bpe_ranks(f"{folder}/merges.txt", f"{folder}/vocab.json")
            return cls(ranks, GPT2_PATTERN)
        except (ValueError, LookupError, AssertionError, AttributeError) as error:
            raise UserError(f"{folder}: merges.txt or vocab.json is not GPT-2's ({error!r:.60})") from None

def encode_prompt(tokenizer, instruction, input="", history=()):
    """<|user|> instruction, blank line, input <|assistant|> -> ids. history: ((user, assistant), ...)"""
    past = [i for user, answer in history for i in encode_example(tokenizer, user, "", answer)[0]]
    text = f"{instruction}\n\n{input}" if input else instruction
    return [*past, tokenizer.user, *tokenizer.encode(text), tokenizer.assistant]

def encode_example(tokenizer, instruction, input, output, history=()):
    """A demonstration -> (ids, mask), side by side: mask is True at the response and at its final EOS."""
    # By position, not by id: a pad that shares its id with the EOS could not hide the EOS (RECIPE S2).
    prompt = encode_prompt(tokenizer, instruction, input, history)
    response = [*tokenizer.encode(output), tokenizer.end]
    return prompt + response, [False] * len(prompt) + [True] * len(response)

def _read(names):
    """Files ("a.jsonl,b*.gz") -> (path, line, text), parts of about PART bytes that begin with this line and end
    with one; an array comes whole. UserError where a file is missing, a folder, empty, or not UTF-8."""
    for path in (path for name in re.split(r"\s*,\s*", str(names)) for path in sorted(glob.glob(name)) or [name]):
        line, empty = 1, True
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                while part := file.read(PART) + file.readline():
                    if line == 1 and part.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                        part += file.read()
                    text = part.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
                    yield path, line, text
                    line, empty = line + text.count("\n"), empty and not text.strip()
        except UnicodeDecodeError as error:
            line += error.object[:error.start].count(b"\n")
            raise UserError(f"{path}, line {line}: not UTF-8. To convert it: iconv -f ENCODING -t utf8, with its "
                            "encoding: gb18030 (Chinese), utf-16 (Windows), latin1 (western Europe)") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', 0) or error}") from None
        if empty:
            raise UserError(f"{path} is empty. Needed: plain text, or examples as .json or .jsonl")

def checksum(files):
    """Of what these files hold: it stays where they are moved, and does not where a record is added."""
    found = 0
    for _, _, text in (part for names in files for part in _read(names)):
        found = zlib.crc32(text.encode(), found)
    return found

def kind_of(names):
    """What the first record is, by its keys: "text", "comparisons", "demonstrations" or "prompts"."""
    _, record = next(_records(names, "text"))
    return ("text" if "text" in record and not record.keys() & {"instruction", "prompt"} else
            "comparisons" if "responses" in record else
            "demonstrations" if record.keys() & {"output", "completion", "response"} else "prompts")

def _parse(path, line, text, plain=""):
    """An array, or a part of JSONL -> (where it stands, the object in our own keys) for each. Of a file named
    otherwise, with plain="text" all is one object, with plain="prompt" each line."""
    plain = "" if (kind := Path(path.removesuffix(".gz")).suffix.lower()) in JSON else plain
    if kind in (".csv", ".tsv", ".parquet", ".xlsx") or plain and line == 1 and re.match(r'\s*\[?\s*{\s*"', text):
        raise UserError(f"{path}: needed: plain text, or examples as JSON in a file named .json or .jsonl")
    if plain:
        parts = [text] if plain == "text" else map(str.strip, text.split("\n"))
        yield from ((path, {plain: part}) for part in parts if part.strip())
        return
    array = text.lstrip().startswith("[")
    for line, part in enumerate([text] if array else text.split("\n"), line):
        try:
            found = json.loads(part if array else f"[{part}]")
            if "\\ud" in part.lower():      # half of a surrogate pair is no character
                json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:       # ... as [[[[... is to json
            line += getattr(error, "lineno", 1) - 1
            raise UserError(f"{path}, line {line}: not JSON ({getattr(error, 'msg', error.args[-1])}). "
                            "Needed: an array in [ ], or one object a line") from None
        if array and not found:
            raise UserError(f"{path} holds no comparison, no demonstrations, no prompts")
        for i, record in enumerate(found, 1):
            where = f"{path}, item {i}" if array else f"{path}, line {line}"
            if not isinstance(record, dict):
                raise UserError(f"{where}: needed: an object with instruction or prompt, not {record!r:.40}")
            yield where, _own_keys(where, record)

def _records(names, plain=""):
    return (found for part in _read(names) for found in _parse(*part, plain))

ROLES = {"user": 0, "human": 0, "assistant": 1, "gpt": 1, "system": 2}

def _content(message):
    return message.get("content", message.get("value")) if isinstance(message, dict) else None

def _dialogue(where, said):
    """Messages, or a transcript "Human: ... Assistant: ..." -> {instruction, history, and output if it ends so}"""
    if isinstance(said, str):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", said.strip())
        said = [{"role": role, "content": text.strip()} for role, text in zip(parts[1::2], parts[2::2])]
    system, turns = "", []
    for message in said if isinstance(said, list) else [said]:
        text = _content(message)
        role = text is not None and ROLES.get(str(message.get("role", message.get("from"))).lower())
        if not isinstance(text, str) or role not in (len(turns) % 2, 2):
            raise UserError(f'{where}: needed: user, assistant in turns, each with "content", not {message!r:.60}')
        system, turns = (system + text + "\n\n" * bool(text), turns) if role == 2 else (system, [*turns, text])
    answer = {"output": turns.pop()} if turns and len(turns) % 2 == 0 else {}
    turns = [system + turn for turn in turns[:1]] + turns[1:]   # the system speaks before the first question
    return {"instruction": "".join(turns[-1:]), "history": [*map(list, zip(turns[::2], turns[1::2]))]} | answer

def _own_keys(where, record):
    """A record as others write it -> with our keys: instruction, history, output; responses and ranks."""
    for key in ("messages", "conversations", "prompt"):
        if isinstance(record.get(key), list) or str(record.get(key)).startswith("\n\nHuman:"):
            record = record | _dialogue(where, record[key])
    pair = [record.get("chosen"), record.get("rejected")]
    if pair == [None, None]:
        return record
    whole = all(isinstance(said, list) and len(said) > 1 for said in pair)      # dialogues that end with them
    if not whole and record.keys() & {"prompt", "instruction"}:
        answers = [_content(said[-1]) if isinstance(said, list) and said else said for said in pair]
    else:
        asked = [_dialogue(where, said) for said in pair]
        answers = [dialogue.pop("output", None) for dialogue in asked]
        if asked[0] != asked[1]:
            raise UserError(f"{where}: needed: the same questions in \"chosen\" and in \"rejected\"")
        record = record | asked[0]
    return record | {"responses": answers, "ranks": [0, 1]}

def _take(where, record, *keys, like="some text", default=None):
    """The value under the first of these keys that there is. UserError with an example if it will not do."""
    def fits(value, like):          # a list by its elements; type(), as True is an int to isinstance
        return type(value) is type(like) and (type(value) is not list or all(fits(v, like[0]) for v in value))
    value = next((record[key] for key in keys if record.get(key) is not None), default)
    if not fits(value, like) or default is None and not str(value).strip():
        names = " or ".join(f'"{key}"' for key in keys)
        raise UserError(f"{where}: needed: {names}, like {json.dumps(like)}, not {value!r:.40}")
    return value

def _question(where, record):
    """-> (instruction, input, history) of a record"""
    instruction = _take(where, record, "instruction", "prompt")
    history = _take(where, record, "history", like=[["a question", "its answer"]], default=[])
    if any(len(turn) != 2 for turn in history):
        raise UserError(f"{where}: needed: a question and its answer in each turn of \"history\"")
    return instruction, _take(where, record, "input", default=""), [*map(tuple, history)]

def read_text(names):
    """Plain text, two empty lines between documents, or records {"text": ...} -> for each part its documents."""
    for part in _read(names):
        texts = (_take(*found, "text") for found in _parse(*part, "text"))
        if documents := [t for text in texts for t in text.split("\n\n\n") if t.strip()]:
            yield documents

def read_prompts(names):
    """Records with a prompt, or a .txt with one on each line -> [(instruction, input, history)]"""
    return [_question(*found) for found in _records(names, "prompt")]

def read_demonstrations(names):
    """JSON arrays or JSONL -> [(instruction, input, output, history)]. UserError at the first that lacks one."""
    return [(*parts, _take(where, record, "output", "completion", "response"), history)
            for where, record in _records(names) for *parts, history in [_question(where, record)]]

def read_comparisons(names):
    """Records with ranks, 0 the best -> ([(instruction, input, history, responses, ranks)], {skipped: number})"""
    found, skipped = [], Counter()
    for where, record in _records(names):
        question = _question(where, record)
        answers = _take(where, record, "responses", "chosen, rejected", like=["an answer", "another"])
        ranks = _take(where, record, "ranks", like=[0, 1])
        if len(ranks) != len(answers) or min(ranks, default=0) < 0:
            raise UserError(f"{where}: needed: {len(answers)} \"ranks\", from 0 (the best) on, not {ranks}")
        distinct = dict(zip(answers, ranks))        # of equal texts one counts
        if len(set(distinct.values())) > 1:
            found.append((*question, [*distinct], [*distinct.values()]))
        else:
            skipped["with one answer" if len(answers) < 2 else
                    "with equal texts" if len(distinct) < 2 else "with ties only"] += 1
    if not found:
        raise UserError(f"{names} holds no comparison" + "".join(f"; {n} {why}" for why, n in skipped.items()))
    return found, skipped

def hold_out(mine, others=()):
    """Records -> (to learn from, to measure on: the others, or without any those of every twentieth prompt)."""
    asked = [(*r[:2], str([part for part in r[2:4] if isinstance(part, list)][:1])) for r in mine]  # and history
    test = {*[*dict.fromkeys(asked)][::20]}                             # a prompt may stand in several
    kept = [record for record, question in zip(mine, asked) if question not in test] or mine
    return (mine, others) if others else (kept, [r for r, question in zip(mine, asked) if question in test])

def pack(tokenizer, texts):
    """Many texts -> one array of ids, each text ended by <|endoftext|>. Without lists: 3 times as fast."""
    encode, end, dtype = tokenizer.encoding.encode_to_numpy, tokenizer.end, tokenizer.dtype
    return np.concatenate([np.append(encode(text, disallowed_special=()), end).astype(dtype) for text in texts])

def windows(ids, block_size, n, seed):
    """n random windows of an array -> tokens (n, block_size + 1): inputs are [:, :-1], targets [:, 1:]."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - block_size, n)
    return torch.from_numpy(np.stack([ids[s:s + block_size + 1] for s in starts]).astype(np.int64))

def collate(examples, pad, size=0):
    """[(ids, mask)] of any lengths -> (B,T): tokens, real (0 at pads), labels (what is to be learnt).
    A row is an example, its tokens 1 in `real`; with a size, as many as this holds, 1, 2, ...: packing."""
    rows = []
    for ids, mask in examples:
        if not rows or len(rows[-1][0]) + len(ids) > size:
            rows.append(([], [], []))
        number = max(rows[-1][1], default=0) + 1
        for part, more in zip(rows[-1], (ids, [number] * len(ids), [False, *mask[1:]])):
            part += more            # False: nothing predicts the first
    tokens, real, labels = (pad_sequence([torch.tensor(part, dtype=torch.long) for part in parts], True, filler)
                            for parts, filler in zip(zip(*rows), (pad, 0, 0)))
    return tokens, real, labels.bool()

def epoch_batches(lengths, batch_size, seed):
    """The order of one epoch, as index lists: every example once, each batch of about equal lengths."""
    # Sorted by length only within stretches of 16 batches: little padding, no order that a model could learn.
    r, order, stretch = random.Random(str(seed)), list(range(len(lengths))), 16 * batch_size
    r.shuffle(order)
    order = sorted(enumerate(order), key=lambda at: (at[0] // stretch, lengths[at[1]]))     # (place, example)
    batches = [[i for _, i in order[j:j + batch_size]] for j in range(0, len(order), batch_size)]
    r.shuffle(batches)
    return batches

if __name__ == "__main__":      # python data.py FILE: what is understood of it
    runpy.run_path(f"{BENCHMARKS}/preview.py", run_name="__main__")
