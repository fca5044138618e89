"""Steps 0 and 1: from raw text to a model that follows instructions.

    python sft.py --config tiny                 pretrain on the built-in documents, fine-tune on the demonstrations
    python sft.py --config tiny --data book.txt            pretrain on your own text, then stop
    python sft.py --config tiny --data mine.json           fine-tune on your own demonstrations

Both steps minimise the same next-token loss. In step 0 every token is a target; in step 1 only the response is.

Where this deviates from InstructGPT (Ouyang et al. 2022):
 1. The paper has two SFT models: a baseline of 16 epochs picked by reward (C.1), and a PPO initialisation of 2 epochs
    with 10 % pretraining data mixed in (C.3). Ours is the second one, in every role.
 2. The paper does not say whether the prompt is learnt too. Here only the response is (the prompt has no gradient).
 3. AdamW with weight decay 0.1 and a short warm-up; the paper's learning rates belong to models 1,000 times larger.
 4. The base is pretrained here, in minutes, on documents made from a seed; the paper starts from GPT-3.
 5. Step 0 has a curriculum: first recitals (lists read out again) in short windows, then documents in longer ones. A model
    of this size finds out how to copy from its context in 400 steps of that; without it, it had not after 1,800 steps of
    twice the size.
 6. The matrices are trained by Muon, not Adam, for the same reason (`training.muon_and_adamw`).

Axes: B batch, T tokens, V vocabulary.
"""
import time
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

import data
import training
import world
from config import UserError, parse, show
from model import generate
from training import say


def next_token_loss(logits, targets, mask, reduction="mean"):
    """- mean over the unmasked targets of log π(y_t | y_<t); uniform logits give ln V.

    logits (B,T,V), targets (B,T), mask (B,T), all already shifted: logits[:, t] predicts targets[:, t].
    reduction "sum": for accumulation; divide by the targets of the WHOLE optimiser step (RECIPE P2).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")     # (B·T,)
    total = (losses * mask.flatten()).sum()
    return total if reduction == "sum" else total / mask.sum().clamp(min=1)


@torch.no_grad()
def held_out_loss(model, batches, cast):
    """Mean next-token loss over the targets of all batches: [(tokens, real or None, labels)]."""
    model.eval()
    total, count = 0.0, 0
    for tokens, real, labels in batches:
        with cast:
            logits = model(tokens[:, :-1], None if real is None else real[:, :-1])
        total += next_token_loss(logits, tokens[:, 1:], labels[:, 1:], "sum").item()
        count += int(labels[:, 1:].sum())
    model.train()
    return total / max(1, count)


def accumulate(model, batches, cast):
    """Gradients of the mean loss over all targets of several micro-batches -> that loss. Not a mean of their means."""
    count = sum(int(labels[:, 1:].sum()) for _, _, labels in batches)
    total = 0.0
    for tokens, real, labels in batches:
        with cast:
            logits = model(tokens[:, :-1], None if real is None else real[:, :-1])
        loss = next_token_loss(logits, tokens[:, 1:], labels[:, 1:], "sum") / count
        loss.backward()
        total += loss.item()
    return total


# ------------------------------------------------------------------------ what is learnt from

def make_tokenizer(config, folder, own):
    """The run's tokenizer: the one it has, GPT-2's, or one trained on a sample of what will be read."""
    path = folder / "tokenizer.json"
    if path.exists() and not config.fresh:
        return data.Tokenizer.load(path)
    if config.tokenizer == "gpt2":
        tokenizer = data.Tokenizer.gpt2()
    else:
        start = time.perf_counter()
        texts = own if isinstance(own, str) else None
        if texts is None:
            samples = world.demonstrations(6000, seed=config.seed)
            texts = list(islice(world.documents(config.seed), 2000)) + [f"{t.prompt}\n{a}" for t, a in samples]
            texts += list(islice(world.recitals(config.seed), 1000)) + ["\n".join(parts) for parts in own or ()]
        else:
            texts = [texts[:4_000_000]]
        ranks = data.train_bpe(texts, config.vocab_size - len(data.SPECIALS))
        tokenizer = data.Tokenizer(ranks)
        say(f"tokenizer: {tokenizer.size} tokens by byte-pair encoding, {time.perf_counter() - start:.0f} s")
    tokenizer.save(path)
    return tokenizer


def make_corpus(config, folder, tokenizer, own):
    """Step 0's text as one array of ids each -> (train, {name: held out}). Kept in the folder, to be made only once."""
    if isinstance(own, str):
        ids = data.pack(tokenizer, own.split("\n\n\n"))
        cut = len(ids) - max(len(ids) // 10, config.block_size + 1)
        if cut <= config.block_size:
            raise UserError(f"{config.data} has only {len(ids)} tokens; --block-size {config.block_size} needs more")
        return {"documents": ids[:cut]}, {"text": ids[cut:]}
    key = training.seed_of(config.seed, config.pretrain_docs, tokenizer.ranks)
    path = folder / f"corpus-{key:08x}.npy"
    if not path.exists():
        start, parts, count = time.perf_counter(), [], 0
        documents = world.documents(config.seed)
        while count < config.pretrain_docs:
            parts.append(data.pack(tokenizer, list(islice(documents, 4000))))
            count += len(parts[-1])
            training.progress(f"  writing documents: {count:,} of {config.pretrain_docs:,} tokens")
        training.save_atomically(np.concatenate(parts)[:config.pretrain_docs], path)
        say(f"documents: {config.pretrain_docs:,} tokens, {time.perf_counter() - start:.0f} s")
    held_out = {"documents": list(islice(world.documents(config.seed, "val"), 600)), "prose": world.prose("val")}
    recitals = data.pack(tokenizer, list(islice(world.recitals(config.seed), 8000)))
    return ({"documents": np.load(path, mmap_mode="r"), "recitals": recitals},
            {name: data.pack(tokenizer, texts) for name, texts in held_out.items()})


def held_out_windows(ids, block_size, n=32):
    """The same windows of a held-out text at every evaluation, in batches."""
    tokens = data.windows(ids, min(block_size, len(ids) - 1), n, seed=0)
    return [(part, None, torch.ones_like(part, dtype=torch.bool)) for part in tokens.split(16)]


def make_examples(config, tokenizer, own):
    """Step 1's examples -> (train, val), lists of (ids, mask); what does not fit the context is dropped and counted."""
    if own is None:
        parts = {"train": world.demonstrations(config.demonstrations, "train", config.seed),
                 "val": world.demonstrations(400, "val", config.seed)}
        parts = {side: [(t.instruction, t.input, answer, t.history) for t, answer in pairs] for side, pairs in parts.items()}
    else:   # every twentieth of the user's demonstrations is held out
        parts = {"train": [d for i, d in enumerate(own) if i % 20], "val": own[::20]}
        if len(own) < 2:
            raise UserError(f"{config.data}: two demonstrations at least, one to learn from and one to hold out")
    kept = {}
    for side, demonstrations in parts.items():
        examples = [data.encode_example(tokenizer, *d) for d in demonstrations]
        kept[side] = [e for e in examples if len(e[0]) <= config.block_size]
        if len(kept[side]) < len(examples):
            say(f"  {len(examples) - len(kept[side])} of {len(examples)} {side} demonstrations are longer than "
                f"{config.block_size} tokens and were dropped (a larger --block-size keeps them)")
        if not kept[side]:
            raise UserError(f"no {side} demonstration fits into --block-size {config.block_size}")
    return kept["train"], kept["val"]


# ------------------------------------------------------------------------ the two steps

def curriculum(config, step, corpus):
    """What step 0 reads at this step, in windows of how many tokens -> (array of ids, T). Short before long."""
    if step < config.recital_steps and "recitals" in corpus:
        return corpus["recitals"], min(64, config.block_size)
    late = step >= 0.7 * config.pretrain_steps
    return corpus["documents"], config.block_size if late else max(config.block_size // 2, 1)


def gradient_seconds(model, tokens, cast):
    """How long the gradient of one step takes here, measured on the second of two; leaves the model as it was."""
    for _ in range(2):
        start = time.perf_counter()
        with cast:
            logits = model(tokens[:, :-1])
        next_token_loss(logits, tokens[:, 1:], torch.ones_like(tokens[:, 1:])).backward()
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def pretrain(config, folder, model, corpus, held_out, cast, device):
    """Step 0: -log π(token | before), every token of the text a target."""
    adamw, muon = both = training.muon_and_adamw(model, config.pretrain_matrix_lr, config.pretrain_lr, config.weight_decay)
    stage = training.Stage(folder, "base", config, config.pretrain_steps, model=model, adamw=adamw, muon=muon)
    for step in stage:
        lr = training.set_lr(both, training.cosine(step, stage.steps, config.warmup))
        text, T = curriculum(config, step, corpus)
        tokens = data.windows(text, T, max(1, config.pretrain_batch // T), [config.seed, step]).to(device)
        labels = torch.ones_like(tokens, dtype=torch.bool)
        micro = [(t, None, m) for t, m in zip(tokens.chunk(config.accumulate), labels.chunk(config.accumulate))]
        loss = accumulate(model, micro, cast)
        norm = stage.update(both, loss, config.clip)
        metrics = dict(loss=loss, norm=norm, lr=lr)
        if (step + 1) % config.eval_every == 0 or step + 1 == stage.steps:
            losses = {name: held_out_loss(model, held_out_windows(ids, T), cast) for name, ids in held_out.items()}
            metrics |= {f"val_{name}": loss for name, loss in losses.items()}
            say(f"  base {step + 1}: held-out loss " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                + f" nats a token, in windows of {T}")
        stage.log(tokens=tokens[:, 1:].numel(), **metrics)
    stage.finish(model.state_dict(), model=asdict(model.config), losses=losses)


def finetune(config, folder, model, tokenizer, examples, corpus, cast, device, ask):
    """Step 1: -log π(response token | before); among the demonstrations, windows of step 0's text (RECIPE S4)."""
    train, val = examples
    per_epoch = -(-len(train) // config.batch_size)
    steps = config.steps or config.epochs * per_epoch
    adamw, muon = both = training.muon_and_adamw(model, config.matrix_lr, config.lr, config.weight_decay)
    stage = training.Stage(folder, "sft", config, steps, model=model, adamw=adamw, muon=muon)
    lengths = [len(ids) for ids, _ in train]
    order = {}                                      # epoch -> its batches
    checks = [data.collate(val[i:i + 100], tokenizer.pad) for i in range(0, len(val), 100)]
    checks = [tuple(x.to(device) for x in batch) for batch in checks]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.sft_dropout
    for step in stage:
        lr = training.set_lr(both, training.cosine(step, steps, min(config.warmup, steps // 10)))
        epoch, i = divmod(step, per_epoch)
        if epoch not in order:
            order = {epoch: data.epoch_batches(lengths, config.batch_size, (config.seed, epoch))}
        tokens, real, labels = data.collate([train[j] for j in order[epoch][i]], tokenizer.pad)
        n = round(len(tokens) * config.ptx_share / (1 - config.ptx_share))
        if n:
            text = data.windows(corpus["documents"], tokens.shape[1] - 1, n, [config.seed, step, 1])
            everywhere = torch.ones_like(text, dtype=torch.bool)
            tokens, real, labels = (torch.cat(pair) for pair in ((tokens, text), (real, everywhere), (labels, everywhere)))
        micro = list(zip(*(x.to(device).chunk(config.accumulate) for x in (tokens, real, labels))))
        loss = accumulate(model, micro, cast)
        norm = stage.update(both, loss, config.clip)
        metrics = dict(loss=loss, norm=norm, lr=lr)
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            metrics["val"] = held_out_loss(model, checks, cast)
            say(f"  sft {step + 1}: held-out loss {metrics['val']:.3f} nats a response token")
            show_samples(model, tokenizer, ask, cast)
        stage.log(tokens=int(real.sum()), **metrics)
    stage.finish(model.state_dict(), model=asdict(model.config), losses={"demonstrations": metrics["val"]}, parent="base")


def show_samples(model, tokenizer, ask, cast):
    """What the model answers to a few fixed prompts now, greedily."""
    prompts = [data.encode_prompt(tokenizer, instruction, text) for instruction, text in ask]
    with cast:
        answers = generate(model, prompts, 80, temperature=0, eos=tokenizer.end).responses
    for (instruction, text), answer in zip(ask, answers):
        question = f"{instruction} {text}".strip().replace("\n", " / ")
        say(f"    {question[:90]}\n      -> " + tokenizer.decode(answer).replace("\n", "\n         "))


def main():
    config, origin = parse("sft", description=__doc__)
    started = time.perf_counter()
    threads, folder = training.set_up_cpu(config.threads), training.run_folder(config)
    device = training.pick_device(config.device)
    dtype, why = training.pick_dtype(config.dtype, device)
    cast = training.autocast(device, dtype)
    say(f"sft.py: config {config.config}, run {folder}, {device} with {threads} threads, "
        f"{str(dtype).split('.')[1]} ({why})\n" + show(config, origin))

    own = None
    if config.data:
        own = data.read_demonstrations(config.data) if data.is_demonstrations(config.data) else data.read_text(config.data)
    only_text = isinstance(own, str)
    tokenizer = make_tokenizer(config, folder, own)
    corpus, held_out = make_corpus(config, folder, tokenizer, own)
    if training.finished(folder, "base") and not config.fresh:
        model, tokenizer, facts = training.load_model(folder, "base", device)
        say(f"step 0: {folder / 'base.pt'} is there and is kept (--fresh makes it anew)")
    else:
        model = training.build(config, tokenizer.size).to(device)
        say(f"step 0: pretrain {model.num_params():,} parameters for {config.pretrain_steps} steps of "
            f"{config.pretrain_batch} tokens")
        text, T = curriculum(config, config.pretrain_steps, corpus)
        batch = data.windows(text, T, max(1, config.pretrain_batch // T), 0).to(device)
        seconds = gradient_seconds(model, batch, cast)
        say(f"  about {training.clock(seconds * config.pretrain_steps)} by the speed of its first gradient "
            f"({1000 * seconds:.0f} ms); Ctrl-C keeps what is done")
        pretrain(config, folder, model, corpus, held_out, cast, device)
    if only_text:
        say(f"done in {training.clock(time.perf_counter() - started)}. Continue the text with: "
            f"python sample.py --out {folder} --stage base --prompt \"...\"")
        return
    examples = make_examples(config, tokenizer, own)
    ask = [(d[0], d[1]) for d in own[:60:20]] if own else [(prompt, "") for prompt in world.SHOWN]
    say(f"step 1: fine-tune on {len(examples[0]):,} demonstrations, {config.epochs} times")
    finetune(config, folder, model, tokenizer, examples, corpus, cast, device, ask)
    say(f"done in {training.clock(time.perf_counter() - started)}. Next:\n"
        f"  python sample.py --out {folder} --prompt \"...\"     ask it\n"
        f"  python evaluate.py --out {folder}                 measure it on held-out prompts")


if __name__ == "__main__":
    training.command(main)
