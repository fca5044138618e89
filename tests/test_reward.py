"""Rankings become a scalar: recipe rows R1 to R11, and reward.py as it is used.

N prompts, K completions and T tokens have prime sizes of their own, so that no two can be confused without an error.
"""
import contextlib
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import data
import reward
import training
import world
from config import RewardConfig, UserError
from model import GPT, GPTConfig, token_logprobs
from reward import RewardModel, accuracy, preferred, ranking_loss

N, K, T, V, C = 5, 7, 13, 23, 10
PAD, ASSISTANT = 0, 1
PLAIN = contextlib.nullcontext()
LIKELIHOOD = pytest.mark.parametrize("answer_after", [None, ASSISTANT], ids=["head", "head and likelihood"])


def tiny(seed=0):
    """A small GPT with weights wide enough that its hidden states differ much from token to token."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(V, 2 * T, n_layer=1, n_head=2, n_embd=C))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt


def tiny_model(answer_after=None, seed=0):
    model = RewardModel(tiny(seed), answer_after)
    torch.nn.init.constant_(model.w, 0.7)
    torch.nn.init.constant_(model.shift, -0.3)
    return model


def some_ranking(seed=0):
    """Scores (N,K) and ranks with ties and absences; the last prompt has only ties, the one before one pair."""
    g = torch.Generator().manual_seed(seed)
    ranks = torch.randint(-1, 4, (N, K), generator=g)
    ranks[-1] = 2
    ranks[-2] = torch.tensor([-1, 1, -1, 0, -1, -1, -1])
    return torch.randn(N, K, generator=g, dtype=torch.float64).requires_grad_(), ranks


def text(n, seed=0):
    """n ids that are no specials, the last ones excepted: the pad's id, which may occur in a text."""
    return torch.randint(2, V, (n - 1,), generator=torch.Generator().manual_seed(seed)).tolist() + [PAD]


# ---------------------------------------------------------------- R1, R3, R4, R5: the loss

def test_the_loss_is_the_triple_loop():
    """R1, R3, R4 at once, with the gradient: over prompts, over i, over j that i is ranked above."""
    scores, ranks = some_ranking()
    prompts = []
    for n in range(N):
        pairs = [(i, j) for i in range(K) for j in range(K) if 0 <= ranks[n, i] < ranks[n, j]]
        losses = [-(1 / (1 + (scores[n, j] - scores[n, i]).exp())).log() for i, j in pairs]
        prompts += [sum(losses) / len(losses)] if losses else []
    slow, fast = sum(prompts) / len(prompts), ranking_loss(scores, ranks)
    assert len(prompts) == N - 1 and fast.item() == pytest.approx(slow.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (fast, slow)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_equal_scores_give_ln_2(k):
    """R1: a model that knows nothing pays ln 2, whatever K. Usual mistake: dividing by C(K,2) twice."""
    loss = ranking_loss(torch.full((N, k), 3.0, dtype=torch.float64), torch.arange(k).expand(N, k))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)


def test_ties_and_absences_have_no_weight():
    """R3: no loss and no gradient. Usual mistake: a tie is ordered by chance, a filler is the worst answer."""
    scores = torch.tensor([[0.3, -0.5, 1.1, 1e6]], dtype=torch.float64, requires_grad=True)
    best, a, b, _ = scores[0]
    loss = ranking_loss(scores, torch.tensor([[0, 1, 1, -1]]))
    assert loss.item() == pytest.approx(((a - best).exp().log1p() + (b - best).exp().log1p()).item() / 2, rel=1e-12)
    grad, = torch.autograd.grad(loss, scores)
    assert grad[0, 3] == 0 and grad[0, :3].abs().min() > 0 and abs(grad.sum()) < 1e-12

    for nothing in ([2, 2, 2, 2], [-1, -1, -1, -1], [-1, 0, -1, -1]):
        loss = ranking_loss(scores, torch.tensor([nothing]))
        assert loss.item() == 0, "nothing to compare: no loss, and no NaN"
        assert not torch.autograd.grad(loss, scores)[0].any()


def test_every_prompt_weighs_the_same():
    """R4: a prompt of K = 7 pulls as much as one of K = 2. Usual mistake: a mean over all pairs, 21 against 1."""
    scores = torch.randn(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    ranks = torch.full((3, K), -1)
    for row, k in enumerate((K, 2, 5)):
        ranks[row, :k] = torch.arange(k)
    alone = [ranking_loss(scores[i:i + 1], ranks[i:i + 1]) for i in range(3)]
    together = ranking_loss(scores, ranks)
    assert together.item() == pytest.approx(sum(alone).item() / 3, rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (together, sum(alone) / 3)))


@pytest.mark.parametrize("margin, loss, slope", [(200.0, 0.0, 0.0), (-200.0, 200.0, -1.0)])
def test_far_apart_scores_stay_finite(margin, loss, slope):
    """R5: -log σ(z) = softplus(-z). Usual mistake: log(sigmoid(z)) is -inf at z = -200, in fp32."""
    scores = torch.tensor([[margin, 0.0]], requires_grad=True)
    found = ranking_loss(scores, torch.tensor([[0, 1]]))
    found.backward()
    assert found.item() == pytest.approx(loss) and scores.grad[0].tolist() == pytest.approx([slope, -slope])


# ---------------------------------------------------------------- R6, R7, R8: the model

def test_the_head_starts_at_one_over_the_root_of_d_plus_one():
    """R6, over 400 heads. Usual mistakes: 1/(d+1); zero, which learns nothing for long."""
    gpt, d = tiny(), C
    torch.manual_seed(0)
    weights = torch.cat([RewardModel(gpt).head.weight.flatten() for _ in range(400)])
    assert weights.std().item() == pytest.approx(1 / math.sqrt(d + 1), rel=0.03)     # 1/√d is 5 % more
    assert abs(weights.mean().item()) < 0.02 and not RewardModel(gpt).head.bias.any()


def test_the_trunk_is_a_copy():
    """R6: it starts with the SFT model's weights, and what the reward model learns the policy does not feel."""
    gpt = tiny()
    model, before = RewardModel(gpt, ASSISTANT), {k: v.clone() for k, v in gpt.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in model.trunk.state_dict().items())
    assert not {p.data_ptr() for p in gpt.parameters()} & {p.data_ptr() for p in model.parameters()}
    tokens, real, _ = data.collate([(text(5), [1] * 5)], PAD)
    model.score(tokens, real).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in gpt.state_dict().items()) and gpt.wte.weight.grad is None
    assert not torch.equal(model.trunk.wpe.weight, before["wpe.weight"])


@LIKELIHOOD
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_score_is_at_the_last_real_token(side, answer_after):
    """R7: what a text scores alone, it scores among longer ones, and the pads' ids do not matter.

    Usual mistakes: a mean over pads; the place of the first pad's id minus one (ids may occur in a text, pads may be left).
    """
    model = tiny_model(answer_after)
    rows = [text(n, n) + [ASSISTANT] + text(m, m) for n, m in ((2, 3), (5, 6), (3, 2), (2, 9))]
    alone = torch.cat([model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)) for row in rows])
    wide = max(map(len, rows)) + 2
    for pad in (PAD, 17):
        tokens, real = torch.full((len(rows), wide), pad), torch.zeros(len(rows), wide, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(wide - len(row), wide)
            tokens[i, where], real[i, where] = torch.tensor(row), True
        torch.testing.assert_close(model.score(tokens, real), alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.score(tokens, real.long()), alone, rtol=0, atol=1e-5)
    every = model(torch.tensor([rows[3]]))[0]
    assert every[-1].item() == pytest.approx(alone[3].item(), abs=1e-5) and (every[:-1] - alone[3]).abs().min() > 1e-3


def test_the_likelihood_is_that_of_the_answer():
    """s = head + w Σ log π(answer token): the prompt's tokens do not count, nor do a conversation's earlier answers.

    Two answers to one prompt differ by their heads' difference + w × their log-likelihoods' difference.
    """
    model, head = tiny_model(ASSISTANT), tiny_model(None)
    prompt = text(3, 1) + [ASSISTANT] + text(4, 2) + text(2, 3) + [ASSISTANT]
    scores, heads, likelihoods = [], [], []
    for n in (3, 5):
        tokens = torch.tensor([prompt + text(n, n)])
        real = torch.ones_like(tokens)
        scores.append(model.score(tokens, real).item())
        heads.append(head.score(tokens, real).item())
        likelihoods.append(token_logprobs(model.trunk(tokens), tokens)[0, len(prompt) - 1:].sum().item())
        assert scores[-1] == pytest.approx(heads[-1] + 0.7 * likelihoods[-1], abs=1e-5)
        assert likelihoods[-1] < -n, "a random model is not sure of anything: the sum is worth seeing"
        upto = model(tokens, real)[0]               # and no earlier column hears of the answer that follows
        assert torch.allclose(upto[:len(prompt)], head(tokens, real)[0, :len(prompt)], atol=1e-6)
    assert scores[0] - scores[1] == pytest.approx(heads[0] - heads[1] + 0.7 * (likelihoods[0] - likelihoods[1]), abs=1e-5)
    model.score(tokens, real).sum().backward()
    assert model.w.grad.item() == pytest.approx(likelihoods[-1], abs=1e-4), "w is learnt"


@LIKELIHOOD
def test_the_shift_moves_scores_and_nothing_else(answer_after):
    """R8: it is saved with the model, it has no gradient, differences stay. Usual mistake: a gain besides the shift."""
    model, fresh = tiny_model(answer_after), RewardModel(tiny(seed=1))
    tokens, real, _ = data.collate([(ids, [1] * len(ids)) for ids in (text(4, 1), text(7, 2), text(5, 3))], PAD)
    before = model.score(tokens, real)
    model.shift += 2.5
    after = model.score(tokens, real)
    torch.testing.assert_close(after, before + 2.5)
    assert "shift" in model.state_dict() and "shift" not in dict(model.named_parameters())
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.score(tokens, real), after, msg="a loaded model scores as the saved one")


# ---------------------------------------------------------------- R10, R11: measuring

def test_a_dead_reward_model_is_half_right():
    """R10: equal scores count ½. Usual mistake: >= makes a model that says always the same 100 % right."""
    scores, ranks = some_ranking()
    pairs = preferred(ranks)
    assert accuracy(torch.zeros(N, K), pairs) == 0.5
    assert accuracy(-ranks, pairs) == 1 and accuracy(ranks, pairs) == 0
    slow = [float(scores[n, i] > scores[n, j]) for n in range(N) for i in range(K) for j in range(K)
            if 0 <= ranks[n, i] < ranks[n, j]]
    assert accuracy(scores, pairs) == pytest.approx(sum(slow) / len(slow))
    assert accuracy(torch.tensor([[1.0, 1.0, 0.0]]), preferred(torch.tensor([[0, 1, 2]]))) == pytest.approx(2.5 / 3)


def test_preferred_is_the_strict_order():
    assert preferred(torch.tensor([[1, 0, -1, 1]])).long().tolist() == [
        [[0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]]


def test_agreement_is_the_ceiling():
    """R11: labelers who are right with q = 0.836 agree in q² + (1 - q)² = 72.6 % of the pairs: the paper's agreement.

    So the truth itself scores 83.6 % against a labeler, and nothing can score more. 250 × 250 pairs, so that each mistake
    of the one meets each of the other; both err in 41 of 250.
    """
    right = torch.arange(250) < 209
    a, b = (x.flatten().long() for x in torch.meshgrid(right, right, indexing="ij"))
    ranks_a, ranks_b = (torch.stack([1 - x, x], 1) for x in (a, b))        # the first answer is truly the better one
    truth, q = torch.tensor([[0, 1]]).expand_as(ranks_a), 209 / 250
    assert accuracy(-ranks_a, preferred(truth)) == accuracy(-truth, preferred(ranks_b)) == pytest.approx(q)
    agreement = accuracy(-ranks_a, preferred(ranks_b))
    assert agreement == pytest.approx(q ** 2 + (1 - q) ** 2, abs=1e-12) and agreement == pytest.approx(0.726, abs=1e-3)


def test_reliability_compares_prediction_and_outcome():
    """A margin of ln 3 predicts 75 %: of four such pairs three come true. Binned by the confidence of the prediction."""
    z = math.log(3)
    scores = torch.tensor([[z, 0], [z, 0], [0, z], [z, 0], [9, 0]])
    bins = reward.reliability(scores, preferred(torch.tensor([[0, 1]] * 5)))
    assert bins[0] == (pytest.approx(0.75), 0.75, 4)
    assert bins[1] == (pytest.approx(1 / (1 + math.exp(-9))), 1.0, 1) and len(bins) == 2
    sure = reward.reliability(torch.tensor([[100.0, 0.0]]), preferred(torch.tensor([[0, 1]])))
    assert sure == [(1.0, 1.0, 1)], "a prediction of exactly 1 has a bin"


def test_a_dead_reward_model_is_reliable():
    """R10 again: who always says "even" predicts ½, and equal scores count ½."""
    assert reward.reliability(torch.zeros(1, 2), preferred(torch.tensor([[0, 1]]))) == [(0.5, 0.5, 1)]


# ---------------------------------------------------------------- R2: groups

GROUPS = [[text(3, 1), text(9, 2)], [text(5, 3)] * 3, [text(n, n) for n in (2, 11, 6, 4, 7)], [text(8, 4), text(2, 5)]]


@LIKELIHOOD
def test_groups_score_as_one_by_one(answer_after):
    """Padding among neighbours and the order of the batches change nothing; places without an answer are 0."""
    model = tiny_model(answer_after)
    alone = [[model.score(torch.tensor([ids]), torch.ones(1, len(ids))).item() for ids in group] for group in GROUPS]
    want = torch.zeros(4, 5)
    for i, row in enumerate(alone):
        want[i, :len(row)] = torch.tensor(row)
    torch.testing.assert_close(reward.score_groups(model, GROUPS, PAD, PLAIN), want, rtol=0, atol=1e-5)
    for batch in (1, 3, 32):
        torch.testing.assert_close(reward.score_many(model, GROUPS, PAD, PLAIN, batch), want, rtol=0, atol=1e-5)


def test_tables_have_a_filler():
    """Rows of any lengths -> one tensor; -1 is the rank of an answer that is not there."""
    assert reward.table([[0, 1], [2], [1, 0, 0]]).tolist() == [[0, 1, -1], [2, -1, -1], [1, 0, 0]]
    assert reward.table([[0.5], [1.0, 2.0]], 0).tolist() == [[0.5, 0.0], [1.0, 2.0]]


@contextlib.contextmanager
def counted_rows(model):
    """How many rows pass the trunk inside of the block."""
    rows = []
    hook = model.trunk.ln_f.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


@LIKELIHOOD
def test_one_forward_a_completion(answer_after):
    """R2: K answers make K rows and C(K,2) pairs. Usual mistake: a row for each side of each pair, K - 1 times the work."""
    model = tiny_model(answer_after)
    with counted_rows(model) as rows:
        ranking_loss(reward.score_groups(model, GROUPS, PAD, PLAIN), reward.table([[0, 1], [0, 0, 1], range(5), [1, 0]]))
    assert sum(rows) == 12


def test_it_learns_a_taste_in_one_epoch(tmp_path):
    """R2, R9: every answer is seen once, with all pairs of its prompt in one step; then unseen answers are in order.

    The labelers like the token 7, and nothing else matters to them.
    """
    g = torch.Generator().manual_seed(0)

    def prompt_and_ranks(k):
        answers = torch.randint(2, V, (k, 5), generator=g)
        likes = torch.randint(0, 4, (k,), generator=g)
        for row, n in zip(answers, likes.tolist()):
            row[row == 7] = 8
            row[torch.randperm(5, generator=g)[:n]] = 7
        return [[3, 4, ASSISTANT, *row] for row in answers.tolist()], (likes.max() - likes).tolist()
    groups = [group for group in (prompt_and_ranks(4 + i % 6) for i in range(400)) if len(set(group[1])) > 1]
    model = RewardModel(tiny(), ASSISTANT)
    config = RewardConfig(batch_prompts=8, lr=2e-2, matrix_lr=2e-2, seed=1)
    with counted_rows(model) as rows:
        stage = reward.train(config, tmp_path, model, groups[50:], PAD, PLAIN)
    assert sum(rows) == sum(len(ids) for ids, _ in groups[50:]) and len(rows) == stage.steps == -(-len(groups[50:]) // 8)
    ids, ranks = zip(*groups[:50])
    assert accuracy(reward.score_many(model, ids, PAD, PLAIN), preferred(reward.table(ranks))) > 0.95


def test_what_does_not_fit_is_left_out(capsys):
    """Counted, and a prompt that compares nothing any more goes with it."""
    tokenizer = data.Tokenizer(data.train_bpe([""], 256))
    comparisons = [("ask", "", (), ["x" * n for n in sizes], ranks)
                   for sizes, ranks in (((3, 300, 5), (1, 0, 0)), ((4, 400), (0, 1)), ((2, 6), (0, 1)))]
    groups = reward.encode_groups(tokenizer, comparisons, 64)
    assert [([len(x) for x in ids], ranks) for ids, ranks in groups] == [([9, 11], (1, 0)), ([8, 12], (0, 1))]
    assert all(x[-1] == tokenizer.end and x.count(tokenizer.assistant) == 1 for ids, _ in groups for x in ids)
    assert "2 answers are longer than 64 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="8 tokens"):
        reward.encode_groups(tokenizer, comparisons, 8)


# ---------------------------------------------------------------- the command

SMALL = "--dtype fp32 --threads 2 --prompts 24 --batch-prompts 5 --max-k 5 --eval-prompts 20 --max-new-tokens 9".split()


@pytest.fixture(scope="module")
def reward_run(tiny_run, run, tmp_path_factory):
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("reward") / "run")
    done = run("reward", *SMALL, "--out", folder)
    assert done.code == 0, done.out
    _, tokenizer, facts = training.load_model(folder, "sft")
    model = RewardModel(GPT(GPTConfig(**facts["model"])))
    model.load_state_dict(training.load(folder / "reward.pt"))
    return SimpleNamespace(folder=folder, out=done.out, model=model, tokenizer=tokenizer)


def test_demonstrations_score_zero_on_average(reward_run):
    """R8: so that a score below zero means "worse than a labeler's answer"; the scores themselves still differ."""
    examples = [data.encode_example(reward_run.tokenizer, t.instruction, t.input, answer, t.history)[0]
                for t, answer in world.demonstrations(400, "val", 1)]
    scores = reward.score_many(reward_run.model, [[ids] for ids in examples], reward_run.tokenizer.pad, PLAIN)
    assert abs(scores.mean().item()) < 1e-3 and scores.std() > 0.1 and reward_run.model.shift != 0


def test_spread_is_within_a_prompt():
    """Usual mistakes: the difficulty of a prompt counts as spread, its length as a taste for long answers; what is absent, as 0.

    Three prompts of 3, 2 and 2 answers, far apart; within a prompt each further token costs 0.5. Equal scores: no number.
    """
    lengths = [[11, 13, 17], [5, 7], [2, 3]]
    scores = torch.nn.utils.rnn.pad_sequence([100.0 * i - 0.5 * torch.tensor(row) for i, row in enumerate(lengths)], batch_first=True)
    here = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    ids = [[[0] * n for n in row] for row in lengths]
    found = reward.spread(scores, ids, here)
    apart = torch.tensor([n - sum(row) / len(row) for row in lengths for n in row], dtype=torch.float64)
    assert found == {"length_correlation": pytest.approx(-1), "spread": pytest.approx(0.5 * apart.std().item())}
    assert reward.spread(torch.zeros(3, 3), ids, here) == {"length_correlation": None, "spread": 0}


def test_the_command_compares_what_it_ranks(reward_run):
    """One epoch over 24 prompts in batches of 5; K from 4 to 5; the rankings are kept in a file that --data could read."""
    facts = json.loads((reward_run.folder / "reward.json").read_text())
    path, = reward_run.folder.glob("comparisons-*.jsonl")
    kept, skipped = data.read_comparisons(path)
    assert facts["parent"] == "sft" and facts["steps"] == -(-len(kept) // 5)
    assert len(kept) + sum(skipped.values()) == 24 and {len(json.loads(x)["ranks"]) for x in path.open()} == {4, 5}
    assert 0 <= facts["measured"]["accuracy_gold"] <= 1 and facts["measured"]["pairs"] > 0
    assert reward_run.model.answer_after == reward_run.tokenizer.assistant


def test_second_round_names_may_have_spaces(reward_run, run):
    """`--from "sft, sft"`; and whatever could not be measured is null in reward.json, which must stay JSON."""
    for hole in ("", "sft,,ppo"):
        done = run("reward", *SMALL, "--out", reward_run.folder, "--fresh", "--from", hole)
        assert done.code == 2 and "no finished " in done.out and "Stages: base, sft" in done.out, done.out
    done = run("reward", *SMALL, "--out", reward_run.folder, "--fresh", "--from", "sft, sft")
    assert done.code == 0, done.out

    def constant(name):
        raise AssertionError(f"{name} in reward.json")
    json.loads((reward_run.folder / "reward.json").read_text(), parse_constant=constant)


def test_equal_scores_correlate_with_nothing():
    """A model that says always the same: no correlation and no NaN; a category without pairs has no accuracy."""
    tokenizer = data.Tokenizer(data.train_bpe([""], 256))
    gpt = GPT(GPTConfig(tokenizer.size, 64, n_layer=1, n_head=2, n_embd=C))
    model = RewardModel(gpt)
    torch.nn.init.zeros_(model.head.weight)
    tasks = world.tasks(2, "val")
    groups = [list(zip(["a", "bb"], world.judge_many([task] * 2, ["a", "bb"]))) for task in tasks]
    found = reward.measure(model, tokenizer, tasks, groups, 0, 64, PLAIN)
    assert found["length_correlation"] is None and None in found["categories"].values()


# ---------------------------------------------------------------- DPO, on the same rankings

def dpo_batch():
    """Three texts of one prompt each, padded on the right; what stands behind the last ASSISTANT is the answer."""
    rows = [text(5, seed)[:-1] + [ASSISTANT] + text(size, seed + 9) for seed, size in ((1, 2), (2, 7), (3, 4))]
    return data.collate([(ids, [1] * len(ids)) for ids in rows], PAD)[:2], rows


def test_the_implicit_reward_by_hand():
    """DPO Eq. 5, token by token in float64: β Σ (log π - log π_ref) over the answer and nothing else.

    Usual mistakes: the prompt's tokens are in the sum, the last token is not, pads are.
    """
    (tokens, real), rows = dpo_batch()
    model = reward.ImplicitReward(tiny(1), ASSISTANT, beta=0.3).double()
    model.reference.load_state_dict(tiny(2).state_dict())
    found = model.score(tokens, real)
    for row, score in zip(rows, found):
        ids, first = torch.tensor([row]), len(row) - row[::-1].index(ASSISTANT)
        pi, ref = (token_logprobs(gpt(ids), ids)[0, first - 1:].sum() for gpt in (model.policy, model.reference))
        assert score.item() == pytest.approx(0.3 * (pi - ref).item(), abs=1e-10)


def test_dpo_is_the_ranking_loss_of_the_implicit_reward():
    """DPO Eq. 7 for two answers; at the start the policy is the reference, and the loss ln 2. The reference stays."""
    (tokens, real), _ = dpo_batch()
    model = reward.ImplicitReward(tiny(1), ASSISTANT, beta=0.3).double()
    scores = model.score(tokens[:2], real[:2])[None]
    loss = ranking_loss(scores, torch.tensor([[1, 0]]))
    assert scores.abs().max() < 1e-12 and loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.reference.parameters())
    with torch.no_grad():                       # downhill the second answer, which is preferred, rises
        for p in model.policy.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad
    worse, better = model.score(tokens[:2], real[:2]).tolist()
    assert better > worse


def test_dpo_from_the_command_line(reward_run, run, tmp_path):
    """The same comparisons, no reward model: a policy that sample.py and evaluate.py load as the stage dpo. Usual mistake:
    it learns at a reward model's rates, and loses right answers (README)."""
    folder = shutil.copytree(reward_run.folder, tmp_path / "run")
    for path in folder.glob("reward.*"):
        path.unlink()
    done = run("reward", *SMALL, "--objective", "dpo", "--out", folder)
    assert done.code == 0 and "sampled and ranked" not in done.out, done.out
    dpo, _, facts = training.load_model(folder, "dpo")
    sft, _, _ = training.load_model(folder, "sft")
    moved = max((a - b).abs().max().item() for a, b in zip(dpo.parameters(), sft.parameters()))
    assert 0 < moved < 0.5 and facts["parent"] == "sft" and not (folder / "reward.pt").exists()
    fast, slow = ([json.loads(line)["lr"] for line in path.read_text().splitlines()]
                  for path in (reward_run.folder / "reward.jsonl", folder / "dpo.jsonl"))
    assert slow == pytest.approx([0.3 * lr for lr in fast])
