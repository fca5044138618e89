"""Tables, figures and verbatim answers of an evaluated run, as one page that needs no other file.

    python benchmarks/report.py runs/tiny            reads its evaluation.json, writes report.html and report.png
"""
import base64
import html
import io
import json
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import folds  # noqa: E402
import instructions  # noqa: E402
import sweep  # noqa: E402
import tax  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(report):
    """Gains of gold and proxy over sqrt(KL), measured and fitted, and the win rates -> a PNG's bytes."""
    curves = report.get("gold_proxy", {})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (path, name), colour in zip(product(("best_of", "ppo"), ("proxy", "gold")), plt.cm.Paired((1, 0, 5, 4))):
        if points := curves.get(path):
            d = np.sqrt([p["kl"] for p in points])
            left.plot(d, [p[name] for p in points], "o", color=colour, label=f"{path.replace('_', '-')}, {name}")
            if path in curves["fit"]:
                (a, b), x = curves["fit"][path][name], np.linspace(min(d) / 2, max(d), 99)
                left.plot(x, x * (a - b * (np.log(x) if path == "ppo" else x)), color=colour)
    left.set(xlabel="square root of KL from the SFT model, nats", ylabel="gain over the SFT model")
    left.axhline(0, color="grey", lw=0.8)
    if curves:
        left.legend(frameon=False)
    rows = {name.replace("_", " "): found["overall"] for name, found in report["win_rate"].items()}
    means = [100 * e["mean"] for e in rows.values()]
    right.barh(list(rows), means, color="tab:blue", xerr=np.abs([[m - 100 * e["low"], 100 * e["high"] - m]
                                                                for m, e in zip(means, rows.values())]).T if rows else None)
    right.axvline(50, color="grey", lw=0.8)
    right.set(xlabel="preferred by the judge, %", xlim=(0, 100))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    plt.close(figure)
    return drawn.getvalue()


def weighted(row):
    """{category: estimate} -> their mean with the weights of InstructGPT's Table 1, with its 95 % interval."""
    weights = world.TABLE_1
    share = {c: weights[c] / sum(weights.values()) for c in weights}
    mean = sum(share[c] * row[c]["mean"] for c in share)
    half = sum((share[c] * (row[c]["high"] - row[c]["low"]) / 2) ** 2 for c in share) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": sum(row[c]["n"] for c in share)}


ADDED = {"attempted": instructions.table, "constraints": instructions.constraints_table,
         "few_shot_tasks": tax.table, "labeler_folds": folds.table}      # key of evaluation.json -> its table


def experiments(report):
    """The categories as often as the paper's users asked, and what other experiments added -> [(title, columns, {row: [str]})]"""
    yield "win rate, %, with the weights of InstructGPT's Table 1", ["overall"], {
        name: [evaluate.cell(weighted(row))] for name, row in report["win_rate"].items()}
    yield from (table(report[key]) for key, table in ADDED.items() if key in report)
    yield from (sweep.table(key.removeprefix("sweep_"), rows) for key, rows in report.items() if key.startswith("sweep_"))


def page(report):
    """report.html: tables, figures and answers in one file that needs no other."""
    parts = ["<!doctype html><meta charset=utf-8><title>What each step bought</title><style>body{font:15px/1.5 "
             "system-ui;margin:2em auto;max-width:75em;padding:0 1em;color-scheme:light dark}td,th{padding:.2em .7em;"
             "text-align:left;vertical-align:top;white-space:pre-wrap}img{max-width:100%;background:#fff}</style>"]
    parts.append('<img alt="gold and proxy against KL; win rates" src="data:image/png;base64,'
                 + base64.b64encode(draw(report)).decode() + '">')
    answers = {row["prompt"]: list(row.values())[1:] for row in report["answers"]}
    for title, columns, rows in (*evaluate.tables(report), *experiments(report), ("ten prompts, greedy", list(report["answers"][0])[1:], answers)):
        lines = [[title, *columns], *([name, *cells] for name, cells in rows.items())]
        parts.append("<table>" + "".join("<tr><td>" + "<td>".join(map(html.escape, line)) for line in lines) + "</table><hr>")
    return "\n".join(parts)


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    path = Path(sys.argv[1]) / "evaluation.json"
    report = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    if "win_rate_greedy" not in report:         # not there, or of an earlier version, or of an experiment alone
        sys.exit(f"error: {path} does not hold what is needed. Make it first: python evaluate.py --out {path.parent}")
    (path.parent / "report.png").write_bytes(draw(report))
    (path.parent / "report.html").write_text(page(report), encoding="utf8")
    print(f"{path.parent / 'report.html'} and report.png")


if __name__ == "__main__":
    training.command(main)
