"""PPO-ptx, piece by piece and then as a whole: recipe rows O1 to O20.

B episodes, R response tokens and V tokens have prime sizes of their own. Where a pad has a value, it is a poisoned one.
"""
import contextlib
import json
import math
import shutil
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import benchmark

import ppo
import sft
import training
from config import PPOConfig, UserError
from model import GPT, GPTConfig, generate
from reward import RewardModel

B, R, V = 5, 7, 23
PAD, END = 0, 1
PLAIN, CPU = contextlib.nullcontext(), torch.device("cpu")
LENGTHS = torch.tensor([7, 1, 3, 5, 2])
MASK = (torch.arange(R) < LENGTHS[:, None]).double()
POISON = 1e6
REAL = [(b, t) for b in range(B) for t in range(LENGTHS[b])]


def numbers(seed, pads=0.0):
    """(B,R) float64, with this value at the pads."""
    x = torch.randn(B, R, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.masked_fill(MASK == 0, pads)


def tiny(dropout=0.0, seed=0):
    """A small GPT with weights wide enough that its logits differ much from token to token."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(V, 29, n_layer=1, n_head=2, n_embd=10, dropout=dropout))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt


def some_episodes(B=11, seed=0):
    """Prompts and responses of different lengths -> two lists of id lists."""
    g = torch.Generator().manual_seed(seed)
    return [[torch.randint(2, V, (int(n),), generator=g).tolist() for n in torch.randint(1, 9, (B,), generator=g)]
            for _ in range(2)]


def batched(prompts, responses, n=1, micro=1):
    """The minibatches of main: n lists of (rows, Episodes)."""
    cut = ppo.minibatches([len(p) + len(r) for p, r in zip(prompts, responses)], n, micro, 0)
    return [[(rows, ppo.Episodes([prompts[i] for i in rows], [responses[i] for i in rows], PAD, CPU)) for rows in part]
            for part in cut]


def gradient(model):
    """All gradients as one vector, or None where there are none."""
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found) if found else None


# ---------------------------------------------------------------- O4, O5, O6, O20: KL and rewards

def test_kl_estimates_are_unbiased():
    """O4: E k1 = E k3 = KL(π‖π_ref) when the tokens are π's own, exactly, over 13 tokens; k3 is never negative.

    Usual mistake: exp(k1) - 1 - k1, whose mean is not the KL; or the KL in the other direction.
    """
    log_p, log_q = torch.randn(2, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    kl, other = (p * (log_p - log_q)).sum().item(), (q * (log_q - log_p)).sum().item()
    k1, k2, k3 = ppo.kl_estimates(log_p, log_q)
    assert abs(kl - other) > 0.1, "the two directions can be told apart"
    assert (p * k1).sum().item() == pytest.approx(kl) and (p * k3).sum().item() == pytest.approx(kl)
    assert torch.allclose(k2, (log_p - log_q) ** 2 / 2) and k3.min() >= 0 and k1.min() < 0
    assert torch.allclose(k3, q / p - 1 - (log_q - log_p), atol=1e-12)


def test_rewards_token_by_token():
    """O5: -β k1 at every real token, the score on top at the last one, nothing at pads.

    Usual mistakes: the score one token behind the EOS, or at the padded end.
    """
    score, logprobs, ref = numbers(0)[:, 0], numbers(1, POISON), numbers(2, -POISON)
    rewards = ppo.token_rewards(score, logprobs, ref, MASK, 0.3)
    for b, t in product(range(B), range(R)):
        want = -0.3 * (logprobs[b, t] - ref[b, t]) * (t < LENGTHS[b]) + score[b] * (t == LENGTHS[b] - 1)
        assert rewards[b, t].item() == pytest.approx(want.item(), abs=1e-12)
    assert torch.equal(ppo.token_rewards(score, logprobs, ref, MASK.bool(), 0.3), rewards), "a mask may be bool"


def test_the_total_is_score_minus_beta_kl():
    """O6, O20: an answer's rewards add up to its score - β × its KL, which is a sum over its tokens, no mean."""
    score, logprobs, ref = numbers(0)[:, 0], numbers(1), numbers(2)
    total = ppo.token_rewards(score, logprobs, ref, MASK, 0.3).sum(1)
    torch.testing.assert_close(total, score - 0.3 * (logprobs - ref).sum(1))


# ---------------------------------------------------------------- O9, O10, O11: advantages

@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_the_double_loop(gamma, lam):
    """O9: A_t = Σ_l (γλ)^l δ_{t+l}, with V = 0 behind the last real token.

    Usual mistakes: the value of a pad as V_{t+1} (here a million), the recursion that leaks from pads, A = r - V.
    """
    rewards, values = numbers(0, POISON), numbers(1, -POISON)
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    for b, n in enumerate(LENGTHS.tolist()):
        delta = [rewards[b, t] + gamma * (values[b, t + 1] if t + 1 < n else 0) - values[b, t] for t in range(n)]
        for t in range(R):
            want = sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) if t < n else torch.tensor(0.0)
            assert advantages[b, t].item() == pytest.approx(want.item(), abs=1e-9)
            assert returns[b, t].item() == pytest.approx(want.item() + (values[b, t].item() if t < n else 0), abs=1e-9)


def test_with_lambda_1_the_return_is_what_came():
    """O9: λ = 1 trusts no value: R_t is the sum of the rewards from t on, whatever V says; λ = 0 only the next one."""
    rewards, values = numbers(0), numbers(1)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(ppo.gae(rewards, values, MASK, 1.0, 1.0)[1], to_go * MASK)
    following = torch.cat([values[:, 1:], torch.zeros(B, 1)], 1) * torch.cat([MASK[:, 1:], torch.zeros(B, 1)], 1)
    torch.testing.assert_close(ppo.gae(rewards, values, MASK, 1.0, 0.0)[1], (rewards + following) * MASK)


def test_whitening_sees_no_pads():
    """O11: mean 0 and biased variance 1 over the real tokens. Usual mistakes: unmasked; n - 1; the mean kept, or lost."""
    x = numbers(0, POISON) * 3 + 2
    real = torch.stack([x[i] for i in REAL])
    deviation = ((real - real.mean()) ** 2).mean().sqrt()
    for shift_mean in (True, False):
        want, white = (real - real.mean()) / deviation + (not shift_mean) * real.mean(), ppo.whiten(x, MASK, shift_mean)
        torch.testing.assert_close(torch.stack([white[i] for i in REAL]), want, rtol=0, atol=1e-6)
        assert not white[MASK == 0].any()
    assert not ppo.whiten(torch.full((B, R), 3.0), MASK).any(), "all equal: nothing to learn, and no NaN"


# ---------------------------------------------------------------- O12, O13: losses

def test_the_policy_loss_is_a_mean_over_real_tokens():
    """O12: of max(-Aρ, -A clip(ρ, 1 ± ε)). Usual mistakes: the mean over pads too, the mean of the rows' means, min."""
    new, old, advantages = numbers(0, 3.0), numbers(1, -3.0), numbers(2, 50.0)
    slow = []
    for i in REAL:
        ratio, a = (new[i] - old[i]).exp().item(), advantages[i].item()
        slow.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
    assert ppo.policy_loss(new, old, advantages, MASK).item() == pytest.approx(sum(slow) / len(slow), rel=1e-12)
    slow = [max(-a * r, -a * min(max(r, 0.5), 1.5))
            for a, r in ((advantages[i].item(), (new[i] - old[i]).exp().item()) for i in REAL)]
    assert ppo.policy_loss(new, old, advantages, MASK, 0.5).item() == pytest.approx(sum(slow) / len(slow), rel=1e-12)


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1, 1.3, False), (1, 1.1, True), (1, 0.7, True), (-1, 0.7, False), (-1, 0.9, True), (-1, 1.3, True)])
def test_the_clip_stops_only_what_goes_too_far(advantage, ratio, moves):
    """O12: the gradient is zero where the ratio has gone beyond the clip in its advantage's direction, and nowhere else.

    A good token that has become rarer, and a bad one that has become likelier, are still corrected.
    """
    logprobs = torch.tensor([[math.log(ratio), 1.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0]])
    ppo.policy_loss(logprobs, torch.zeros(1, 2), torch.full((1, 2), float(advantage)), mask).backward()
    assert logprobs.grad.tolist() == [[pytest.approx(-advantage * ratio if moves else 0), 0]]


def test_the_value_loss_takes_the_worse_of_two():
    """O13: ½ mean of max((V - R)², (V_old + clip(V - V_old) - R)²). Usual mistakes: min, no ½, pads, clipping V - R."""
    values, old, returns = numbers(0, POISON), numbers(1, -POISON), numbers(2, POISON)
    slow = []
    for i in REAL:
        v, o, r = values[i].item(), old[i].item(), returns[i].item()
        slow.append(max((v - r) ** 2, (o + min(max(v - o, -0.3), 0.3) - r) ** 2) / 2)
    assert ppo.value_loss(values, old, returns, MASK, 0.3).item() == pytest.approx(sum(slow) / len(slow), rel=1e-12)


@pytest.mark.parametrize("value, loss, slope", [(1.0, 0.32, 0.0), (0.1, 0.405, -0.9), (-1.0, 2.0, -2.0)])
def test_a_step_beyond_the_value_clip_has_no_reward(value, loss, slope):
    """O13, on paper, V_old = 0 and R = 1, c = 0.2: at V = 1 nothing pulls further; with V on the wrong side all does."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    found = ppo.value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(slope)


# ---------------------------------------------------------------- O2, O3: episodes and what is computed of them

def test_what_was_sampled_is_what_is_scored():
    """O2: the log-probs logged while sampling are those of the scoring forward, though pads stand on the other side.

    And after top-k sampling they are not: the policy that is scored never drew these answers.
    """
    gpt, (prompts, _) = tiny(), some_episodes()

    def difference(**how):
        drawn = generate(gpt, prompts, 13, eos=END, generator=torch.Generator().manual_seed(1), **how)
        assert how or len(set(map(len, drawn.responses))) > 2, "answers of different lengths"
        e = ppo.Episodes(prompts, drawn.responses, PAD, CPU)
        assert e.mask.sum(1).tolist() == list(map(len, drawn.responses)) and e.R == drawn.logprobs.shape[1]
        return ((e.logprobs(gpt, PLAIN) - drawn.logprobs) * e.mask).abs().max().item()
    assert difference() < 1e-4
    assert difference(top_k=5) > 0.1 and difference(temperature=0.7) > 0.1


def test_values_are_of_the_state_before_the_token():
    """values[:, t] is what the model says of prompt + response[:t]: it has not seen token t. Usual mistake: off by one."""
    model, (prompts, responses) = RewardModel(tiny()), some_episodes()
    e = ppo.Episodes(prompts, responses, PAD, CPU)
    values = e.values(model, PLAIN)
    for b, (prompt, response) in enumerate(zip(prompts, responses)):
        for t in range(len(response)):
            seen = torch.tensor([prompt + response[:t]])
            assert values[b, t].item() == pytest.approx(model.score(seen, torch.ones_like(seen)).item(), abs=1e-5)


def test_entropy_is_that_of_the_whole_distribution():
    gpt, (prompts, responses) = tiny(), some_episodes()
    e = ppo.Episodes(prompts, responses, PAD, CPU)
    logprobs, entropy = e.logprobs(gpt, PLAIN, entropy=True)
    assert torch.equal(logprobs, e.logprobs(gpt, PLAIN))
    p = gpt(torch.tensor([prompts[3] + responses[3]]))[0, len(prompts[3]) - 1:-1].softmax(-1)
    torch.testing.assert_close(entropy[3, :len(responses[3])], -(p * p.log()).sum(-1))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_first_ratio_is_exactly_one(dropout):
    """O3: scored in the update's own shapes, old and new log-probs agree to the last bit; with dropout they do not."""
    policy, value, (prompts, responses) = tiny(dropout), RewardModel(tiny()), some_episodes()
    batches = batched(prompts, responses, 3, 2)
    old, ref, values, mask, entropy = ppo.assess(policy, tiny(seed=1), value, batches, PLAIN)
    found = ppo.update(policy, value, batches[0], old, torch.ones_like(old), values, values, mask, PPOConfig(), PLAIN)
    if dropout:
        assert found["ratio_off"] > 0.01
    else:
        assert found["ratio_off"] == 0 and found["ratio_max"] == 1 and found["clip_fraction"] == 0
        assert found["value_loss"] == 0


def test_an_assessment_is_in_the_episodes_order():
    """Whatever the minibatches are, row i is episode i, padded with zeros to the longest of all."""
    policy, reference, value, (prompts, responses) = tiny(), tiny(seed=1), RewardModel(tiny(seed=2)), some_episodes()
    e = ppo.Episodes(prompts, responses, PAD, CPU)
    old, ref, values, mask, entropy = ppo.assess(policy, reference, value, batched(prompts, responses, 3, 2), PLAIN)
    assert torch.equal(mask, e.mask.float())
    wants = e.logprobs(policy, PLAIN), e.logprobs(reference, PLAIN), e.values(value, PLAIN)
    for found, want in zip((old, ref, values), wants):
        torch.testing.assert_close(found, want * mask, rtol=0, atol=1e-5)
        assert not found[mask == 0].any() and not found.requires_grad
    _, entropies = e.logprobs(policy, PLAIN, entropy=True)
    assert entropy == pytest.approx(ppo.masked_mean(entropies, mask).item(), rel=1e-5)


# ---------------------------------------------------------------- O14, O17, O18: the inner loop

@pytest.mark.parametrize("episodes, n, micro", [(512, 8, 2), (101, 8, 3), (7, 3, 5), (8, 8, 1)])
def test_every_episode_is_used_once(episodes, n, micro):
    """O14: also where nothing divides. Usual mistake: the remainder is dropped, or a minibatch is nearly empty."""
    lengths = [i * 7919 % 101 for i in range(episodes)]
    batches = ppo.minibatches(lengths, n, micro, 0)
    sizes = [sum(map(len, minibatch)) for minibatch in batches]
    assert sorted(i for minibatch in batches for rows in minibatch for i in rows) == list(range(episodes))
    assert len(batches) == n and max(sizes) - min(sizes) <= 1 and max(map(len, batches)) <= micro
    assert ppo.minibatches(lengths, n, micro, 0) == batches != ppo.minibatches(lengths, n, micro, 1)


def an_update(policy, value, micro, ratio=0.3):
    """ppo.update on one minibatch cut into micro-batches, with old log-probs and values off by noise -> its metrics."""
    prompts, responses = some_episodes()
    (minibatch,) = batched(prompts, responses, 1, micro)
    with torch.no_grad():
        e = ppo.Episodes(prompts, responses, PAD, CPU)
        g, mask = torch.Generator().manual_seed(0), e.mask.double()
        noise = torch.randn(4, *mask.shape, generator=g, dtype=torch.float64)
        old, values = e.logprobs(policy, PLAIN) + ratio * noise[0], e.values(value, PLAIN) + ratio * noise[1]
    return ppo.update(policy, value, minibatch, old * mask, noise[2] * mask, noise[3] * mask, values * mask, mask,
                      PPOConfig(), PLAIN)


def test_micro_batches_are_one_minibatch():
    """The gradient of 3 or 5 micro-batches, and their metrics, are those of the whole. Usual mistake: a mean of means."""
    found = {}
    for micro in (1, 3, 5):
        policy, value = tiny().double(), RewardModel(tiny()).double()
        metrics = an_update(policy, value, micro)
        found[micro] = gradient(policy), gradient(value), torch.tensor(list(metrics.values()))
    for micro in (3, 5):
        for part, whole in zip(found[micro], found[1]):
            torch.testing.assert_close(part.double(), whole.double(), rtol=1e-4, atol=1e-6)
    assert 0 < found[1][2][list(metrics).index("clip_fraction")] < 1


def test_both_gradients_lie_in_one_buffer():
    """O17: PPO's gradient + γ × the gradient of the pretraining loss (a mean over tokens), and then one step."""
    text = torch.randint(V, (3, 17), generator=torch.Generator().manual_seed(5))
    windows = [(text, None, torch.ones_like(text, dtype=torch.bool))]
    value = RewardModel(tiny()).double()

    def gradients(*parts):
        policy = tiny().double()
        for part in parts:
            part(policy)
        return gradient(policy)

    def update(policy):
        an_update(policy, value, 2)

    def ptx(weight):
        return lambda policy: sft.accumulate(policy, windows, PLAIN, weight)
    ppo_alone, ptx_alone = gradients(update), gradients(ptx(1.0))
    torch.testing.assert_close(gradients(update, ptx(2.5)), ppo_alone + 2.5 * ptx_alone)
    policy = tiny().double()
    sft.next_token_loss(policy(text[:, :-1]), text[:, 1:], torch.ones_like(text[:, 1:])).backward()
    torch.testing.assert_close(ptx_alone, gradient(policy))
    assert sft.accumulate(policy, windows, PLAIN, 2.5) == pytest.approx(sft.accumulate(policy, windows, PLAIN, 0.0)), \
        "what is logged is the loss itself, not its share"


def test_the_average_of_the_weights():
    """O18: ema ← 0.992 ema + 0.008 θ, started at θ_0: while θ stands still so does it."""
    model, ema = tiny(), tiny()
    ppo.ema_update(ema, model, 0.992)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), model.parameters()))
    want = [p.detach().double() for p in ema.parameters()]
    for seed in range(1, 4):
        model = tiny(seed=seed)
        ppo.ema_update(ema, model, 0.992)
        want = [0.992 * slow + 0.008 * fast.detach().double() for slow, fast in zip(want, model.parameters())]
    for found, exact in zip(ema.parameters(), want):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- O7, O19: answering

def test_an_unfinished_answer_has_a_score_of_its_own(monkeypatch):
    """O7: it REPLACES the reward's score. Usual mistake: subtracting a penalty, so that a liked ramble still pays.

    O19: at temperature 1, and nothing said of top-k or top-p.
    """
    tasks = [SimpleNamespace(parts=("ask", "", ()), prompt="ask")] * 3
    answers = [training.Answer(*parts) for parts in (([5, END], "a", True), ([5, 6, 7], "b", False), ([END], "", True))]

    def respond(model, tokenizer, prompts, max_new_tokens, temperature, seed, cast):
        assert temperature == 1 and max_new_tokens == 31 and len(prompts) == 3
        return answers
    monkeypatch.setattr(ppo.training, "respond", respond)
    monkeypatch.setattr(ppo.data, "encode_prompt", lambda tokenizer, *parts: [2, 3])
    policy = SimpleNamespace(config=SimpleNamespace(block_size=17))
    prompts, given, score = ppo.rollout(policy, None, tasks, lambda t, a: {"ab": [7.0, 9.0, -4.0]}["".join(a)],
                                        PPOConfig(max_new_tokens=31, unfinished_score=-2.5), 0, PLAIN)
    assert score.tolist() == [7.0, -2.5, -4.0]
    assert prompts == [[2, 3]] * 3 and given == answers


# ---------------------------------------------------------------- health, and the user's own reward

HEALTHY = {"kl": 1.5, "ratio_first": 0.0, "entropy": 0.8, "eos_rate": 0.97, "length": 16.0, "explained_variance": 0.4,
           "gold": 0.75, "proxy": 1.2}
FIRST = {"kl": 0.0, "ratio_first": 0.0, "entropy": 1.0, "eos_rate": 0.99, "length": 15.0, "explained_variance": -9.0}
PAST = [FIRST, *[{**FIRST, "kl": 0.5}] * 5, {**HEALTHY, "gold": 0.76, "proxy": 0.8}, {**HEALTHY, "gold": 0.74, "proxy": 0.9}]


@pytest.mark.parametrize("change, word", [
    ({"kl": -0.5}, "top-k"), ({"ratio_first": 0.2}, "dropout"), ({"entropy": 0.15}, "entropy has collapsed to 0.15"),
    ({"eos_rate": 0.5}, "50% of the answers end"), ({"length": 40.0}, "40 tokens"), ({"length": 3.0}, "3 tokens"),
    ({"explained_variance": -0.3}, "explained variance -0.30"), ({"gold": 0.72}, "exploits")])
def test_each_sickness_has_its_warning(change, word):
    """One sentence, with the number that gives it away and with what to do."""
    for past in (PAST, [*PAST, {**PAST[-1], **change}, {**PAST[-1], **change}]):
        found = ppo.health({**HEALTHY, **change}, past)
    assert len(found) == 1 and word in found[0] and "{" not in found[0]


@pytest.mark.parametrize("change", [{}, {"kl": -0.02}, {"eos_rate": 0.95}, {"length": 20.0}, {"gold": 0.60, "proxy": 0.1},
                                    {"gold": 0.74}], ids=str)
def test_a_healthy_run_is_left_alone(change):
    """Noise, and gold that falls together with the score, are no reason to cry."""
    assert ppo.health({**HEALTHY, **change}, PAST) == []
    row = {k: v for k, v in {**HEALTHY, **change}.items() if k not in ("gold", "proxy")}
    assert ppo.health(row, PAST) == [], "an iteration without an evaluation"


def test_a_bad_iteration_of_the_value_model_is_left_alone():
    """It comes in a good run, too; three in a row do not."""
    bad = {**HEALTHY, "explained_variance": -0.3}
    assert ppo.health(bad, PAST) == ppo.health(bad, [*PAST, bad]) == [] != ppo.health(bad, [*PAST, bad, bad])


def test_a_beginning_is_left_alone():
    """The first row has nothing to be compared with, and a young value model may be bad."""
    assert ppo.health(FIRST, []) == ppo.health({**HEALTHY, "explained_variance": -5.0}, PAST[:3]) == []
    measured = {**FIRST, "gold": 0.1, "proxy": 9.0}
    assert ppo.health(measured, []) == ppo.health(measured, PAST[:3]) == []


OWN = """
def score(prompts, responses):
    assert isinstance(prompts, list) and isinstance(responses, list)
    return [len(p) + 2 * len(r) for p, r in zip(prompts, responses)]
def raises(prompts, responses): return [1 / 0]
def nan(prompts, responses): return [0.5, float("nan")]
def short(prompts, responses): return [0.5]
def none(prompts, responses): pass
"""
TASKS = [SimpleNamespace(prompt="first prompt"), SimpleNamespace(prompt="second")]


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def score(:")
    return lambda name: ppo.own_reward(str(tmp_path / name))


def test_own_reward(own):
    assert own("mine.py:score")(TASKS, ["ab", ""]) == [16.0, 6.0]


@pytest.mark.parametrize("name, words", [
    ("raises", ["ZeroDivisionError", "first prompt"]), ("nan", ["nan", "'second'"]), ("short", ["1 scores for 2 answers"]),
    ("none", ["TypeError", "first prompt"])])
def test_own_reward_that_fails(own, name, words):
    """The user's mistake in the user's words: which function, what it did, at which prompt; and no traceback of ours."""
    score = own(f"mine.py:{name}")
    with pytest.raises(UserError) as error:
        score(TASKS, ["ab", ""])
    for word in [f"mine.py:{name}", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("name, word", [
    ("absent.py:score", "absent.py"), ("mine.py:absent", "absent"), ("mine.py:", "FUNCTION"), ("mine:score", "FILE.py"),
    ("broken.py:score", "SyntaxError")])
def test_own_reward_that_is_not_there(own, name, word):
    with pytest.raises(UserError, match=word):
        own(name)


# ---------------------------------------------------------------- learning: Bellman's equation

# A tree of states. From each the moves 1, 2 and END are taken with these probabilities, three times at most; every move
# has a reward of its own. 64 episodes hold each path exactly as often as it is likely, so nothing is left to chance.
MOVES, DEPTH, GAMMA = {1: 1, 2: 2, 3: 1}, 3, 0.9        # in quarters; 3 ends
PATHS = [path for n in range(1, DEPTH + 1) for path in product(MOVES, repeat=n)
         if 3 not in path[:-1] and (path[-1] == 3 or n == DEPTH)]
EPISODES = [path for path in PATHS for _ in range(4 ** (DEPTH - len(path)) * math.prod(MOVES[a] for a in path))]


def move_reward(path):
    """What the last move of this path earns: any fixed numbers will do."""
    number = sum(a * 5 ** i for i, a in enumerate(path))
    return number * 7 % 11 / 5 - 1 + number / 100


def bellman(path=()):
    """V(s) = Σ_a π(a|s) Q(s,a),  Q(s,a) = r(s,a) + γ V(s')"""
    if path[-1:] == (3,) or len(path) == DEPTH:
        return 0.0
    return sum(quarters / 4 * (move_reward((*path, a)) + GAMMA * bellman((*path, a))) for a, quarters in MOVES.items())


def the_tree():
    """-> Episodes, rewards (B,R) and mask of the 64 episodes."""
    e = ppo.Episodes([[4]] * len(EPISODES), list(map(list, EPISODES)), PAD, CPU)
    rewards = torch.zeros(e.mask.shape, dtype=torch.float64)
    for b, path in enumerate(EPISODES):
        rewards[b, :len(path)] = torch.tensor([move_reward(path[:t + 1]) for t in range(len(path))], dtype=torch.float64)
    return e, rewards, e.mask.double()


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_the_advantage_is_q_minus_v(lam):
    """Policy evaluation: with exact values the mean advantage of a move is Q(s,a) - V(s), for every λ."""
    e, rewards, mask = the_tree()
    assert len(EPISODES) == 64
    values = torch.zeros_like(rewards)
    for b, path in enumerate(EPISODES):
        values[b, :len(path)] = torch.tensor([bellman(path[:t]) for t in range(len(path))], dtype=torch.float64)
    advantages, _ = ppo.gae(rewards, values, mask, GAMMA, lam)
    for move in {path[:t + 1] for path in EPISODES for t in range(len(path))}:
        found = [advantages[b, len(move) - 1].item() for b, path in enumerate(EPISODES) if path[:len(move)] == move]
        q = move_reward(move) + GAMMA * bellman(move)
        assert sum(found) / len(found) == pytest.approx(q - bellman(move[:-1]), abs=1e-9)


def test_the_value_model_finds_bellmans_solution():
    """Values learnt from returns that are made of the values themselves end at the one solution of Bellman's equation."""
    torch.manual_seed(0)
    model = RewardModel(GPT(GPTConfig(5, 5, n_layer=1, n_head=2, n_embd=16, init_std=0.3)))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    (e, rewards, mask), steps = the_tree(), 300
    for step in range(steps):
        adam.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        with torch.no_grad():
            old = e.values(model, PLAIN) * mask
        _, returns = ppo.gae(rewards, old, mask, GAMMA, 0.95)
        ppo.value_loss(e.values(model, PLAIN), old, returns, mask).backward()
        adam.step()
        adam.zero_grad()
    exact = torch.tensor([[bellman(path[:t]) if t < len(path) else 0 for t in range(DEPTH)] for path in EPISODES])
    found = e.values(model, PLAIN).detach() * mask
    assert exact.abs().max() > 1 and (found - exact).abs().max() < 0.05


# ---------------------------------------------------------------- learning: the optimal policy

class Bigram(torch.nn.Module):
    """A language model whose logits depend on the last token alone; as much of a GPT as Episodes asks for."""
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def hidden(self, tokens, mask):
        return torch.nn.functional.one_hot(tokens, len(self.logits)).float()

    def unembed(self, x):
        return x @ self.logits


class PerToken(torch.nn.Module):
    """A value for each last token."""
    def __init__(self, V):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(V))

    def forward(self, tokens, mask):
        return self.table[tokens]


def test_ppo_finds_the_optimal_policy():
    """O1: the maximum of E[r] - β KL(π‖π_ref) is π* = π_ref exp(r/β) / Z, and the shipped loop ends there.

    The prompt 2 is answered by "3 END" or by "4 5 END". π_ref says the second in one of five cases; it is worth 1 more.
    """
    beta, prompt, short, long, rest, never = 0.5, 2, 3, 4, 5, -30.0
    logits = torch.full((6, 6), never)
    logits[prompt, short], logits[prompt, long] = math.log(0.8), math.log(0.2)
    logits[short, END] = logits[long, rest] = logits[rest, END] = 0.0
    policy, reference, value = Bigram(logits), Bigram(logits), PerToken(6)
    config, steps, g = PPOConfig(beta=beta), 120, torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([{"params": policy.parameters(), "lr": 0.05}, {"params": value.parameters(), "lr": 0.1}])
    first = [group["lr"] for group in adam.param_groups]
    for step in range(steps):
        for group, lr in zip(adam.param_groups, first):
            group["lr"] = lr * (1 - step / steps)
        likes_long = policy.logits[prompt].softmax(-1)[long].item()
        drawn = torch.rand(256, generator=g) < likes_long
        responses = [[long, rest, END] if x else [short, END] for x in drawn.tolist()]
        batches = batched([[prompt]] * 256, responses, 2, 2)
        old, ref, values, mask, _ = ppo.assess(policy, reference, value, batches, PLAIN)
        advantages, returns = ppo.gae(ppo.token_rewards(drawn.float(), old, ref, mask, beta), values, mask)
        advantages = ppo.whiten(advantages, mask)
        for minibatch in batches:
            ppo.update(policy, value, minibatch, old, advantages, returns, values, mask, config, PLAIN)
            adam.step()
            adam.zero_grad()
    found = policy.logits[prompt].softmax(-1)[[short, long]]
    weights = torch.tensor([0.8, 0.2 * math.exp(1 / beta)])
    torch.testing.assert_close(found.detach(), weights / weights.sum(), rtol=0, atol=0.01)
    # the value of the prompt is what there is to win: β log Z, the maximum itself
    assert value.table[prompt].item() == pytest.approx(beta * math.log(weights.sum()), abs=0.01)


# ---------------------------------------------------------------- the command

ITERATIONS, MINIBATCHES, PEAK = 4, 3, 1e-2
SMALL = (f"--dtype fp32 --threads 2 --iterations {ITERATIONS} --minibatches {MINIBATCHES} --lr {PEAK} --warmup 2 "
         "--prompts 60 --episodes 23 --eval-prompts 10 --max-new-tokens 9 --ptx-tokens 128 --ptx-window 32").split()
REWARD = "--dtype fp32 --threads 2 --prompts 16 --batch-prompts 5 --max-k 5 --eval-prompts 20 --max-new-tokens 9".split()


def copied(state):
    return {k: v.clone() for k, v in state.items()}


@pytest.fixture(scope="module")
def ppo_run(tiny_run, run, tmp_path_factory):
    """A whole run of ppo.py, overheard: what it drew, what it computed, and the policy's gradient all the way."""
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("ppo") / "run")
    done = run("reward", *REWARD, "--out", folder)
    assert done.code == 0, done.out
    heard = SimpleNamespace(folder=folder, drawn={}, rollouts=[], assessed=[], updates=[], events=[],
                            lrs={"step": [], "value step": []})

    def overhear(place, name, keep):
        original = getattr(place, name)

        def overheard(*args, **more):
            before = gradient(heard.parts["policy"]) if hasattr(heard, "parts") else None
            result = original(*args, **more)
            keep(before, args, result)
            return result
        patch.setattr(place, name, overheard)

    def started(before, args, _):
        heard.parts = args[0].parts
        heard.start = {name: copied(heard.parts[name].state_dict()) for name in ("policy", "value", "ema")}
        models = *(heard.parts[name] for name in ("policy", "value", "ema")), heard.judge
        heard.storages = [{p.data_ptr() for p in model.parameters()} for model in models]

    def drew(before, args, result):
        for prompt, response, logprobs in zip(args[1], result.responses, result.logprobs):
            heard.drawn[tuple(prompt), tuple(response)] = logprobs[:len(response)]

    def event(name):
        return lambda before, args, _: heard.events.append((name, before, gradient(heard.parts["policy"])))

    def stepped(before, args, _):
        name = "step" if args[1][0] is heard.parts["adam"] else "value step"
        heard.events.append((name, before, gradient(heard.parts["policy"])))
        heard.lrs[name] += [group["lr"] / group["peak"] for group in args[1][0].param_groups[:1]]
    with pytest.MonkeyPatch.context() as patch:
        overhear(training, "generate", drew)
        overhear(ppo, "make_reward", lambda before, args, result: setattr(heard, "judge", result[1]))
        def rolled(before, args, result):
            if args[0] is heard.parts["policy"]:        # not the held-out answers, which are the EMA's
                prompts, answers, score = result
                heard.rollouts.append((prompts, [a.ids for a in answers], score,
                                       sum(a.ended for a in answers) / len(answers)))
        overhear(ppo, "rollout", rolled)
        overhear(ppo, "assess", lambda before, args, result: heard.assessed.append(result))
        overhear(ppo, "update", lambda before, args, result: heard.updates.append(args))
        overhear(ppo, "update", event("ppo"))
        overhear(ppo, "accumulate", event("ptx"))
        overhear(training.Stage, "__init__", started)
        overhear(training.Stage, "update", stepped)
        done = run("ppo", *SMALL, "--out", folder)
    assert done.code == 0, done.out
    heard.rows = [json.loads(line) for line in (folder / "ppo.jsonl").read_text().splitlines()]
    return heard


def test_run_everything_starts_where_it_should(ppo_run):
    """O8, O18: policy and average are the SFT model, the value model is the reward model; nobody shares a weight.

    Usual mistakes: a value head on the policy's trunk, which its loss then changes; a reward model that is trained on.
    """
    sft_weights, rm_weights = (training.load(ppo_run.folder / f"{name}.pt") for name in ("sft", "reward"))
    for name, weights in (("policy", sft_weights), ("ema", sft_weights), ("value", rm_weights)):
        start = ppo_run.start[name]
        assert start.keys() == weights.keys() and all(torch.equal(start[k], weights[k]) for k in weights), name
    assert len(set.union(*ppo_run.storages)) == sum(map(len, ppo_run.storages)), "a weight in two roles"
    last, judge = ppo_run.parts["value"].state_dict(), ppo_run.judge.state_dict()
    assert not torch.equal(last["head.weight"], rm_weights["head.weight"]), "it learns"
    assert all(torch.equal(judge[k], rm_weights[k]) for k in judge), "and the reward model does not"


def test_run_sampled_is_scored(ppo_run):
    """O2, O19, in the whole of the command: every log-prob while sampling is the old log-prob of the update."""
    for (prompts, responses, _, _), (old, _, _, mask, _) in zip(ppo_run.rollouts, ppo_run.assessed):
        assert mask.sum(1).tolist() == list(map(len, responses))
        for b, (prompt, response) in enumerate(zip(prompts, responses)):
            drawn = ppo_run.drawn[tuple(prompt), tuple(response)]
            torch.testing.assert_close(old[b, :len(response)], drawn, rtol=0, atol=1e-4)


def test_run_logs_what_it_says(ppo_run):
    """O3, O6, O20: ratio 1 before the first step; KL a mean over answers of a sum over tokens; total = score - β KL."""
    assert len(ppo_run.rows) == ITERATIONS
    for row, (old, ref, _, mask, _), (_, responses, score, rate) in zip(ppo_run.rows, ppo_run.assessed, ppo_run.rollouts):
        assert row["ratio_first"] == 0 and row["score"] == pytest.approx(score.mean().item()) and row["eos_rate"] == rate
        kl = sum(((old - ref)[b, :len(r)]).sum().item() for b, r in enumerate(responses)) / len(responses)
        assert row["kl"] == pytest.approx(kl, abs=1e-5) and row["kl_k3"] >= 0
        assert row["reward"] == pytest.approx(row["score"] - 0.1 * row["kl"], abs=1e-5)
        assert row["length"] == pytest.approx(sum(map(len, responses)) / len(responses), abs=1e-5)
    assert ppo_run.rows[0]["kl"] == 0 and ppo_run.rows[-1]["kl"] > 0.01, "it starts at the reference, and leaves it"
    wanted = "kl kl_k3 score reward ratio_max clip_fraction entropy eos_rate length explained_variance ptx_loss lr".split()
    assert not set(wanted) - set(ppo_run.rows[0]) and {"gold", "proxy"} <= set(ppo_run.rows[-1])


def test_run_whitens_after_the_returns(ppo_run):
    """O7, O9, O10, O11: what the update is given, computed anew from what was drawn and assessed."""
    for i, (old, ref, values, mask, _) in enumerate(ppo_run.assessed):
        score = ppo_run.rollouts[i][2]
        advantages, returns = ppo.gae(ppo.token_rewards(score, old, ref, mask, 0.1), values, mask, 1.0, 0.95)
        for args in ppo_run.updates[i * MINIBATCHES:(i + 1) * MINIBATCHES]:
            torch.testing.assert_close(args[3:8], (old, ppo.whiten(advantages, mask), returns, values, mask))


def test_run_uses_each_episode_once(ppo_run):
    """O14: 23 episodes in 3 minibatches, one optimiser step each, and every one is there."""
    for i in range(ITERATIONS):
        updates = ppo_run.updates[i * MINIBATCHES:(i + 1) * MINIBATCHES]
        used = [row for args in updates for rows, _ in args[2] for row in rows]
        assert sorted(used) == list(range(23))


def test_run_steps_once_for_both_gradients(ppo_run):
    """O16, O17: per minibatch an empty buffer, PPO's gradient and the pretraining gradient in it, one step of Adam.

    Usual mistake: two optimiser steps; under Adam the second one can undo the first.
    """
    names = [name for name, _, _ in ppo_run.events]
    assert names.count("step") == names.count("ppo") == names.count("ptx") == ITERATIONS * MINIBATCHES
    while ppo_run.events:
        end = [name for name, _, _ in ppo_run.events].index("step")
        group, step = ppo_run.events[:end], ppo_run.events[end]
        del ppo_run.events[:end + 2 if ppo_run.events[end + 1:][0][0] == "value step" else end + 1]
        assert {name for name, _, _ in group} >= {"ppo", "ptx"} and group[0][1] is None, "the buffer was empty"
        for (_, _, after), (_, before, _) in zip(group, [*group[1:], step]):
            assert torch.equal(after, before) and after.abs().max() > 0
        assert step[2] is None
    for name in ("adam", "value_adam"):
        adam = ppo_run.parts[name]
        assert {group["betas"] for group in adam.param_groups} == {(0.9, 0.95)}
        assert {int(state["step"]) for state in adam.state_dict()["state"].values()} == {ITERATIONS * MINIBATCHES}


def test_run_warms_up_by_the_iteration(ppo_run):
    """O15: from 0.1 of the peak over `warmup` iterations, then constant. Usual mistakes: per minibatch; a decay."""
    assert [row["lr"] / PEAK for row in ppo_run.rows] == pytest.approx([0.1, 0.55, 1, 1])
    for lrs in ppo_run.lrs.values():
        assert lrs == pytest.approx([lr for lr in (0.1, 0.55, 1, 1) for _ in range(MINIBATCHES)])


def test_run_keeps_the_average(ppo_run):
    """O18: ppo.pt is the average of the weights, which is near θ_0 and near the policy, and is neither."""
    kept, start = training.load(ppo_run.folder / "ppo.pt"), ppo_run.start["policy"]
    last = ppo_run.parts["policy"].state_dict()
    moved, gone = (sum((kept[k] - x[k]).norm() ** 2 for k in kept) ** 0.5 for x in (start, last))
    assert 0 < moved < 0.2 * gone
    assert all(torch.equal(kept[k], v) for k, v in ppo_run.parts["ema"].state_dict().items())


@pytest.mark.parametrize("flags, words", [
    (["--episodes", 8, "--group", 9], ["--group 9", "--episodes 8"]),
    (["--episodes", 7, "--minibatches", 8], ["--minibatches 8", "--episodes 7"]),
    (["--ptx-tokens", 64, "--ptx-window", 128], ["--ptx-window 128", "--ptx-tokens 64"])], ids=str)
def test_too_few_of_something(flags, words, run, tmp_path):
    """One line, before anything is read or computed. Usual mistake: random.sample's traceback, minutes later."""
    done = run("ppo", *flags, "--out", tmp_path / "none")
    assert done.code == 2 and done.out.count("\n") == 1 and not (tmp_path / "none").exists()
    assert all(word in done.out for word in words)


# ---------------------------------------------------------------- GRPO

def test_group_advantages_by_hand():
    """Within a prompt's own answers, whole rewards, the same at every token; pads get none.

    Usual mistakes: groups are cut across prompts; the rewards of the tokens are whitened, not those of the answers.
    """
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(15, 7, generator=g, dtype=torch.float64)
    mask = (torch.arange(7) < torch.randint(1, 8, (15, 1), generator=g)).double()
    rewards *= mask
    found = ppo.group_advantages(rewards, mask, 5)
    for first in range(0, 15, 5):
        whole = [sum(rewards[i].tolist()) for i in range(first, first + 5)]
        mean = sum(whole) / 5
        std = (sum((r - mean) ** 2 for r in whole) / 4) ** 0.5
        for i, r in zip(range(first, first + 5), whole):
            assert found[i].tolist() == pytest.approx([(r - mean) / (std + 1e-4) * m for m in mask[i].tolist()], abs=1e-10)


def test_equal_answers_teach_nothing():
    """A prompt that is always answered equally well: no advantage, and no division by zero."""
    found = ppo.group_advantages(torch.full((8, 3), 0.7), torch.ones(8, 3), 4)
    assert torch.equal(found, torch.zeros(8, 3))


def test_grpo_from_the_command_line(ppo_run, run, tmp_path, monkeypatch):
    """Every prompt is answered `group` times, side by side, and no value model is trained; the stage is grpo."""
    folder, asked = shutil.copytree(ppo_run.folder, tmp_path / "run"), []
    original = ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda policy, tok, tasks, *rest: asked.append(tasks) or original(policy, tok, tasks, *rest))
    done = run("ppo", *SMALL, "--advantage", "group", "--group", 2, "--episodes", 22, "--out", folder)
    assert done.code == 0, done.out
    pairs = asked[0][::2], asked[0][1::2]
    assert pairs[0] == pairs[1] and len({task.prompt for task in pairs[0]}) == len(pairs[0])
    assert training.load_model(folder, "grpo")[2]["parent"] == "sft"
    rows = [json.loads(line) for line in (folder / "grpo.jsonl").read_text().splitlines()]
    assert all(row["value_loss"] == 0 for row in rows)


def test_prompts_of_your_own(ppo_run, run, tmp_path):
    """Without a judge: reward and KL are measured on every twentieth prompt, which is not trained on."""
    folder, path = shutil.copytree(ppo_run.folder, tmp_path / "run"), tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(43)), encoding="utf8")
    done = run("ppo", *SMALL, "--data", path, "--fresh", "--out", folder)
    assert done.code == 0, done.out
    row = json.loads((folder / "ppo.json").read_text())["last"]
    assert "gold" not in row and row["held_out_kl"] != 0 and math.isfinite(row["proxy"])
    assert "gold" not in done.out.partition("step 3")[2]


def test_the_curve_of_a_finished_run(ppo_run):
    """benchmarks/over_optimisation.py: what held-out rows of ppo.jsonl gained over the SFT model, by the same reward and judge.

    Usual mistake: the beginning is measured on other prompts than the rows.
    """
    sft, tokenizer, _ = training.load_model(ppo_run.folder, "sft")
    device, cast = torch.device("cpu"), contextlib.nullcontext()
    over = benchmark("over_optimisation")
    found = over.along_ppo(ppo_run.folder, sft, tokenizer, device, cast)
    rows = [json.loads(line) for line in (ppo_run.folder / "ppo.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "held_out_kl" in row]
    assert len(found) == len(measured) > 0 and [p["kl"] for p in found] == [row["held_out_kl"] for row in measured]
    config = over.commands.stored_config(ppo_run.folder, "ppo", PPOConfig)
    _, tasks = ppo.prompts_of(config, tokenizer, sft.config.block_size)
    score, _ = ppo.make_reward(config, ppo_run.folder, sft, tokenizer, cast, device)
    start = ppo.held_out(sft, sft, tokenizer, tasks, score, config, cast)
    assert found[-1]["proxy"] == pytest.approx(measured[-1]["proxy"] - start["proxy"])
    assert len(tasks) == 10 and start["held_out_kl"] == 0
