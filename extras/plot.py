"""Learning curves of runs in one picture. Needs matplotlib.

python extras/plot.py runs/*/log.jsonl                     writes curves.png into the
                                                           folder that the runs share
python extras/plot.py runs/*/log.jsonl picture.png
python extras/plot.py --ef runs/paper/log.jsonl runs/turn/log.jsonl ef.png
                                                           the cosines of EF, one panel per run
"""

import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NOT_DRAWN = ("step", "epoch", "lr", "images_per_second")
DASHES = {"IR": "-", "EF": "--"}
COSINES = dict(EF_own="its own view", EF_other_view="another view", EF_other_image="another image")
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def read(path):
    """The lines of a log, as dicts. A resumed run may repeat steps: the later line counts."""
    lines = {}
    for text in Path(path).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a run is writing it, or was killed while writing
            continue
        lines[line["step"]] = line
    return list(lines.values())


def draw(ax, lines, key, **style):
    """A curve over the epochs, from the lines that have the key."""
    points = [(line["epoch"], line[key]) for line in lines if key in line]
    marker = "." if len(points) < 30 else ""
    ax.plot(*zip(*points), marker=marker, **style)


def panels(logs):
    """What the logs hold, as {title: its keys}: IR_rank and EF_rank share the panel "rank"."""
    keys = dict.fromkeys(key for lines in logs for line in lines for key in line)
    titles = {}
    for key in sorted(keys, key=lambda key: key[:3] in ("IR_", "EF_")):  # loss terms first
        if key not in NOT_DRAWN:
            title = key.removeprefix("IR_").removeprefix("EF_")
            titles.setdefault(title, []).append(key)
    return titles


def draw_curves(paths, picture):
    """One panel for each loss term and metric; one colour for each run."""
    logs = [read(path) for path in paths]
    titles = panels(logs)
    rows = -(-len(titles) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(13, 2.6 * rows), squeeze=False)
    colours = plt.get_cmap("tab10" if len(paths) <= 10 else "turbo").resampled(max(10, len(paths)))

    for ax in axes.flat[len(titles) :]:
        ax.axis("off")
    for ax, (title, keys) in zip(axes.flat, titles.items()):
        for i, lines in enumerate(logs):
            for key in keys:
                if any(key in line for line in lines):
                    draw(ax, lines, key, color=colours(i), linestyle=DASHES.get(key[:2], "-"))
        values = [line[key] for lines in logs for line in lines for key in keys if key in line]
        wide = min(values) > 0 and max(values) > 30 * min(values)
        ax.set(title=title, xlabel="epoch", yscale="log" if wide else "linear")

    handles = [plt.Line2D([], [], color=colours(i)) for i in range(len(paths))]
    names = [str(Path(path).parent) for path in paths]
    for part, dashes in DASHES.items():
        handles.append(plt.Line2D([], [], color="black", linestyle=dashes))
        names.append(part)
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(picture, dpi=100)


def draw_ef(paths, picture):
    """The three cosines of P' with Q' over the epochs: equal if EF ignores the view."""
    figure, axes = plt.subplots(1, len(paths), figsize=(6, 2.6), sharey=True, squeeze=False)
    for ax, path in zip(axes.flat, paths):
        config = json.loads(Path(path).with_name("config.json").read_text())
        lines = read(path)
        for (key, name), dashes in zip(COSINES.items(), ("-", "--", ":")):
            draw(ax, lines, key, label=name, linestyle=dashes, linewidth=2)
        ax.set(title=config.get("training") or "the paper's losses", xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes.flat[0].set(ylabel="cosine of EF with", ylim=(0, None))
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=200)  # 1,200 pixels wide, sharp when shown at 600


def main(words):
    paths = [word for word in words if word.endswith(".jsonl")]
    if not paths:
        sys.exit(__doc__)

    folder = os.path.commonpath([Path(path).resolve().parent for path in paths])
    picture = words[-1] if words[-1].endswith(".png") else Path(folder, "curves.png")
    plt.rcParams.update({**STYLE, "figure.constrained_layout.use": True})
    if "--ef" in words:
        draw_ef(paths, picture)
    else:
        draw_curves(paths, picture)
    print(picture)


if __name__ == "__main__":
    main(sys.argv[1:])
