"""The tables of assets/results.md, in Markdown, from the runs that its commands make.

    python assets/tables.py         in the folder that holds runs/; a table whose runs are missing is left out
"""
import json
import statistics
from pathlib import Path

METHODS = ("dino", "freed", "paper", "turn")
COSINES = ("EF_own", "EF_other_view", "EF_other_image")


def read_json(pattern):
    """The files runs/<pattern>, read."""
    return [json.loads(path.read_text()) for path in sorted(Path("runs").glob(pattern))]


def last_epochs(pattern):
    """The last line of each runs/<pattern>/log.jsonl."""
    paths = sorted(Path("runs").glob(f"{pattern}/log.jsonl"))
    return [json.loads(path.read_text().splitlines()[-1]) for path in paths]


def section(pattern, name):
    """The section of each runs/<pattern>/eval.json whose name begins so."""
    found = []
    for sections in read_json(f"{pattern}/eval.json"):
        found += [numbers for key, numbers in sections.items() if key.startswith(name)][:1]
    return found


def cell(values, digits=1):
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def told(reports, what, digits):
    """Cells of all, IR and EF of what `clever.compare` told after training."""
    cells = []
    for part in ("all", "IR", "EF"):
        rows = [report["after"][what] for report in reports]
        cells.append(cell([row[part] for row in rows if part in row], digits))
    return cells


def table(head, rows):
    if rows:
        print("|" + "|".join(f" {name} " for name in head) + "|")
        print("|" + "---|" * len(head))
        for row in rows:
            print("|" + "|".join(f" {value} " for value in row) + "|")
        print()


# 1 and 5. CIFAR-10 with BAug, with CAug; tiny100
KINDS = [(probe, kind) for probe in ("linear", "k-NN") for kind in ("orig", "cj+rot")]
for runs in ("b", "e", "t"):
    rows = []
    for name in (("untrained", *METHODS) if runs == "b" else METHODS):  # once: it is CIFAR-10's
        pattern = "untrained-?" if name == "untrained" else f"{runs}-{name}-?"
        probes = section(pattern, "probes")
        for part in ("all", "IR", "EF"):
            if probes and f"linear {part}" in probes[0]:
                cells = [cell([run[f"{probe} {part}"][kind][0] for run in probes]) for probe, kind in KINDS]
                rows.append([name, part, len(probes), *cells])
    table([runs, "part", "seeds", *(" ".join(kind) for kind in KINDS)], rows)

# 2. What EF knows, on CIFAR-10
rows = []
for runs in ("b", "e"):
    for name in METHODS:
        reports = section(f"{runs}-{name}-?", "rotation")
        logs = [line for line in last_epochs(f"{runs}-{name}-?") if "EF_own" in line]
        if reports:
            cosines = [cell([line[key] for line in logs], 3) for key in COSINES]
            rows.append([f"{runs} {name}", *told(reports, "R2 of the angle", 3), *cosines])
table(["", "R² all", "R² IR", "R² EF", "same view", "other view", "other image"], rows)

# 3. The losses of EF, and 4. the split, on patterns
for runs in (METHODS, ("s-0.5", "s-0.8", "s-0.9")):
    rows = []
    for name in runs:
        reports = read_json(f"{name}-?/compare.json")
        if reports:
            upright = told(reports, "k-NN, upright", 1)[0]  # of all
            rotated = told(reports, "k-NN, rotated", 1)
            rows.append([name, len(reports), upright, *rotated, *told(reports, "R2 of the angle", 2)])
    table(["", "seeds", "k-NN all, upright", "k-NN all, rotated", "k-NN IR, rotated", "k-NN EF, rotated",
           "R² all", "R² IR", "R² EF"], rows)
