"""The original Transformer (Vaswani et al. 2017): an encoder reads a source, a decoder answers it.

Attention, MLP, norms and KV cache are model.py's. Cross-attention and beam search are new here.
train_seq2seq.py trains a model on lines of verse. Shapes: B rows, S tokens of a source, T of an
answer, C = n_embd, D = head_dim, V the vocabulary. Rows that are shorter are padded with -1.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import MLP, CausalSelfAttention, GPTConfig, KVCache, Linear, make_norm, sinusoids


@dataclass
class EncoderDecoderConfig(GPTConfig):
    """The shape; the defaults are the paper's base model. Raises ValueError."""

    block_size: int = 512  # the most tokens of a source, and of an answer
    vocab_size: int = 37000  # sources and answers share it
    n_layer: int = 6  # of the encoder, and as many of the decoder
    n_head: int = 8
    n_embd: int = 512
    dropout: float = 0.1
    bias: bool = True
    position: str = 'sinusoidal'
    mlp: str = 'relu'
    norm_first: bool = False  # x + layer(norm(x)) as in the GPT, not norm(x + layer(x))


class CrossAttention(nn.Module):
    """Attention to the source: queries from the decoder, keys and values from the encoder."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.dropout, self.n_head, C = config.dropout, config.n_head, config.n_embd
        self.c_q = Linear(C, C, bias=config.bias)
        self.c_kv = Linear(C, 2 * C, bias=config.bias)
        self.c_proj = Linear(C, C, bias=config.bias)

    def keys_values(self, source: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (B, n_head, S, D) of the encoder's output (B, S, C)."""
        kv = self.c_kv(source).unflatten(2, (2 * self.n_head, -1)).transpose(1, 2)
        return kv.chunk(2, dim=1)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, C) and the source's keys and values → (B, T, C)."""
        q = self.c_q(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.c_proj(y.transpose(1, 2).flatten(2))
        return F.dropout(y, self.dropout, self.training)


# What the decoder needs of the sources: keys and values per layer (B, n_head, S, D), and a mask
Memory = tuple[list[tuple[Tensor, ...]], Tensor]  # (B, 1, 1, S), True where there is a token


class Block(nn.Module):
    """Self-attention, in a decoder cross-attention, and MLP, each with a residual and a norm."""

    def __init__(self, config: EncoderDecoderConfig, layer: int, decoder: bool):
        super().__init__()
        self.layer, self.norm_first = layer, config.norm_first
        self.ln_1, self.attn = make_norm(config, config.n_embd), CausalSelfAttention(config, layer)
        if decoder:
            self.ln_cross, self.cross = make_norm(config, config.n_embd), CrossAttention(config)
        self.ln_2, self.mlp = make_norm(config, config.n_embd), MLP(config)

    def residual(self, x: Tensor, norm: Any, layer: Any, *args: Any) -> Tensor:
        """A layer with its residual connection and its norm."""
        if self.norm_first:
            return x + layer(norm(x), *args)
        return norm(x + layer(x, *args))

    def forward(
        self, x: Tensor, mask: Any, memory: Memory | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """x (B, T, C) → (B, T, C). An encoder's `mask` hides padding; a decoder is causal."""
        x = self.residual(x, self.ln_1, self.attn, None, mask, cache)
        if memory is not None:
            (k, v), mask = memory[0][self.layer], memory[1]
            x = self.residual(x, self.ln_cross, self.cross, k, v, mask)
        return self.residual(x, self.ln_2, self.mlp)


class Answer(NamedTuple):
    """An answer: its token ids, with the end if it came, and its log probability in nats."""

    ids: list[int]
    log_p: float

    def score(self, length_penalty: float) -> float:
        """log_p / ((5 + length) / 6)^penalty: without it, short answers win (Wu et al. 2016)."""
        return self.log_p / ((5 + len(self.ids)) / 6) ** length_penalty


class EncoderDecoder(nn.Module):
    """The model; one table embeds sources and answers and is the output head too."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        layers = range(config.n_layer)
        self.encoder = nn.ModuleList(Block(config, i, decoder=False) for i in layers)
        self.decoder: Any = nn.ModuleList(Block(config, i, decoder=True) for i in layers)
        self.ln_encoder: nn.Module = nn.Identity()
        self.ln_decoder: nn.Module = nn.Identity()
        if config.norm_first:  # the blocks' sum is not normalized yet
            self.ln_encoder = make_norm(config, config.n_embd)
            self.ln_decoder = make_norm(config, config.n_embd)
        self.positions: Tensor
        positions = sinusoids(config.block_size, config.n_embd)
        self.register_buffer('positions', positions, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        # times √C, the embeddings are as large as the positions
        nn.init.normal_(self.wte.weight, std=config.n_embd**-0.5)

    def embed(self, idx: Tensor, past: int = 0) -> Tensor:
        """Token ids (B, T), the first at position `past`, → (B, T, C)."""
        positions = self.positions[past : past + idx.size(1)]
        x = self.wte(idx.clamp(min=0)) * math.sqrt(self.config.n_embd) + positions
        return F.dropout(x, self.config.dropout, self.training)

    def read(self, source: Tensor) -> Memory:
        """Run the encoder on sources (B, S), each of at least one token, padded with -1."""
        mask = (source >= 0)[:, None, None]
        x = self.embed(source)
        for block in self.encoder:
            x = block(x, mask)
        x = self.ln_encoder(x)
        return [block.cross.keys_values(x) for block in self.decoder], mask

    def logits(self, idx: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for the tokens after idx (B, T), which follow those in the cache."""
        x = self.embed(idx, cache.length if cache else 0)
        for block in self.decoder:
            x = block(x, None, memory, cache)
        if cache:
            cache.length += idx.size(1)
        return F.linear(self.ln_decoder(x), self.wte.weight)

    def forward(
        self, source: Tensor, idx: Tensor, targets: Tensor | None = None, smoothing: float = 0.0
    ) -> Tensor:
        """Logits (B, T, V); or, given targets (B, T) padded with -1, the mean loss in nats.

        idx (B, T) are the targets shifted right, after a start token. `smoothing` spreads that part
        of a target's probability over the vocabulary (Szegedy et al. 2016).
        """
        logits = self.logits(idx, self.read(source))
        if targets is None:
            return logits
        logits, targets = logits.flatten(0, 1).float(), targets.flatten()
        return F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=smoothing)

    def greedy(self, source: Tensor, eot: int, max_new_tokens: int) -> list[Answer]:
        """One answer per source (B, S): always the likeliest next token, until it is `eot`."""
        return [best for (best,) in self.beam(source, eot, max_new_tokens, width=1)]

    @torch.inference_mode()
    def beam(
        self, source: Tensor, eot: int, max_new_tokens: int, width: int = 4, penalty: float = 0.6
    ) -> list[list[Answer]]:
        """The `width` best answers to each source (B, S), by score. Call `eval()` before.

        Each beam is continued with every token. Of the `width` likeliest of these, those that end
        are answers. Beams that have not ended after `max_new_tokens` count as well.
        """
        B, V, device = len(source), self.config.vocab_size, source.device
        memory = self.read(source.repeat_interleave(width, 0))
        cache = KVCache(self.config, B * width, max_new_tokens, device, self.wte.weight.dtype)
        done: list[list[Answer]] = [[] for _ in range(B)]
        ids = torch.full((B, width, 1), eot, device=device)
        log_p = torch.full((B, width), -math.inf, device=device)
        log_p[:, 0] = 0  # all beams are equal at first, so only one counts
        for _ in range(max_new_tokens):
            step = self.logits(ids[..., -1].view(-1, 1), memory, cache)[:, -1].float()
            total = log_p[..., None] + step.log_softmax(dim=-1).view(B, width, V)
            # a beam can end in one way only, so at least half of these candidates continue
            total, index = total.flatten(1).topk(min(2 * width, width * V))
            parent, token = index // V, index % V
            ids = torch.cat((ids.take_along_dim(parent[..., None], 1), token[..., None]), dim=2)
            ended = token == eot
            for row, i in ended[:, :width].nonzero().tolist():
                if len(done[row]) < width and total[row, i] > -math.inf:
                    done[row].append(Answer(ids[row, i, 1:].tolist(), float(total[row, i])))
            if all(len(answers) == width for answers in done):
                break
            log_p, kept = total.masked_fill(ended, -math.inf).topk(width)
            ids = ids.take_along_dim(kept[..., None], 1)
            # a beam continues with the keys and values of its parent
            rows = parent.gather(1, kept) + width * torch.arange(B, device=device)[:, None]
            cache.data = cache.data[:, :, rows.flatten()]
        for answers, beams, values in zip(done, ids[..., 1:].tolist(), log_p.tolist()):
            unfinished = [Answer(beam, p) for beam, p in zip(beams, values) if p > -math.inf]
            answers += unfinished[: width - len(answers)]
            answers.sort(key=lambda answer: answer.score(penalty), reverse=True)
        return done
