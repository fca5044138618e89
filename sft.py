"""Steps 0 and 1: from raw text to a model that follows instructions.

    python sft.py --config tiny                    pretrain on built-in text, fine-tune on demonstrations
    python sft.py --config tiny --data book.txt    pretrain on your own text, then stop
    python sft.py --config tiny --data mine.json   fine-tune on your own demonstrations

Both minimise the same next-token loss. In step 0 every token is a target; in step 1 only the response is.
Where this deviates from InstructGPT (Ouyang et al. 2022):
 1. The paper has two SFT models, a baseline of 16 epochs picked by reward (C.1), and for PPO one of 2 epochs
    with 10 % pretraining data mixed in (C.3). Ours is the second one, in every role.
 2. The paper does not say whether the prompt is learnt too. Here only the response is.
 3. Weight decay 0.1 and a short warm-up; the paper's learning rates belong to models 1,000 times larger.
 4. The base is pretrained here, in minutes, on documents made from a seed; the paper starts from GPT-3.
 5. Step 0 begins with recitals (lists read out again), and Muon trains the matrices: so it copies from its
    context after 400 steps, without recitals not after 1,800 of twice the size.
Axes: B batch, T tokens, V vocabulary."""
import dataclasses, time
from itertools import chain, islice, repeat
from config import UserError     # before torch: see there
import numpy as np
import torch
import data, training, world
from model import add_lora, load_gpt2
from training import say

def next_token_loss(logits, targets, mask, reduction="mean"):
    """- mean over the unmasked targets of log π(y_t | y_<t); uniform logits give ln V.
    logits (B,T,V), targets (B,T), mask (B,T), all already shifted: logits[:, t] predicts targets[:, t].
    reduction "sum": for accumulation; divide by the targets of the WHOLE optimiser step (RECIPE P2)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    total = (losses * mask.flatten()).sum()
    return total if reduction == "sum" else total / mask.sum().clamp(min=1)

def batch_loss(model, tokens, real, labels, cast):
    """Σ of next_token_loss over the labelled tokens of one batch, as data.collate makes it; real None: no pads"""
    device = next(model.parameters()).device
    tokens, real, labels = (x if x is None else x.to(device) for x in (tokens, real, labels))
    targets, wanted = tokens[:, 1:], labels[:, 1:]
    with cast:      # no example sees another, if some share a row, nor the pads, and each has its own positions
        x = model.hidden(tokens[:, :-1], segments=None if real is None else real[:, :-1])
        if not wanted.all():        # only what is learnt is unembedded: the logits are a third of the work
            x, targets = x[wanted][None], targets[wanted][None]
        logits = model.unembed(x)
    return next_token_loss(logits, targets, torch.ones_like(targets), "sum")

@torch.no_grad()
def held_out_loss(model, batches, cast):
    """Mean next-token loss over the targets of all batches: [(tokens, real or None, labels)]."""
    model.eval()
    total = sum(batch_loss(model, *batch, cast).item() for batch in batches)
    model.train()
    return total / max(1, sum(int(labels[:, 1:].sum()) for _, _, labels in batches))

def accumulate(model, batches, cast, weight=1.0):
    """Gradients of weight · the mean loss over ALL targets of several micro-batches -> that mean."""
    count, total = sum(int(labels[:, 1:].sum()) for _, _, labels in batches), 0.0
    for batch in batches:
        loss = batch_loss(model, *batch, cast) / count
        (weight * loss).backward()
        total += loss.item()
    return total

def make_tokenizer(config, folder, own):
    """The run's tokenizer: the one it has, GPT-2's, or one trained on a sample of what will be read."""
    path = folder / "tokenizer.json"
    begun = training.finished(folder, "base") or (folder / "base.state").exists()
    if path.exists() and begun and not config.fresh:
        return data.Tokenizer.load(path)
    if config.init or config.tokenizer == "gpt2":
        tokenizer = data.Tokenizer.published(config.init) if config.init else data.Tokenizer.gpt2()
    else:       # said first: it takes seconds
        say(f"tokenizer: up to {config.vocab_size} tokens by byte-pair encoding")
        texts = next(data.read_text(own)) if isinstance(own, str) else [
            *islice(world.documents(config.seed), 2000), *islice(world.recitals(config.seed), 1000),
            *(f"{task.prompt}\n{answer}" for task, answer in world.demonstrations(6000, seed=config.seed)),
            *("\n".join(parts[:3]) for side in own or () for parts in side)]
        tokenizer = data.Tokenizer(data.train_bpe(texts, config.vocab_size - len(data.SPECIALS)))
    tokenizer.save(path)
    return tokenizer

def make_corpus(config, folder, tokenizer, own, read=""):
    """Step 0's text as arrays of ids -> ({name: train}, {name: held out}). read: the file that a base has read."""
    if read and (folder / read).exists():
        return {"documents": np.memmap(folder / read, tokenizer.dtype, "r")}, {}
    key = (config.data_eval, *map(training.seed_of, data.read_text(own))) if isinstance(own, str) else (
        config.seed, config.pretrain_docs)
    path = folder / f"corpus-{training.seed_of(*key, tokenizer.ranks):08x}.bin"
    if isinstance(own, str):        # held out: of its first part the last tenth, or --data-eval's first part
        ids, *other = (data.pack(tokenizer, next(data.read_text(name))) for name in config.files)
        T, cut = config.block_size, len(ids) if other else len(ids) - max(len(ids) // 10, config.block_size + 1)
        held_out = other[0] if other else ids[cut:]
        if min(cut, len(held_out)) <= T:
            raise UserError(f"{own}: {len(ids)} tokens, {len(held_out)} held out, are few for --block-size {T}")
        if not path.exists():
            later = (data.pack(tokenizer, part) for part in islice(data.read_text(own), 1, None))
            training.save_atomically(chain([ids[:cut]], later), path)
        return {"documents": np.memmap(path, tokenizer.dtype, "r")}, {"text": held_out}
    if not path.exists():
        parts, documents = [], world.documents(config.seed)
        while (count := sum(map(len, parts))) < config.pretrain_docs:
            training.progress(f"  writing documents: {count:,} of {config.pretrain_docs:,} tokens")
            parts.append(data.pack(tokenizer, list(islice(documents, 4000))))
        training.save_atomically([np.concatenate(parts)[:config.pretrain_docs]], path)
    corpus = {"documents": np.memmap(path, tokenizer.dtype, "r"),
              "recitals": data.pack(tokenizer, list(islice(world.recitals(config.seed), 8000)))}
    return corpus, held_out_text(tokenizer, config.seed)

def held_out_text(tokenizer, seed):
    """What step 0 is measured on -> {"documents" and "prose": ids}."""
    texts = {"documents": list(islice(world.documents(seed, "val"), 600)), "prose": world.prose("val")}
    return {name: data.pack(tokenizer, text) for name, text in texts.items()}

def plain_text(tokens):
    """Tokens (B,T) as a batch: no pads, and every one is learnt."""
    return tokens, None, torch.ones_like(tokens, dtype=torch.bool)

def held_out_windows(ids, block_size, n=32):
    """The same windows of a held-out text at every evaluation, in batches."""
    return [plain_text(x) for x in data.windows(ids, min(block_size, len(ids) - 1), n, seed=0).split(16)]

def make_examples(config, tokenizer, own):
    """Step 1's (train, val), lists of (ids, mask), without what is too long."""
    fitting, T = [], config.block_size
    for side, n in (("train", config.demonstrations), ("val", 400)):
        written = own[len(fitting)] if own else [(t.instruction, t.input, answer, t.history)
                                                 for t, answer in world.demonstrations(n, side, config.seed)]
        examples = [data.encode_example(tokenizer, *d) for d in written]
        fitting.append([e for e in examples if len(e[0]) <= T])
        if not fitting[-1]:
            raise UserError(f"{' '.join(config.files)}: no {side} demonstration fits --block-size {T}")
        if dropped := len(examples) - len(fitting[-1]):
            say(f"  {dropped} of {len(examples)} {side} demonstrations exceed --block-size {T}: dropped")
    return fitting

def curriculum(config, step, corpus):
    """What step 0 reads at this step, in windows of T tokens -> (array of ids, T). Short before long."""
    if step < config.recital_steps and "recitals" in corpus:
        return corpus["recitals"], min(64, config.block_size)
    late = step >= 0.7 * config.pretrain_steps
    return corpus["documents"], config.block_size if late else max(config.block_size // 2, 1)

def learn(config, folder, name, model, steps, warmup, rates, batch, check, cast, corpus):
    """The loop of both steps -> its rows. batch(step): tokens, real or None, labels; check(step): {text: loss}"""
    adamw, muon = both = training.muon_and_adamw(model, *rates, config.weight_decay)
    stage = training.Stage(folder, name, config, steps, model=model, adamw=adamw, muon=muon)
    for step in stage:
        lr = training.set_lr(both, training.cosine(step, steps, warmup))
        micro = [*zip(*(repeat(None) if x is None else x.chunk(config.accumulate) for x in batch(step)))]
        loss = accumulate(model, micro, cast)
        metrics = {"loss": loss, "norm": stage.update(both, loss, config.clip), "lr": lr}
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            losses = check(step)
            found = ", ".join(f"{text} {loss:.3f}" for text, loss in losses.items())
            say(f"  {name} {step + 1}: held-out loss {found} nats a token")
            metrics |= {f"val_{text}": loss for text, loss in losses.items()}
        stage.log(sum(int((labels if real is None else real > 0).sum()) for _, real, labels in micro), **metrics)
    stage.finish(model, model=vars(model.config), losses=losses, corpus=corpus.filename.name)
    return stage.history

def pretrain(config, folder, model, corpus, held_out, cast):
    """Step 0: -log π(token | before), every token of the text a target."""
    def batch(step):
        text, T = curriculum(config, step, corpus)
        return plain_text(data.windows(text, T, max(1, config.pretrain_batch // T), [config.seed, step]))
    def check(step):
        _, T = curriculum(config, step, corpus)
        return {name: held_out_loss(model, held_out_windows(x, T), cast) for name, x in held_out.items()}
    rows = learn(config, folder, "base", model, config.pretrain_steps, config.warmup,
                 (config.pretrain_matrix_lr, config.pretrain_lr), batch, check, cast, corpus=corpus["documents"])
    for text in held_out:               # a text that is too short for so many steps is learnt by heart
        key = f"val_{text}"
        best = min((row for row in rows if key in row), key=lambda row: row[key])
        if best[key] < rows[-1][key] - 0.02:
            say(f"  ! the held-out loss was lowest after {best['step']} steps, {text} {best[key]:.3f}; since then "
                f"it is learnt by heart. Better: more text, or --fresh --pretrain-steps {best['step']}")

def finetune(config, folder, model, tokenizer, train, val, corpus, ask, cast):
    """Step 1: -log π(response token | before); beside them, windows of step 0's text (RECIPE S4)."""
    lengths, per_epoch = [len(ids) for ids, _ in train], -(-len(train) // config.batch_size)
    steps = config.steps or config.epochs * per_epoch
    order = [rows for epoch in range(-(-steps // per_epoch))
             for rows in data.epoch_batches(lengths, config.batch_size, (config.seed, epoch))]
    checks = [data.collate(val[i:i + 100], tokenizer.pad) for i in range(0, len(val), 100)]
    prompts = [data.encode_prompt(tokenizer, *question) for question in ask]
    def batch(step):
        rows = data.collate([train[i] for i in order[step]], tokenizer.pad, config.packing * config.block_size)
        B, T = rows[0].shape
        if n := round(B * config.ptx_share / (1 - config.ptx_share)):
            text, _, every = plain_text(data.windows(corpus["documents"], T - 1, n, [config.seed, step, 1]))
            rows = [torch.cat(pair) for pair in zip(rows, (text, every, every))]
        return rows
    def check(step):
        for question, answer in zip(ask, training.respond(model, tokenizer, prompts, 80, 0, 0, cast)):
            say("    " + " ".join(question[:2]).strip().replace("\n", " / ")[:90])
            say("      -> " + answer.text.replace("\n", "\n         "))
        return {"demonstrations": held_out_loss(model, checks, cast)}
    learn(config, folder, "sft", model, steps, min(config.warmup, steps // 10),
          (config.matrix_lr, config.lr), batch, check, cast, corpus=corpus["documents"])

def main():
    started, config, folder, device, cast = training.begin("sft", __doc__)
    own = None if not config.data else config.data if data.kind_of(config.data) == "text" else (
        data.hold_out(*map(data.read_demonstrations, config.files)))
    tokenizer = make_tokenizer(config, folder, own)
    begun, facts = (folder / "base.state").exists(), {}         # of a new base, which --fresh began
    if kept := training.finished(folder, "base") and not begun and not config.fresh:
        model, _, facts = training.load_model(folder, "base")
    else:
        model = load_gpt2(config.init, tokenizer.size) if config.init else training.build(config, tokenizer.size)
    model = model.to(device)
    config = dataclasses.replace(config, block_size=min(config.block_size, model.config.block_size))
    examples = make_examples(config, tokenizer, own) if isinstance(own, tuple) else ()      # own may be refused
    corpus, held_out = make_corpus(config, folder, tokenizer, own, facts.get("corpus"))
    if kept:
        if isinstance(own, str) and facts.get("content") != data.checksum(config.files):
            raise UserError(f"{folder} has a base of another text: --fresh makes it anew, or name another --out")
        say(f"step 0: {folder / 'base.pt'} is there and is kept (--fresh makes it anew)")
    elif config.init and not isinstance(own, str):
        say(f"step 0: {config.init}, {model.num_params():,} parameters, instead of pretraining")
        training.Stage(folder, "base", config, 0).finish(model, model=vars(model.config))
    else:
        say(f"step 0: pretrain {model.num_params():,} parameters for {config.pretrain_steps} steps")
        pretrain(config, folder, model, corpus, held_out, cast)
    if not isinstance(own, str):
        train, val = examples or make_examples(config, tokenizer, own)
        ask = [(d[0], d[1], d[3]) for d in own[1][:3]] if own else [(prompt, "") for prompt in world.SHOWN]
        torch.manual_seed(training.seed_of(config.seed, "lora"))
        add_lora(model, config.lora_rank)
        say(f"step 1: fine-tune on {len(train):,} demonstrations, {config.epochs} times")
        finetune(config, folder, model, tokenizer, train, val, corpus, ask, cast)
    then = "sft.py --data DEMONSTRATIONS" if isinstance(own, str) else "reward.py" + " --data RANKINGS" * bool(own)
    say(f"done in {training.clock(time.perf_counter() - started)}. Next:" + "".join(
        f"\n  python {command} --out {folder}" for command in ('sample.py --prompt "..."', then)))

if __name__ == "__main__":
    training.command(main)
