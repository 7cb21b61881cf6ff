"""The pictures of assets/results.md, from the runs that its commands make. Needs matplotlib.

    python assets/figures.py        in the folder that holds runs/

Writes assets/robustness.png (section 3) and assets/regulariser.png (section 2), where their runs are there.
"""
import json
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

plt.rcParams.update({"font.size": 11, "figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3,
                     "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130})


def band(ax, x, rows, label):
    """The mean over seeds as a line, their range as a band: rows (seeds, points)."""
    rows = torch.tensor(rows)
    line, = ax.plot(x, rows.mean(0), marker=".", label=label)
    ax.fill_between(x, rows.amin(0), rows.amax(0), alpha=0.2, color=line.get_color())


def finish(figure, axes, path):
    """One legend below all panels; written where something was drawn."""
    handles, labels = axes[0].get_legend_handles_labels()
    if labels:
        figure.tight_layout(rect=(0, 0.12, 1, 1))
        figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
        figure.savefig(path)
        print(path)


# 3. Robustness of the runs of section 1
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
AXES = {"rot": "rotation in degrees", "elastic": "strength α of the elastic deformation"}
RUNS = {"dino-baug": "DINO, BAug", "dino-caug": "DINO, CAug", "clever-caug": "CLeVER, CAug"}
for ax, (kind, title) in zip(axes, AXES.items()):
    for run, label in RUNS.items():
        curves = []
        for path in sorted(Path("runs").glob(f"c-{run}-?/eval.json")):
            for section in json.loads(path.read_text()).values():
                if "rot=15" in section.get("linear all", {}):
                    curves.append(section["linear all"])
        if curves:
            kinds = ["orig"] + [name for name in curves[0] if name.startswith(kind + "=")]
            x = [0.0] + [float(name.split("=")[1]) for name in kinds[1:]]
            band(ax, x, [[curve[name][0] for name in kinds] for curve in curves], label)
    ax.set_xlabel(title)
axes[0].set_ylabel("linear probe, top-1, %")
finish(figure, axes, "assets/robustness.png")

# 2. The regulariser
figure, axes = plt.subplots(1, 4, figsize=(11, 3.4))
PANELS = {"L_Orth": "L_Orth", "EF_entropy": "entropy of the EF teacher", "EF_rank": "effective rank of EF",
          "L_PReg": "L_PReg"}
for ax, (key, title) in zip(axes, PANELS.items()):
    for run in ("1-0.001", "1-0", "1-0.01", "0-0.001"):
        logs = []
        for path in sorted(Path("runs").glob(f"r-{run}-?/log.jsonl")):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            logs.append([line[key] for line in lines if "EF_rank" in line])  # an epoch's last line
        if logs:
            orth, reg = run.split("-")
            band(ax, range(1, len(logs[0]) + 1), logs, f"λ_orth {orth}, λ_reg {reg}")
    ax.set(title=title, xlabel="epoch", yscale="log" if key in ("L_Orth", "L_PReg") else "linear")
    ax.title.set_size(11)
finish(figure, axes, "assets/regulariser.png")
