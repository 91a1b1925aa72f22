"""The GPT: its configuration, blocks, loss, and `generate` with a KV cache.

Two presets, every part of which can be overridden:
- arch='gpt2': LayerNorm, learned positions, GELU, tied head: OpenAI's GPT-2 (Radford et al. 2019), weights in and out.
- arch='modern' (default): RMSNorm before and RoPE in attention, QK-norm, grouped-query attention, SwiGLU, no biases,
  zero-initialised output projections: the Qwen3 architecture (Qwen team 2025), so that common runtimes load it.

lyregpt/pretrained.py takes the weights of either from Hugging Face's files; lyregpt/export.py is the way back. examples/seq2seq/encoder_decoder.py builds the original
Transformer of the same parts.

Shapes in comments: B sequences, T tokens each, C = n_embd, H heads of D = head_dim (mostly C / H), V the vocabulary.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from lyregpt.device import fast_int8, is_sharded, put

PRESETS: dict[str, dict[str, Any]] = {
    'gpt2': dict(
        bias=True, position='learned', norm='layernorm', mlp='gelu', qk_norm=False, tie_weights=True
    ),
    'modern': dict(
        bias=False, position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, tie_weights=False
    ),
}
NANOGPT_KEYS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


@dataclass
class GPTConfig:
    """The model's shape. None means what the preset `arch` says. Raises ValueError, with the field's name, for a bad value."""

    block_size: int = 1024  # tokens of context
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool | None = None  # biases in linear layers and LayerNorms
    arch: str = (
        'gpt2'  # nanoGPT's checkpoints name none, so here it is the default; train.py's is modern
    )
    n_kv_head: int | None = (
        None  # key and value heads, shared by n_head / n_kv_head query heads each; None: n_head
    )
    n_ff: int | None = (
        None  # width inside the MLP; None: 4 C, or 8/3 C rounded up to a multiple of 32 for swiglu
    )
    position: str | None = (
        None  # learned, rope (Su et al. 2021) or sinusoidal (Vaswani et al. 2017)
    )
    norm: str | None = None  # layernorm or rmsnorm (Zhang and Sennrich 2019)
    mlp: str | None = (
        None  # gelu, swiglu (Shazeer 2020), relu (Vaswani et al. 2017) or relu2 (So et al. 2021)
    )
    qk_norm: bool | None = (
        None  # normalize queries and keys (Henry et al. 2020): steady at high learning rates
    )
    tie_weights: bool | None = None  # one matrix for embedding and head (Press and Wolf 2017)
    rope_theta: float = 10000.0
    head_dim: int | None = None  # width of a head; None: n_embd / n_head

    def __post_init__(self) -> None:
        if self.arch not in PRESETS:
            raise ValueError(f'arch={self.arch}: expected one of {", ".join(PRESETS)}')
        for key, value in PRESETS[self.arch].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: expected at least 1')
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(
                    f'n_head={self.n_head} does not divide n_embd={self.n_embd}: every head takes an equal share of the width'
                )
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim < 1:
            raise ValueError(f'head_dim={self.head_dim}: expected at least 1')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}')
        if self.n_ff is None:
            self.n_ff = (
                32 * math.ceil(self.n_embd * 8 / 3 / 32)
                if self.mlp == 'swiglu'
                else 4 * self.n_embd
            )
        if self.n_ff < 1:
            raise ValueError(f'n_ff={self.n_ff}: expected at least 1')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: expected a share from 0 to below 1')
        for key, known in (
            ('position', ('learned', 'rope', 'sinusoidal')),
            ('norm', ('layernorm', 'rmsnorm')),
            ('mlp', ('gelu', 'swiglu', 'relu', 'relu2')),
        ):
            if getattr(self, key) not in known:
                raise ValueError(f'{key}={getattr(self, key)}: expected one of {", ".join(known)}')
        if self.position == 'rope' and self.head_dim % 2:
            raise ValueError(
                f'head_dim={self.head_dim} (n_embd / n_head, if not given): RoPE turns pairs, so it must be even'
            )

    def to_dict(self) -> dict[str, Any]:
        """The arguments that rebuild this config; for plain GPT-2 exactly nanoGPT's seven, so that nanoGPT can read them."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        nanogpt = {k: whole[k] for k in NANOGPT_KEYS}
        return nanogpt if GPTConfig(**nanogpt) == self else whole


# -----------------------------------------------------------------------------
# Blocks


class LayerNorm(nn.Module):
    """LayerNorm whose bias can be left out."""

    def __init__(self, dim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, dim) → the same shape (Ba et al. 2016)."""
        return F.layer_norm(
            x,
            self.weight.shape,
            self.weight.type_as(x),
            None if self.bias is None else self.bias.type_as(x),
            1e-5,
        )


class RMSNorm(nn.Module):
    """x / rms(x) · weight, over the last dimension."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, dim) → the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), 1e-6)


def make_norm(config: GPTConfig, dim: int) -> nn.Module:
    """The norm over `dim` features that the config names."""
    return RMSNorm(dim) if config.norm == 'rmsnorm' else LayerNorm(dim, bool(config.bias))


def angles(length: int, dim: int, theta: float) -> torch.Tensor:
    """How far a position has turned each of the dim / 2 hands, from fast to slow: (length, dim / 2) radians."""
    return torch.outer(
        torch.arange(length).float(), theta ** (-torch.arange(0, dim, 2).float() / dim)
    )


def sinusoids(length: int, dim: int) -> torch.Tensor:
    """What Vaswani et al. 2017 add to the token at each position: sine and cosine of its angles in turn, (length, dim)."""
    angle = angles(length, dim, 10000.0)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(length, -1)[:, :dim]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE: turn each pair (x_i, x_{i+D/2}) of x (B, H, T, D) by its position's angle; cos and sin are (T, D) or (B, 1, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class KVCache:
    """Keys and values of the tokens seen so far, per layer (B, n_kv_head, room, D), in memory taken once.

    `length` tokens of each row are filled in; `pad` (B,) counts the empty places on the left of shorter prompts, or is
    None when all rows are equally long. `place` is None, or the place (1,) of the next token as a tensor: then `update`
    gives out the whole room, whose shape never changes, so that a compiled step or a CUDA graph serves every token. A place
    of its own for each row, (B, 1), makes texts of any length neighbours (lyregpt/engine.py).
    """

    def __init__(
        self, config: GPTConfig, batch: int, room: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (
            config.n_layer,
            2,
            batch,
            config.n_kv_head or config.n_head,
            room,
            config.head_dim or 0,
        )
        self.data = torch.zeros(
            shape, device=device, dtype=dtype
        )  # zeros: a compiled step reads the whole room, masked
        self.length = 0
        self.pad: torch.Tensor | None = None
        self.place: torch.Tensor | None = None

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the new tokens' k and v (B, n_kv_head, T, D) behind the old; returns all keys and values so far."""
        if self.place is not None and self.place.dim() == 2:
            rows, heads = (torch.arange(n, device=k.device) for n in k.shape[:2])
            self.data[layer, 0][rows[:, None], heads, self.place] = k[:, :, 0].to(self.data.dtype)
            self.data[layer, 1][rows[:, None], heads, self.place] = v[:, :, 0].to(self.data.dtype)
            return self.data[layer, 0], self.data[layer, 1]
        if self.place is not None:
            self.data[layer, 0].index_copy_(2, self.place, k.to(self.data.dtype))
            self.data[layer, 1].index_copy_(2, self.place, v.to(self.data.dtype))
            return self.data[layer, 0], self.data[layer, 1]
        end = self.length + k.size(2)
        self.data[layer, 0, :, :, self.length : end] = k
        self.data[layer, 1, :, :, self.length : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


def attend_alike(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention of one query a row, q (B, H, 1, D) to k and v (B, n_kv_head, keys, D), mask (B, 1, 1, keys): plain products.

    To the last bit the same whoever else is in the batch, unlike the fused kernel, whose threads differ in their rounding on
    a CPU (He et al. 2025, "Defeating Nondeterminism in LLM Inference"; here measured by tests/test_engine.py).
    """
    B, H, _, D = q.shape
    scores = (
        q.reshape(B, k.size(1), H // k.size(1), D) @ k.transpose(-1, -2) * D**-0.5
    )  # query heads that share keys, together
    return (scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v).view(B, H, 1, D)


class CastLinear(torch.autograd.Function):
    """x Wᵀ + b in autocast's dtype that keeps no copy of W in that dtype for the backward pass: it is cast again there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """x (…, in), weight (out, in), bias (out,) or None → (…, out) in `dtype`."""
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and, in the weight's dtype, of weight and bias."""
        x, weight = ctx.saved_tensors
        dy = grads[0].flatten(0, -2)
        dw = (dy.t() @ x.flatten(0, -2)).to(weight.dtype)
        return (
            grads[0] @ weight.to(x.dtype),
            dw,
            dy.sum(0, dtype=torch.float32) if ctx.has_bias else None,
            None,
        )


class Linear(nn.Linear):
    """nn.Linear that, trained in bfloat16 on a CPU, keeps no bfloat16 weights: 170 MB less for GPT-2, for 1% of the step."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (…, in) → (…, out)."""
        if (
            input.device.type == 'cpu'
            and torch.is_autocast_enabled('cpu')
            and torch.is_grad_enabled()
        ):
            return CastLinear.apply(input, self.weight, self.bias, torch.get_autocast_dtype('cpu'))
        return super().forward(input)


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and those before it: q, k and v in one matrix, then scaled dot-product attention.

    A mask, if given, says instead who sees whom (True: is seen), shape (B or 1, 1, T or 1, keys): so it serves an encoder, too.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.head_dim or 0
        bias = bool(config.bias)
        self.c_attn = Linear(
            config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=bias
        )
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd, bias=bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim) if config.qk_norm else None for _ in 'qk'
        )

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """x (B, T, C) → (B, T, C). `rope`: cosines and sines; `mask`: which keys each query sees, None for all up to itself; `cache`: what came before."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            q = q.to(k.dtype)  # a cache may be finer than the weights
        if (
            cache is not None
            and cache.place is not None
            and cache.place.dim() == 2
            and mask is not None
        ):
            y = attend_alike(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and T == k.size(2) > 1,
                dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=self.n_kv_head != self.n_head,
            )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Each token by itself: widen, bend, narrow."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        n_ff = config.n_ff or 0
        self.c_fc = Linear(
            config.n_embd, n_ff * (2 if self.kind == 'swiglu' else 1), bias=bool(config.bias)
        )
        self.c_proj = Linear(n_ff, config.n_embd, bias=bool(config.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) → (B, T, C)."""
        x = self.c_fc(x)
        if self.kind == 'swiglu':
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = (
                F.gelu(x, approximate='tanh')
                if self.kind == 'gelu'
                else F.relu(x)
                if self.kind == 'relu'
                else F.relu(x).square()
            )
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the MLP, each added to what came in (He et al. 2015) and normalized before (pre-norm, Xiong et al. 2020)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """x (B, T, C) → (B, T, C); the rest as in CausalSelfAttention."""
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class PackedLinear(nn.Module):
    """A linear layer for writing on a CPU. oneDNN's blocked weights reach twice the memory bandwidth of plain rows at one token."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) → (…, out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


def packed(linear: nn.Linear) -> nn.Module:
    """The layer with packed weights where oneDNN has them for its device and dtype, else the layer itself."""
    packs = linear.weight.device.type == 'cpu' and torch.backends.mkldnn.is_available()
    if linear.weight.dtype == torch.bfloat16:
        packs = packs and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif linear.weight.dtype != torch.float32:
        packs = False
    return PackedLinear(linear) if packs else linear


class Int8Linear(nn.Module):
    """A linear layer for generating: weights in int8 with a scale per output, a quarter of fp32's bytes to read.

    On CPUs that multiply int8 by int8 fast, each token's activations are rounded to int8 too, with a scale per token
    (LLM.int8's vector-wise scheme, Dettmers et al. 2022, without its outliers). Other CPUs multiply activations in bfloat16
    by weights that they convert on the way; GPUs convert the weights first.
    """

    weight: torch.Tensor  # (out, in), int8
    scale: torch.Tensor  # (out,)

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        weight = (weight / scale[:, None]).round().to(torch.int8)
        self.round_activations = weight.device.type == 'cpu' and fast_int8()
        self.padding = (
            0 if weight.is_cuda or self.round_activations else -weight.size(1) % 32
        )  # rows of _weight_int8pack_mm are whole vectors
        self.register_buffer('weight', F.pad(weight, (0, self.padding)), persistent=False)
        self.register_buffer('scale', scale, persistent=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) → (…, out) in x's dtype."""
        if x.is_cuda:
            y = F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None])
        elif not self.round_activations:
            rows = F.pad(x.flatten(0, -2).to(torch.bfloat16), (0, self.padding))
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale.to(torch.bfloat16))
            y = y.to(x.dtype).view(*x.shape[:-1], -1)
        else:
            rows = x.flatten(0, -2).float()
            scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
            y = (
                torch._int_mm((rows / scale).round().to(torch.int8), self.weight.t())
                * scale
                * self.scale
            )
            y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(x Wᵀ)[target], without the (tokens × vocabulary) matrix.

    x (N, C), weight (V, C), targets (N,) with -1 for "no loss here". Works through chunks of tokens and takes each chunk's
    gradients at once, while its logits are at hand (as in Liger Kernel, Hsu et al. 2024): memory falls from N·V to
    chunk·V, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, training: bool
    ) -> torch.Tensor:
        """The summed loss, a scalar in fp32, in nats."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w = weight.to(dtype)
        most = 2 ** (24 if device == 'cpu' else 27) // weight.size(
            0
        )  # fp32 logits: 64 MB at a time, or 512 on a GPU
        chunk = max(64, -(-x.size(0) // -(-x.size(0) // max(1, most))))  # equal parts
        dx, dw = (
            (torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32))
            if training
            else (None, None)
        )
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            for start in range(0, x.size(0), chunk):
                part, target = x[start : start + chunk].to(dtype), targets[start : start + chunk]
                keep = (target >= 0).float()
                log_p = F.log_softmax(part @ w.t(), dim=-1, dtype=torch.float32)
                target = target.clamp(min=0)[:, None]
                loss = (
                    loss - log_p.gather(1, target)[:, 0] @ keep
                )  # not in place: compiled by torch 2.11, all gradients would be zero
                if dx is not None and dw is not None:
                    grad = (
                        log_p.exp_()
                        .scatter_add_(1, target, -torch.ones_like(log_p[:, :1]))
                        .mul_(keep[:, None])
                        .to(dtype)
                    )
                    del log_p  # the largest tensor of all
                    dx[start : start + chunk] = grad @ w
                    for some, columns in zip(
                        dw.split(8192), grad.split(8192, dim=1)
                    ):  # a temporary of (V, C) would cost more than the product
                        some += columns.t() @ part
                    del grad
        ctx.dtype = weight.dtype
        ctx.save_for_backward(*(() if dx is None else (dx, dw)))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Hands out the gradients that the forward pass took."""
        dx, dw = (
            ctx.saved_tensors
        )  # scaled in place: (V, C) is too large for a copy, so backward can run only once
        return dx.mul_(grads[0].to(dx.dtype)), dw.mul_(grads[0]).to(ctx.dtype), None, None


# -----------------------------------------------------------------------------
# The model


class Transformer(nn.ModuleDict):
    """The parts under nanoGPT's names, with their types."""

    wte: nn.Embedding  # token embeddings (V, C)
    wpe: nn.Embedding  # position embeddings (block_size, C); learned positions only
    drop: nn.Dropout
    h: nn.ModuleList  # the blocks
    ln_f: nn.Module


class GPT(nn.Module):
    """A decoder-only Transformer. `model(idx)` gives logits (B, T, V); `model(idx, targets)` the mean loss in nats per token."""

    positions: torch.Tensor | None  # see _position_table

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device(
            'meta'
        ):  # shapes only: nothing is drawn that init_weights would draw again
            self.transformer = Transformer(
                dict(
                    wte=nn.Embedding(config.vocab_size, config.n_embd),
                    **(
                        {'wpe': nn.Embedding(config.block_size, config.n_embd)}
                        if config.position == 'learned'
                        else {}
                    ),
                    drop=nn.Dropout(config.dropout),
                    h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                    ln_f=make_norm(config, config.n_embd),
                )
            )
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            if config.tie_weights:
                self.lm_head.weight = self.transformer.wte.weight
            self.register_buffer('positions', None, persistent=False)
        self.remat = False  # keep the blocks' inputs only and compute the rest again in the backward pass (Chen et al. 2016)
        self.compiled_step: Any = None  # of generate, kept from call to call
        self.static_cache: KVCache | None = None
        if device.type != 'meta':
            self.materialize(device)
            self.init_weights()

    def materialize(self, device: torch.device) -> None:
        """Give a model made under `torch.device('meta')`, which has shapes only, memory for its weights; then `init_weights()` or load them."""
        self.to_empty(device=device)
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        table = self._position_table()
        self.positions = None if table is None else table.to(device)

    def _position_table(self) -> torch.Tensor | None:
        """What a position adds or turns by: (2, T, D) cosines and sines for RoPE, (1, T, C) for sinusoidal, None for learned."""
        config = self.config
        if config.position == 'learned':
            return None
        if config.position == 'sinusoidal':
            return sinusoids(config.block_size, config.n_embd)[None]
        angle = angles(config.block_size, config.head_dim or 0, config.rope_theta)
        return torch.stack((angle.cos(), angle.sin())).repeat(1, 1, 2)

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal(0.02), output projections by 1/√(2L) less. Modern: fan-in scaled matrices, output projections and head zero.

        Modern embeddings begin at 0.2, so that the first updates of the blocks do not drown them (docs/concepts/what-we-tried.md);
        at 0.02 where they are the head too, whose first logits should be small.
        """
        config = self.config
        for name, p in self.named_parameters():
            # of a sharded weight each process draws the whole and keeps its part: the same weights on any number of processes
            whole = torch.empty(p.shape, dtype=p.dtype) if is_sharded(p) else p
            if p.dim() < 2:
                nn.init.ones_(whole) if name.endswith('weight') else nn.init.zeros_(whole)
            elif config.arch == 'gpt2':
                nn.init.normal_(
                    whole,
                    std=0.02
                    / (math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 1),
                )
            elif (
                name.endswith('c_proj.weight')
                or name == 'lm_head.weight'
                and not config.tie_weights
            ):
                nn.init.zeros_(
                    whole
                )  # every block begins as the identity (Yang et al. 2022, Tensor Programs V)
            else:
                embedding = 0.02 if config.tie_weights else 0.2
                nn.init.normal_(
                    whole,
                    std=embedding
                    if name.endswith(('wte.weight', 'wpe.weight', 'lm_head.weight'))
                    else 0.5 * config.n_embd**-0.5,
                )
            if is_sharded(p):
                put(p, whole)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """The last block's normalized output (B, T, C) for token ids (B, T), which follow what the cache holds.

        Raises ValueError if they are more than the context.
        """
        B, T = idx.shape
        static = cache.place if cache is not None else None
        past = cache.length if cache is not None and static is None else 0
        if past + T > self.config.block_size:
            raise ValueError(
                f'{past + T} tokens are more than the context of block_size={self.config.block_size}'
            )
        place = torch.arange(past, past + T, device=idx.device) if static is None else static
        mask = None
        if cache is not None and (static is not None or cache.pad is not None or past and T > 1):
            keys = torch.arange(
                past + T if static is None else cache.data.size(4), device=idx.device
            )
            mask = (
                keys <= place[..., None]
            )  # (T, keys), or (B, 1, keys) of rows with places of their own
            if place.dim() == 2:
                mask = mask[:, None]
            elif (
                cache.pad is not None
            ):  # shorter prompts are padded on the left: positions shift, padding is masked
                mask = mask & (keys >= cache.pad[:, None, None])  # (B, T, keys)
                mask = (mask | (keys == place[:, None]))[
                    :, None
                ]  # a padding place sees itself: an empty softmax would be NaN
                place = (place - cache.pad[:, None]).clamp(min=0)  # (B, T)
        x = self.transformer.wte(idx)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # what the blocks add up stays in fp32, also where FSDP2 hands out the weights in bfloat16
        rope = None
        if self.positions is None:
            x = x + self.transformer.wpe(place)
        elif self.config.position == 'sinusoidal':
            x = x + self.positions[0, place].to(x.dtype)
        else:
            table = self.positions[:, place].to(
                torch.get_autocast_dtype(x.device.type)
                if torch.is_autocast_enabled(x.device.type)
                else x.dtype
            )
            rope = (
                (table[0], table[1]) if place.dim() == 1 else (table[0][:, None], table[1][:, None])
            )
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.remat and self.training and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(
                    block, x, rope, mask, cache, use_reentrant=False
                )
            else:
                x = block(x, rope, mask, cache)
        if cache is not None and static is None:
            cache.length += T
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) in the weights' dtype; or, given targets (B, T) with -1 for "none", the mean loss, a scalar in fp32."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        if not isinstance(self.lm_head, nn.Linear):  # quantized: it keeps no plain weights
            return F.cross_entropy(
                self.lm_head(x).float().flatten(0, 1), targets.flatten(), ignore_index=-1
            )
        total = LinearCrossEntropy.apply(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled()
        )
        return total / (targets >= 0).sum().clamp(min=1)

    # -------------------------------------------------------------------------
    # Size

    def num_params(self, embeddings: bool = True) -> int:
        """How many parameters; without the token and position tables if asked (a tied table is the head, so it counts)."""
        n = sum(p.numel() for p in self.parameters())
        if not embeddings:
            n -= self.transformer.wpe.weight.numel() if self.config.position == 'learned' else 0
            n -= self.transformer.wte.weight.numel() if not self.config.tie_weights else 0
        return n

    def flops_per_token(self) -> int:
        """Training FLOPs a token, forward and backward: 6 N + 12 L H D T (PaLM, Chowdhery et al. 2022, appendix B)."""
        config = self.config
        return (
            6 * self.num_params(embeddings=False)
            + 12 * config.n_layer * config.n_head * (config.head_dim or 0) * config.block_size
        )

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to `block_size` tokens in place. Raises ValueError if it is longer than now."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f'block_size={block_size}: this model can be cropped to 1 … {self.config.block_size} tokens'
            )
        self.config.block_size = block_size
        if self.config.position == 'learned':
            self.transformer.wpe = nn.Embedding.from_pretrained(
                self.transformer.wpe.weight[:block_size].clone(), freeze=False
            )
        else:
            self.positions = (
                self.positions[:, :block_size].clone() if self.positions is not None else None
            )

    # -------------------------------------------------------------------------
    # Writing

    @torch.inference_mode()
    def generate(
        self,
        prompts: torch.Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_tokens: Iterable[int] = (),
        seed: int = 1337,
        vocab_size: int | None = None,
        compile: bool = False,
        avoid: Sequence[Any] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Continue each prompt (token ids; lengths may differ), giving out one (B,) tensor of new ids at a time.

        A row that met a stop token gives that token, then -1s; when all have, the iterator ends. Row i draws from a
        random stream of its own, `seed + i`, so that neither the batch nor the other rows change what it writes.
        `temperature=0` is greedy; `top_k` and `top_p` of 0 or None are off; `repetition_penalty` > 1 makes tokens that
        already stand in the row less likely (Keskar et al. 2019); ids from `vocab_size` on (padding) are never drawn.
        When the context is full, its later half is kept and read again: writing goes on without end.
        `compile` compiles the step of one token (on CUDA as one graph); it takes a while and pays for long or many texts,
        one call at a time: the cache is kept from call to call.
        `avoid` holds an object per row (originality.Avoid): the ids that its `banned()` lists are not drawn next, and `push(id)`
        tells it what was; each token is then waited for.
        Raises ValueError for an empty prompt or an option out of range.
        """
        check_sampling(temperature, top_k, top_p, repetition_penalty, max_new_tokens)
        rows = [torch.as_tensor(p, dtype=torch.long).tolist() for p in prompts]
        if not rows or not all(rows):
            raise ValueError('a prompt is empty: give at least one token')
        if avoid is not None and len(avoid) != len(rows):
            raise ValueError(
                f'avoid holds {len(avoid)} objects for {len(rows)} prompts: give one each'
            )
        device = self.transformer.wte.weight.device
        stop = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
        dice = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
        running = torch.ones(len(rows), dtype=torch.bool, device=device)
        seen = torch.zeros(len(rows), self.config.vocab_size, dtype=torch.bool, device=device)
        if repetition_penalty != 1:
            for i, row in enumerate(rows):
                seen[i, row] = True
        history, cache, tokens = rows, None, stop
        written: list[torch.Tensor] = []
        if compile and self.compiled_step is None:
            self.compiled_step = torch.compile(
                self.next_logits, mode='reduce-overhead' if device.type == 'cuda' else 'default'
            )
        was_training = self.training
        self.eval()
        try:
            for step in range(max_new_tokens):
                if cache is None or cache.length >= self.config.block_size:
                    if (
                        written
                    ):  # read only now: a look at each token as it comes would make a GPU wait
                        history = [
                            row + new
                            for row, new in zip(history, torch.stack(written, dim=1).tolist())
                        ]
                        written.clear()
                    history, cache, logits = self._prefill(history, max_new_tokens - step, compile)
                elif cache.place is not None:
                    cache.place.fill_(cache.length)
                    logits = self.compiled_step(tokens[:, None], cache)
                    cache.length += 1
                else:
                    logits = self.next_logits(tokens[:, None], cache)
                logits = logits.float()[:, :vocab_size]
                if repetition_penalty != 1:
                    logits = torch.where(
                        seen[:, :vocab_size],
                        torch.where(
                            logits > 0, logits / repetition_penalty, logits * repetition_penalty
                        ),
                        logits,
                    )
                if step % 64 == 0:
                    chance = torch.stack([torch.rand(64, generator=g) for g in dice]).to(
                        device
                    )  # one number a token: (B, 64)
                if avoid is not None:
                    banned = torch.zeros(logits.shape, dtype=torch.bool)
                    for row, watch in zip(banned, avoid):
                        row[watch.banned()] = True
                    logits = logits.masked_fill(banned.to(device), -math.inf)
                tokens = sample_token(logits, chance[:, step % 64], temperature, top_k, top_p)
                if avoid is not None:
                    for watch, token, runs in zip(avoid, tokens.tolist(), running.tolist()):
                        if runs:
                            watch.push(token)
                if repetition_penalty != 1:
                    seen.scatter_(1, tokens[:, None], True)
                out = torch.where(running, tokens, -1)
                written.append(tokens)
                yield out
                if len(stop):
                    running &= ~torch.isin(tokens, stop)
                    if not running.any():
                        return
        finally:
            self.train(was_training)

    def next_logits(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read idx (B, T) behind what the cache holds; the logits (B, V) of what follows."""
        return self.lm_head(self.hidden(idx, cache)[:, -1])

    def _prefill(
        self, history: list[list[int]], left: int, static: bool
    ) -> tuple[list[list[int]], KVCache, torch.Tensor]:
        """The rows cut to the context (a full one to its later half), a cache that has read them with room for what comes, and the logits."""
        size, weight = self.config.block_size, self.transformer.wte.weight
        history = [
            row[-size:] if len(row) <= size else row[-max(1, size // 2) :] for row in history
        ]
        longest = max(map(len, history))
        room = (
            size if static else min(size, longest + left)
        )  # one shape for all texts: compiled once
        # CPUs attend several times faster in fp32 than in bf16 (docs/concepts/what-we-tried.md)
        dtype = torch.float32 if weight.device.type == 'cpu' else weight.dtype
        cache, want = self.static_cache, (len(history), room, dtype, weight.device)
        if (
            not static
            or cache is None
            or (*cache.data.shape[2:5:2], cache.data.dtype, cache.data.device) != want
        ):
            cache = KVCache(self.config, len(history), room, weight.device, dtype)
        cache.length, cache.place, cache.pad = 0, None, None
        if all(
            row == history[0] for row in history
        ):  # samples of one prompt: read it once, for the first row, and copy
            first = copy.copy(cache)
            first.data = cache.data[:, :, :1]
            logits = self.next_logits(
                torch.tensor(history[:1], device=weight.device), first
            ).expand(len(history), -1)
            cache.data[:, :, 1:, :, :longest] = first.data[:, :, :, :, :longest]
            cache.length = longest
        else:
            if any(len(row) < longest for row in history):
                cache.pad = torch.tensor(
                    [longest - len(row) for row in history], device=weight.device
                )
            idx = torch.tensor(
                [[0] * (longest - len(row)) + row for row in history], device=weight.device
            )
            logits = self.next_logits(idx, cache)
        if static:
            cache.place = torch.tensor([longest], device=weight.device)
            if self.static_cache is not cache:
                torch._dynamo.mark_static_address(cache.data)  # CUDA graphs write into it in place
            self.static_cache = cache
        return history, cache, logits

    def quantize(self, kind: str | None = None) -> 'GPT':
        """Make the linear layers, in place, ones that only write: int8 weights (kind='int8'), or on CPUs oneDNN's packed ones.

        Raises ValueError if this device has no such kind.
        """
        device = self.transformer.wte.weight.device.type
        if kind not in (None, 'int8'):
            raise ValueError(f'quantize={kind}: expected None or int8')
        if kind and device not in ('cpu', 'cuda'):
            raise ValueError(
                f'quantize={kind}: works on cpu and cuda, not on {device}; use dtype=float16 there'
            )
        for parent in [m for m in self.modules() if not isinstance(m, nn.Linear)]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child) if kind else packed(child))
        return self


# -----------------------------------------------------------------------------
# Sampling


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    max_new_tokens: int = 1,
) -> None:
    """Raises ValueError, with the option's name, for a value out of range."""
    for ok, text in (
        (temperature >= 0, f'temperature={temperature}: expected 0 (greedy) or more'),
        (not top_k or top_k > 0, f'top_k={top_k}: expected 0 (off) or more'),
        (not top_p or 0 < top_p <= 1, f'top_p={top_p}: expected a share from 0 (off) to 1'),
        (
            repetition_penalty > 0,
            f'repetition_penalty={repetition_penalty}: expected more than 0 (1 is off)',
        ),
        (max_new_tokens >= 0, f'max_new_tokens={max_new_tokens}: expected 0 or more'),
    ):
        if not ok:
            raise ValueError(text)


def sample_token(
    logits: torch.Tensor,
    chance: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> torch.Tensor:
    """One token (B,) per row of logits (B, V): the one at which the cumulative probability passes `chance` (B,) in [0, 1).

    One uniform number a token makes a sample a function of its row's dice alone, whatever device or batch it is drawn in.
    """
    if temperature < 1e-5:  # 0 is greedy; anything near it would overflow
        return logits.argmax(dim=-1)
    logits = logits / temperature
    order = None
    if top_k and top_k < logits.size(-1):
        logits, order = logits.topk(
            top_k, dim=-1
        )  # sorted, so top_p below needs no sort of its own
    elif top_p and top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    p = logits.softmax(dim=-1)
    if top_p and top_p < 1:
        p = torch.where(
            p.cumsum(dim=-1) - p < max(top_p, 1e-6), p, 0
        )  # the smallest set that reaches top_p (Holtzman et al. 2020)
    total = p.cumsum(dim=-1)
    at = torch.searchsorted(
        total, (chance[:, None] * total[:, -1:]).clamp(max=total[:, -1:] * (1 - 1e-7)), right=True
    ).clamp(max=p.size(-1) - 1)
    at = torch.where(
        p.gather(1, at) > 0, at, p.argmax(dim=-1, keepdim=True)
    )  # a GPU's cumulative sum may round what cannot be into the draw
    return (at if order is None else order.gather(1, at))[:, 0]
