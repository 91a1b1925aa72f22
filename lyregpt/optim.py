"""The optimizers: AdamW, and Muon for the blocks' matrices; both work on whole weights and on weights sharded by FSDP2."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn

from lyregpt.device import fast_bf16, is_sharded, local
from model import GPT


def configure_optimizers(
    model: GPT,
    weight_decay: float,
    learning_rate: float,
    betas: tuple[float, float],
    optimizer: str = 'muon',
    dtype: torch.dtype | None = None,
) -> dict[str, torch.optim.Optimizer]:
    """{'adamw': …} for all parameters, or {'adamw': …, 'muon': …} with the blocks' matrices under Muon.

    Norms and biases are not decayed; nor are the embeddings under Muon (Jordan et al. 2024 leave them to Adam). `dtype` is that
    of Muon's products; None: bfloat16 where it is fast.
    """
    config = model.config
    heads = (config.n_head, config.n_kv_head or config.n_head, config.n_kv_head or config.n_head)
    splits = {'attn.c_attn.weight': [h * (config.head_dim or 0) for h in heads]}
    if config.mlp == 'swiglu':
        splits['mlp.c_fc.weight'] = [config.n_ff or 0] * 2
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {'decay': [], 'plain': []}
    matrices: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, p in model.named_parameters():
        if optimizer == 'muon' and p.dim() == 2 and name.startswith('transformer.h.'):
            matrices[
                tuple(next((s for end, s in splits.items() if name.endswith(end)), ()))
            ].append((name, p))
        else:
            groups['decay' if p.dim() >= 2 and optimizer != 'muon' else 'plain'].append((name, p))
    adamw = [
        {'params': groups['decay'], 'weight_decay': weight_decay},
        {'params': groups['plain'], 'weight_decay': 0.0},
    ]
    device = next(model.parameters()).device
    made: dict[str, torch.optim.Optimizer] = {
        'adamw': torch.optim.AdamW(
            [g for g in adamw if g['params']],
            lr=learning_rate,
            betas=betas,
            fused=device.type in ('cpu', 'cuda'),
        )
    }
    if matrices:
        made['muon'] = Muon(
            [{'params': ps, 'rows': list(rows)} for rows, ps in matrices.items()],
            lr=learning_rate,
            weight_decay=weight_decay,
            dtype=dtype or (torch.bfloat16 if fast_bf16(device) else torch.float32),
        )
    return made


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton–Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for 2-D weights.

    The update is scaled to the RMS that AdamW's has, 0.2 √max(rows, columns) (Liu et al. 2025, "Muon is Scalable"), so a
    learning rate tuned for AdamW serves. A group's `rows` cuts a fused matrix (q, k, v) into those that are orthogonalized
    each by itself. Matrices of one shape go through Newton–Schulz together: a few big products instead of many small.

    Weights sharded over processes (FSDP2, along dimension 0) are dealt out: each process gets some of the matrices whole,
    orthogonalizes those, and hands every other process its rows of the result: two all-to-alls, and no product done twice.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, rows=[]))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient. `closure` is for the base class; it is not called."""
        params: list[tuple[torch.Tensor, dict[str, Any]]] = []
        updates: list[torch.Tensor] = []
        for group in self.param_groups:
            here = [p for p in group['params'] if p.grad is not None]
            grads = [local(p.grad) for p in here]
            for p in here:
                if 'momentum_buffer' not in self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
            buffers = [local(self.state[p]['momentum_buffer']) for p in here]
            torch._foreach_lerp_(buffers, grads, 1 - group['momentum'])
            updates += torch._foreach_lerp(grads, buffers, group['momentum'])  # Nesterov's
            params += [(p, group) for p in here]
        if params and is_sharded(params[0][0]):
            updates = self.sharded(params, updates)
        else:
            parts = orthogonalize_parts(updates, [group['rows'] for _, group in params], self.dtype)
            updates = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
        for (p, group), update in zip(params, updates):
            weight = local(p)
            weight.mul_(1 - group['lr'] * group['weight_decay'])
            weight.add_(update, alpha=-group['lr'])

    def sharded(
        self, params: list[tuple[torch.Tensor, dict[str, Any]]], updates: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """This process's rows of each orthogonalized update, from its rows of each update."""
        from torch.distributed.tensor import DTensor, Shard

        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, (p, group) in enumerate(params):
            alike[tuple(p.shape) + tuple(group['rows'])].append(i)
        mesh = params[0][0].device_mesh  # type: ignore[attr-defined]
        whole = []  # per shape: the matrices that are this process's to orthogonalize, (n, rows, columns)
        for (rows, columns, *_), members in alike.items():
            mine = torch.stack([updates[i] for i in members])
            shape = torch.Size((len(members), rows, columns))
            dealt = DTensor.from_local(
                mine,
                mesh,
                [Shard(1)],
                run_check=False,
                shape=shape,
                stride=(rows * columns, columns, 1),
            )
            whole.append(dealt.redistribute(placements=[Shard(0)]).to_local())
        cuts = [
            params[members[0]][1]['rows']
            for stack, members in zip(whole, alike.values())
            for _ in stack
        ]
        done = iter(
            orthogonalize_parts([matrix for stack in whole for matrix in stack], cuts, self.dtype)
        )
        out = list(updates)
        for ((rows, columns, *_), members), stack in zip(alike.items(), whole):
            result = torch.empty(stack.shape, device=stack.device)
            for matrix in result:
                torch.cat(next(done), out=matrix)
            shape = torch.Size((len(members), rows, columns))
            dealt = DTensor.from_local(
                result,
                mesh,
                [Shard(0)],
                run_check=False,
                shape=shape,
                stride=(rows * columns, columns, 1),
            )
            for i, part in zip(members, dealt.redistribute(placements=[Shard(1)]).to_local()):
                out[i] = part.to(
                    updates[i].device
                )  # with cpu_offload the mesh is the GPUs', the weights are not there
        return out


def orthogonalize_parts(
    updates: Sequence[torch.Tensor], rows: Sequence[list[int]], dtype: torch.dtype
) -> list[list[torch.Tensor]]:
    """Each update (2-D) cut by its `rows` ([]: whole), every part orthogonalized and scaled to AdamW's RMS, in fp32."""
    alike: dict[tuple[int, int], list[tuple[int, torch.Tensor, bool]]] = defaultdict(list)
    for i, (update, cut) in enumerate(zip(updates, rows)):
        for part in update.split(cut or [update.size(0)]):
            tall = part.size(0) > part.size(
                1
            )  # turn tall ones so that products are of the smaller side
            alike[min(part.shape), max(part.shape)].append((i, part.t() if tall else part, tall))
    done: list[list[torch.Tensor]] = [[] for _ in updates]
    for (_, columns), items in alike.items():
        for (i, _, tall), part in zip(
            items, orthogonalize(torch.stack([part for _, part, _ in items]), dtype=dtype)
        ):
            done[i].append((part.t() if tall else part).float().mul_(0.2 * columns**0.5))
    return done


def orthogonalize(
    x: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Bring the singular values of each matrix of x (N, rows ≤ columns) near 1: the quintic Newton–Schulz iteration of Muon."""
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x
