"""Draws the plot of a search with plain characters, for a terminal, from the points of the plot on
the page.
"""

from qpruner.report.plots.chart import Chart
from qpruner.report.plots.search import CONTROL, FAILED, STOPPED
from qpruner.search.roles import control_title

COLUMNS, LINES, MARGIN, LEGEND = 44, 11, 8, 26
"""Size of the plot's area, and widths of scale and legend beside it."""
MARKS = "ox+*#%&"  # of the cuts in turn, which read without colour too
Span = tuple[str, str]  # a piece of a line and its colour


def text_plot(chart: Chart) -> list[list[Span]]:
    """Draw the points: a character for each cut, numbers for the controls, the winner in brackets;
    with a legend.
    """
    points, [budget] = chart.spec["data"]["values"], chart.spec["layer"][0]["data"]["values"]
    axis, colours = (chart.spec["layer"][2]["encoding"][name] for name in ("y", "color"))
    scores = axis["scale"].get("domain") or [point["score"] for point in points]
    sizes = [point["megabytes"] for point in (budget, *points)]

    def place(size: float, score: float) -> tuple[int, int]:
        down = (max(scores) - score) / (max(scores) - min(scores) or 1)
        along = (size - min(sizes)) / (max(sizes) - min(sizes) or 1)
        return round((LINES - 1) * min(max(down, 0), 1)), 1 + round((COLUMNS - 3) * along)

    at_budget = place(budget["megabytes"], scores[0])[1]
    grid: dict[tuple[int, int], Span] = {(line, at_budget): (":", "") for line in range(LINES)}
    looks = dict(
        zip(
            colours["scale"]["domain"],
            zip(MARKS * 9, colours["scale"]["range"], strict=False),
            strict=False,
        )
    )
    legend, controls = (
        [(f"{mark} {cut}", colour) for cut, (mark, colour) in looks.items()],
        list[Span](),
    )
    for point in sorted(
        points, key=lambda each: (each["best"], each["kind"] == CONTROL, each["trial"])
    ):
        (line, column), (mark, colour) = (
            place(point["megabytes"], point["score"]),
            looks[point["cut"]],
        )
        if point["kind"] == CONTROL:
            mark = f"{len(controls) + 1:x}"
            controls.append((f"{mark} {control_title(point['origin'])}", colour))
        elif point["kind"] in (STOPPED, FAILED):
            mark = "."
        if point["best"]:
            grid |= {(line, column - 1): ("(", ""), (line, column + 1): (")", "")}
            legend.append((f"({mark}) {point['name']}", ""))
        grid[line, column] = (mark, colour)
    legend += (
        [(f". {STOPPED}", "")]
        if any(point["kind"] in (STOPPED, FAILED) for point in points)
        else []
    )
    room = LINES + 2 - len(legend)
    legend += (
        controls if len(controls) <= room else [*controls[: room - 1], ("and further controls", "")]
    )
    named = f"budget {budget['megabytes']:.1f} MB"
    below = f"{min(sizes):.1f} MB ".ljust(min(at_budget, COLUMNS - len(named))) + named
    ends = [f"{max(scores):.3f}", *[""] * (LINES - 2), f"{min(scores):.3f}"]
    cells = [
        [grid.get((line, column), (" ", "")) for column in range(COLUMNS)] for line in range(LINES)
    ]
    cells += [[(each[:COLUMNS].ljust(COLUMNS), "")] for each in ("-" * COLUMNS, below)]
    beside = [(f"  {text[:LEGEND]}", colour) for text, colour in legend]
    lines = zip([*ends, "", ""], cells, strict=True)
    return [
        [(axis["axis"]["title"], "")],
        *(
            [(f"{end:>{MARGIN - 1}} ", ""), *line, *beside[at : at + 1]]
            for at, (end, line) in enumerate(lines)
        ),
    ]
