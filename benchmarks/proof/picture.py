"""The proof in one picture: before and after, and all arms. The same JSON gives the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.proof.settings import BASE, CRITIC, LAYOUTS
from sima_ray.ports import JsonDict

_BLUE, _GRAY = "#0072B2", "#6E6E6E"
# Okabe and Ito's colours, told apart by most colour-blind readers; the shapes differ too.
STYLES = {
    BASE: (_GRAY, "o"),
    CRITIC.name: (_BLUE, "D"),
    **{f"{CRITIC.name}_{layout}": ("#56B4E9", "D") for layout in LAYOUTS},
    "random": ("#E69F00", "s"),
    "shorter": ("#D55E00", "v"),
    "greedy": ("#CC79A7", "^"),
    "oracle": ("#009E73", "P"),
    "critic_keep": ("#000000", "<"),
    "critic_half": ("#8C6D1F", ">"),
    "critic_balanced": ("#4B3F9E", "X"),
}
"""Colour and shape of every arm; one of the two layouts is the critic's own."""
_PANELS = {
    "chair_s": "CHAIR_s ↓\ncaptions with a\nhallucinated object",
    "recall": "recall ↑\ntrue objects\nthat are named",
    "errors": "errors ↓\na caption,\nof any kind",
}


def draw(proof: JsonDict, path: Path) -> None:
    """Write the picture.

    Args:
        proof: The whole JSON.
        path: An SVG file.
    """
    with matplotlib.rc_context({"svg.hashsalt": "proof", "svg.fonttype": "path", "font.size": 9.5}):
        figure = Figure(figsize=(11.5, 4.4), layout="constrained", facecolor="white")
        parts: Any = figure.subfigures(1, 2, width_ratios=(1.0, 1.45))
        _before_after(parts[0], proof["arms"])
        _arms(parts[1], proof["arms"])
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _before_after(part: Any, arms: JsonDict) -> None:
    part.suptitle("one round of self-critique", fontsize=11)
    for axes, (key, title) in zip(part.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        pair = (arms[BASE][key], arms[CRITIC.name][key])
        axes.set_title(title, fontsize=9)
        bars = axes.bar(
            (0, 1),
            [figure["value"] for figure in pair],
            width=0.62,
            color=("#BDBDBD", _BLUE),
            yerr=_arms_of_error(pair),
            error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "#222222"},
        )
        for bar, figure in zip(bars, pair, strict=True):
            at = (bar.get_x() + bar.get_width() / 2, figure["high"])
            axes.annotate(
                f"{figure['value']:.3f}",
                at,
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set_xticks((0, 1), ("before", "after"))
        axes.set_xlim(-0.6, 1.6)
        axes.set_ylim(0, 1.12 * max(figure["high"] for figure in pair))
        axes.spines[["top", "right"]].set_visible(False)


def _arms(part: Any, arms: JsonDict) -> None:
    part.suptitle("the same candidates, other preferences", fontsize=11)
    axes = part.subplots()
    for name, arm in arms.items():
        (color, shape), chair, recall = STYLES[name], arm["chair_s"], arm["recall"]
        axes.errorbar(
            chair["value"],
            recall["value"],
            xerr=_arms_of_error([chair]),
            yerr=_arms_of_error([recall]),
            fmt="none",
            ecolor=color,
            elinewidth=0.9,
            capsize=2,
        )
        # The points by themselves, so that the legend shows no error bars.
        size = 9 if name == CRITIC.name else 6.5
        axes.plot(
            chair["value"],
            recall["value"],
            shape,
            color=color,
            markersize=size,
            label=arm["label"],
        )
    axes.set_xlabel("CHAIR_s: less is better")
    axes.set_ylabel("recall: more is better")
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the axes: arms lie close together, so labels at the points would cover one another.
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _arms_of_error(figures: Sequence[JsonDict]) -> list[list[float]]:
    """The lengths of the intervals below and above the values; rounding must not make one negative."""
    return [
        [max(0.0, figure["value"] - figure["low"]) for figure in figures],
        [max(0.0, figure["high"] - figure["value"]) for figure in figures],
    ]
