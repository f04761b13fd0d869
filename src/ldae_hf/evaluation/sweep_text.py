"""Sweeps as plain text."""

PLACES = {"sweep_depth": ("block", "part"), "sweep_timestep": ("timestep", "noise"), "sweep_layers": ("layer", "pool")}


def sweep_table(row: dict) -> str:
    """A line for each point: where it is, top-1 in percent, on held-out samples and on the test set, and the paper's.

    The best one on held-out samples is marked.
    """
    places, points = PLACES[row["task"]], row["points"]
    paper = any("paper_top1" in point for point in points)
    lines = [(*places, "held out", "top-1", *(["paper"] if paper else []))]
    for point in points:
        numbers = [point["held_out_top1"], point["top1"], *([point.get("paper_top1")] if paper else [])]
        lines.append((*(str(point[place]) for place in places), *("" if n is None else f"{n:.1f}" for n in numbers)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for number, line in enumerate(lines, start=-1):
        cells = zip(line, widths, (str.rjust, str.ljust, *[str.rjust] * 3), strict=False)
        mark = "  best on held-out samples" if number == row["best"] else ""
        text.append("  ".join(align(cell, width) for cell, width, align in cells) + mark)
    return "\n".join([*text, *([row["note"]] if "note" in row else [])])
