"""Text <-> tokens <-> batches: the tokenizer, the one prompt template, the file formats, the masks.

Axes: B batch, T tokens.
"""
import base64
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import tiktoken
import torch

from config import UserError

# ------------------------------------------------------------------------ the tokenizer

# Text is first cut into words with their leading space, single digits, punctuation and white space; merges never cross
# these cuts. Latin letters apart from all others, so that Chinese beside a Latin word does not stick to it. The same
# pattern runs in Python's re (training) and in tiktoken (encoding).
PATTERN = r" ?[A-Za-zÀ-ɏ]+|[^\W\d_A-Za-zÀ-ɏ]+|\d| ?[^\s\w]+|_+|\s+(?!\S)|\s+"
END, PAD, USER, ASSISTANT = SPECIALS = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>")


def train_bpe(texts, size):
    """Byte-pair encoding (Sennrich et al. 2016), from scratch: texts -> {token bytes: rank}, at most `size` of them.

    Begin with the 256 bytes; again and again, make the most frequent pair of neighbours one new token.
    """
    words = Counter(word for text in texts for word in re.findall(PATTERN, text))
    ranks = {bytes([i]): i for i in range(256)}
    spelled = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(words.items())]
    count, where = Counter(), defaultdict(set)      # of each pair: how often, and in which words
    for i, (parts, n) in enumerate(spelled):
        for pair in zip(parts, parts[1:]):
            count[pair] += n
            where[pair].add(i)
    while len(ranks) < size and count:
        best = max(count, key=lambda pair: (count[pair], pair))     # a tie must not depend on the hash seed
        if count[best] < 2:
            break                                   # what occurs once is no pattern
        ranks[best[0] + best[1]] = len(ranks)
        for i in where.pop(best):                   # recount only the words that contain the pair
            parts, n = spelled[i]
            for pair in zip(parts, parts[1:]):
                count[pair] -= n
                where[pair].discard(i)
            merged, j = [], 0
            while j < len(parts):
                size_here = 2 if tuple(parts[j:j + 2]) == best else 1
                merged.append(b"".join(parts[j:j + size_here]))
                j += size_here
            spelled[i] = (merged, n)
            for pair in zip(merged, merged[1:]):
                count[pair] += n
                where[pair].add(i)
        del count[best]
    return ranks


class Tokenizer:
    """Text <-> token ids. The special tokens stand above all others, and no text can spell them."""

    def __init__(self, ranks, pattern=PATTERN):
        first = max(ranks.values()) + 1
        special = {name: first + i for i, name in enumerate(SPECIALS)}
        if first == 50_256:                         # GPT-2's own: its end of text is already the next id
            special = {END: 50_256, PAD: 50_257, USER: 50_258, ASSISTANT: 50_259}
        self.end, self.pad, self.user, self.assistant = special.values()
        self.size, self.ranks, self.pattern = first + len(special), ranks, pattern
        self.encoding = tiktoken.Encoding("instruct", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text):
        """str -> list of ids. "<|user|>" in a text is seven characters like any others: nobody can forge a turn."""
        return self.encoding.encode_ordinary(text)

    def encode_many(self, texts):
        return self.encoding.encode_ordinary_batch(texts)

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
            raise UserError(f"{path} is no tokenizer of this project ({error}). Train it again: "
                            "python sft.py --fresh") from None

    @classmethod
    def gpt2(cls):
        """tiktoken's GPT-2 encoding, which it downloads once."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:                  # requests' errors, and tiktoken's own
            raise UserError(
                "the GPT-2 tokenizer could not be downloaded (" + type(error).__name__ + "). On a machine with network: "
                "TIKTOKEN_CACHE_DIR=some/folder python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\", then copy "
                "that folder here and set TIKTOKEN_CACHE_DIR to it; or use --tokenizer bpe.") from None
        return cls(encoding._mergeable_ranks, encoding._pat_str)


# ------------------------------------------------------------------------ the prompt template

def encode_prompt(tokenizer, instruction, input="", history=()):
    """What the model reads before it answers -> ids.

    <|user|> instruction, a blank line, input <|assistant|>; earlier turns stand before it, each ended by
    <|endoftext|> as the model's own answers are. history: ((user, assistant), ...)
    """
    ids = []
    for user, assistant in history:
        ids += [tokenizer.user, *tokenizer.encode(user), tokenizer.assistant, *tokenizer.encode(assistant), tokenizer.end]
    text = f"{instruction}\n\n{input}" if input else instruction
    return ids + [tokenizer.user, *tokenizer.encode(text), tokenizer.assistant]


def encode_example(tokenizer, instruction, input, output, history=()):
    """A demonstration -> (ids, mask), side by side: mask is True at the response and at the EOS that ends it.

    By position, not by id: a pad that shares its id with the EOS could not hide the EOS (RECIPE S2).
    """
    prompt = encode_prompt(tokenizer, instruction, input, history)
    response = [*tokenizer.encode(output), tokenizer.end]
    return prompt + response, [False] * len(prompt) + [True] * len(response)


# ------------------------------------------------------------------------ files

def read_text(path):
    """A file as text. UserError where it is missing, a folder, empty, or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8. Convert it: iconv -f latin1 -t utf8 {path} > new.txt") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. --data takes one readable file") from None
    if not text.strip():
        raise UserError(f"{path} is empty. Needed: plain text, or demonstrations as .json or .jsonl")
    return text


def is_demonstrations(path):
    """Demonstrations (.json, .jsonl), or plain text?"""
    return Path(path).suffix.lower() in (".json", ".jsonl")


def _records(path):
    """(where, record) of a JSON array or of JSONL."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}, item {i}", record) for i, record in enumerate(json.loads(text), 1)]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append((f"{path}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg}). Needed: an array in [ ], or one object a "
                                "line") from None
    return records


def read_demonstrations(path):
    """A JSON array or JSONL -> [(instruction, input, output)].

    Keys: instruction, output and perhaps input; or prompt and completion (or response). UserError at the first
    record that lacks one, names its place, and says which keys would do.
    """
    found = []
    for where, record in _records(path):
        if not isinstance(record, dict):
            raise UserError(f"{where}: a {type(record).__name__} where an object with instruction and output should be")
        question = "instruction" if "instruction" in record else "prompt"
        answer = next((k for k in ("output", "completion", "response") if k in record), "output")
        for key in (question, answer):
            if key not in record:
                raise UserError(f"{where}: no \"{key}\". Needed: instruction (input) output, or prompt completion")
            if not isinstance(record[key], str) or not record[key].strip():
                raise UserError(f"{where}: \"{key}\" is empty or no text")
        extra = record.get("input") or ""
        if not isinstance(extra, str):
            raise UserError(f"{where}: \"input\" is no text")
        found.append((record[question], extra, record[answer]))
    if not found:
        raise UserError(f"{path} holds no demonstrations")
    return found


# ------------------------------------------------------------------------ batches

def pack(tokenizer, texts):
    """Many texts -> one array of ids, each text ended by <|endoftext|>."""
    small = np.uint16 if tokenizer.size <= 2 ** 16 else np.uint32
    ids = [np.array([*ids, tokenizer.end], dtype=small) for ids in tokenizer.encode_many(texts)]
    return np.concatenate(ids)


def windows(ids, block_size, n, seed):
    """n random windows of a long array -> tokens (n, block_size + 1): inputs are [:, :-1], targets [:, 1:]."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - block_size, n)
    return torch.from_numpy(np.stack([ids[s:s + block_size + 1] for s in starts]).astype(np.int64))


def collate(examples, pad):
    """[(ids, mask)] of any lengths -> tokens (B,T), real (B,T), labels (B,T): padded on the right.

    real: True at real tokens; labels: True at the tokens that are to be learnt.
    """
    T = max(len(ids) for ids, _ in examples)
    tokens = torch.full((len(examples), T), pad)
    real, labels = torch.zeros(2, len(examples), T, dtype=torch.bool)
    for row, (ids, mask) in enumerate(examples):
        tokens[row, :len(ids)] = torch.tensor(ids)
        real[row, :len(ids)] = True
        labels[row, :len(ids)] = torch.tensor(mask)
    return tokens, real, labels


def epoch_batches(lengths, batch_size, seed):
    """The order of one epoch: a list of index lists. Every example once; each batch of about equal lengths.

    Shuffled, cut into stretches of 16 batches, sorted by length within a stretch, and the batches shuffled: little
    padding, and no order that a model could learn.
    """
    r = random.Random(str(seed))
    order = list(range(len(lengths)))
    r.shuffle(order)
    batches = []
    for i in range(0, len(order), 16 * batch_size):
        stretch = sorted(order[i:i + 16 * batch_size], key=lengths.__getitem__)
        batches += [stretch[j:j + batch_size] for j in range(0, len(stretch), batch_size)]
    r.shuffle(batches)
    return batches
