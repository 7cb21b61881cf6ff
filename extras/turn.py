"""Another loss for EF, an example of a fork: `python assets/turn.py [options of clever.py]`.

L_Orth is content with an EF that ignores the view. Here the K' outputs of h_EF are the coordinates of K'/2
points of a plane. If a view was rotated, its points shall be: turned back by the angle, which the
augmentation knows, the outputs of all views of an image must agree, over the pairs of L_Orth:

    L_Turn = mean of 1 - cos(R(-angle_i) e_i, R(-angle_j) e_j)      e_i of the teacher, e_j of the student

A constant costs 1 - (2 / pi)^2 = 0.59, a true solution 0. What it gains and costs: results.md, section 3.
To go on with a run: `python assets/turn.py --out RUN --resume`. With clever.py it would go on with L_Orth.
"""
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clever  # noqa: E402

WEIGHT = 0.1  # of L_Turn
angles = []  # of the views of the step, (B,) each
parse = clever.parse
warp = clever.warp


def checking_parse(argv):
    """`clever.parse`, which refuses what has no plane to turn in."""
    cfg = parse(argv)
    if cfg.method == "dino" or cfg.ef_out_dim % 2:
        raise clever.UserError("turn.py needs --method clever and an even --ef-out-dim")
    return cfg


def remembering_warp(images, size, box, flip, angle, *more, **others):
    """`clever.warp`, which keeps the angles. Rotation comes after the flip: their sense does not change."""
    angles.append(angle)
    return warp(images, size, box, flip, angle, *more, **others)


class MultiCrop(clever.MultiCrop):
    """The views, with their angles in `angles`."""

    def forward(self, images, aspect, step):
        angles.clear()
        return super().forward(images, aspect, step)


def turn_back(e, angle):
    """Outputs e (V, B, K'), turned back by the angles (V, B) of their views, of length 1."""
    x, y = e.unflatten(-1, (-1, 2)).unbind(-1)  # each (V, B, K' / 2)
    cos = angle.deg2rad().cos()[..., None]
    sin = angle.deg2rad().sin()[..., None]
    return F.normalize(torch.cat([cos * x + sin * y, cos * y - sin * x], -1), dim=-1)


def turn_loss(cfg, student, teacher, centres, heads):
    """L = L_CL + WEIGHT * L_Turn, with the arguments of `clever.clever_loss`."""
    L_CL = clever.invariance_loss(student[0], teacher[0], centres[0], teacher_temp=cfg.teacher_temp)
    angle = torch.stack(angles)  # (V, B)
    e_teacher = turn_back(teacher[1].detach(), angle[:2])
    e_student = turn_back(student[1], angle)
    cosine = torch.einsum("gbk,vbk->gvb", e_teacher, e_student)
    L_Turn = clever.mean_over_pairs(1 - cosine)
    return dict(L_CL=L_CL, L_Turn=L_Turn, loss=L_CL + WEIGHT * L_Turn)


if __name__ == "__main__":
    clever.parse = checking_parse
    clever.warp = remembering_warp
    clever.MultiCrop = MultiCrop
    clever.clever_loss = turn_loss
    words = sys.argv[1:]
    if "--resume" not in words:
        words = ["--ef-out-dim", "64", *words]
    os._exit(clever.main(words))
