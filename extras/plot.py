"""Learning curves of several runs in one picture. Needs matplotlib.

    python assets/plot.py runs/*/log.jsonl               writes curves.png
    python assets/plot.py runs/*/log.jsonl mine.png      writes mine.png
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {  # key of the log: (title, scale of the y axis)
    "L_CL": ("L_CL", "linear"),
    "L_Orth": ("L_Orth", "log"),
    "L_PReg": ("L_PReg", "log"),
    "IR_rank": ("effective rank of IR", "linear"),
    "EF_rank": ("effective rank of EF", "linear"),
    "EF_own": ("EF: cosine of P' and Q'", "linear"),  # with the two of BESIDE
}
BESIDE = {"EF_own": (("EF_other_view", "--"), ("EF_other_image", ":"))}


def read(path):
    """The lines of a log.jsonl, as dicts; of a step that a resumed run repeated, the later one."""
    lines = {}  # by step
    for text in Path(path).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a run is writing it, or was killed
            continue
        lines[line["step"]] = line
    return list(lines.values())


def draw(ax, lines, key, **style):
    """A curve of the lines that have the key: losses have more of them than what an epoch's end measures."""
    have = [line for line in lines if key in line]
    if have:
        marker = "." if len(have) < 30 else ""
        ax.plot([line["epoch"] for line in have], [line[key] for line in have], marker=marker, **style)


def main(paths, picture):
    logs = {path: read(path) for path in paths}
    names = [Path(path).parent.name or path for path in paths]
    names = names if len(set(names)) == len(names) else list(paths)
    plt.rcParams.update({"font.size": 11, "figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3,
                         "axes.spines.top": False, "axes.spines.right": False})
    colours = plt.get_cmap("tab10" if len(paths) <= 10 else "turbo").resampled(max(10, len(paths)))
    wide = max(map(len, names)) > 40
    rows = len(names) + 3 if wide else (len(names) + 4) // 2  # of the legend
    height = 5.6 + 0.25 * rows
    figure, axes = plt.subplots(2, 3, figsize=(9, height))
    for ax, (key, (title, scale)) in zip(axes.flat, PANELS.items()):
        for i, path in enumerate(paths):
            draw(ax, logs[path], key, color=colours(i), label=names[i])
            for other, dashes in BESIDE.get(key, ()):
                draw(ax, logs[path], other, color=colours(i), linestyle=dashes)
        if not ax.lines:
            ax.text(0.5, 0.5, "not in these logs", transform=ax.transAxes, ha="center")
        ax.set(title=title, xlabel="epoch", yscale=scale if ax.lines else "linear")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], color="black", linestyle=style) for style in ("-", "--", ":")]
    labels += ["EF: same view", "EF: other view of the image", "EF: other image"]
    figure.tight_layout(rect=(0, 0.25 * rows / height + 0.01, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=1 if wide else 2, frameon=False)
    figure.savefig(picture, dpi=130)
    print(picture)


if __name__ == "__main__":
    words = sys.argv[1:]
    logs = [word for word in words if not word.endswith(".png")]
    if not logs or not all(Path(log).is_file() for log in logs):
        sys.exit(__doc__)
    main(logs, ([word for word in words if word.endswith(".png")] or ["curves.png"])[0])
