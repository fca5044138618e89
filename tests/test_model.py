"""What a GPT must do, and the usual mistakes: recipe rows A2 to A7 and O2 (A8: test_training.py)."""
import io
import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, KVCache, generate, sample, token_logprobs, waves

V, BLOCK, B, T = 23, 19, 3, 13


def tiny(dtype=torch.float64, spread=0.3, seed=0, **changes):
    """A small GPT with weights wide enough that its logits differ much from token to token."""
    torch.manual_seed(seed)
    config = dict(vocab_size=V, block_size=BLOCK, n_layer=2, n_head=2, n_embd=10) | changes
    gpt = GPT(GPTConfig(**config)).double()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=spread)
    return gpt.to(dtype)


def some_tokens(B=B, T=T, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the model

@pytest.mark.parametrize("flash", [False, True])
def test_the_future_cannot_be_heard(flash):
    """A2: change token t, and the logits before t keep every bit; those at t do change."""
    gpt, tokens = tiny(flash=flash), some_tokens()
    before = gpt(tokens)
    assert before.shape == (B, T, V)
    for t in range(1, T):
        changed = tokens.clone()
        changed[:, t:] = (tokens[:, t:] + 1) % V
        after = gpt(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 4, 3]], ids=["one by one", "in chunks"])
def test_cached_decoding_is_the_full_forward(flash, chunks):
    """A3: token by token through the cache gives the logits of one forward, also behind left pads.

    Usual mistakes: a causal mask aligned top-left, and positions that start again at 0.
    """
    gpt, tokens = tiny(flash=flash), some_tokens()
    mask = torch.arange(T) >= torch.tensor([[0], [2], [4]])
    for mask in (None, mask):
        cache, got = KVCache(gpt, B, T), []
        for part in tokens.split(chunks, dim=1):
            end = cache.length + part.shape[1]
            got.append(gpt(part, None if mask is None else mask[:, :end], cache=cache))
        real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(torch.cat(got, 1)[real], gpt(tokens, mask)[real],
                                   rtol=0, atol=1e-5)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("left, right", [(4, 0), (0, 4), (3, 2)])
def test_pads_on_either_side_change_nothing(flash, left, right):
    """A4: whatever the pads hold. Usual mistake: position ids that count the pads."""
    gpt, tokens = tiny(flash=flash), some_tokens()
    mask = torch.ones_like(tokens)
    want = gpt(tokens)
    for poison in (0, 7):
        padded = F.pad(tokens, (left, right), value=poison)
        got = gpt(padded, F.pad(mask, (left, right)))[:, left:left + T]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("flash", [False, True])
def test_pads_send_finite_gradients(flash):
    """A5 in the whole model: a left pad sees nobody; its NaN would reach every weight."""
    gpt = tiny(flash=flash)
    mask = torch.arange(T) >= torch.tensor([[0], [2], [T]])      # the last row holds nothing at all
    gpt(some_tokens(), mask)[mask].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in gpt.parameters())


@pytest.mark.parametrize("flash", [False, True])
def test_packed_documents_do_not_see_each_other(flash):
    """Packed rows give what the documents give alone. Usual mistake: positions that run on."""
    gpt, tokens = tiny(flash=flash), some_tokens(B=2)
    lengths = [[4, 7, 2], [1, 2, 10]]
    segments = torch.tensor([sum(([i] * n for i, n in enumerate(row)), []) for row in lengths])
    got = gpt(tokens, segments=segments)
    padded = gpt(F.pad(tokens, (2, 3)), F.pad(torch.ones_like(tokens), (2, 3)),
                 segments=F.pad(segments, (2, 3), value=-1))[:, 2:2 + T]
    for row, ns in enumerate(lengths):
        alone = [gpt(part[None])[0] for part in tokens[row].split(ns)]
        torch.testing.assert_close(got[row], torch.cat(alone), rtol=0, atol=1e-10)
        torch.testing.assert_close(padded[row], torch.cat(alone), rtol=0, atol=1e-10)


def test_gelu_is_the_tanh_form():
    """A6: GPT-2's weights need it, and erf is off by up to 5e-4 in every activation."""
    mlp = tiny(n_embd=1, n_head=1).h[0].mlp
    with torch.no_grad():
        for layer, weight in ((mlp.c_fc, 1.0), (mlp.c_proj, 0.25)):  # 4 copies, and their mean
            layer.weight.fill_(weight)
            layer.bias.zero_()
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)[:, None]
    want = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    torch.testing.assert_close(mlp(x), want, rtol=0, atol=1e-12)


def test_a_new_model_knows_nothing():
    """A7: std 0.02, residual projections 0.02/√(2L), biases 0, norms 1; so the loss is ln V."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=512, block_size=64, n_layer=3, n_head=4, n_embd=64))
    for name, p in gpt.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
    tokens = torch.randint(512, (4, 64))
    loss = -token_logprobs(gpt(tokens), tokens).mean()
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


def fresh(seed=0, **changes):
    """A new model, its weights as they are drawn."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**(dict(vocab_size=V, block_size=BLOCK, n_layer=2, n_head=1, n_embd=10) | changes)))


@pytest.mark.parametrize("C", [10, 7, 1])
def test_positions_may_start_as_waves(C):
    """wave_std · sine and cosine of t/10000^(2i/C), one by one; an odd C has one sine more. The rest is drawn as ever."""
    frequencies = [10_000 ** (-i / C) for i in range(0, C, 2)]
    want = [([math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies])[:C] for t in range(BLOCK)]
    assert waves(BLOCK, C).shape == (BLOCK, C)
    torch.testing.assert_close(waves(BLOCK, C), torch.tensor(want), rtol=0, atol=1e-5)
    with_waves, without = fresh(n_embd=C, wave_std=0.3), fresh(n_embd=C)
    torch.testing.assert_close(with_waves.wpe.weight.data, 0.3 * torch.tensor(want), rtol=0, atol=1e-5)
    assert isinstance(with_waves.wpe.weight, torch.nn.Parameter) and with_waves.wpe.weight.requires_grad
    for (name, p), q in zip(with_waves.named_parameters(), without.parameters()):
        assert torch.equal(p, q) == (name != "wpe.weight"), name


def test_with_waves_the_token_before_is_one_linear_map():
    """What the waves are for: wpe[t - 1] = A wpe[t] with one A for all t, which noise has not."""
    def misfit(table):
        now, before = table[1:], table[:-1]
        return (now @ torch.linalg.lstsq(now, before, driver="gelsd").solution - before).abs().max() / before.std()
    assert misfit(waves(64, 10).double()) < 1e-4
    assert misfit(torch.randn(64, 10, generator=seeded()).double()) > 1


def test_init_std_scales_every_matrix():
    """And by default the numbers are GPT-2's: 0.02, learned positions that start as noise."""
    assert (fresh().config.init_std, fresh().config.wave_std) == (0.02, 0)
    for (name, p), q in zip(fresh(init_std=0.08).named_parameters(), fresh().parameters()):
        torch.testing.assert_close(p, 4 * q if p.dim() == 2 else q, rtol=1e-6, atol=0, msg=name)


def test_the_head_is_tied_and_saved_once():
    """One table for both ends; a checkpoint of plain tensors. Usual mistake: saving it twice."""
    gpt = tiny(torch.float32)
    C, shapes = 10, 2 * (4 * 10 * 10 + 8 * 10 * 10)
    assert gpt.num_params() == (V + BLOCK) * C + shapes + 2 * (3 + 1 + 4 + 1) * C + 5 * 2 * C
    file = io.BytesIO()
    torch.save(gpt.state_dict(), file)
    file.seek(0)
    other = tiny(torch.float32, seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(gpt(some_tokens()), other(some_tokens()))
    assert {name.split(".")[0] for name in gpt.state_dict()} == {"wte", "wpe", "h", "ln_f"}


def test_dropout_only_while_training():
    gpt = tiny(dropout=0.5)
    tokens = some_tokens()
    assert not torch.equal(gpt(tokens), gpt(tokens))
    gpt.eval()
    assert torch.equal(gpt(tokens), gpt(tokens))


@pytest.mark.parametrize("change, message", [
    (dict(n_head=3), "multiple"), (dict(n_layer=0), "n_layer"), (dict(dropout=1.0), "dropout")])
def test_a_bad_config_is_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**change)
    assert "\n" not in str(error.value)


def test_a_context_that_does_not_fit_is_one_clear_line():
    gpt = tiny()
    with pytest.raises(ValueError, match="20 tokens .* block_size 19"):
        gpt(some_tokens(T=BLOCK + 1))
    cache = KVCache(gpt, B, 99)
    gpt(some_tokens(T=BLOCK), cache=cache)
    with pytest.raises(ValueError, match="20 tokens .* block_size 19"):
        gpt(some_tokens(T=1), cache=cache)


@pytest.mark.parametrize("route", ["autocast", "weights"])
def test_bf16_is_the_same_model(route):
    """Under autocast and with bf16 weights, cached or not; the cache then holds bf16 too."""
    tokens, want = some_tokens(), tiny(torch.float32, spread=0.1)(some_tokens())
    gpt = tiny(torch.bfloat16 if route == "weights" else torch.float32, spread=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=route == "autocast"), torch.no_grad():
        cache = KVCache(gpt, B, T)
        assert cache.k.dtype == torch.bfloat16
        stepwise = torch.cat([gpt(t, cache=cache) for t in tokens.split([9, 1, 1, 2], 1)], 1)
        full = gpt(tokens)
        result = generate(gpt, [[1, 2], [3]], 4, generator=seeded())
    torch.testing.assert_close(full.float(), want, rtol=0, atol=0.05)
    torch.testing.assert_close(stepwise.float(), want, rtol=0, atol=0.05)
    assert result.logprobs.dtype == torch.float32
    assert token_logprobs(full, tokens).dtype == torch.float32


def test_token_logprobs_are_about_the_next_token():
    """The logits at t are about token t+1. Usual mistakes: one off, and log-probs in bf16."""
    logits, tokens = torch.randn(B, T, V, dtype=torch.float64, generator=seeded()), some_tokens()
    got = token_logprobs(logits, tokens)
    for b in range(B):
        for t in range(T - 1):
            p = logits[b, t].exp() / logits[b, t].exp().sum()
            assert got[b, t].item() == pytest.approx(math.log(p[tokens[b, t + 1]]), abs=1e-12)
    half = logits.bfloat16()
    torch.testing.assert_close(token_logprobs(half, tokens), token_logprobs(half.float(), tokens))


# ---------------------------------------------------------------- sampling

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


def score(gpt, prompt, response, temperature=1.0, top_k=0, top_p=1.0):
    """The log-probs of a response by one full forward, cut and renormalised token by token."""
    logits = gpt(torch.tensor([prompt + response]))[0] / temperature
    total = []
    for t, token in enumerate(response, start=len(prompt) - 1):
        p = logits[t].softmax(-1)
        kept = p.argsort(descending=True)[:top_k or V]
        p_kept = p[kept] / p[kept].sum()
        before = p_kept.cumsum(0) - p_kept                      # the mass of the likelier ones
        kept = kept[before < top_p]
        assert token in kept
        total.append((p[token] / p[kept].sum()).log())
    return torch.stack(total)


def test_greedy_is_the_argmax_of_the_full_forward():
    """Prompts of different lengths in one batch, each continued as if it were alone."""
    gpt = tiny()
    result = generate(gpt, PROMPTS, 8, temperature=0)
    assert result.logprobs.shape == (3, 8) and not result.logprobs.any()  # certain: log 1
    for prompt, response in zip(PROMPTS, result.responses):
        ids = list(prompt)
        for _ in range(8):
            ids.append(gpt(torch.tensor([ids]))[0, -1].argmax().item())
        assert response == ids[len(prompt):]


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.7), dict(top_k=3), dict(top_p=0.6),
                                 dict(temperature=1.5, top_k=7, top_p=0.8)], ids=str)
def test_sampled_is_scored(how):
    """O2: the log-prob logged while sampling is that of the scoring forward, within 1e-4 in fp32.

    Usual mistakes: top-k or top-p scored on the full softmax, the temperature forgotten, dropout
    left on. The importance ratio of PPO cannot see it: both its sides are recomputed.
    """
    gpt = tiny(torch.float32, dropout=0.2)
    result = generate(gpt, PROMPTS * 4, 9, generator=seeded(), **how)
    assert gpt.training                                          # and it is given back as it was
    gpt.eval()
    for prompt, response, logprobs in zip(PROMPTS * 4, result.responses, result.logprobs):
        torch.testing.assert_close(logprobs, score(gpt, prompt, response, **how), rtol=0, atol=1e-4)
        if not how:
            tokens = torch.tensor([prompt + response])
            rescored = token_logprobs(gpt(tokens), tokens)[0, len(prompt) - 1:]
            torch.testing.assert_close(logprobs, rescored, rtol=0, atol=1e-4)


def test_samples_follow_the_distribution():
    """Of 20,000 samples each token has its share, within five standard deviations."""
    n, logits = 20_000, torch.randn(V, generator=seeded()) * 2
    for top_k, top_p in [(0, 1.0), (4, 1.0), (0, 0.5)]:
        u = torch.rand(n, generator=seeded(1))
        token, logprob = sample(logits.expand(n, V), u, 0.8, top_k, top_p)
        share = token.bincount(minlength=V) / n
        p = torch.zeros(V)
        p[token] = logprob.exp()                                 # what it says that it drew from
        assert p.sum().item() == pytest.approx(1, abs=1e-5 if top_k or top_p < 1 else 2e-3)
        assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-3).all()
        full = (logits / 0.8).softmax(-1)
        torch.testing.assert_close(p[p > 0] / p.max(), full[p > 0] / full.max(), rtol=1e-4, atol=0)


def test_no_impossible_token_is_drawn():
    """u = 0 and u just below 1 give the first and the last POSSIBLE token, ties are cut at k.

    Usual mistakes: searchsorted from the left, which takes a leading token of probability zero,
    and a last sum below u, so that the token is V.
    """
    zero, one = torch.zeros(1), torch.ones(1).nextafter(torch.zeros(1))
    g = seeded()
    for _ in range(200):
        logits = torch.randn(1, V, generator=g)
        logits[0, :2] = logits[0, 7:9] = logits[0, -2:] = -torch.inf
        assert sample(logits, zero, 1.0, 0, 1.0)[0].item() == 2
        assert sample(logits, one, 1.0, 0, 1.0)[0].item() == V - 3
    flat, u = torch.zeros(64, V), torch.linspace(0, one.item(), 64)
    for how, kept in [((1.0, 4, 1.0), 4), ((1.0, 0, 0.5), math.ceil(V / 2)), ((1.0, 0, 1e-9), 1)]:
        token, logprob = sample(flat, u, *how)
        assert len(token.unique()) == kept
        torch.testing.assert_close(logprob, torch.full((64,), -math.log(kept)), rtol=0, atol=1e-5)


def with_ends(**kwargs):
    """24 samples of a model that likes token 0: with eos=0 they end at different times."""
    gpt = tiny()
    with torch.no_grad():
        w = gpt.wte.weight[0]
        gpt.ln_f.bias += w / w.dot(w)                            # its logit rises by 1
    return generate(gpt, PROMPTS * 8, 12, generator=seeded(), **kwargs)


def test_a_response_ends_with_its_eos():
    """EOS belongs to the response, once, at its end, and has a log-prob; after it come zeros.

    A row's tokens do not depend on when the others end: without eos, the same ones come.
    Usual mistake: dropping EOS, so that PPO cannot learn when to stop.
    """
    free, result = with_ends(), with_ends(eos=0)
    lengths = [len(r) for r in result.responses]
    assert len(set(lengths)) > 4 and min(lengths) < 4            # rows left at different times
    assert result.logprobs.shape == (24, max(lengths))
    for response, logprobs, unended, theirs in zip(result.responses, result.logprobs,
                                                   free.responses, free.logprobs):
        n = len(response)
        assert 0 not in response[:-1]
        assert response[-1] == 0 or n == 12
        assert response == unended[:n]
        torch.testing.assert_close(logprobs[:n], theirs[:n], rtol=0, atol=1e-6)
        assert (logprobs[:n] < 0).all() and not logprobs[n:].any()


def test_a_response_ends_where_the_context_does():
    """Prompt and response share block_size, whatever the longer prompts beside it."""
    gpt = tiny()
    prompts = [[1] * n for n in (1, 7, BLOCK - 1, BLOCK)]
    result = generate(gpt, prompts, 99, temperature=0)
    assert [len(r) for r in result.responses] == [BLOCK - 1, BLOCK - 7, 1, 0]
    assert result.responses[0] == generate(gpt, prompts[:1], 99, temperature=0).responses[0]
    with pytest.raises(ValueError, match="prompt of 20 tokens .* block_size 19"):
        generate(gpt, [[1] * (BLOCK + 1)], 1)
    assert generate(gpt, [[1]], 0).responses == [[]]


def test_a_row_is_continued_as_if_it_were_alone():
    """With its own random numbers a row samples the same in a batch and by itself."""
    gpt, n = tiny(), 9
    batch = generate(gpt, PROMPTS, n, generator=seeded())
    uniform = torch.rand(n, len(PROMPTS), generator=seeded())
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for step in range(n):
            logits = gpt(torch.tensor([ids]))[:, -1]
            ids.append(sample(logits, uniform[step, row:row + 1], 1.0, 0, 1.0)[0].item())
        assert batch.responses[row] == ids[len(prompt):]


def test_the_seed_decides():
    gpt = tiny()
    one, same, other = (generate(gpt, PROMPTS, 9, generator=seeded(s)) for s in (0, 0, 1))
    assert one.responses == same.responses and torch.equal(one.logprobs, same.logprobs)
    assert one.responses != other.responses


def test_streaming_hears_every_token():
    """on_token gets the B new ids of each step, None where a response has ended."""
    heard = []
    result = with_ends(eos=0, on_token=heard.append)
    assert all(len(step) == 24 for step in heard)
    assert [[t for t in row if t is not None] for row in zip(*heard)] == result.responses


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_an_empty_prompt_is_an_error(prompts):
    """There is nothing to condition on. Usual mistake: a row of pads that answers anyway."""
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny(), prompts, 3)


@pytest.mark.parametrize("how", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0),
                                 dict(top_p=1.1)], ids=str)
def test_impossible_settings_are_an_error(how):
    with pytest.raises(ValueError, match="temperature"):
        generate(tiny(), [[1]], 3, **how)


def test_logprobs_can_be_used_in_a_loss():
    """They are ordinary tensors. Usual mistake: inference tensors, which autograd will not save."""
    gpt = tiny(torch.float32)
    logprobs = generate(gpt, [[1, 2]], 3, generator=seeded()).logprobs
    (torch.ones(3, requires_grad=True) * logprobs).sum().backward()
