"""Another loss for EF, as an example of a loss of your own:

    python clever.py --training extras.turn:Turn --ef-out-dim 64 --aug caug [options]

An EF that ignores the view already nearly minimises L_Orth. Here the K' outputs of h_EF are the
coordinates of K' / 2 points in a plane, which should turn with the view. The augmentation knows the
angles: turned back by them, the outputs of all views of an image should agree, over the same pairs
as in L_Orth:

    L_Turn = mean of 1 - cos(R(-angle_i) e_i, R(-angle_j) e_j)     e_i: teacher, e_j: student
    L      = L_CL + 0.1 L_Turn

With --aug caug, a constant output costs 1 - (2 / pi)^2 = 0.59, a true solution 0. results.md has
the measurements.
"""

import torch
import torch.nn.functional as F

import clever

WEIGHT = 0.1  # of L_Turn


def turn_back(e, angle):
    """Turn the points of outputs e (V, B, K') back by angles (V, B), and normalise them."""
    x, y = e.unflatten(-1, (-1, 2)).unbind(-1)  # each (V, B, K' / 2)
    cos = angle.deg2rad().cos()[..., None]
    sin = angle.deg2rad().sin()[..., None]
    return F.normalize(torch.cat([cos * x + sin * y, cos * y - sin * x], -1), dim=-1)


class Turn(clever.Training):
    def loss(self, student, teacher):
        ir, e = student.logits  # (V, B, K), (V, B, K')
        ir_teacher, e_teacher = teacher.logits  # of the G global views
        temp = self.cfg.teacher_temp
        L_CL = clever.invariance_loss(ir, ir_teacher, self.centres[0], teacher_temp=temp)

        angle = torch.stack(self.augment.angles)  # (V, B), in degrees
        e = turn_back(e, angle)
        e_teacher = turn_back(e_teacher, angle[:2])
        cosine = torch.einsum("gbk,vbk->gvb", e_teacher, e)
        L_Turn = clever.mean_over_pairs(1 - cosine)
        return dict(L_CL=L_CL, L_Turn=L_Turn, loss=L_CL + WEIGHT * L_Turn)


class TurnInDisc(Turn):
    """The same on views cut to the inscribed disc: black corners give the angle away."""

    def __init__(self, cfg, steps_per_epoch, device="cpu"):
        super().__init__(cfg, steps_per_epoch, device)
        warp = self.augment.warp

        def warp_in_disc(images, size, *geometry):
            return warp(images, size, *geometry) * clever.disc(size, images.device)

        self.augment.warp = warp_in_disc
