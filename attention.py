"""Scaled dot-product attention, written out, and the masks that it takes.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V                       Vaswani et al. 2017, Eq. 1

Axes: B batch, H heads, T tokens (Tq queries, Tk keys), D head size. Masks: bool or 0/1, True = may attend."""
import math
import torch

def attention(q, k, v, mask=None, *, causal=False, flash=False):
    """Mix the values of all keys that a query may see, weighted by how well query and key agree.
    q (B,H,Tq,D); k and v (B,H,Tk,D); mask broadcastable to (B,H,Tq,Tk)  ->  (B,H,Tq,D)
    causal: no query sees a later key; the LAST sees ALL keys, as a new token does those of a cache (RECIPE A3).
    flash: the same numbers from PyTorch's fused kernel, which never stores the (Tq,Tk) weights.
    A query that may attend to nothing returns zeros and sends zero gradients (RECIPE A5)."""
    Tq, Tk = q.shape[-2], k.shape[-2]
    kernel_masks = flash and causal and mask is None and Tq == Tk  # faster than a mask tensor
    if causal and Tq > 1 and not kernel_masks:               # a single query sees all keys
        mask = causal_mask(Tq, Tk, device=q.device) & (True if mask is None else mask.bool())
    if mask is not None:
        # A softmax over -inf alone is NaN: who may see nothing is shown everything, and then gets zeros
        empty = ~mask.bool().any(-1, keepdim=True)           # (B,1,Tq,1), or what broadcasts to it
        mask = mask.bool() | empty
    if flash:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kernel_masks)
    else:
        q = q / math.sqrt(q.shape[-1])                       # here, as Tq·D is less than Tq·Tk
        # One query: q Kᵀ would transpose the whole cache in bf16, a fifth of the time of generation
        scores = q @ k.mT if Tq > 1 else (k @ q.mT).mT       # (B,H,Tq,Tk)  QKᵀ / √d_k
        if mask is not None:    # added, not filled in: a sum's gradient is free, 15 % less time in bf16
            scores += torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        weights = scores.softmax(-1)                         # (B,H,Tq,Tk)  each row sums to 1
        out = weights @ v                                    # (B,H,Tq,D)
    return out if mask is None else out.masked_fill(empty, 0)

def causal_mask(Tq, Tk, real=None, segments=None, device=None):
    """True where the key is not later than the query, the last of both being one token -> (Tq,Tk). With real
    (B,Tk): and is no pad; with segments (B,T), a number per packed document: and is in its own -> (B,1,Tq,Tk)."""
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)
    if real is not None:
        mask = mask & real.bool()[:, None, None, :]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])[:, None]
    return mask
