"""What attention must do, and the usual mistakes: recipe rows A1, A2, A3, A5.

Every axis has a prime size of its own, so that no two can be confused without an error.
"""
import math

import pytest
import torch

from attention import attention, causal_mask

B, H, D, T, LONGER = 2, 3, 5, 7, 11
PATHS = pytest.mark.parametrize("flash", [False, True], ids=["by hand", "flash"])

REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])          # pads on either side
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
DEAF = torch.ones(T, LONGER, dtype=torch.bool)
DEAF[3] = False                                                              # query 3 sees nothing

# kind: (number of keys, mask, causal)
KINDS = {
    "no mask": (LONGER, None, False),
    "causal": (T, None, True),
    "causal, fewer queries than keys": (LONGER, None, True),
    "causal, more queries than keys": (5, None, True),
    "padding": (T, REAL.bool()[:, None, None], False),
    "padding and causal": (T, REAL.bool()[:, None, None], True),     # has empty rows: the left pads
    "segments and causal": (T, causal_mask(T, T, segments=SEGMENTS), True),
    "all joined": (T, causal_mask(T, T, REAL, SEGMENTS), False),
    "an empty row": (LONGER, DEAF, False),
    "numbers instead of bools": (T, REAL[:, None, None], False),
}


def qkv(Tk, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
            for n in (T, Tk, Tk)]


def triple_loop(q, k, v, mask, causal):
    """Attention as one would explain it: every query on its own, over the keys that it may see."""
    Tk = k.shape[2]
    allowed = torch.ones(B, H, T, Tk) if mask is None else mask.expand(B, H, T, Tk)
    rows = []
    for b in range(B):
        for h in range(H):
            for i in range(T):
                seen = [j for j in range(Tk)
                        if allowed[b, h, i, j] and not (causal and j > i + Tk - T)]
                if not seen:
                    rows.append(torch.zeros(D, dtype=q.dtype))
                    continue
                scores = (k[b, h, seen] * q[b, h, i]).sum(-1) / math.sqrt(D)
                weights = scores.exp() / scores.exp().sum()
                rows.append((weights[:, None] * v[b, h, seen]).sum(0))
    return torch.stack(rows).view(B, H, T, D)


@PATHS
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_the_triple_loop(kind, flash):
    """A1, A2, A3, A5 at once: output and all three gradients of each kind of mask, in float64."""
    Tk, mask, causal = KINDS[kind]
    inputs = qkv(Tk)
    want = triple_loop(*inputs, mask, causal)
    got = attention(*inputs, mask, causal=causal, flash=flash)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)

    upstream = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(1)).double()
    grads = zip("qkv", torch.autograd.grad(got, inputs, upstream),
                torch.autograd.grad(want, inputs, upstream, materialize_grads=True))
    for name, ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=lambda m: f"d{name}: {m}")



@PATHS
def test_scores_are_divided_by_the_root_of_the_head_size(flash):
    """A1, on paper: q·k = √d ln 3 for one key and 0 for the other gives weights 3/4 and 1/4.

    Usual mistake: √n_embd instead of √d_head, or no scale at all.
    """
    heads, d = 3, 16
    q = torch.zeros(1, heads, 1, d)
    q[..., 0] = math.sqrt(d) * math.log(3)
    k, v = torch.zeros(1, heads, 2, d), torch.zeros(1, heads, 2, d)
    k[:, :, 0, 0] = v[:, :, 0, 0] = 1
    out = attention(q, k, v, flash=flash)[0, :, 0, 0]
    assert out.tolist() == pytest.approx([0.75] * heads, abs=1e-6)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_future_cannot_be_heard(flash, dtype):
    """A2: change the keys and values from position t on, and earlier outputs keep every bit.

    Usual mistake: the mask on the wrong axis, or off by one.
    """
    q, k, v = qkv(T, dtype)
    before = attention(q, k, v, causal=True, flash=flash)
    for t in range(1, T):
        k2, v2 = k.detach().clone(), v.detach().clone()
        k2[:, :, t:], v2[:, :, t:] = 3, -2
        after = attention(q, k2, v2, causal=True, flash=flash)
        assert torch.equal(before[:, :, :t], after[:, :, :t])
        assert not torch.equal(before[:, :, t], after[:, :, t])  # the present is heard


@PATHS
def test_a_new_token_sees_the_whole_cache(flash):
    """A3: the last query of a causal mask sees ALL keys, however many queries there are.

    Usual mistake: PyTorch's is_causal=True aligns top-left, so one new token sees key 0 only.
    """
    q, k, v = qkv(LONGER)
    everything = attention(q, k, v, flash=flash)
    one = attention(q[:, :, -1:], k, v, causal=True, flash=flash)
    several = attention(q, k, v, causal=True, flash=flash)
    torch.testing.assert_close(one, everything[:, :, -1:])
    torch.testing.assert_close(several[:, :, -1:], everything[:, :, -1:])


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gives_zeros(flash, dtype):
    """A5: zeros forward, zeros backward, and nothing of it reaches the other rows.

    Usual mistake: the softmax over all -inf gives NaN, and one NaN gradient ends the training.
    """
    q, k, v = qkv(LONGER, dtype)
    out = attention(q, k, v, DEAF, flash=flash)
    assert torch.equal(out[:, :, 3], torch.zeros(B, H, D, dtype=dtype))
    assert out[:, :, [0, 1, 2, 4, 5, 6]].abs().min() > 0
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(grad).all() for grad in (dq, dk, dv))
    assert not dq[:, :, 3].any()

    dk, dv = torch.autograd.grad(attention(q, k, v, DEAF, flash=flash)[:, :, 3].sum(), (k, v))
    assert not dk.any() and not dv.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_flash_is_the_same_function(kind, dtype, atol):
    """The fast path computes the readable one. Usual mistake: a second path that no test runs."""
    Tk, mask, causal = KINDS[kind]
    q, k, v = qkv(Tk, dtype)
    torch.testing.assert_close(attention(q, k, v, mask, causal=causal, flash=True),
                               attention(q, k, v, mask, causal=causal), rtol=0, atol=atol)


def test_masks_say_who_sees_whom():
    """Rows are queries, columns keys. Usual mistake: the transposed mask, which sees the future."""
    assert causal_mask(3, 3).long().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 4).long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(3, 3, segments=torch.tensor([[5, 5, 2]]))[0, 0].long().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert causal_mask(2, 3, torch.tensor([[0, 1, 1]]))[0, 0].long().tolist() == [[0, 1, 0], [0, 1, 1]]
    both = causal_mask(3, 3, torch.tensor([[1, 1, 0]]), torch.tensor([[5, 2, 2]]))
    assert both.dtype == torch.bool and both[0, 0].long().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
