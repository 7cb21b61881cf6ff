"""VMamba-Tiny (arXiv 2401.10166) in plain PyTorch: `--arch vmamba_tiny` of clever.py.

A map (B, H, W, D) is read as sequences of L = H * W positions in 4 directions. Parameters are named as in
the original; Mamba's state has size 1. This is also an example of a backbone of your own, which
`--arch module:Class` takes: it has an `embed_dim` and maps (N, 3, H, W) to (N, D).

Shapes: B images, H x W positions, L of them, D features, R the rank of the time step.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import Permute

from clever import init_linear, mlp, stochastic_depth


def cross_scan(x):
    """Reads a map by rows, by columns, and both backwards: (B, H, W, D) -> (B, L, 4, D)."""
    rows = x.flatten(1, 2)  # (B, L, D)
    columns = x.transpose(1, 2).flatten(1, 2)  # (B, L, D), L = W H
    return torch.stack([rows, columns, rows.flip(1), columns.flip(1)], 2)


def cross_merge(y, H, W):
    """Undoes `cross_scan` and adds the 4 maps: (B, L, 4, D) -> (B, H, W, D)."""
    right, down, left, up = y.unbind(2)  # each (B, L, D)
    rows = (right + left.flip(1)).unflatten(1, (H, W))  # (B, H, W, D)
    columns = (down + up.flip(1)).unflatten(1, (W, H))  # (B, W, H, D)
    return rows + columns.transpose(1, 2)


def recurrence(decay, drive):
    """state_t = decay_t state_(t-1) + drive_t, from 0, along dimension 1 of both."""
    states = []
    state = torch.zeros_like(drive[:, 0])
    for decay_t, drive_t in zip(decay.unbind(1), drive.unbind(1)):
        state = torch.addcmul(drive_t, decay_t, state)
        states.append(state)
    return torch.stack(states, 1)


def scan(log_decay, drive, chunks):
    """The recurrence with decay exp(log_decay) along L of (B, L, 4, D), in chunks side by side (Mamba)."""
    B = len(drive)
    log_decay = log_decay.unflatten(1, (chunks, -1)).flatten(0, 1)  # (B * chunks, steps, 4, D)
    drive = drive.unflatten(1, (chunks, -1)).flatten(0, 1)
    states = recurrence(log_decay.exp(), drive)  # of each chunk, from 0: (B * chunks, steps, 4, D)
    kept = log_decay.cumsum(1).exp()  # what is left of the state on entering the chunk
    ends = recurrence(
        kept[:, -1].unflatten(0, (B, chunks)), states[:, -1].unflatten(0, (B, chunks))
    )
    starts = F.pad(
        ends[:, :-1], (0, 0, 0, 0, 1, 0)
    )  # a chunk starts where the last ended: (B, chunks, 4, D)
    states = states + kept * starts.flatten(0, 1)[:, None]
    return states.unflatten(0, (B, chunks)).flatten(1, 2)  # (B, L, 4, D)


class SS2D(nn.Module):
    """Selective scan (Mamba, 2312.00752) of a map in 4 directions, no gate: (B, H, W, D) -> (B, H, W, D).

    In each direction, with delta_t = softplus(dt_projs r_t + bias), A = -exp(A_logs) and Mamba's B, C as
    write, read: state_t = exp(delta_t A) state_(t-1) + delta_t write_t u_t, y_t = read_t state_t + Ds u_t."""

    def __init__(self, dim):
        super().__init__()
        R = math.ceil(dim / 16)  # rank of the time step
        dt = 10 ** torch.empty(4, dim).uniform_(-3, -1)
        self.x_proj_weight = nn.Parameter(torch.empty(4, R + 2, dim))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, dim, R))
        self.dt_projs_bias = nn.Parameter(dt.expm1().log())  # its softplus is dt
        self.A_logs = nn.Parameter(torch.zeros(4 * dim, 1))
        self.Ds = nn.Parameter(torch.ones(4 * dim))
        self.out_norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        for weight in (self.x_proj_weight, self.dt_projs_weight):
            bound = weight.shape[2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def selective_scan(self, v):
        """The sum over the directions of y, of a map (B, H, W, D), in the parameters' dtype."""
        H, W, D = v.shape[1:]
        u = cross_scan(v)  # (B, L, 4, D)
        p = torch.einsum("blkd,kpd->blkp", u, self.x_proj_weight)  # (B, L, 4, R + 2)
        with torch.autocast(v.device.type, enabled=False):  # half precision would lose the state
            u = u.to(self.Ds.dtype)
            r, write_t, read_t = p.to(self.Ds.dtype).tensor_split([-2, -1], 3)  # (B, L, 4, R or 1)
            delta = torch.einsum("blkr,kdr->blkd", r, self.dt_projs_weight) + self.dt_projs_bias
            delta = F.softplus(delta)  # (B, L, 4, D)
            A = -self.A_logs.exp().view(4, D)
            state = scan(delta * A, delta * write_t * u, chunks=H)
            return cross_merge(read_t * state + self.Ds.view(4, D) * u, H, W)

    def forward(self, x):
        x = self.in_proj(x).permute(0, 3, 1, 2)  # (B, D, H, W)
        v = F.silu(self.conv2d(x)).permute(0, 2, 3, 1)  # (B, H, W, D)
        return self.out_proj(self.out_norm(self.selective_scan(v)))


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm2(x)) (VMamba): (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)

    def forward(self, x):
        y = checkpoint(
            self.op, self.norm(x), use_reentrant=False
        )  # else every state of the scan is kept
        x = x + stochastic_depth(y, self.drop_path, self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, self.training)


def halve(dim, wider):
    """Layers that halve the sides: (B, dim, H, W) -> (B, H / 2, W / 2, wider)."""
    return nn.Conv2d(dim, wider, 3, stride=2, padding=1), Permute([0, 2, 3, 1]), nn.LayerNorm(wider)


class VMamba(nn.Module):
    """VMamba-Tiny without its classifier: images (B, 3, H, W) -> (B, dims[-1])."""

    def __init__(self, drop_path=0.1, dims=(96, 192, 384, 768), depths=(2, 2, 8, 2)):
        super().__init__()
        self.embed_dim = dims[-1]
        narrow = dims[0] // 2
        channel_first = Permute([0, 3, 1, 2])
        stem = [*halve(3, narrow), channel_first, nn.GELU(), *halve(narrow, dims[0])]
        self.patch_embed = nn.Sequential(*stem)
        drop_path = min(2 * drop_path, 0.99)  # its authors use 0.2 where ViTs have 0.1
        rates = [drop_path * i / (sum(depths) - 1) for i in range(sum(depths))]
        self.layers = nn.Sequential()
        for i, depth in enumerate(depths):
            blocks = [VSSBlock(dims[i], rates.pop(0)) for _ in range(depth)]
            stage = nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks)))
            if i + 1 < len(depths):
                stage.add_module(
                    "downsample", nn.Sequential(channel_first, *halve(dims[i], dims[i + 1]))
                )
            self.layers.append(stage)
        self.classifier = nn.Sequential(OrderedDict(norm=nn.LayerNorm(dims[-1])))
        init_linear(self)

    @torch.compiler.disable  # --compile would unroll each block's scan, for each size of map
    def forward(self, x):
        x = self.layers(self.patch_embed(x))  # (B, H / 32, W / 32, D)
        return self.classifier(x).mean((1, 2))
