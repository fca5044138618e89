"""Step 3: PPO-ptx. The policy answers, the reward model scores, a KL penalty keeps it near the SFT model.

    python ppo.py --config tiny                           the reward model of step 2
    python ppo.py --config tiny --reward execution        the exact check instead
    python ppo.py --config tiny --reward mine.py:score    your own score(prompts, responses) -> floats
    python ppo.py --config tiny --ptx-coef 0              no pretraining gradient: the stage ppo_no_ptx
    python ppo.py --config tiny --advantage group         GRPO's advantage, no value model: the stage grpo

    maximise  E[ r(x,y) - β log π(y|x)/π_SFT(y|x) ] + γ E_pretrain[ log π(x) ]            InstructGPT Eq. 2
Where this deviates from InstructGPT (Ouyang et al. 2022):
 1. The learning rate, β and γ suit a model 1,000 times smaller, with answers of 15 tokens and other scores.
 2. As many pretraining as episode tokens (paper: 8 times as many examples), their mean loss (paper: silent).
 3. The paper is silent on λ (0.95), the value's clip range (0.2), answers without end (scored -1: Ziegler 2019).
 4. The gain of the last norm learns 200 times as fast: it is around 1, the matrices around 0.08, and most
    wrong answers are one unlikely token. With one rate the policy became no surer in 20,000 episodes.
 5. 20,000 episodes, drawn from fewer prompts than that; the paper has 256,000 of 31,000 prompts.
Axes: B episodes, T tokens (prompt and response), R response tokens, V vocabulary, C channels. Tensors (B,R)
are padded on the right; values[:, t] is the value of the state BEFORE response token t."""
import copy, math, random, runpy, time
from config import UserError     # before torch: see there
import numpy as np
import torch
import data, training, world
from model import add_lora, token_logprobs, twin
from reward import RewardModel, encode, score_many
from sft import accumulate, plain_text
from training import say

def kl_estimates(logprobs, ref_logprobs):
    """Per-token estimates k1, k2, k3 of KL(π‖π_ref) from samples of π (Schulman 2020); E k1 = E k3 = KL."""
    k1 = logprobs - ref_logprobs
    return k1, k1 ** 2 / 2, torch.expm1(-k1) + k1               # k3 = exp(-k1) - 1 + k1

def token_rewards(score, logprobs, ref_logprobs, mask, beta):
    """r_t = -β k1_t, and the score (B,) at the last real token -> (B,R)     bracket of InstructGPT Eq. 2"""
    k1, _, _ = kl_estimates(logprobs, ref_logprobs)
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1
    return -beta * k1 * mask + score[:, None] * last

def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16) -> advantages, returns, both (B,R).
    δ_t = r_t + γ V_{t+1} - V_t,  A_t = δ_t + γλ A_{t+1};  behind the end V = A = 0.  Returns R = A + V."""
    advantages, advantage, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask

def group_advantages(rewards, mask, group):
    """GRPO's advantage (Shao et al. 2024, 4.1.2), no value model: rewards, mask (B,R) -> (B,R)
    Neighbours in B, `group` at a time, answer the same prompt: at all tokens of an answer A = (r - mean r)
    / std r of its whole reward r among them. The KL is in r here; there it is a term of the loss."""
    r = rewards.sum(1).view(-1, group)
    advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    return advantages.view(-1, 1) * mask

def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()

def whiten(x, mask, shift_mean=True):
    """x (B,R) with variance 1 (biased) over the real tokens, and mean 0 if shift_mean; 0 at pads."""
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return (white if shift_mean else white + mean) * mask

def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """- mean over real tokens of min(A ρ, A clip(ρ, 1 ± ε)), ρ = π/π_old   Schulman et al. 2017, Eq. 7"""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.minimum(advantages * ratio, advantages * clipped), mask)

def value_loss(values, old_values, returns, mask, clip=0.2):
    """½ mean of max((V - R)², (V_old + clip(V - V_old, ±c) - R)²): no reward for a step beyond the clip."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)

@torch.no_grad()
def ema_update(ema, model, decay):
    """ema ← decay · ema + (1 - decay) · model, started at θ₀"""
    for slow, fast in zip(ema.parameters(), model.parameters()):
        slow.lerp_(fast, 1 - decay)

class Episodes:
    """B prompts with their responses as tensors: tokens and real (B,T), mask (B,R), where (B,R+1)."""
    def __init__(self, prompts, responses, pad, device):
        tokens, real, _ = data.collate([(p + r, [1] * len(p + r)) for p, r in zip(prompts, responses)], pad)
        sizes, starts = (torch.tensor([len(x) for x in part]) for part in (responses, prompts))
        self.R = int(sizes.max())
        mask = torch.arange(self.R) < sizes[:, None]
        # the column of the token before each response token, and of the last one: the states that count
        where = (starts[:, None] - 1 + torch.arange(self.R + 1)).clamp(max=tokens.shape[1] - 1)
        self.tokens, self.real, self.mask, self.where = (x.to(device) for x in (tokens, real, mask, where))

    def logprobs(self, policy, cast, entropy=False):
        """log π of the response tokens -> (B,R), or with the entropy of their distributions, also (B,R)."""
        with cast:
            x = policy.hidden(self.tokens, self.real)                                       # (B,T,C)
            x = x.gather(1, self.where[..., None].expand(-1, -1, x.size(2)))                # (B,R+1,C)
            logits = policy.unembed(x)                                                      # (B,R+1,V)
        logprobs = token_logprobs(logits, self.tokens.gather(1, self.where))                # (B,R)
        if not entropy:
            return logprobs
        log_p = logits[:, :-1].float().log_softmax(-1)
        return logprobs, -(log_p.exp() * log_p).sum(-1)

    def values(self, model, cast):
        """V of the state before each response token -> (B,R)"""
        with cast:
            return model(self.tokens, self.real).gather(1, self.where[:, :-1])

def minibatches(lengths, n, micro, seed):
    """Every episode once: n minibatches at random, each cut into micro-batches of about equal lengths."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [sorted(order[i::n], key=lengths.__getitem__) for i in range(n) if order[i::n]]
    return [[rows.tolist() for rows in np.array_split(part, min(micro, len(part)))] for part in parts]

def make_reward(config, folder, policy, tokenizer, cast, device):
    """--reward -> a function (tasks, answers) -> scores; and step 2's model if it is that, or None."""
    if config.reward == "execution" and not config.data:
        return lambda tasks, answers: [float(v.right) for v in world.judge_many(tasks, answers)], None
    if ":" in config.reward:
        return own_reward(config.reward), None
    if config.reward != "model":
        raise UserError(f"--reward {config.reward}: needed: model, FILE.py:FUNCTION or, without --data, execution")
    if not training.finished(folder, "reward"):
        raise UserError(f"{folder} has no reward model that fits its SFT model: python reward.py --out {folder}")
    model, size = RewardModel(policy).to(device), policy.config.block_size
    model.load_state_dict(training.load(folder / "reward.pt", device))
    def score(tasks, answers):
        ids = [encode(tokenizer, t.parts, [a], size) for t, a in zip(tasks, answers)]
        return score_many(model, ids, tokenizer.pad, cast, batch=128)[:, 0].tolist()
    return score, model

def own_reward(name):
    """"FILE.py:function" -> the user's score(prompts, responses), checked at each call."""
    path, _, function = name.rpartition(":")
    try:
        score = runpy.run_path(path)[function]
    except (Exception, SystemExit) as e:
        raise UserError(f"--reward {name}: {type(e).__name__}: {e}. Give FILE.py:FUNCTION") from None
    def checked(tasks, answers):
        prompts = [task.prompt for task in tasks]
        try:
            scores = [float(value) for value in score(prompts, list(answers))]
        except (Exception, SystemExit) as e:
            raise UserError(f"{name}: {type(e).__name__}: {e}; prompts: {prompts[0]!r:.80}") from None
        strange = [f"{v} for {p!r:.80}" for p, v in zip(prompts, scores) if not math.isfinite(v)]
        if strange or len(scores) != len(prompts):
            raise UserError(f"{name} gave {len(scores)} scores for {len(prompts)} answers {strange[:1]}")
        return scores
    return checked

def rollout(policy, tokenizer, tasks, reward, config, seed, cast):
    """Sample at temperature 1, no top-k, top-p -> prompts, [Answer], scores (B,); no end: replaced (RECIPE O7)"""
    prompts = [data.encode_prompt(tokenizer, *task.parts)[1 - policy.config.block_size:] for task in tasks]
    answers = training.respond(policy, tokenizer, prompts, config.max_new_tokens, 1.0, seed, cast)
    scores = torch.tensor(reward(tasks, [a.text for a in answers]), dtype=torch.float32)
    return prompts, answers, torch.where(torch.tensor([a.ended for a in answers]), scores, config.unfinished_score)

@torch.no_grad()
def assess(policy, reference, value, batches, cast):
    """-> log-probs of policy and reference, values, mask, all (B,R), and the policy's mean entropy."""
    # in the very micro-batches of the update, so that the first ratio is 1 to the last bit (RECIPE O3)
    micro = [pair for minibatch in batches for pair in minibatch]
    shape = sum(len(rows) for rows, _ in micro), max(e.R for _, e in micro)
    old, ref, values, mask, entropy = torch.zeros(5, *shape, device=micro[0][1].tokens.device)
    for rows, e in micro:
        mask[rows, :e.R] = e.mask.float()
        old[rows, :e.R], entropy[rows, :e.R] = e.logprobs(policy, cast, entropy=True)
        ref[rows, :e.R] = e.logprobs(reference, cast)
        if value is not None:
            values[rows, :e.R] = e.values(value, cast)
    return old * mask, ref * mask, values * mask, mask, masked_mean(entropy, mask).item()

def update(policy, value, minibatch, old, advantages, returns, old_values, mask, config, cast):
    """Gradients of both losses, means over one minibatch, micro-batch by micro-batch -> metrics."""
    found = dict(policy_loss=0.0, value_loss=0.0, ratio_max=0.0, ratio_off=0.0, clip_fraction=0.0)
    total = sum(mask[rows].sum() for rows, _ in minibatch)
    for rows, e in minibatch:
        m, before, A, R, V = (x[rows, :e.R] for x in (mask, old, advantages, returns, old_values))
        logprobs, share = e.logprobs(policy, cast), m.sum() / total
        loss = share * policy_loss(logprobs, before, A, m, config.clip_ratio)
        v_loss = torch.zeros(()) if value is None else share * value_loss(
            e.values(value, cast), V, R, m, config.clip_value)
        (loss + v_loss).backward()                                      # they share no weights
        ratio = ((logprobs.detach() - before) * m).exp()
        off = (ratio - 1).abs()
        clipped = share * masked_mean((off > config.clip_ratio).float(), m)
        for name, x in (("policy_loss", loss), ("value_loss", v_loss), ("clip_fraction", clipped)):
            found[name] += x.item()
        for name, x in (("ratio_max", ratio), ("ratio_off", off)):
            found[name] = max(found[name], x.max().item())
    return found

def pretraining_gradient(policy, corpus, config, seed, cast):
    """Adds γ ∇ E_pretrain[-log π] to the gradient that is there -> the loss     end of InstructGPT Eq. 2"""
    T = min(config.ptx_window, policy.config.block_size)
    text = data.windows(corpus, T, config.ptx_tokens // T, seed)
    return accumulate(policy, [plain_text(text)], cast, config.ptx_coef)

def summarise(steps, old, ref, values, returns, rewards, mask):
    """The metrics of an iteration (RECIPE O20); steps: those of its minibatches."""
    k1, _, k3 = kl_estimates(old, ref)
    error, spread = (masked_mean((returns - v) ** 2, mask) for v in (values, masked_mean(returns, mask)))
    per_answer = {name: x.sum(1).mean().item() for name, x in
                  (("kl", k1 * mask), ("kl_k3", k3 * mask), ("reward", rewards), ("length", mask))}
    return {**per_answer, **{key: sum(step[key] for step in steps) / len(steps) for key in steps[0]},
            "ratio_first": steps[0]["ratio_off"], "ratio_max": max(step["ratio_max"] for step in steps),
            "explained_variance": 1 - error.item() / max(spread.item(), 1e-8)}

@torch.no_grad()
def sequence_kl(policy, reference, prompts, answers, pad, cast):
    """Σ_t k1 of each answer, sampled of the policy: on average KL(π‖π_ref) in nats an answer -> [float]"""
    first, device, found = 1 - policy.config.block_size, policy.wte.weight.device, []
    for i in range(0, len(prompts), 64):
        e = Episodes([p[first:] for p in prompts[i:i + 64]], [a.ids for a in answers[i:i + 64]], pad, device)
        k1, _, _ = kl_estimates(e.logprobs(policy, cast), e.logprobs(reference, cast))
        found += (k1 * e.mask).sum(1).tolist()
    return found

def held_out(policy, reference, tokenizer, tasks, reward, config, cast):
    """The judge's (where it knows the tasks) and the reward's means over held-out prompts, and the KL."""
    prompts, answers, scores = rollout(policy, tokenizer, tasks, reward, config, config.seed, cast)
    moved = sequence_kl(policy, reference, prompts, answers, tokenizer.pad, cast)
    found = {"proxy": scores.mean().item(), "held_out_kl": sum(moved) / len(tasks)}
    if not config.data:
        verdicts = world.judge_many(tasks, [a.text for a in answers], [a.ended for a in answers])
        found |= {name: sum(getattr(v, key) for v in verdicts) / len(tasks)
                  for name, key in (("gold", "score"), ("right", "right"))}
    return found

def prompts_of(config, tokenizer, size):
    """The tasks to answer, and those to measure on: the built-in world's, or your own file's prompts that fit."""
    if not config.data:
        return (world.tasks(config.prompts, "train", config.seed + 2000, world.PRACTICE),
                world.tasks(config.eval_prompts, "val", config.seed))
    asked = [training.that_fit(tokenizer, data.read_prompts(name), size) for name in config.files]
    pool, test = data.hold_out(*asked)
    return [[world.Task("", *asked, "", (), history=tuple(past)) for *asked, past in side]
            for side in (pool, test[:config.eval_prompts])]

def health(row, past):
    """What is wrong with this iteration, cause and remedy -> list of str. past: the earlier rows."""
    first, measured = (past or [row])[0], [r for r in past if "gold" in r]
    best = max(measured, key=lambda r: r["gold"], default=row)
    checks = (
        (row["kl"] < -0.1, "KL {kl:.2f} is negative: sample at temperature 1, without top-k and top-p"),
        (row["ratio_first"] > 0.01, "the first ratio is off 1 by {ratio_first:.3f}. Is dropout on?"),
        (row["entropy"] < 0.2 * first["entropy"], "entropy has collapsed to {entropy:.2f}. Raise --beta"),
        (row["eos_rate"] < first["eos_rate"] - 0.05,
         "only {eos_rate:.0%} of the answers end: raise --max-new-tokens, lower --unfinished-score"),
        (not 0.6 <= row["length"] / first["length"] <= 1.6, "answers have {length:.0f} tokens now: does the "
         "reward pay for length? See length_correlation in reward.json, raise --beta"),
        (len(past) >= 5 and max(r["explained_variance"] for r in [*past[-2:], row]) < 0, "explained variance "
         "{explained_variance:.2f}, again: the value model is worse than a constant. Raise --value-lr"),
        ("gold" in row and row["gold"] < best.get("gold", 0) - 0.03 and row["proxy"] > best["proxy"],
         "the reward rises while held-out gold falls ({gold:.3f}): the policy exploits it. Stop earlier, "
         "raise --beta, or rank its answers: reward.py --from sft,ppo"))
    return [text.format(**row) for wrong, text in checks if wrong]

MEASURED = {"gold": "gold", "right": "right", "proxy": "score", "held_out_kl": "KL in nats an answer"}
SHOWN = "score kl entropy length eos_rate ptx_loss rollout_s scoring_s update_s ptx_s".split()  # as it runs

def learners(config, reference, reward_model, device):
    """What changes from step to step -> {name: model or optimiser}, without a value model for GRPO."""
    torch.manual_seed(training.seed_of(config.seed, "value"))
    rank = config.lora_rank     # with adapters the policy, its EMA and the reference share the frozen weights
    policy = add_lora(twin(reference.requires_grad_(not rank)), rank)
    gain = policy.ln_f.weight = torch.nn.Parameter(policy.ln_f.weight.detach().clone())     # see deviation 4
    others = [p for p in policy.parameters() if p is not gain]
    groups = [{"params": others}, {"params": [gain], "lr": config.gain_lr}]
    parts = {"policy": policy, "ema": twin(policy), "adam": training.adamw(groups, config.lr, weight_decay=0.0)}
    if config.advantage == "gae":
        parts["value"] = value = copy.deepcopy(reward_model or RewardModel(reference)).to(device)
        add_lora(value.trunk, rank)
        parts["value_adam"] = training.adamw(value.parameters(), config.value_lr, weight_decay=0.0)
    return parts

def main():
    started, config, folder, device, cast = training.begin("ppo", __doc__)
    reference, tokenizer, facts = training.load_sft(config, folder, device)
    reward, reward_model = make_reward(config, folder, reference, tokenizer, cast, device)
    if config.ptx_coef and not (text := folder / facts.get("corpus", "no corpus")).is_file():
        raise UserError(f"{folder} has no text of sft.py's to mix in: leave it out with --ptx-coef 0")
    corpus = np.memmap(text, tokenizer.dtype, "r") if config.ptx_coef else None
    parts = learners(config, reference, reward_model, device)
    policy, ema, value = parts["policy"], parts["ema"], parts.get("value")
    adams = [parts[name] for name in ("adam", "value_adam") if name in parts]
    name = "grpo" if value is None else "ppo" if config.ptx_coef else "ppo_no_ptx"
    group = config.group if value is None else 1
    stage = training.Stage(folder, name, config, config.iterations, **parts)
    pool, test = prompts_of(config, tokenizer, reference.config.block_size)
    say(f"step 3: {stage.steps} iterations of {config.episodes} answers, stage {name}")

    for iteration in stage:
        seeds, seed = [config.seed, iteration], training.seed_of(config.seed, iteration)
        clock, ptx_seconds, steps = [time.perf_counter()], 0.0, []
        enough = pool * -(-config.episodes // len(pool))
        drawn = random.Random(str(seeds)).sample(enough, config.episodes // group)
        tasks = [task for task in drawn for _ in range(group)]
        prompts, answers, score = rollout(policy, tokenizer, tasks, reward, config, seed, cast)
        clock.append(time.perf_counter())
        sizes = [len(prompt) + len(answer.ids) for prompt, answer in zip(prompts, answers)]
        batches = [[(rows, Episodes([prompts[i] for i in rows], [answers[i].ids for i in rows],
                                    tokenizer.pad, device)) for rows in micro]
                   for micro in minibatches(sizes, config.minibatches, config.accumulate, seed)]
        old, ref, values, mask, entropy = assess(policy, reference, value, batches, cast)
        rewards = token_rewards(score.to(device), old, ref, mask, config.beta)
        if value is None:
            advantages, returns = group_advantages(rewards, mask, group), values
        else:
            advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
            advantages = whiten(advantages, mask)                       # after the returns (RECIPE O10)
        clock.append(time.perf_counter())
        lr = training.set_lr(adams, min(1.0, 0.1 + 0.9 * iteration / config.warmup))
        for i, minibatch in enumerate(batches):                         # one epoch: each episode once
            found = update(policy, value, minibatch, old, advantages, returns, values, mask, config, cast)
            if config.ptx_coef:                                         # into the same gradient
                start = time.perf_counter()
                found["ptx_loss"] = pretraining_gradient(policy, corpus, config, [*seeds, i], cast)
                ptx_seconds += time.perf_counter() - start
            norms = [stage.update([adam], found[loss], config.clip)
                     for adam, loss in zip(adams, ("policy_loss", "value_loss"))]
            ema_update(ema, policy, config.ema)
            steps.append(found | {"norm": norms[0]})
        clock.append(time.perf_counter())
        rollout_s, scoring_s, update_s = np.diff(clock).tolist()
        row = summarise(steps, old, ref, values, returns, rewards, mask) | {
            "score": score.mean().item(), "eos_rate": sum(a.ended for a in answers) / len(answers), "lr": lr,
            "entropy": entropy, "rollout_s": rollout_s, "scoring_s": scoring_s, "ptx_s": ptx_seconds,
            "update_s": update_s - ptx_seconds}
        if (iteration + 1) % config.eval_every == 0 or iteration + 1 == stage.steps:
            row |= held_out(ema, reference, tokenizer, test, reward, config, cast)
            say(f"  {name} {iteration + 1}: held-out " + ", ".join(
                f"{label} {row[key]:.3f}" for key, label in MEASURED.items() if key in row))
        for warning in health(row, stage.history):
            say(f"  ! {name} {iteration + 1}: {warning}")
        stage.log(tokens=int(mask.sum()), shown=SHOWN, **row)
    stage.finish(ema, model=vars(policy.config), last=row)
    say(f"done in {training.clock(time.perf_counter() - started)}. Next:" + "".join(f"\n  python {command} --out "
        f"{folder}" for command in ("sample.py --compare", "evaluate.py")[:1 if config.data else 2]))

if __name__ == "__main__":
    training.command(main)
