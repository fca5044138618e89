"""LoRA: what is frozen, what learns, and that all its forms are the same function."""
import copy
import io
import json
import shutil
import signal

import pytest
import torch
from conftest import killed_at, same_weights
from test_model import B, T, V, some_tokens, tiny
from test_ppo import REWARD
from test_ppo import SMALL as PPO

import ppo
import training
from config import PPOConfig
from model import KVCache, add_lora, generate, learnt, load_gpt2, merge_lora, save_gpt2, token_logprobs, twin
from reward import RewardModel

R, MATRICES = 3, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

def moved(dtype=torch.float64, **changes):
    """A model whose adapters, B too, are random numbers: it is far from its base."""
    gpt = add_lora(tiny(dtype, **changes), R)
    for name, p in gpt.named_parameters():
        if name.endswith((".A", ".B")):
            torch.nn.init.normal_(p, std=0.3)
    return gpt


def loss_of(gpt):
    return -token_logprobs(gpt(some_tokens()), some_tokens()).mean()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_it_begins_as_the_full_model():
    """B = 0: not one bit of the logits differs. Usual mistake: both factors random, and the start is noise."""
    full, gpt = tiny(), add_lora(tiny(), R)
    assert torch.equal(gpt(some_tokens()), full(some_tokens()))
    assert all(p.any() for name, p in gpt.named_parameters() if name.endswith(".A"))        # and not both zero: no gradient


def test_only_the_adapters_of_four_matrices_a_block_learn():
    gpt = add_lora(tiny(), R)
    shapes = {name: p.shape for name, p in gpt.named_parameters() if p.requires_grad}
    sizes = {"attn.c_attn": (10, 30), "attn.c_proj": (10, 10), "mlp.c_fc": (10, 40), "mlp.c_proj": (40, 10)}
    assert shapes == {f"h.{i}.{name}.{letter}": shape for i in range(2) for name, (n_in, n_out) in sizes.items()
                      for letter, shape in (("A", (R, n_in)), ("B", (n_out, R)))}


def test_it_is_equation_3():
    """h = W x + (α/r) B A x, row by row, with α not r. Usual mistakes: the scale forgotten, or α and r mixed up."""
    layer = moved().h[1].mlp.c_fc
    A, B_, W = layer.A, layer.B, layer.weight
    x = torch.randn(B, T, 10, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            want = W @ x[b, t] + layer.bias + 16.0 / 3 * (B_ @ (A @ x[b, t]))
            close(layer(x)[b, t], want)


def test_gradients_of_the_first_step():
    """∂/∂A passes through B = 0, so A stands still for one step; ∂/∂B does not; the base has none at all."""
    gpt = add_lora(tiny(), R)
    loss_of(gpt).backward()
    for name, p in gpt.named_parameters():
        if name.endswith(".A"):
            assert not p.grad.any(), name
        elif name.endswith(".B"):
            assert p.grad.any(dim=1).float().mean() > 0.5, name
        else:
            assert p.grad is None, name


def test_the_base_keeps_every_bit_while_the_adapters_learn():
    """With the optimisers that training uses. Usual mistake: weight decay, which also shrinks what has no gradient."""
    gpt, base = add_lora(tiny(torch.float32), R), tiny(torch.float32).state_dict()
    both, before = training.muon_and_adamw(gpt, 0.02, 0.02, 0.1), loss_of(gpt).item()
    for _ in range(7):
        loss_of(gpt).backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert loss_of(gpt).item() < before - 0.05
    assert all(torch.equal(p, base[name]) for name, p in gpt.state_dict().items() if name in base)


def test_merged_is_the_same_function_and_a_plain_gpt(tmp_path):
    gpt = moved()
    plain = merge_lora(copy.deepcopy(gpt))
    close(plain(some_tokens()), gpt(some_tokens()))
    assert [*plain.state_dict()] == [*tiny().state_dict()] and all(p.requires_grad for p in plain.parameters())
    assert plain.num_params() == tiny().num_params()
    tiny().load_state_dict(plain.state_dict())
    add_lora(plain, R)                                                              # and adapters can be added anew
    close(plain(some_tokens()), gpt(some_tokens()))
    save_gpt2(merge_lora(plain), tmp_path)
    torch.testing.assert_close(load_gpt2(tmp_path)(some_tokens()).double(), gpt(some_tokens()), rtol=0, atol=1e-4)


def test_a_twin_shares_what_is_frozen_and_nothing_else():
    """PPO's reference: the same weights, without adapters. It stays the base, bit by bit, while the policy learns, and
    costs no memory. Usual mistakes: a deepcopy (twice the memory), or what learns is shared too (the KL stays 0)."""
    base, gpt, tokens = tiny(), tiny(), some_tokens()
    reference = twin(gpt.requires_grad_(False))
    add_lora(gpt, R)
    assert {p.data_ptr() for p in reference.parameters()} == {p.data_ptr() for p in gpt.parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):          # A has no gradient before B has moved
        loss_of(gpt).backward()
        optimizer.step()
    assert torch.equal(reference(tokens), base(tokens)) and not torch.equal(gpt(tokens), base(tokens))
    slow = twin(gpt)            # PPO's EMA
    with torch.no_grad():
        gpt.h[0].mlp.c_fc.B += 1
    assert not torch.equal(slow(tokens), gpt(tokens))
    full = twin(tiny())         # without LoRA nothing is frozen: a copy
    assert not {p.data_ptr() for p in full.parameters()} & {p.data_ptr() for p in tiny().parameters()}
    assert generate(reference, [[1, 2], [3]], 5, temperature=0).responses == generate(base, [[1, 2], [3]], 5, temperature=0).responses


def test_a_file_of_adapters_loads_back():
    """On the same base the same model; and nothing of the base is in it."""
    gpt, file = moved(), io.BytesIO()
    torch.save(learnt(gpt), file)
    assert all(name.endswith((".A", ".B")) for name in learnt(gpt))
    file.seek(0)
    other = add_lora(tiny(), R)
    other.load_state_dict(other.state_dict() | torch.load(file, weights_only=True))
    assert torch.equal(other(some_tokens()), gpt(some_tokens()))
    narrow = add_lora(tiny(), R - 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        narrow.load_state_dict(narrow.state_dict() | learnt(gpt))
    with pytest.raises(RuntimeError, match="Unexpected"):
        tiny().load_state_dict(tiny().state_dict() | learnt(gpt))


def test_of_a_reward_model_what_is_not_frozen_is_kept():
    """The trunk's adapters, and head, w and zero around it: all that a file must hold to make it again."""
    def model():
        torch.manual_seed(7)
        return RewardModel(tiny(torch.float32), answer_after=4)
    one, other = model(), model()
    for reward in (one, other):
        add_lora(reward.trunk, R)
    with torch.no_grad():
        for p in one.parameters():
            p += 0.1 * p.requires_grad
        one.shift += 3
    kept = learnt(one)
    assert {name for name in kept if not name.startswith("trunk.h.")} == {"head.weight", "head.bias", "w", "shift", "answer_after"}
    other.load_state_dict(other.state_dict() | kept)
    assert torch.equal(one(some_tokens()), other(some_tokens()))


def test_copies_do_not_share_and_keep_their_adapters():
    gpt = moved()
    other = copy.deepcopy(gpt)
    assert torch.equal(gpt(some_tokens()), other(some_tokens()))
    with torch.no_grad():
        other.h[0].attn.c_attn.B.zero_()
    assert gpt.h[0].attn.c_attn.B.any() and torch.equal(gpt(some_tokens()), moved()(some_tokens()))


def test_cached_and_in_bf16_it_is_the_same_model():
    """One token at a time, and under autocast, where the weights stay fp32 and the product is bf16."""
    gpt, tokens = moved(), some_tokens()
    cache = KVCache(gpt, B, T)
    close(torch.cat([gpt(t, cache=cache) for t in tokens.split([9, 1, 1, 2], 1)], 1), gpt(tokens))
    half = moved(torch.float32, spread=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = half(tokens)
        loss_of(half).backward()
    assert got.dtype == torch.bfloat16 and half.h[0].mlp.c_fc.A.grad.dtype == torch.float32
    torch.testing.assert_close(got.float(), half(tokens), rtol=0, atol=0.1)


def test_the_seed_decides_and_rows_fill_the_rank():
    torch.manual_seed(5)
    one = add_lora(tiny(seed=5), R)
    two, other = add_lora(tiny(seed=5), R), add_lora(tiny(seed=6), R)
    one, two, other = (gpt.h[0].mlp.c_fc.A for gpt in (one, two, other))
    assert torch.equal(one, two) and not torch.equal(one, other) and torch.linalg.matrix_rank(one) == R and V > 0


# ---------------------------------------------------------------- in the three steps
@pytest.fixture(scope="module")
def lora_run(tiny_run, run, tmp_path_factory):
    """sft, reward and ppo, each with --lora-rank, from the base of `tiny_run`."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    folder.mkdir()
    for path in (*tiny_run.folder.glob("base.*"), *tiny_run.folder.glob("corpus-*"), tiny_run.folder / "tokenizer.json"):
        shutil.copy(path, folder)
    for script, flags in (("sft", tiny_run.flags), ("reward", REWARD), ("ppo", PPO)):
        done = run(script, *flags, "--lora-rank", R, "--out", folder)
        assert done.code == 0, done.out
    return folder


def stored(folder, stage):
    return torch.load(folder / f"{stage}.pt", weights_only=True)


def test_each_step_keeps_its_adapters_alone(lora_run):
    """Of the policies A and B, of PPO the last gain too, of the reward model its head; none of the base. They have learnt."""
    of_gpt = {f"h.0.{name}.{letter}" for name in MATRICES for letter in "AB"}
    assert {*stored(lora_run, "sft.lora")} == of_gpt and {*stored(lora_run, "ppo.lora")} == of_gpt | {"ln_f.weight"}
    around = {"head.weight", "head.bias", "w", "shift", "answer_after"}
    assert {*stored(lora_run, "reward.lora")} == {f"trunk.{name}" for name in of_gpt} | around
    for stage in ("sft", "reward", "ppo"):
        assert all(p.any() for name, p in stored(lora_run, f"{stage}.lora").items() if name.endswith(".B")), stage
        assert (lora_run / f"{stage}.lora.pt").stat().st_size < (lora_run / f"{stage}.pt").stat().st_size
    assert not (lora_run / "base.lora.pt").exists()


def test_a_stage_is_its_parent_and_its_adapters(lora_run):
    """Merged, it is read as a plain GPT; and the adapters put on the parent are the same model."""
    models = {stage: training.load_model(lora_run, stage)[0] for stage in ("base", "sft", "ppo")}
    for parent, stage in (("base", "sft"), ("sft", "ppo")):
        adapted = add_lora(training.load_model(lora_run, parent)[0], R)
        adapted.load_state_dict(adapted.state_dict() | stored(lora_run, f"{stage}.lora"))
        for name, p in merge_lora(adapted).state_dict().items():
            assert torch.equal(p, models[stage].state_dict()[name]), (stage, name)
        assert torch.equal(models[stage].wte.weight, models[parent].wte.weight)
        assert not torch.equal(models[stage].h[0].mlp.c_fc.weight, models[parent].h[0].mlp.c_fc.weight)
    assert not torch.equal(models["ppo"].ln_f.weight, models["sft"].ln_f.weight)
    assert {*stored(lora_run, "reward")} == {*RewardModel(models["sft"]).state_dict()}


def test_ppo_with_adapters_begins_at_the_reference(lora_run):
    """KL 0 at first, and then not: the policy has moved and the reference, which shares its weights, has not."""
    rows = [json.loads(line) for line in (lora_run / "ppo.jsonl").read_text().splitlines()]
    assert abs(rows[0]["kl"]) < 1e-5 and rows[0]["ratio_first"] < 1e-5 and rows[-1]["kl_k3"] > 1e-6


def test_policy_ema_and_reference_share_the_frozen_weights(lora_run):
    """The memory of one model, not of three. Usual mistake: the last gain, which learns, is shared as well."""
    reference = training.load_model(lora_run, "sft")[0]
    for rank in (0, R):
        parts = ppo.learners(PPOConfig(lora_rank=rank), reference, None, torch.device("cpu"))
        policy, ema, value = (parts[name] for name in ("policy", "ema", "value"))
        places = [{p.data_ptr() for name, p in gpt.named_parameters() if not name.endswith((".A", ".B"))}
                  for gpt in (reference, policy, ema)]
        shared = len(places[0]) - 1 if rank else 0          # all but the gain
        assert len(places[0] & places[1]) == len(places[0] & places[2]) == len(places[1] & places[2]) == shared
        assert value.head.weight.requires_grad and value.trunk.wte.weight.requires_grad == (not rank)
        assert any(name.endswith(".A") for name, _ in value.trunk.named_parameters()) == bool(rank)
        assert all(p.requires_grad == (not rank) for p in reference.parameters())


def test_a_killed_step_goes_on_with_its_adapters(lora_run, run, tmp_path):
    """Interrupted and started again: the adapters of the undisturbed run, bit by bit."""
    folder = shutil.copytree(lora_run, tmp_path / "run")
    flags = *PPO, "--lora-rank", R, "--out", folder
    (folder / "ppo.json").unlink()
    died = killed_at(2, "ppo", "ppo", *flags)
    assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr
    done = run("ppo", *flags)
    assert done.code == 0 and "going on after step 1" in done.out, done.out
    assert same_weights(folder, lora_run, "ppo") and same_weights(folder, lora_run, "ppo.lora")
    (folder / "ppo.state").write_bytes(b"")
    assert run("ppo", *PPO, "--lora-rank", R + 1, "--out", folder).code == 2


def test_adapters_of_an_earlier_time_do_not_stay(lora_run, run, tmp_path):
    """The stage is made anew with all its weights: what lay beside it belongs to nothing."""
    folder = shutil.copytree(lora_run, tmp_path / "run")
    done = run("ppo", *PPO, "--fresh", "--out", folder)
    assert done.code == 0 and not (folder / "ppo.lora.pt").exists() and (folder / "sft.lora.pt").exists(), done.out


def test_without_the_flag_nothing_is_frozen(tiny_run):
    assert {*stored(tiny_run.folder, "sft")} == {*stored(tiny_run.folder, "base")}
    assert not [*tiny_run.folder.glob("*.lora.pt")]
