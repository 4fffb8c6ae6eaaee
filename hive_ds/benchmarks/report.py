"""A result of `hive_ds.benchmarks.step` as a table and as a picture.

python -m hive_ds.benchmarks.report FILE.json [--picture bars.png]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hive_ds.errors import HiveError, run_command, told_as

OURS = ("ours compiled", "ours")
"""What the others are compared with: the first of these that was timed."""
STEADY = 0.1
"""Rounds that differ by more make a row that says little."""
COLUMNS = ("ms/step", "images/s", "text tokens/s", "MFU %", "peak GiB", "x ours in time")


def table(result: dict[str, Any]) -> str:
    """The whole run in Markdown: one table a workload, then what was left out."""
    lines = [
        f"Stage {result['stage']}, {result['models']}, {result['precision']}; measured here: "
        f"{result['matmul_flops_per_second'] / 1e12:.4g} TFLOP/s of a large matrix product."
    ]
    if "device" in result:
        device = result["device"]
        lines[0] += f" {device['name']}, driver {device.get('driver', '-')}, commit {result['commit'][:10]}."
    if result["tiny"]:
        lines.append("TINY MODELS ON A CPU: this proves that the suite works; the times say nothing about a GPU.")
        lines.append("Nothing was compiled here, whatever a row's name says.")
    for name in dict.fromkeys(row["workload"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["workload"] == name]
        lines += ["", f"### {name}", "", f"| | {' | '.join(COLUMNS)} | where the time goes |"]
        lines.append("|---|" + "---:|" * len(COLUMNS) + "---|")
        lines += [_line(row, _ours(rows)) for row in rows]
        unsteady = [row["label"] for row in rows if row.get("spread", 0) > STEADY]
        if unsteady:
            lines += ["", f"Not steady, rounds differ by more than {STEADY:.0%}: {'; '.join(unsteady)}."]
        speedup = _allowed(rows)
        if speedup:
            lines += ["", speedup]
    lines += _best_batches(result["rows"])
    lines += ["", *(f"Skipped: {one['what']}: {one['why']}" for one in result["skipped"])]
    return "\n".join(lines) + "\n"


def _ours(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    timed = {row["arm"]: row for row in rows if "seconds" in row}
    return next((timed[name] for name in OURS if name in timed), None)


def _line(row: dict[str, Any], ours: dict[str, Any] | None) -> str:
    if "seconds" not in row:
        return f"| {row['label']} |" + " |" * len(COLUMNS) + f" **check failed: {row['check']}** |"
    peak = row["peak_bytes"]
    shares = [f"{name} {share:.0%}" for name, share in row["shares"].items() if share >= 0.005]
    cells = [
        f"{row['seconds'] * 1e3:.4g} ±{row['spread'] / 2:.0%}",
        f"{row['images_per_second']:.4g}",
        f"{row['text_tokens_per_second']:.4g}",
        f"{100 * row['mfu']:.3g}",
        f"{peak / 2**30:.3g}" if peak else "",
        f"{row['seconds'] / ours['seconds']:.2f}" if ours else "",
    ]
    return f"| {row['label']} | {' | '.join(cells)} | {', '.join(shares)} |"


def _allowed(rows: list[dict[str, Any]]) -> str | None:
    """How much of the speed-up over SA that the counted FLOPs allow is there."""
    ours, timed = _ours(rows), {row["arm"]: row for row in rows if "seconds" in row}
    if ours is None or "sa" not in timed:
        return None
    sa = timed["sa"]
    allowed, found = sa["flops"] / ours["flops"], sa["seconds"] / ours["seconds"]
    return f"Over SA: {found:.2f} times as fast; counted FLOPs allow {allowed:.2f} ({found / allowed:.2f} of that)."


def _best_batches(rows: list[dict[str, Any]]) -> list[str]:
    """Each way at its fastest batch beside ours at its own, of texts that were timed in several."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    batches: dict[str, set[str]] = {}
    for row in rows:
        texts = row["workload"].rpartition(" x ")[0]
        if "seconds" in row:
            batches.setdefault(texts, set()).add(row["workload"])
            before = best.setdefault(texts, {}).get(row["arm"])
            if before is None or row["images_per_second"] > before["images_per_second"]:
                best[texts][row["arm"]] = row
    lines = []
    for texts, ways in best.items():
        ours = _ours(list(ways.values()))
        if len(batches[texts]) < 2 or ours is None:
            continue
        for row in ways.values():
            found = ours["images_per_second"] / row["images_per_second"]
            allowed = (row["flops"] / row["micro_batch"]) / (ours["flops"] / ours["micro_batch"])
            cells = (texts, row["label"], f"{row['micro_batch']:.4g}", f"{row['images_per_second']:.4g}")
            lines.append(f"| {' | '.join(cells)} | {found:.2f} | {allowed:.2f} | {found / allowed:.2f} |")
    if not lines:
        return []
    head = "| texts | | best batch | images/s | ours is times as fast | counted FLOPs allow | of that |"
    return ["", "### At the best batch of each", "", head, "|---|---|---:|---:|---:|---:|---:|", *lines]


def picture(result: dict[str, Any], path: Path) -> None:
    """Milliseconds of a step by part, a bar for each way of training, one panel a workload (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "seconds" in row]
    if not rows:
        raise HiveError("nothing was timed; expected a row with a time to draw")
    names = list(dict.fromkeys(row["workload"] for row in rows))
    # Of a row that is not traced, or that ended before its trace was read, the whole.
    shares = {id(row): row["shares"] or {"not told apart": 1.0} for row in rows}
    parts = list(dict.fromkeys(part for row in rows for part in shares[id(row)]))
    figure, panels = pyplot.subplots(len(names), 1, figsize=(10, 1.2 + 2.2 * len(names)), squeeze=False)
    for panel, name in zip(panels[:, 0], names, strict=True):
        own = [row for row in rows if row["workload"] == name][::-1]
        lefts = [0.0] * len(own)
        for number, part in enumerate(parts):
            widths = [1e3 * row["seconds"] * shares[id(row)].get(part, 0) for row in own]
            panel.barh([row["arm"] for row in own], widths, left=lefts, label=part, color=f"C{number}")
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        panel.set(title=name, xlabel="ms a step")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    note = " (tiny models on a CPU)" if result["tiny"] else ""
    figure.suptitle(f"Stage {result['stage']}, {result['models']}{note}")
    figure.tight_layout(rect=(0, 0.6 / (1.2 + 2.2 * len(names)), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Print the table of a result file, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG to draw the bars into")
    options = parser.parse_args()
    with told_as(str(options.file), "a result file of hive_ds.benchmarks.step"):
        result = json.loads(options.file.read_text(encoding="utf-8"))
        words = table(result)
    print(words)
    if options.picture:
        picture(result, options.picture)


if __name__ == "__main__":
    sys.exit(run_command(main))
