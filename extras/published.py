"""The published training loop, written out naively: losses pair by pair, loops over parameters.

The six-step test and extras/benchmark.py compare with it. It takes its networks from a `Training`
of clever.py and shares nothing else with it.
"""

import copy
import math

import torch
import torch.nn.functional as F


def naive_loss(term, student, teacher, centre, teacher_temp=0.04):
    """The mean of term(P_i, logits_j) over global views i and all other views j: DINO's two loops.

    student (V, B, K), teacher (G, B, K): logits, global views first; centre (K,).
    """
    P = ((teacher.detach() - centre) / teacher_temp).softmax(-1)
    logits = student / 0.1
    values = []
    for i in range(len(P)):
        for j in range(len(logits)):
            if i != j:
                values.append(term(P[i], logits[j]).mean())
    return sum(values) / len(values)


def cross_entropy(P, logits):
    return -(P * logits.log_softmax(-1)).sum(-1)


def cosine(P, logits):
    return F.cosine_similarity(P, logits.softmax(-1), dim=-1).abs()


def naive_invariance(*args):
    """L_CL, with the arguments of `naive_loss` after `term`."""
    return naive_loss(cross_entropy, *args)


def naive_orthogonality(*args):
    """L_Orth, with the arguments of `naive_loss` after `term`."""
    return naive_loss(cosine, *args)


def naive_regularization(head_ir, head_ef):
    """L_PReg of two heads."""
    ir = sum(p.pow(2).sum() for p in head_ir.parameters())
    ef = sum(p.pow(2).sum() for p in head_ef.parameters())
    return (ir - ef).abs()


def naive_schedule(start, end, steps, warmup=0):
    """DINO's cosine schedule: a value per step."""
    values = [start * i / max(1, warmup - 1) for i in range(warmup)]
    n = steps - warmup
    for i in range(n):
        values.append(end + (start - end) * (1 + math.cos(math.pi * i / n)) / 2)
    return values


class Published:
    """The published loop. It starts from copies of the networks of a `Training` and its `cfg`."""

    def __init__(self, run, clip=3.0):
        cfg = run.cfg
        self.cfg = cfg
        self.clip = clip
        self.student = copy.deepcopy(run.student)
        self.teacher = copy.deepcopy(run.teacher)
        self.centres = [centre.clone() for centre in run.centres]

        decayed, others = [], []
        for name, p in self.student.named_parameters():
            if name.endswith(".bias") or p.ndim == 1:
                others.append(p)
            else:
                decayed.append(p)
        groups = [dict(params=decayed), dict(params=others, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, foreach=False)

        epoch = run.steps_per_epoch
        steps = cfg.epochs * epoch
        self.lr = naive_schedule(
            cfg.lr * cfg.batch / 256, 1e-6, steps, min(10 * epoch, steps // 10)
        )
        self.weight_decay = naive_schedule(*cfg.weight_decay, steps)
        self.momentum = naive_schedule(cfg.momentum, 1.0, steps)
        self.frozen = cfg.freeze_epochs * epoch  # steps

    def loss(self, student, teacher):
        """The named terms of the loss from the logits of each head, IR then EF."""
        cfg = self.cfg
        L_CL = naive_invariance(student[0], teacher[0], self.centres[0], cfg.teacher_temp)
        if cfg.method == "dino":
            return dict(L_CL=L_CL, loss=L_CL)

        L_Orth = naive_orthogonality(student[1], teacher[1], self.centres[1], cfg.teacher_temp)
        L_PReg = naive_regularization(*self.student.heads)
        loss = L_CL + cfg.lambda_orth * L_Orth + cfg.lambda_reg * L_PReg
        return dict(L_CL=L_CL, L_Orth=L_Orth, L_PReg=L_PReg, loss=loss)

    def step(self, views, step):
        """One optimisation step from V views (B, 3, h, w); step counts from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr[step]
        self.optimizer.param_groups[0]["weight_decay"] = self.weight_decay[step]

        with torch.autocast("cpu", torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            with torch.no_grad():
                teacher = self.teacher(views[:2]).logits
            terms = self.loss(self.student(views).logits, teacher)
        self.optimizer.zero_grad()
        terms["loss"].backward()

        for name, p in self.student.named_parameters():
            factor = self.clip / (p.grad.norm().item() + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)
            if "prototypes" in name and step < self.frozen:
                p.grad = None
        self.optimizer.step()

        m = self.momentum[step]
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
                slow.mul_(m).add_((1 - m) * fast)
            for centre, logits in zip(self.centres, teacher):
                centre.mul_(0.9).add_(0.1 * logits.mean((0, 1)))
        return {name: term.detach() for name, term in terms.items()}
