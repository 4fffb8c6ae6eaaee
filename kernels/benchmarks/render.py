"""Result files as a table and as a roofline picture.

cd kernels && python -m benchmarks.render benchmarks/results/FILE.json [--picture roofline.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .records import Record

OURS = "hive"


def floors(record: Record) -> dict[tuple[str, str], float]:
    """Seconds that each (shape, direction) takes, moving or multiplying, at the rates measured in the run."""
    rates = record["ceilings"]
    return {
        (name, direction): max(work["bytes"] / rates["bytes_per_second"], work["flops"] / rates["flops_per_second"])
        for name, shape in record["shapes"].items()
        for direction, work in shape["work"].items()
    }


def ratio(record: Record, row: Record) -> float | None:
    """How many times as long as ours the peer takes; None where either failed its check or has no time."""
    ours = [
        other
        for other in record["rows"]
        if (other["peer"], other["shape"], other["direction"]) == (OURS, row["shape"], row["direction"])
    ]
    if not ours or any(one["check"] != "passed" or "seconds" not in one for one in (ours[0], row)):
        return None
    return row["seconds"] / ours[0]["seconds"]


COLUMNS = ("us", "eager us", "% of floor", "TFLOP/s", "GB/s", "x ours", "peak MiB")


def table(record: Record) -> str:
    """The whole run in Markdown: one table a shape."""
    device, rates = record["device"], record["ceilings"]
    lines = [
        f"{device['name']}, driver {device.get('driver', '-')}, torch {record['torch']}, triton {record['triton']}, "
        f"commit {record['commit'][:10]}{' with changes' if record['dirty'] else ''}, {record['date'][:10]}",
        f"Measured here: {rates['bytes_per_second'] / 1e12:.3g} TB/s copied, "
        f"{rates['flops_per_second'] / 1e12:.3g} TFLOP/s multiplied.",
    ]
    if record["tiny"]:
        lines.append("TINY SHAPES ON A CPU: this proves that the suite works; the times say nothing about a GPU.")
    least = floors(record)
    for name, shape in record["shapes"].items():
        lines += ["", f"### {name}: {shape['title']}", "", f"| | | {' | '.join(COLUMNS)} | |"]
        lines.append("|---|---|" + "---:|" * len(COLUMNS) + "---|")
        for direction in shape["work"]:
            floor = least[name, direction]
            lines.append(f"| {direction} | floor | {floor * 1e6:.4g} | | 100 | | | | | |")
            lines += [
                _line(record, row, floor)
                for row in record["rows"]
                if (row["shape"], row["direction"]) == (name, direction)
            ]
    return "\n".join(lines) + "\n"


def _line(record: Record, row: Record, floor: float) -> str:
    label = row["label"] + (f" ({row['detail']})" if row["detail"] else "")
    if row["check"] != "passed":
        return f"| {row['direction']} | {label} |" + " |" * len(COLUMNS) + f" **check failed: {_cell(row['check'])}** |"
    if "seconds" not in row:
        return f"| {row['direction']} | {label} |" + " |" * len(COLUMNS) + f" {_cell(row['note'])} |"
    seconds, work = row["seconds"], record["shapes"][row["shape"]]["work"][row["direction"]]
    eager, peak, times = row.get("eager_seconds"), row.get("peak_bytes"), ratio(record, row)
    cells = [
        f"{seconds * 1e6:.4g} ±{row['spread']:.0%}",
        f"{eager * 1e6:.4g}" if eager else "",
        f"{floor / seconds:.0%}".rstrip("%"),
        f"{work['flops'] / seconds / 1e12:.3g}",
        f"{work['bytes'] / seconds / 1e9:.3g}",
        f"{times:.2f}" if times is not None else "",
        f"{peak / 2**20:.0f}" if peak is not None else "",
    ]
    return f"| {row['direction']} | {label} | {' | '.join(cells)} | {_cell(row['note'])} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def picture(record: Record, path: Path) -> None:
    """The roofline of the device and where each implementation stands under it, one panel a direction (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directions = [d for d in ("forward", "backward") if any(d in shape["work"] for shape in record["shapes"].values())]
    figure, panels = pyplot.subplots(1, len(directions), figsize=(6.5 * len(directions), 5.5), squeeze=False)
    for panel, direction in zip(panels[0], directions, strict=True):
        _roof(panel, record, direction)
        peers = dict.fromkeys(row["peer"] for row in record["rows"])
        for number, peer in enumerate(peers):
            _points(panel, record, direction, peer, number)
        panel.set(xscale="log", yscale="log", xlabel="FLOP per byte of the floor", title=direction)
        panel.set_ylim(top=8 * record["ceilings"]["flops_per_second"] / 1e12)  # room for names
        panel.grid(True, which="both", alpha=0.2)
    panels[0][0].set_ylabel("TFLOP/s")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=8, fontsize=8)
    note = " (tiny shapes, no GPU)" if record["tiny"] else ""
    figure.suptitle(f"{record['device']['name']}{note}, commit {record['commit'][:10]}, {record['date'][:10]}")
    figure.tight_layout(rect=(0, 0.05, 1, 1))  # the legend below
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _intensity(record: Record, name: str, direction: str) -> float:
    work = record["shapes"][name]["work"][direction]
    return work["flops"] / work["bytes"]


def _roof(panel: object, record: Record, direction: str) -> None:
    rates = record["ceilings"]
    names = [name for name, shape in record["shapes"].items() if direction in shape["work"]]
    ridge = rates["flops_per_second"] / rates["bytes_per_second"]
    at = sorted({ridge, *(_intensity(record, name, direction) for name in names)})
    at = [at[0] / 2, *at, at[-1] * 2]
    roof = [min(rates["flops_per_second"], x * rates["bytes_per_second"]) / 1e12 for x in at]
    panel.plot(at, roof, color="black", label="floor")  # type: ignore[attr-defined]
    labels: dict[float, list[str]] = {}
    for name in names:
        labels.setdefault(float(f"{_intensity(record, name, direction):.1e}"), []).append(name)
    for x, alike in labels.items():
        y = min(rates["flops_per_second"], x * rates["bytes_per_second"]) / 1e12
        text = ", ".join(alike)
        panel.annotate(text, (x, y), xytext=(0, 5), textcoords="offset points", fontsize=7, rotation=75)  # type: ignore[attr-defined]


def _points(panel: object, record: Record, direction: str, peer: str, number: int) -> None:
    rows = [r for r in record["rows"] if r["peer"] == peer and r["direction"] == direction and "seconds" in r]
    x = [_intensity(record, row["shape"], direction) for row in rows]
    y = [record["shapes"][r["shape"]]["work"][direction]["flops"] / r["seconds"] / 1e12 for r in rows]
    ours = peer == OURS
    panel.scatter(  # type: ignore[attr-defined]
        x, y, s=70 if ours else 25, marker="*" if ours else "osD^vPX"[number % 7], label=peer, zorder=3 if ours else 2
    )


def main() -> None:
    """Print the table of a result file, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG to draw the roofline into")
    options = parser.parse_args()
    try:
        record = json.loads(options.file.read_text(encoding="utf-8"))
        words = table(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.file} is no result file of PART=bench: {type(error).__name__} {error}")
    print(words)
    if options.picture:
        picture(record, options.picture)


if __name__ == "__main__":
    main()
