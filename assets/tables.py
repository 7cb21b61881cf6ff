"""The tables of assets/results.md, sections 1, 2, 4 and 6, in Markdown, from the runs that its commands make.

    python assets/tables.py         in the folder that holds runs/; a table whose runs are missing is left out
"""
import json
import statistics
from pathlib import Path


def read_json(pattern):
    """The files runs/<pattern>, read."""
    return [json.loads(path.read_text()) for path in sorted(Path("runs").glob(pattern))]


def last_epochs(pattern):
    """The last line of each runs/<pattern>/log.jsonl."""
    paths = sorted(Path("runs").glob(f"{pattern}/log.jsonl"))
    return [json.loads(path.read_text().splitlines()[-1]) for path in paths]


def probes(pattern):
    """The probes of each runs/<pattern>/eval.json: {"linear all": {"orig": [top-1, top-5]}}."""
    found = []
    for sections in read_json(f"{pattern}/eval.json"):
        found += [numbers for name, numbers in sections.items() if name.startswith("probes")][:1]
    return found


def cell(values, digits=1):
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def table(head, rows):
    if rows:
        print("|" + "|".join(f" {name} " for name in head) + "|")
        print("|" + "---|" * len(head))
        for row in rows:
            print("|" + "|".join(f" {value} " for value in row) + "|")
        print()


# 1. CLeVER against DINO on CIFAR-10
rows = []
RUNS = {"untrained": "untrained-?", "DINO, BAug": "c-dino-baug-?", "CLeVER, BAug": "c-clever-baug-?",
        "DINO, CAug": "c-dino-caug-?", "CLeVER, CAug": "c-clever-caug-?"}
for name, pattern in RUNS.items():
    runs = probes(pattern)
    for part in ("all", "IR", "EF"):
        if runs and f"linear {part}" in runs[0]:
            row = [name, part]
            for probe in ("linear", "k-NN"):
                for kind in ("orig", "cj+rot"):
                    row.append(cell([run[f"{probe} {part}"][kind][0] for run in runs]))
            rows.append(row)
table(["", "part", "linear orig", "linear cj+rot", "k-NN orig", "k-NN cj+rot"], rows)

# 2. The regulariser: patterns, then CIFAR-10
LOGGED = {"L_CL": 2, "L_Orth": 3, "L_PReg": 3, "IR_entropy": 2, "IR_rank": 1, "EF_entropy": 2, "EF_std": 2,
          "EF_rank": 1, "EF_own": 4, "EF_other_view": 4, "EF_other_image": 4}  # key: digits
rows = []
for orth in ("1", "0"):
    for reg in ("0", "0.001", "0.01"):
        runs = last_epochs(f"r-{orth}-{reg}-?")
        reports = read_json(f"r-{orth}-{reg}-?/compare.json")
        after = [report["after"]["k-NN, rotated"]["IR"] for report in reports]
        if runs:
            cells = [cell([run[key] for run in runs], digits) for key, digits in LOGGED.items()]
            rows.append([orth, reg, *cells, cell(after)])
table(["λ_orth", "λ_reg", *LOGGED, "IR k-NN rotated"], rows)
rows = []
for reg, pattern in (("0", "l-0-?"), ("0.001", "c-clever-caug-?"), ("0.01", "l-0.01-?")):
    runs = last_epochs(pattern)
    if runs:
        cells = [cell([run[key] for run in runs], digits) for key, digits in LOGGED.items()]
        for kind in ("orig", "cj+rot"):
            cells.append(cell([run["linear all"][kind][0] for run in probes(pattern)]))
        rows.append([reg, *cells])
table(["λ_reg", *LOGGED, "linear all, orig", "linear all, cj+rot"], rows)

# 4. The split
rows = []
for ratio, pattern in (("0.5", "s-0.5-?"), ("0.8", "r-1-0.001-?"), ("0.9", "s-0.9-?")):
    reports = read_json(f"{pattern}/compare.json")
    for when, name in (("before", "untrained"), ("after", "trained")):
        if reports:
            row = [ratio, name]
            for what, digits in (("R2 of the angle", 2), ("k-NN, rotated", 1)):
                for part in ("all", "IR", "EF"):
                    row.append(cell([report[when][what][part] for report in reports], digits))
            rows.append(row)
table(["ρ", "", "R² all", "R² IR", "R² EF", "k-NN all", "k-NN IR", "k-NN EF"], rows)

# 6. The losses of EF on CIFAR-10
rows = []
for name in ("dino", "freed", "paper", "turn"):
    runs = probes(f"e-{name}-?")
    logs = last_epochs(f"e-{name}-?")
    told = [sections["rotation quick"]["after"] for sections in read_json(f"e-{name}-?/eval.json")]
    if runs:
        row = [name, len(runs)]
        for probe in ("linear all", "k-NN all"):
            for kind in ("orig", "cj+rot"):
                row.append(cell([run[probe][kind][0] for run in runs]))
        for part in ("all", "IR", "EF"):
            found = [after["R2 of the angle"] for after in told]
            row.append(cell([angle[part] for angle in found if part in angle], 3))
        for key in ("EF_own", "EF_other_view", "EF_other_image"):
            row.append(cell([line[key] for line in logs if key in line], 3))
        rows.append(row)
table(["", "seeds", "linear orig", "linear cj+rot", "k-NN orig", "k-NN cj+rot", "R² all", "R² IR", "R² EF",
       "same view", "other view", "other image"], rows)
