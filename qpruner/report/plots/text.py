"""Draws the plot of a search with plain characters, for a terminal, from the points of the plot on the page."""

from qpruner.report.plots.chart import Chart, Spec
from qpruner.report.plots.search import CONTROL, FAILED, STOPPED
from qpruner.report.results import control_title

COLUMNS, LINES, MARGIN, LEGEND = 44, 11, 8, 26
"""Size of the plot's area, and the widths of the scale on its left and the legend on its right."""
MARKS = "ox+*#%&"  # of the cuts in turn, which read without colour too
Span = tuple[str, str]  # a piece of a line and its colour
Grid = dict[tuple[int, int], Span]


def text_plot(chart: Chart) -> list[list[Span]]:
    """Draw the points: a character for each cut, numbers for the controls, the winner in brackets; with a legend."""
    points, budget = chart.spec["data"]["values"], chart.spec["layer"][0]["data"]["values"][0]["megabytes"]
    scale = chart.spec["layer"][1]["encoding"]["y"]
    scores = scale["scale"].get("domain") or [point["score"] for point in points]
    sizes = [budget, *(point["megabytes"] for point in points)]
    low, high, least, most = min(scores), max(scores), min(sizes), max(sizes)

    def place(point: Spec) -> tuple[int, int]:
        up = (min(max(point["score"], low), high) - low) / (high - low or 1)
        along = (point["megabytes"] - least) / (most - least or 1)
        return round((LINES - 1) * (1 - up)), 1 + round((COLUMNS - 3) * along)

    colours = chart.spec["layer"][2]["encoding"]["color"]["scale"]
    looks = {cut: (MARKS[at % len(MARKS)], colours["range"][at]) for at, cut in enumerate(colours["domain"])}
    at_budget = place({"score": low, "megabytes": budget})[1]
    grid: Grid = {(line, at_budget): (":", "") for line in range(LINES)}
    legend: list[Span] = [(f"{mark} {cut}", colour) for cut, (mark, colour) in looks.items()]
    controls: list[Span] = []
    for point in sorted(points, key=lambda each: (each["best"], each["kind"] == CONTROL, each["trial"])):
        (line, column), (mark, colour) = place(point), looks[point["cut"]]
        if point["kind"] == CONTROL:
            mark = f"{len(controls) + 1:x}"
            controls.append((f"{mark} {control_title(point['origin'])}", colour))
        elif point["kind"] in (STOPPED, FAILED):
            mark = "."
        if point["best"]:
            grid |= {(line, column - 1): ("(", ""), (line, column + 1): (")", "")}
            legend.append((f"({mark}) {point['name']}", ""))
        grid[line, column] = (mark, colour)
    if any(point["kind"] in (STOPPED, FAILED) for point in points):
        legend.append((f". {STOPPED}", ""))
    room = LINES + 2 - len(legend)
    legend += controls if len(controls) <= room else [*controls[: room - 1], ("and further controls", "")]
    ends = [f"{high:.3f}", *[""] * (LINES - 2), f"{low:.3f}"]
    below = f"{least:.1f} MB".ljust(max(0, at_budget - 13)) + f" budget {budget:.1f} MB"
    body = [
        [(f"{end:>{MARGIN - 1}} ", ""), *(grid.get((line, column), (" ", "")) for column in range(COLUMNS))]
        for line, end in enumerate(ends)
    ]
    body += [[(" " * MARGIN + each.ljust(COLUMNS)[:COLUMNS], "")] for each in ("-" * COLUMNS, below)]
    beside = [(f"  {text[:LEGEND]}", colour) for text, colour in legend]
    return [[(scale["axis"]["title"], "")], *([*line, *beside[at : at + 1]] for at, line in enumerate(body))]
