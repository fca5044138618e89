"""Step 2: a reward model, from rankings of K answers to the same prompt.

    python reward.py --config tiny                       sample answers of the SFT model, have them ranked, learn
    python reward.py --config tiny --from sft,ppo        second round: the labelers rank PPO's answers too
    python reward.py --config tiny --data mine.jsonl     your own rankings

The labelers of the built-in world rank by the exact judge's score, their own taste and noise (`world.rank`). The reward
model sees only their rankings; it is then measured against them, and against the judge that it never saw.

Where this deviates from InstructGPT (Ouyang et al. 2022):
 1. The score is the head's plus w times the log-likelihood that the trunk itself gives to the answer. From a few thousand
    prompts a head alone does not learn what the SFT model knows already, right from wrong: LIKELIHOOD_NUMBERS
    `--likelihood no` is the paper's form.
 2. Trained by Muon and AdamW at rates that suit a small model, in batches of fewer prompts: 64 prompts of a few
    thousand would be too few steps. One epoch, as the paper's.
 3. Of the K answers some are drawn at other temperatures and some are demonstrations; the paper's labelers saw answers of
    several models (3.4 says no more).
 4. Trunk and policy have the same size; the paper uses one 6B reward model for all.

Axes: B batch, T tokens, C channels, N prompts, K completions of one prompt.
"""
import copy
import math
import random
import time
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import training
import world
from config import UserError, parse
from model import token_logprobs
from training import say


class RewardModel(nn.Module):
    """A GPT with one scalar a token in place of the unembedding's logits; owns a copy of the trunk.

    s(x,y) = head(h_T) + w Σ_t log π(y_t | x, y_<t) + shift, where π is the trunk's own distribution, w is learnt, and the
    answer y stands behind the last token `answer_after` (an id; None: no such sum, as in the paper).
    """

    def __init__(self, gpt, answer_after=None):
        super().__init__()
        self.trunk, d = copy.deepcopy(gpt), gpt.config.n_embd
        self.head = nn.Linear(d, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(d + 1))     # Stiennon et al. 2020; a zero head learns late
        nn.init.zeros_(self.head.bias)
        self.w = nn.Parameter(torch.tensor([0.2]))
        self.register_buffer("answer_after", torch.tensor(-1 if answer_after is None else answer_after))
        self.register_buffer("shift", torch.zeros(()))                  # puts demonstrations at zero; set after training

    def forward(self, tokens, mask=None):
        """tokens (B,T), mask (B,T) -> (B,T) fp32: the score of the text up to each token."""
        x = self.trunk.hidden(tokens, mask)                             # (B,T,C)
        scores = self.head(x).squeeze(-1).float() + self.shift          # (B,T)
        if self.answer_after < 0:
            return scores
        answer = (tokens == self.answer_after).flip(1).cumsum(1).flip(1) == 0       # (B,T) behind its last occurrence
        if mask is not None:
            answer = answer & mask.bool()
        first = max(int(answer.any(0).long().argmax()), 1)              # the columns before it need no logits
        logprobs = token_logprobs(self.trunk.unembed(x[:, first - 1:]), tokens[:, first - 1:])     # (B,T-first)
        return scores + self.w * F.pad((logprobs * answer[:, first:]).cumsum(1), (first, 0))

    def score(self, tokens, mask):
        """-> (B,): the score at the last real token of each row."""
        T = tokens.shape[1]
        last = (torch.arange(T, device=tokens.device) * mask).argmax(1)     # (B,)
        return self(tokens, mask).gather(1, last[:, None]).squeeze(1)


def preferred(ranks):
    """ranks (N,K), 0 = best, equal = tie, -1 = absent -> (N,K,K) bool: is i ranked above j?"""
    present = ranks >= 0
    return (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]


def ranking_loss(scores, ranks):
    """- mean log σ(s_i - s_j) over a prompt's pairs i ≻ j, then the mean over prompts.     InstructGPT Eq. 1

    scores (N,K), ranks (N,K) as in `preferred` -> scalar. Ties and absent completions make no pair; a prompt without pairs
    does not count; every other prompt weighs the same, whatever its K.
    """
    pairs = preferred(ranks)                                                # (N,K,K)
    margins = scores[:, :, None] - scores[:, None, :]                       # (N,K,K)  s_i - s_j
    losses = F.softplus(-margins).masked_fill(~pairs, 0)                    # -log σ(z) = softplus(-z), finite for all z
    n = pairs.sum((1, 2))                                                   # (N,) at most C(K,2)
    return (losses.sum((1, 2)) / n.clamp(min=1)).sum() / (n > 0).sum().clamp(min=1)


def accuracy(scores, pairs):
    """The share of the pairs (N,K,K) that scores (N,K) order the same way; equal scores count ½. None without pairs."""
    ahead, behind = scores[:, :, None], scores[:, None, :]
    credit = ((ahead > behind).double() + 0.5 * (ahead == behind))[pairs]
    return credit.mean().item() if len(credit) else None


def reliability(scores, pairs, bins=5):
    """Are the probabilities true? -> [(mean predicted P(a ≻ b), how often a was preferred, pairs)], by predicted P >= ½."""
    margins = (scores[:, :, None] - scores[:, None, :])[pairs]              # of the preferred over the other
    predicted, hit = margins.abs().sigmoid(), (margins > 0).double() + 0.5 * (margins == 0)
    bin_of = ((predicted - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [(predicted[bin_of == b].mean().item(), hit[bin_of == b].mean().item(), int((bin_of == b).sum()))
            for b in range(bins) if (bin_of == b).any()]


def score_groups(model, groups, pad, cast):
    """groups: N lists of up to K id lists -> scores (N,K), 0 where there is none; one forward a completion."""
    device = model.head.weight.device
    tokens, real, _ = data.collate([(ids, [1] * len(ids)) for group in groups for ids in group], pad)
    with cast:
        scores = model.score(tokens.to(device), real.to(device))            # (sum of K,)
    here = table([[1] * len(group) for group in groups], 0).bool().to(device)
    return torch.zeros(here.shape, device=device).masked_scatter(here, scores)


@torch.no_grad()
def score_many(model, groups, pad, cast, batch=32):
    """As `score_groups`, without gradients and for any number of groups -> (N,K) on the CPU."""
    order = sorted(range(len(groups)), key=lambda i: max(map(len, groups[i])))
    scores = torch.zeros(len(groups), max(map(len, groups)))
    for start in range(0, len(order), batch):
        part = order[start:start + batch]
        found = score_groups(model, [groups[i] for i in part], pad, cast).cpu()
        scores[part, :found.shape[1]] = found
    return scores


# ------------------------------------------------------------------------ comparisons

def sample_groups(models, tokenizer, tasks, config, seed, cast, mixed=True):
    """K answers to each task, of these models -> N lists of training.Answer.

    mixed: a quarter each at temperature 0.7 and 1.3, and for every other task one demonstration; else all at 1.
    """
    r = random.Random(f"answers {seed}")
    groups, places = [[None] * r.randint(config.min_k, config.max_k) for _ in tasks], {}
    for i, group in enumerate(groups):
        for k in range(len(group)):
            if mixed and k == 0 and i % 2:
                group[0] = training.Answer(None, world.write(r, tasks[i], r.choice(world.LABELERS)), True)
            else:
                source = r.randrange(len(models)), r.choice((0.7, 1.0, 1.0, 1.3)) if mixed else 1.0
                places.setdefault(source, []).append((i, k))
    for (m, temperature), where in sorted(places.items()):
        training.progress(f"  sampling {len(where):,} answers at temperature {temperature}")
        prompts = [data.encode_prompt(tokenizer, *tasks[i].parts) for i, _ in where]
        found = training.respond(models[m], tokenizer, prompts, config.max_new_tokens, temperature,
                                 training.seed_of(seed, m, temperature), cast)
        for (i, k), answer in zip(where, found):
            groups[i][k] = answer
    return groups


def judge_groups(tasks, groups):
    """The judge's verdicts, in the groups' shape."""
    flat = [(task, a) for task, group in zip(tasks, groups) for a in group]
    verdicts = iter(world.judge_many([t for t, _ in flat], [a.text for _, a in flat], [a.ended for _, a in flat]))
    return [[next(verdicts) for _ in group] for group in groups]


def make_comparisons(config, folder, models, tokenizer, cast):
    """The labelers' rankings, as data.read_comparisons gives them; kept in the folder as JSONL."""
    changed = [(folder / f"{name}.pt").stat().st_mtime_ns for name in config.from_.split(",")]
    key = training.seed_of(config.seed, config.from_, config.prompts, config.min_k, config.max_k, config.max_new_tokens, *changed)
    path = folder / f"comparisons-{key:08x}.jsonl"
    if not path.exists():
        start, r = time.perf_counter(), random.Random(f"ranking {config.seed}")
        tasks = world.tasks(config.prompts, "train", config.seed + 1000)
        groups = sample_groups(models, tokenizer, tasks, config, config.seed, cast)
        rows = []
        for task, group, verdicts in zip(tasks, groups, judge_groups(tasks, groups)):
            answers = [answer.text for answer in group]
            ranks = world.rank(r, answers, verdicts, r.choice(world.RANKERS))
            rows.append(dict(zip(("instruction", "input", "history"), task.parts), responses=answers, ranks=ranks))
        training.save_atomically(rows, path)
        say(f"  {sum(map(len, groups)):,} answers to {len(tasks):,} prompts sampled and ranked, "
            f"{time.perf_counter() - start:.0f} s: {path}")
    return data.read_comparisons(path)[0]


def encode(tokenizer, parts, answers, size=0):
    """Prompt, answer and end, as the reward model reads them -> one list of ids an answer; if size, its last `size` ids.

    parts: (instruction, input, history)
    """
    instruction, text, history = parts
    return [data.encode_example(tokenizer, instruction, text, answer, history)[0][-size:] for answer in answers]


def encode_groups(tokenizer, comparisons, block_size):
    """-> [(lists of ids, ranks)], one a prompt; what does not fit the context is left out and counted."""
    groups, dropped = [], 0
    for *parts, answers, ranks in comparisons:
        pairs = list(zip(encode(tokenizer, parts, answers), ranks))
        kept = [(ids, rank) for ids, rank in pairs if len(ids) <= block_size]
        dropped += len(pairs) - len(kept)
        if len({rank for _, rank in kept}) > 1:
            groups.append(tuple(zip(*kept)))
    if dropped:
        say(f"  {dropped} answers are longer than {block_size} tokens with their prompt and were left out")
    if not groups:
        raise UserError(f"no comparison of two answers fits into {block_size} tokens")
    return groups


def table(rows, filler=-1):
    """N lists of up to K numbers -> (N,K); ranks with -1 where there is none."""
    K = max(map(len, rows))
    return torch.tensor([list(row) + [filler] * (K - len(row)) for row in rows])


# ------------------------------------------------------------------------ training and measuring

def train(config, folder, model, groups, pad, cast):
    """One epoch over the prompts; all pairs of a prompt are one element of a batch -> the Stage, to be finished."""
    batches = data.epoch_batches([max(map(len, ids)) for ids, _ in groups], config.batch_prompts, (config.seed, "reward"))
    both = adamw, muon = training.muon_and_adamw(model, config.matrix_lr, config.lr, config.weight_decay)
    stage = training.Stage(folder, "reward", config, min(config.steps or len(batches), len(batches)),
                           model=model, adamw=adamw, muon=muon)
    for step in stage:
        lr = training.set_lr(both, training.cosine(step, stage.steps, min(config.warmup, stage.steps // 10)))
        ids, ranks = zip(*(groups[i] for i in batches[step]))
        scores = score_groups(model, ids, pad, cast)
        ranks = table(ranks).to(scores.device)
        loss = ranking_loss(scores, ranks)
        loss.backward()
        norm = stage.update(both, loss.item(), config.clip)
        stage.log(tokens=sum(len(x) for group in ids for x in group), loss=loss.item(), norm=norm, lr=lr,
                  accuracy=accuracy(scores.detach(), preferred(ranks)))
    return stage


def measure(model, tokenizer, tasks, groups, seed, cast):
    """How good are the scores of answers to held-out prompts? -> a dict for reward.json, printed by `report`."""
    verdicts, r = judge_groups(tasks, groups), random.Random(f"measure {seed}")
    texts = [[answer.text for answer in group] for group in groups]
    ids = [encode(tokenizer, task.parts, answers, model.trunk.config.block_size) for task, answers in zip(tasks, texts)]
    scores = score_many(model, ids, tokenizer.pad, cast)
    gold = preferred(table([world.ranks_of([v.score for v in row]) for row in verdicts]))
    right = preferred(table([[int(not v.right) for v in row] for row in verdicts]))
    ranks = [table([world.rank(r, a, v, r.choice(who)) for a, v in zip(texts, verdicts)])
             for who in (world.RANKERS, world.HELD_OUT_RANKERS)]
    seen, unseen = map(preferred, ranks)
    decided = seen | seen.mT
    # deviations from the prompt's mean, so that neither the prompt's length nor its difficulty counts
    here = ranks[0] >= 0
    both = torch.stack([scores.double(), table([list(map(len, row)) for row in ids], 0).double()]) * here
    both = (both - both.sum(2, keepdim=True) / here.sum(1, keepdim=True))[:, here]
    of = {c: gold & torch.tensor([t.category == c for t in tasks])[:, None, None] for c in world.CATEGORIES}
    return {"accuracy_gold": accuracy(scores, gold), "pairs": int(gold.sum()),
            "right_against_wrong": accuracy(scores, gold & right), "style": accuracy(scores, gold & ~right & ~right.mT),
            "accuracy_labelers": accuracy(scores, seen), "accuracy_held_out_labelers": accuracy(scores, unseen),
            "ceiling": accuracy(-ranks[0], gold & decided),         # the labelers in the judge's order
            "agreement": accuracy(-ranks[0], unseen & decided),     # and in one another's
            "length_correlation": torch.corrcoef(both)[0, 1].item(), "spread": both[0].std().item(),
            "reliability": reliability(scores, seen),
            "categories": {c: accuracy(scores, pairs) for c, pairs in of.items() if pairs.any()}}


def report(found):
    f = {name: "none" if value is None else f"{100 * value:.1f} %" for name, value in found.items()
         if value is None or isinstance(value, float)}
    say(f"  held-out prompts, {found['pairs']:,} pairs of SFT samples: {f['accuracy_gold']} in the judge's order "
        f"(right against wrong {f['right_against_wrong']}, by style {f['style']})\n"
        f"  as the labelers rank: {f['accuracy_labelers']}, held-out labelers {f['accuracy_held_out_labelers']}; the "
        f"labelers themselves: {f['ceiling']} in the judge's order, {f['agreement']} in one another's\n"
        "  by category: " + ", ".join(f"{c} {100 * a:.0f}" for c, a in found["categories"].items()) + "\n"
        f"  score and length correlate {found['length_correlation']:+.2f}; scores spread {found['spread']:.2f}; preference "
        "predicted and observed: " + ", ".join(f"{p:.2f} {o:.2f}" for p, o, _ in found["reliability"]))


def main():
    config, origin = parse("reward", description=__doc__)
    started = time.perf_counter()
    folder, device, cast = training.begin("reward", config, origin)
    sft, tokenizer, facts = training.load_model(folder, "sft", device)
    size = sft.config.block_size
    torch.manual_seed(training.seed_of(config.seed, "reward"))
    model = RewardModel(sft, tokenizer.assistant if config.likelihood else None).to(device)
    if config.data:     # every twentieth of the user's comparisons is held out
        comparisons, skipped = data.read_comparisons(config.data)
        say(f"step 2: {len(comparisons):,} comparisons in {config.data}"
            + "".join(f"; {n} {why} were skipped" for why, n in skipped.items()))
        held_out = encode_groups(tokenizer, comparisons[::20], size)
        comparisons = [c for i, c in enumerate(comparisons) if i % 20] or comparisons
    else:
        say(f"step 2: labelers rank {config.min_k} to {config.max_k} answers of {config.from_} to each of "
            f"{config.prompts:,} prompts")
        models = [training.load_model(folder, name, device)[0] for name in config.from_.split(",")]
        comparisons = make_comparisons(config, folder, models, tokenizer, cast)
    stage = train(config, folder, model, encode_groups(tokenizer, comparisons, size), tokenizer.pad, cast)
    if config.data:
        ids, ranks = zip(*held_out)
        pairs = preferred(table(ranks))
        found = {"accuracy": accuracy(score_many(model, ids, tokenizer.pad, cast), pairs), "pairs": int(pairs.sum())}
        say(f"  {100 * found['accuracy']:.1f} % of {found['pairs']} held-out pairs in the order of {config.data}")
        zero = [[x for x, rank in zip(*group) if rank == min(group[1])] for group in held_out]
    else:
        tasks = world.tasks(config.eval_prompts, "val", config.seed)
        answers = sample_groups([sft], tokenizer, tasks, config, (config.seed, "val"), cast, mixed=False)
        found = measure(model, tokenizer, tasks, answers, config.seed, cast)
        report(found)
        zero = [encode(tokenizer, t.parts, [answer], size) for t, answer in world.demonstrations(400, "val", config.seed)]
    # The scores' zero is arbitrary: put it where demonstrations are (InstructGPT 3.5). Their scale stays.
    model.shift -= score_many(model, zero, tokenizer.pad, cast).sum().to(device) / sum(map(len, zero))
    stage.finish(model.state_dict(), model=asdict(sft.config), parent="sft", measured=found)
    say(f"done in {training.clock(time.perf_counter() - started)}. Next: python ppo.py --out {folder}")


if __name__ == "__main__":
    training.command(main)
