"""Step 2: a reward model, from rankings of K answers to the same prompt.

    python reward.py --config tiny                     the SFT model answers, the labelers rank, it learns
    python reward.py --config tiny --from sft,ppo      second round: the labelers rank PPO's answers too
    python reward.py --config tiny --data mine.jsonl   your own rankings
    python reward.py --config tiny --objective dpo     DPO: the same rankings train a policy

The built-in labelers rank by the exact judge's score, their taste and noise (`world.rank`). The reward
model sees only their rankings; it is measured against them, and against the judge that it never saw.
Where this deviates from InstructGPT (Ouyang et al. 2022):
 1. The score is the head's plus w times the trunk's log-likelihood of the answer: from a few thousand prompts a
    head alone tells right from wrong in 62 % of pairs, the sum in 85 %. `--likelihood 0` is the paper's.
 2. Muon and AdamW at rates that suit a small model; fewer prompts a step: 64 would leave too few steps.
 3. Some answers are drawn at other temperatures, some are demonstrations; the paper's are several models'.
 4. Trunk and policy have the same size; the paper uses one 6B reward model for all.
 5. With `--data` scores are divided by their spread (Ziegler et al. 2019) if above 1: so PPO's β suits them too.
Axes: B batch, T tokens, C channels, N prompts, K completions of one prompt."""
import copy, math, random, time
from config import UserError     # before torch: see there
import torch
import torch.nn as nn
import data, training, world
from model import add_lora, token_logprobs
from training import say

def answer_logprobs(gpt, x, tokens, mask, after):
    """log π of each row's tokens behind its last `after` (an id), zeros elsewhere: x (B,T,C) -> (B,T)"""
    answer = (tokens == after).flip(1).cumsum(1).flip(1) == 0
    answer &= nn.functional.pad(torch.ones_like(tokens[:, 1:]) if mask is None else mask[:, 1:], (1, 0)).bool()
    x, y = x[answer.roll(-1, 1)], tokens[answer]        # the n answer tokens, and what stands before each
    logits = gpt.unembed(x)[:, None].expand(-1, 2, -1)                              # (n,2,V)
    logprobs = token_logprobs(logits, y[:, None].expand(-1, 2))                     # (n,1)
    return logprobs.new_zeros(tokens.shape).masked_scatter(answer, logprobs)

class RewardModel(nn.Module):
    """s(x,y) = head(h_T) + w Σ_t log π(y_t | x, y_<t) + shift: a GPT (a copy) with one scalar a token.
    π is the trunk's, w learnt, y stands behind the last token `answer_after` (None: no sum, as in the paper)."""
    def __init__(self, gpt, answer_after=None, w=0.2):
        super().__init__()
        self.trunk, d = copy.deepcopy(gpt), gpt.config.n_embd
        self.head = nn.Linear(d, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(d + 1))     # Stiennon et al. 2020
        nn.init.zeros_(self.head.bias)
        self.w = nn.Parameter(torch.tensor([w]))
        self.register_buffer("answer_after", torch.tensor(-1 if answer_after is None else answer_after))
        self.register_buffer("shift", torch.zeros(()))      # puts demonstrations at 0; set after training

    def forward(self, tokens, mask=None):
        """tokens (B,T), mask (B,T) -> (B,T) fp32: the score of the text up to each token."""
        x = self.trunk.hidden(tokens, mask)                                         # (B,T,C)
        scores = self.head(x).squeeze(-1).float() + self.shift                      # (B,T)
        if self.answer_after < 0:
            return scores
        return scores + self.w * answer_logprobs(self.trunk, x, tokens, mask, self.answer_after).cumsum(1)

    def score(self, tokens, mask):
        """-> (B,): the score at the last real token of each row."""
        last = (torch.arange(tokens.shape[1], device=tokens.device) * mask).argmax(1)           # (B,)
        return self(tokens, mask).gather(1, last[:, None]).squeeze(1)

class ImplicitReward(nn.Module):
    """What a policy's own log-probs say of an answer: r(x,y) = β log π(y|x) / π_ref(y|x).   DPO Eq. 5
    `ranking_loss` of it is DPO's loss (Rafailov et al. 2023, Eq. 7; for K answers their appendix A.3)."""
    def __init__(self, gpt, answer_after, beta):
        super().__init__()
        self.policy, self.reference = copy.deepcopy(gpt), copy.deepcopy(gpt).requires_grad_(False)
        self.answer_after, self.beta = answer_after, beta

    def score(self, tokens, mask):                                  # -> (B,)
        pi, ref = (answer_logprobs(gpt, gpt.hidden(tokens, mask), tokens, mask, self.answer_after).sum(1)
                   for gpt in (self.policy, self.reference))
        return self.beta * (pi - ref)

def preferred(ranks):
    """ranks (N,K), 0 = best, equal = tie, -1 = absent -> (N,K,K) bool: is i ranked above j?"""
    present = ranks >= 0
    return (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]

def margins(scores):
    """(N,K) -> (N,K,K): s_i - s_j"""
    return scores[:, :, None] - scores[:, None, :]

def ranking_loss(scores, ranks):
    """- mean log σ(s_i - s_j) over a prompt's pairs i ≻ j, then the mean over prompts.   InstructGPT Eq. 1
    scores (N,K), ranks (N,K) as in `preferred` -> scalar. Ties and absent completions make no pair; a prompt
    without pairs does not count; every other prompt weighs the same, whatever its K."""
    pairs = preferred(ranks)                                        # (N,K,K)
    losses = nn.functional.softplus(-margins(scores)).masked_fill(~pairs, 0)    # -log σ(z) = softplus(-z): finite
    n = pairs.sum((1, 2))                                           # (N,) at most C(K,2)
    return (losses.sum((1, 2)) / n.clamp(min=1)).sum() / (n > 0).sum().clamp(min=1)

def accuracy(scores, pairs):
    """The share of pairs (N,K,K) that scores (N,K) order so; equal scores count ½. None of none."""
    hit = (margins(scores)[pairs].sign().cpu().double() + 1) / 2       # cpu: Apple's GPUs have no float64
    return hit.mean().item() if len(hit) else None

def reliability(scores, pairs, bins=5):
    """Are the probabilities true? -> [(mean predicted P, how often it came true, pairs)], by P >= ½."""
    z = margins(scores)[pairs]                                  # of the preferred over the other
    predicted, hit = z.abs().sigmoid(), (z.sign().double() + 1) / 2
    bin_of = ((predicted - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [(predicted[of].mean().item(), hit[of].mean().item(), int(of.sum()))
            for of in (bin_of == b for b in range(bins)) if of.any()]

def spread(scores, groups, here):
    """How far apart the scores (N,K) of a prompt's answers are, and whether long answers get the higher ones."""
    both = torch.stack([scores.double(), table([list(map(len, ids)) for ids in groups], 0).double()]) * here
    both = (both - both.sum(2, keepdim=True) / here.sum(1, keepdim=True))[:, here]  # prompts differ, too
    r = torch.corrcoef(both)[0, 1].item()                       # NaN where all scores or lengths are equal
    return {"length_correlation": r if math.isfinite(r) else None, "spread": both[0].std().item()}

def table(rows, filler=-1):
    """N lists of up to K numbers -> (N,K); ranks with -1 where there is none."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)

def score_groups(model, groups, pad, cast):
    """N lists of up to K id lists -> scores (N,K), 0 where there is none; one forward a completion."""
    tokens, real, _ = data.collate([(ids, [1] * len(ids)) for group in groups for ids in group], pad)
    with cast:
        scores = model.score(*(x.to(next(model.parameters()).device) for x in (tokens, real)))      # (sum of K,)
    return nn.utils.rnn.pad_sequence(scores.split(list(map(len, groups))), batch_first=True)

@torch.no_grad()
def score_many(model, groups, pad, cast, batch=32):
    """As `score_groups`, without gradients and for any number of groups -> (N,K) on the CPU."""
    order, found = sorted(range(len(groups)), key=lambda i: max(map(len, groups[i]))), {}
    for part in (order[start:start + batch] for start in range(0, len(order), batch)):
        found |= zip(part, score_groups(model, [groups[i] for i in part], pad, cast).tolist())
    return table([found[i] for i in range(len(groups))], 0)

def sample_groups(models, tokenizer, tasks, config, seed, cast, mixed=True):
    """K answers of these models to each task, temperature 1 or `mixed` -> N lists of (text, Verdict)."""
    r, found, places = random.Random(f"answers {seed}"), {}, {}
    sizes = [r.randint(config.min_k, config.max_k) for _ in tasks]
    slots = [(i, k) for i, size in enumerate(sizes) for k in range(size)]
    for i, k in slots:
        if mixed and k == 0 and i % 2:          # one demonstration for every other task
            found[i, k] = training.Answer(None, world.write(r, tasks[i], r.choice(world.LABELERS)), True)
        else:
            source = r.randrange(len(models)), r.choice((0.7, 1.0, 1.0, 1.3)) if mixed else 1.0
            places.setdefault(source, []).append((i, k))
    for (m, temperature), where in sorted(places.items()):
        training.progress(f"  sampling {len(where):,} answers at temperature {temperature}")
        prompts = [data.encode_prompt(tokenizer, *tasks[i].parts) for i, _ in where]
        found |= zip(where, training.respond(models[m], tokenizer, prompts, config.max_new_tokens,
                                             temperature, training.seed_of(seed, m, temperature), cast))
    _, texts, ended = zip(*map(found.get, slots))
    judged = zip(texts, world.judge_many([tasks[i] for i, _ in slots], texts, ended))
    return [[next(judged) for _ in range(size)] for size in sizes]

def make_comparisons(config, folder, tokenizer, device, cast):
    """The labelers' rankings, as data.read_comparisons gives them; kept in the folder as JSONL."""
    stages = [name.strip() for name in config.from_.split(",")]
    models = [training.load_model(folder, name, device)[0] for name in stages]
    key = training.seed_of(config.seed, ",".join(stages), config.prompts, config.min_k, config.max_k,
                           config.max_new_tokens, *((folder / f"{name}.pt").stat().st_mtime_ns for name in stages))
    path = folder / f"comparisons-{key:08x}.jsonl"
    if not path.exists():
        tasks = world.tasks(config.prompts, "train", config.seed + 1000, world.PRACTICE)
        groups = sample_groups(models, tokenizer, tasks, config, config.seed, cast)
        r = random.Random(f"ranking {config.seed}")
        rows = [dict(zip(("instruction", "input", "history"), task.parts), responses=[a for a, _ in group],
                     ranks=world.rank(r, *zip(*group), r.choice(world.RANKERS)))
                for task, group in zip(tasks, groups)]
        training.save_atomically(rows, path)
        say(f"  {sum(map(len, groups)):,} answers to {len(tasks):,} prompts sampled and ranked: {path}")
    return data.read_comparisons(path)[0]

def encode(tokenizer, parts, answers, size=0):
    """(instruction, input, history) and answers, as the model reads them -> the last `size` ids of each."""
    return [data.encode_example(tokenizer, *parts[:2], answer, parts[2])[0][-size:] for answer in answers]

def encode_groups(tokenizer, comparisons, size):
    """-> [(lists of ids, ranks)], one a prompt; what is longer than the context is left out and counted."""
    encoded = [[*zip(encode(tokenizer, parts, answers), ranks)] for *parts, answers, ranks in comparisons]
    fitting = [[(ids, rank) for ids, rank in group if len(ids) <= size] for group in encoded]
    groups = [tuple(zip(*group)) for group in fitting if len({rank for _, rank in group}) > 1]
    if not groups:
        raise UserError(f"no comparison of two answers fits into {size} tokens")
    n = sum(map(len, encoded)) - sum(map(len, fitting))
    say(f"  {len(groups):,} prompts; {n} answers are longer than {size} tokens with them and left out")
    return groups

def train(config, folder, model, groups, pad, cast):
    """Batches of prompts; all pairs of a prompt are one element of a batch -> the Stage."""
    longest = [max(map(len, ids)) for ids, _ in groups]
    batches = [rows for epoch in range(config.epochs)
               for rows in data.epoch_batches(longest, config.batch_prompts, (config.seed + epoch, "reward"))]
    steps = len(batches[:config.steps or None])
    both = adamw, muon = training.muon_and_adamw(model, config.matrix_lr, config.lr, config.weight_decay)
    share = config.dpo_rate if config.objective == "dpo" else 1.0
    stage = training.Stage(folder, config.objective, config, steps, model=model, adamw=adamw, muon=muon)
    for step in stage:
        lr = training.set_lr(both, share * training.cosine(step, steps, min(config.warmup, steps // 10)))
        ids, ranks = zip(*(groups[i] for i in batches[step]))
        scores = score_groups(model, ids, pad, cast)
        ranks = table(ranks).to(scores.device)
        loss = ranking_loss(scores, ranks)
        loss.backward()
        norm = stage.update(both, loss.item(), config.clip)
        stage.log(tokens=sum(len(x) for group in ids for x in group), loss=loss.item(), norm=norm, lr=lr,
                  accuracy=accuracy(scores.detach(), preferred(ranks)))
    return stage

def measure(model, tokenizer, tasks, groups, seed, size, cast):
    """How good are the scores of answers to held-out prompts? -> what reward.json says of it."""
    r = random.Random(f"measure {seed}")
    ids = [encode(tokenizer, task.parts, [a for a, _ in group], size) for task, group in zip(tasks, groups)]
    scores = score_many(model, ids, tokenizer.pad, cast)
    gold = preferred(table([world.ranks_of([verdict.score for _, verdict in group]) for group in groups]))
    right = preferred(table([[int(not verdict.right) for _, verdict in group] for group in groups]))
    ranks, others = (table([world.rank(r, *zip(*group), r.choice(who)) for group in groups])
                     for who in (world.RANKERS, world.HELD_OUT_RANKERS))
    seen, unseen = preferred(ranks), preferred(others)
    pairs = {"accuracy_gold": gold, "right_against_wrong": gold & right, "style": gold & ~right & ~right.mT,
             "accuracy_labelers": seen, "accuracy_held_out_labelers": unseen}
    of = {c: torch.tensor([task.category == c for task in tasks])[:, None, None] for c in world.CATEGORIES}
    return {**{name: accuracy(scores, these) for name, these in pairs.items()}, "pairs": int(gold.sum()),
            "ceiling": accuracy(-ranks, gold & (seen | seen.mT)),       # the labelers in the judge's order
            "agreement": accuracy(-ranks, unseen & (seen | seen.mT)),   # and in one another's
            **spread(scores, ids, ranks >= 0), "reliability": reliability(scores, seen),
            "categories": {c: accuracy(scores, gold & these) for c, these in of.items()}}

def main():
    started, config, folder, device, cast = training.begin("reward", __doc__)
    sft, tokenizer, _ = training.load_sft(config, folder, device)
    size, dpo = sft.config.block_size, config.objective == "dpo"
    torch.manual_seed(training.seed_of(config.seed, "reward"))
    model = (ImplicitReward(sft, tokenizer.assistant, config.dpo_beta) if dpo else
             RewardModel(sft, tokenizer.assistant if config.likelihood else None, config.likelihood)).to(device)
    add_lora(model.policy if dpo else model.trunk, config.lora_rank)
    if config.data:
        found, skipped = zip(*map(data.read_comparisons, config.files))
        left_out = ", ".join(f"{n} {why}" for why, n in skipped[0].items()) or "none"
        say(f"step 2: {len(found[0]):,} comparisons in {config.data}; skipped: {left_out}")
        comparisons, held_out = data.hold_out(*(training.that_fit(tokenizer, side, size) for side in found))
        held_out = encode_groups(tokenizer, held_out, size)
    else:
        say(f"step 2: labelers rank answers of {config.from_} to {config.prompts:,} prompts")
        comparisons = make_comparisons(config, folder, tokenizer, device, cast)
    stage = train(config, folder, model, encode_groups(tokenizer, comparisons, size), tokenizer.pad, cast)
    if config.data:
        ids, ranks = zip(*held_out)
        scores, ranks = score_many(model, ids, tokenizer.pad, cast), table(ranks)
        found = {"accuracy": accuracy(scores, preferred(ranks)), "pairs": int(preferred(ranks).sum()),
                 **spread(scores, ids, ranks >= 0), "reliability": reliability(scores, preferred(ranks))}
        zero = [[x for x, rank in zip(*group) if rank == min(group[1])] for group in held_out]
    else:
        tasks = world.tasks(config.eval_prompts, "val", config.seed)
        answers = sample_groups([sft], tokenizer, tasks, config, (config.seed, "val"), cast, mixed=False)
        found = measure(model, tokenizer, tasks, answers, config.seed, size, cast)
        zero = [encode(tokenizer, task.parts, [answer], size)
                for task, answer in world.demonstrations(400, "val", config.seed)]
    rows = [f"{v:6.3f} {k}" for k, v in (found | found.get("categories", {})).items() if isinstance(v, float)]
    bins = ", ".join(f"{p:.2f} {o:.2f}" for p, o, _ in found["reliability"])
    legend = "" if config.data else " (gold: the judge's order, as by category; ceiling: the labelers in it)"
    say("\n    ".join((f"  on held-out prompts{legend}:", *rows, f"preference, predicted and observed: {bins}")))
    for part in (model.head.weight, model.w) if config.data and not dpo else ():    # see deviation 5
        part.data /= max(1.0, found["spread"])
    if not dpo:     # the scores' zero is arbitrary: put it where demonstrations are (InstructGPT 3.5)
        model.shift -= score_many(model, zero, tokenizer.pad, cast).sum().to(device) / sum(map(len, zero))
    stage.finish(model.policy if dpo else model, model=vars(sft.config), measured=found)
    then = "sample.py --compare" if dpo else "ppo.py" + " --data PROMPTS" * bool(config.data)
    say(f"done in {training.clock(time.perf_counter() - started)}. Next: python {then} --out {folder}")

if __name__ == "__main__":
    training.command(main)
