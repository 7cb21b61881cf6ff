"""VMamba-Tiny (arXiv 2401.10166) in plain PyTorch: `python clever.py --arch vmamba_tiny`.

A map of H x W positions is read as a sequence in four directions; Mamba, with a state of size 1,
runs along each. Parameters are named as in the original. An example for `--arch module:Class`.
Shapes: B images, L = H * W positions, D features, R the rank of the time step.
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
    """Read a map by rows, by columns, and both backwards: (B, H, W, D) -> (B, L, 4, D)."""
    rows = x.flatten(1, 2)  # (B, L, D)
    columns = x.transpose(1, 2).flatten(1, 2)  # (B, L, D), L = W H
    return torch.stack([rows, columns, rows.flip(1), columns.flip(1)], 2)


def cross_merge(y, H, W):
    """Put the four sequences back in place and add them: (B, L, 4, D) -> (B, H, W, D)."""
    right, down, left, up = y.unbind(2)  # each (B, L, D)
    rows = (right + left.flip(1)).unflatten(1, (H, W))  # (B, H, W, D)
    columns = (down + up.flip(1)).unflatten(1, (W, H))  # (B, W, H, D)
    return rows + columns.transpose(1, 2)


def recurrence(decay, drive, dim):
    """state_t = decay_t * state_(t-1) + drive_t along a dimension, starting from 0."""
    states = []
    state = torch.zeros_like(drive.select(dim, 0))
    for decay_t, drive_t in zip(decay.unbind(dim), drive.unbind(dim)):
        state = torch.addcmul(drive_t, decay_t, state)
        states.append(state)
    return torch.stack(states, dim)


def scan(log_decay, drive, chunks):
    """The recurrence with decay exp(log_decay) along L, in chunks side by side: (B, L, 4, D)."""
    log_decay = log_decay.unflatten(1, (chunks, -1))  # (B, chunks, steps, 4, D)
    drive = drive.unflatten(1, (chunks, -1))
    states = recurrence(log_decay.exp(), drive, dim=2)  # of each chunk, from 0

    # A chunk starts in the state in which the one before it ended.
    kept = log_decay.cumsum(2).exp()  # the fraction that is left of that state
    ends = recurrence(kept[:, :, -1], states[:, :, -1], dim=1)  # (B, chunks, 4, D)
    starts = F.pad(ends[:, :-1], (0, 0, 0, 0, 1, 0))
    return (states + kept * starts[:, :, None]).flatten(1, 2)


class SS2D(nn.Module):
    """Selective scan (Mamba, arXiv 2312.00752) in four directions: (B, H, W, D) -> (B, H, W, D).

    delta_t = softplus(dt_projs r_t + bias), A = -exp(A_logs)
    state_t = exp(delta_t A) state_(t-1) + delta_t write_t u_t
    y_t     = read_t state_t + Ds u_t          write and read are Mamba's B and C
    """

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
        """y summed over the directions, in the dtype of the parameters: (B, H, W, D)."""
        H, W, D = v.shape[1:]
        u = cross_scan(v)  # (B, L, 4, D)
        p = torch.einsum("blkd,kpd->blkp", u, self.x_proj_weight)  # (B, L, 4, R + 2)
        with torch.autocast(v.device.type, enabled=False):  # half precision would lose the state
            u = u.to(self.Ds.dtype)
            r, write_t, read_t = p.to(self.Ds.dtype).tensor_split([-2, -1], 3)  # (B, L, 4, R or 1)
            delta = torch.einsum("blkr,kdr->blkd", r, self.dt_projs_weight)  # (B, L, 4, D)
            delta = F.softplus(delta + self.dt_projs_bias)
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
        y = checkpoint(self.op, self.norm(x), use_reentrant=False)  # keeps no states of the scan
        x = x + stochastic_depth(y, self.drop_path, self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, self.training)


def halve(dim, wider):
    """Layers that halve the sides of a map: (B, dim, H, W) -> (B, H / 2, W / 2, wider)."""
    return nn.Conv2d(dim, wider, 3, stride=2, padding=1), Permute([0, 2, 3, 1]), nn.LayerNorm(wider)


class VMamba(nn.Module):
    """VMamba-Tiny without its classifier: images (B, 3, H, W) -> (B, dims[-1])."""

    def __init__(self, drop_path=0.1, dims=(96, 192, 384, 768), depths=(2, 2, 8, 2)):
        super().__init__()
        self.embed_dim = dims[-1]
        channel_first = Permute([0, 3, 1, 2])
        first, second = halve(3, dims[0] // 2), halve(dims[0] // 2, dims[0])
        self.patch_embed = nn.Sequential(*first, channel_first, nn.GELU(), *second)
        drop_path = min(2 * drop_path, 0.99)  # its authors use 0.2 where ViTs have 0.1
        rates = [drop_path * i / (sum(depths) - 1) for i in range(sum(depths))]
        self.layers = nn.Sequential()
        for i, depth in enumerate(depths):
            blocks = [VSSBlock(dims[i], rates.pop(0)) for _ in range(depth)]
            stage = nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks)))
            if i + 1 < len(depths):
                stage.downsample = nn.Sequential(channel_first, *halve(dims[i], dims[i + 1]))
            self.layers.append(stage)
        self.classifier = nn.Sequential(OrderedDict(norm=nn.LayerNorm(dims[-1])))
        init_linear(self)

    @torch.compiler.disable  # --compile would unroll every scan, for each size of image
    def forward(self, x):
        x = self.layers(self.patch_embed(x))  # (B, H / 32, W / 32, D)
        return self.classifier(x).mean((1, 2))
