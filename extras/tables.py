"""The tables of results.md in Markdown, from the runs of its commands: `python extras/tables.py`

Reads runs/<letter>-<method>-<seed> in the current folder; `TITLES` explains the letters. Cells are
mean ± standard deviation over the seeds; differences are mean ± standard error.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clever import print_table  # noqa: E402

TITLES = dict(
    b="CIFAR-10, baug", c="CIFAR-10, caug", e="CIFAR-10, caug+", t="tiny100, caug", p="patterns"
)
PROBES = (("linear", "orig"), ("linear", "cj+rot"), ("k-NN", "orig"), ("k-NN", "cj+rot"))
KNN = ("k-NN, upright", "k-NN, rotated")  # of clever.py
R2 = "R2 of the angle"
COSINES = ("EF_own", "EF_other_view", "EF_other_image")


def read_evaluation(folder):
    """{part: [accuracies in the order of PROBES, R2]} from the last probes in eval.json."""
    path = folder / "eval.json"
    if not path.exists():
        return {}

    parts = {}
    for section in json.loads(path.read_text()).values():
        if "compare" not in section:  # fine-tuning
            continue
        for part, r2 in section["compare"]["after"][R2].items():
            accuracies = [section[probe][part][kind][0] for probe, kind in PROBES]
            parts[part] = [*accuracies, r2]
    return parts


def read_comparison(folder):
    """{part: [accuracies in the order of KNN, R2]} from compare.json."""
    path = folder / "compare.json"
    if not path.exists():
        return {}
    after = json.loads(path.read_text())["after"]
    return {part: [after[name][part] for name in (*KNN, R2)] for part in after[R2]}


def read_cosines(folder):
    """{"EF": the cosines in the order of COSINES} at the last epoch's end in log.jsonl."""
    path = folder / "log.jsonl"
    texts = path.read_text().splitlines() if path.exists() else []
    lines = [json.loads(text) for text in texts if COSINES[0] in text]
    return {"EF": [lines[-1][key] for key in COSINES]} if lines else {}


def collect(letter, read):
    """What `read` returns of each run, {method: {seed: {part: [numbers]}}}."""
    methods = {}
    for folder in sorted(Path("runs").glob(f"{letter}-*-*")):
        method, seed = folder.name[2:].rsplit("-", 1)
        parts = read(folder)
        if parts:
            methods.setdefault(method, {})[seed] = parts
    return methods


def mean(values, digits):
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values):.{digits}f}"


def difference(values, digits):
    text = f"{statistics.mean(values):+.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def cells(seeds, digits, summary=mean):
    """A cell for each column from the lists of numbers of all seeds."""
    return [summary(values, d) for values, d in zip(zip(*seeds), digits)]


def show(title, head, rows):
    if rows:
        print(f"\n{title}\n")
        print_table(head, rows)


def show_parts(title, methods, columns, digits):
    """A row for each method and part; then the differences to DINO on all of z, seed by seed."""
    rows = []
    for method, seeds in methods.items():
        runs = list(seeds.values())
        for part in runs[0]:
            numbers = [run[part] for run in runs]
            rows.append([method, part, str(len(runs)), *cells(numbers, digits)])
    show(title, ["", "part", "seeds", *columns], rows)

    rows = []
    for method, seeds in methods.items():
        gains = []
        for seed, parts in seeds.items():
            dino = methods.get("dino", {}).get(seed)
            if dino and method != "dino":
                gains.append([a - b for a, b in zip(parts["all"], dino["all"])])
        if gains:
            rows.append([method, str(len(gains)), *cells(gains, digits, difference)])
    show(f"{title}: difference to DINO, all", ["", "seeds", *columns], rows)


def main():
    if not any(Path("runs").glob("[bcetp]-*-*")):
        sys.exit("no runs here: extras/results.md has the commands that make them")

    for letter in "bcet":
        columns = [*[" ".join(probe) for probe in PROBES], "R² of the angle"]
        show_parts(TITLES[letter], collect(letter, read_evaluation), columns, (1, 1, 1, 1, 3))
    columns = [*KNN, "R² of the angle"]
    show_parts(TITLES["p"], collect("p", read_comparison), columns, (1, 1, 3))

    rows = []
    for letter, title in TITLES.items():
        for method, seeds in collect(letter, read_cosines).items():
            numbers = [parts["EF"] for parts in seeds.values()]
            rows.append([title, method, str(len(numbers)), *cells(numbers, (3, 3, 3))])
    columns = ["its own view", "another view", "another image"]
    show("Cosine of EF with ...", ["", "", "seeds", *columns], rows)


if __name__ == "__main__":
    main()
