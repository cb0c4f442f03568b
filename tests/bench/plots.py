"""Draw the plots that stdin describes as JSON into a directory, as SVG that is the same for the same numbers.

python -m tests.bench.plots DIRECTORY
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

SIZE_INCHES = (7, 4.2)
IDEAL = {"linestyle": "--", "color": "0.6", "marker": ""}
# A fixed salt and no date: a plot that is drawn again from the same numbers is no change for git.
STYLE = {"svg.hashsalt": "bench", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3}


def draw(pyplot: Any, plot: dict[str, Any], directory: Path) -> None:
    """Draw one."""
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES, layout="constrained")
    for line in plot["lines"]:
        style = IDEAL if line["is_ideal"] else {"marker": "o", "markersize": 4}
        axes.plot(line["xs"], line["ys"], label=line["name"], **style)
    axes.set(title=plot["title"], xlabel=plot["x_label"], ylabel=plot["y_label"])
    if plot["log_x"]:
        axes.set_xscale("log")
    if plot["log_y"]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(directory / f"{plot['name']}.svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Draw all that stdin asks for."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    pyplot = import_module("matplotlib.pyplot")
    for plot in json.load(sys.stdin):
        draw(pyplot, plot, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
