"""A GPT in one file: GPT-2 (Radford et al. 2019), and its published weights; KV cache, sampling; LoRA.

Axes: B batch, T tokens (P of a prompt, R of a response), V vocabulary, C channels, H heads, D = C/H, L layers"""
import collections, copy, json, math
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from config import UserError
from attention import attention, causal_mask

@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int            # V
    block_size: int            # the longest context, in tokens
    n_layer: int               # L
    n_head: int                # H
    n_embd: int                # C
    dropout: float = 0.0       # of the embedding and of what each block adds to the residual stream
    flash: bool | None = None  # attention by PyTorch's fused kernel; None: see `by_hand_is_faster`
    init_std: float = 0.02     # of matrices and embeddings; GPT-2's. It suits C = 768, a small C needs more
    wave_std: float = 0.0      # above 0, positions start as sinusoids of this amplitude, not as noise

    def __post_init__(self):
        sizes = self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd
        if min(sizes) < 1 or self.n_embd % self.n_head or not 0 <= self.dropout < 1:
            raise ValueError(f"needed: sizes >= 1, n_embd a multiple of n_head, 0 <= dropout < 1; not {self}")

def by_hand_is_faster(q):
    """q (B,H,Tq,D) -> whether the written-out attention beats the fused kernel here, as measured."""
    # On a CPU it does in bf16 up to T = 512 (T = 256, forward + backward: 11 ms against 25 without AMX, 10
    # against 19 with), and in decoding from B = 16 on (B = 64: 7 % more tokens/s in fp32, 40 % in bf16).
    B, _, Tq, _ = q.shape
    return q.device.type == "cpu" and (B >= 16 if Tq == 1 else q.dtype == torch.bfloat16 and Tq <= 512)

class Linear(nn.Linear):
    """W x + b; after `add_lora` W (out,in) is frozen, and A (r,in) and B (out,r) learn."""
    scale = 0.0                                                     # α/r; 0: without A and B

    def forward(self, x):                                           # (...,in) -> (...,out)
        y = super().forward(x)                  # W x + b + (α/r) B A x                     Hu et al. 2021, Eq. 3
        return y + self.scale * F.linear(F.linear(x, self.A), self.B) if self.scale else y

class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.flash = config.n_head, config.flash
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)   # q, k and v in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, causal, cache, layer):               # x (B,T,C)
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for part in self.c_attn(x).chunk(3, dim=-1))     # 3 times (B,H,T,D)
        if cache is not None:
            k, v = cache.append(layer, k, v)                        # (B,H,Tk,D): all tokens so far
        flash = not by_hand_is_faster(q) if self.flash is None else self.flash
        y = attention(q, k, v, mask, causal=causal, flash=flash)    # (B,H,T,D)
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))      # (B,T,C)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(collections.OrderedDict(   # GELU's tanh form, as in GPT-2 (RECIPE A6)
            c_fc=Linear(C, 4 * C), gelu=nn.GELU(approximate="tanh"),                 # (B,T,4C)
            c_proj=Linear(4 * C, C), dropout=nn.Dropout(config.dropout)))            # (B,T,C)

    def forward(self, x, mask, causal, cache, layer):               # x (B,T,C)
        # Pre-norm: the stream x itself is never normalised, so gradients pass it unhindered.
        x = x + self.attn(self.ln_1(x), mask, causal, cache, layer)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)   # also the unembedding
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                residual = name.endswith("c_proj.weight")   # 2L of them: so their sum keeps its size (RECIPE A7)
                nn.init.normal_(p, std=config.init_std / math.sqrt(2 * config.n_layer if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if config.wave_std:
            # "The token before" is then one linear map everywhere: the first layer finds it much sooner.
            self.wpe.weight.data = config.wave_std * waves(config.block_size, config.n_embd)

    def num_params(self):
        """The number of parameters; the tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens, mask=None, **where):
        """tokens (B,T) int64, mask (B,T), `where` as for `hidden`  ->  logits (B,T,V), always."""
        return self.unembed(self.hidden(tokens, mask, **where))

    def unembed(self, x):
        """(...,C) -> logits (...,V), by the embedding itself: the head is tied."""
        return F.linear(x, self.wte.weight)

    def hidden(self, tokens, mask=None, *, positions=None, segments=None, cache=None):
        """The trunk: tokens (B,T) int64 -> (B,T,C), normalised, for a head. ValueError beyond block_size.
        mask (B,T): True at real tokens; pads, on either side, are seen by nobody, and come out as anything.
        positions (B,T): rows of wpe; by default the number of real tokens before, in the same segment.
        segments (B,T): a number per packed document; they do not see each other. Not with a cache.
        cache: a KVCache; `tokens` follow those that it holds, and `mask` covers both, (B,Tk)."""
        T, past = tokens.shape[1], 0 if cache is None else cache.length
        # With a mask or positions given, pads may make the cache wider than the context.
        context = past + T if mask is None and positions is None else T
        if context > self.config.block_size:
            raise ValueError(f"{context} tokens do not fit block_size {self.config.block_size}")
        if positions is None:
            positions = token_positions(past + T, mask, segments, tokens.device)[:, past:]
        causal = mask is None and segments is None      # else a mask tensor, (B,1,T,Tk): one for all layers
        allowed = None if causal else causal_mask(T, past + T, mask, segments, tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))       # (B,T,C)
        for layer, block in enumerate(self.h):
            x = block(x, allowed, causal, cache, layer)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

def waves(T, C):
    """(T,C): sines and cosines of the position, wavelengths 2π to 20,000π. Vaswani et al. 2017, 3.5"""
    angles = torch.arange(T)[:, None] * 10_000 ** (-torch.arange(0, C, 2) / C)      # (T, ceil(C/2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :C]

def token_positions(T, mask, segments, device):
    """(B,T), or (1,T) where all rows agree: how many real tokens of its segment precede a token."""
    before = torch.arange(T, device=device)[None] if mask is None else mask.long().cumsum(1) - mask.long()
    if segments is None:
        return before
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))     # (B,T) True where one begins
    return before - (before * starts).cummax(1).values

def token_logprobs(logits, tokens):
    """log π(token | what stands before it): logits (B,T,V), tokens (B,T) -> (B,T-1), >= fp32."""
    at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
    logprobs = logits[:, :-1].log_softmax(-1, dtype=at_least_fp32)  # (B,T-1,V)
    return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)     # logits at t are about t+1

class KVCache:
    """The keys and values of all tokens so far: a new token costs one token's work. Not for gradients."""
    def __init__(self, gpt, batch, capacity):
        c, weight = gpt.config, gpt.wte.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        shape = c.n_layer, batch, c.n_head, capacity, c.n_embd // c.n_head          # (L,B,H,capacity,D)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=weight.device) for _ in range(2))
        self.length = 0                                             # tokens held by every row

    def append(self, layer, k, v):
        """k, v (B,H,T,D) of the new tokens -> those of all tokens, (B,H,length+T,D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows):
        """Drop all rows of the batch but these (int64), in place."""
        for x in (*self.k, *self.v):                                # layer by layer, to copy little at once
            x[:len(rows), :, :self.length] = x[rows, :, :self.length]
        self.k, self.v = self.k[:, :len(rows)], self.v[:, :len(rows)]

# lists of the sampled ids, EOS included where it was drawn; (B,R) their log-probs, fp32, zeros after the end
Generation = collections.namedtuple("Generation", "responses logprobs")

def generate(gpt, prompts, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, eos=None, generator=None,
             on_token=None):
    """Continue prompts (lists of ids, any lengths) by at most max_new_tokens -> Generation, or ValueError.
    top_k > 0 keeps the k likeliest tokens, top_p < 1 then the fewest of these that hold so much probability;
    temperature 0 is greedy. A response ends with `eos`, or where it and its prompt fill block_size. Log-probs are
    those drawn from: after temperature, top_k, top_p (RECIPE O2; greedy: zeros). generator: same seed, same result
    for a row whenever others end. on_token: called at each step with the B new ids, None for an ended response."""
    sizes, block_size = [len(p) for p in prompts], gpt.config.block_size
    if not prompts or min(sizes) == 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("generate needs at least one token a prompt, temperature and top_k >= 0, 0 < top_p <= 1")
    if max(sizes) > block_size:
        raise ValueError(f"a prompt of {max(sizes)} tokens does not fit block_size {block_size}")
    device = gpt.wte.weight.device
    shape = max(0, min(max_new_tokens, block_size - min(sizes))), len(prompts)      # (R,B)
    # All random numbers at once, so that nothing that happens on the way can shift them.
    uniform = torch.rand(shape, generator=generator, device=generator.device if generator else device).to(device)
    training = gpt.training
    gpt.eval()
    try:
        tokens, logprobs, lengths = decode(gpt, prompts, uniform, (temperature, top_k, top_p), eos, on_token)
    finally:
        gpt.train(training)
    responses = [row[:n] for row, n in zip(tokens.tolist(), lengths)]
    return Generation(responses, logprobs[:, :max(lengths)].clone())    # an inference tensor serves no loss

@torch.inference_mode()
def decode(gpt, prompts, uniform, how, eos, on_token):
    """The loop of `generate`: uniform (R,B) in [0,1) -> tokens (B,R), log-probs (B,R), each one's length."""
    (steps, B), device, block_size = uniform.shape, uniform.device, gpt.config.block_size
    tokens = torch.zeros(B, steps, dtype=torch.long, device=device)
    logprobs, P = torch.zeros(B, steps, device=device), max(len(p) for p in prompts)
    # Pads stand on the left, so that the last token of every row is in the same column.
    new = torch.tensor([[0] * (P - len(p)) + list(p) for p in prompts], device=device)  # (B,P)
    pads = torch.tensor([P - len(p) for p in prompts], device=device)                   # (B,)
    columns = torch.arange(P + steps, device=device)
    mask = columns >= pads[:, None] if pads.any() else None                             # (B,P+R)
    length = torch.zeros(B, dtype=torch.long, device=device)
    rows = torch.arange(B, device=device)               # the prompts that are still in the batch
    alive = pads > P - block_size                       # those of them that still answer
    cache = KVCache(gpt, B, P + steps)
    for step in range(steps):
        T = P + step
        positions = (columns[cache.length:T] - pads[:, None]).clamp(0, block_size - 1)  # for ended rows, too
        x = gpt.hidden(new, None if mask is None else mask[:, :T], positions=positions, cache=cache)
        token, logprob = sample(gpt.unembed(x[:, -1]), uniform[step, rows], *how)       # (B,) (B,)
        tokens[rows, step], logprobs[rows, step] = token, logprob * alive
        length[rows] += alive
        if on_token is not None:
            heard = dict(zip(rows[alive].tolist(), token[alive].tolist()))
            on_token([heard.get(row) for row in range(B)])
        alive = alive & (token != (-1 if eos is None else eos)) & (pads > T + 1 - block_size)   # eos, or no room
        left = int(alive.sum())
        if left == 0:
            break
        # Dropping ended rows: 2 to 3 times faster where most are short; before ¾ the copying takes the gain.
        if left <= len(rows) * 3 // 4:
            keep = alive.nonzero().squeeze(1)
            cache.keep(keep)
            rows, pads, alive, token = rows[keep], pads[keep], alive[keep], token[keep]
            mask = None if mask is None else mask[keep]
        new = token[:, None]
    return tokens, logprobs, length.tolist()

def sample(logits, uniform, temperature, top_k, top_p):
    """One token a row: logits (B,V), uniform (B,) in [0,1) -> tokens (B,), log-probs (B,) fp32."""
    # Inverse transform: the first token at which the cumulated probability passes u, a number of ours.
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    V, order = logits.shape[-1], None
    if 0 < top_k < V or top_p < 1:
        logits, order = logits.topk(min(top_k or V, V))             # (B,k), the likeliest first
    probs = (logits.float() / temperature).softmax(-1)              # (B,V), or (B,k)
    if top_p < 1:
        probs = probs * (probs.cumsum(-1) - probs < top_p)          # the one that crosses stays
    cumulated = probs.cumsum(-1)
    total = cumulated[:, -1:]                                       # 1, but for rounding and top_p
    # "Passes" is >, so never at probability zero; u <= 1 - 2**-24 keeps u · total < total: there always is one.
    token = torch.searchsorted(cumulated, uniform[:, None] * total, right=True)     # (B,1)
    logprob = (probs.gather(-1, token) / total).log().squeeze(-1)
    return (token if order is None else order.gather(-1, token)).squeeze(-1), logprob

def add_lora(gpt, rank, alpha=16.0):
    """Freezes the GPT in place; A and B of its blocks' matrices learn, B from 0. Rank 0: nothing at all. -> gpt"""
    if rank:
        gpt.requires_grad_(False)
        for layer in [m for m in gpt.modules() if isinstance(m, Linear)]:
            W, layer.scale = layer.weight, alpha / rank
            layer.A = nn.Parameter(W.new_empty(rank, W.shape[1]).normal_(std=W.shape[1] ** -0.5))
            layer.B = nn.Parameter(W.new_zeros(W.shape[0], rank))
    return gpt

@torch.no_grad()
def merge_lora(gpt):
    """W becomes W + (α/r) B A, and the adapters go, in place: a plain GPT again, and all may learn. -> gpt"""
    for layer in [m for m in gpt.modules() if isinstance(m, Linear) and m.scale]:
        layer.weight = nn.Parameter(layer.weight + layer.scale * layer.B @ layer.A)
        del layer.A, layer.B, layer.scale
    return gpt.requires_grad_()

def learnt(model):
    """Its state without what is frozen: with adapters, kilobytes."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}

def twin(model):
    """A copy that shares what is frozen."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})

# ------------------------------------------------------------------------ GPT-2's published weights
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TRANSPOSED = "c_attn.weight", "c_proj.weight", "c_fc.weight"        # published as (in,out)

def read_gpt2(path, vocab_size):
    """A .safetensors file -> {name: fp32 tensor}, each as our GPT has it. ValueError says what is wrong."""
    with open(path, "rb") as file:              # a header's size, the header, then the tensors without gaps
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n) if n <= 100_000_000 else "")           # the format's own limit
    header.pop("__metadata__", None)
    rows, found = sorted((*entry["data_offsets"], name) for name, entry in header.items()), {}
    if [0, *(end for _, end, _ in rows)] != [*(row[0] for row in rows), path.stat().st_size - 8 - n]:
        raise ValueError(f"{path.name} is cut off, or its offsets are wrong")
    for begin, end, name in sorted(rows, key=lambda row: row[0] - row[1]):      # wte, the largest, is first
        dtype, shape = DTYPES.get(header[name]["dtype"]), header[name]["shape"]
        if name.endswith((".attn.bias", ".attn.masked_bias")):                  # the causal mask
            continue
        if not dtype or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is {header[name]}; needed: {', '.join(DTYPES)}")
        # Not mapped: until it is copied a map counts too, and the weights would be there twice.
        x = torch.from_numpy(np.fromfile(path, np.uint8, end - begin, offset=8 + n + begin))
        x, name = x.view(dtype).view(shape).float(), name.removeprefix("transformer.")
        if name == "wte.weight" and len(x) < vocab_size:
            # The mean: no context prefers a new token (Hewitt 2021). Noise: also frozen, they differ.
            x = torch.cat([x, x.mean(0) + 0.02 * torch.randn(vocab_size - len(x), *x.shape[1:])])
        found[name] = x.movedim(0, -1).contiguous() if name.endswith(TRANSPOSED) else x
    return found

def load_gpt2(path, vocab_size=0):
    """GPT-2 as published, a .safetensors file, its index, or their folder -> GPT. Nothing in it is executed.
    n_head is config.json's where one is there, else C / 64. The embedding gets rows up to vocab_size; the old
    ones stay. OSError, or UserError: one line that names, say, the tensor that is missing or misshapen."""
    path = Path(path)
    path = min(path.glob("model.safetensors*"), default=path / "model.safetensors") if path.is_dir() else path
    found, config = {}, path.with_name("config.json")
    try:
        index = json.loads(path.read_bytes())["weight_map"] if path.suffix == ".json" else {"all": path.name}
        for file in {*index.values()}:
            found |= read_gpt2(path.with_name(file), vocab_size)
        wte, T, C = found["wte.weight"], len(found["wpe.weight"]), len(found["ln_f.weight"])
        L = len({name.split(".")[1] for name in found if name.startswith("h.")})
        n_head = json.loads(config.read_bytes())["n_head"] if config.exists() else C // 64
        with torch.device("meta"):              # shapes alone: nothing is drawn
            gpt = GPT(GPTConfig(len(wte), T, L, n_head, C))
        if not torch.equal(head := found.pop("lm_head.weight", wte), wte[:len(head)]):
            raise ValueError("lm_head.weight is not wte.weight, as it is in GPT-2")
        gpt.load_state_dict(found, assign=True)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is damaged, or not GPT-2's. {said:.300}") from None
    return gpt

def save_gpt2(gpt, path):
    """Writes a folder as GPT-2 is published: model.safetensors, fp32, and config.json."""
    c, folder, header, at = gpt.config, Path(path), {"__metadata__": {"format": "pt"}}, 0
    weights = gpt.state_dict()
    for name, p in weights.items():
        weights[name] = p = p.t() if name.endswith(TRANSPOSED) else p
        header[name] = {"dtype": "F32", "shape": [*p.shape], "data_offsets": [at, at := at + 4 * p.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                 # so that the tensors are aligned
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for p in weights.values():
            file.write(p.float().cpu().contiguous().numpy())
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, n_positions=c.block_size, vocab_size=c.vocab_size, activation_function="gelu_new")))
