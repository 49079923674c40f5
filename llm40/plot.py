"""The course's one style of figure, and the few kinds of picture that many lessons draw.

Importing this module sets the style. Lines differ in lightness and dash as well as in hue, and every color scale runs
monotonically from light to dark, so that figures can be read in grey and by the color-blind.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's palette (2008), ordered so that neighbors differ in lightness; black, and its pale yellow left out.
COLORS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
SEQUENTIAL = "mako_r"  # light is little, dark is much (seaborn's)
DIVERGING = "vlag"  # around a center (seaborn's)
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Serif CJK SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
)


def set_style() -> None:
    """The style of every figure in the course."""
    installed = set(font_manager.get_font_names())
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.family": ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in installed)],
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#555555",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=DASHES),
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.8,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "legend.handlelength": 2.8,
        }
    )


set_style()


def heatmap(
    matrix: Tensor | np.ndarray,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    unit: str = "",
    xticks: Sequence[Any] | None = None,
    yticks: Sequence[Any] | None = None,
    center: float | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    annotate: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """A matrix as colors: row 0 at the top. `unit` names the color bar; `annotate` is a format such as ".2f".

    With `center` the scale diverges from that value. `xticks` and `yticks` are labels, one a column and one a row.
    """
    import seaborn as sns  # a second's import that only heat maps need

    values = array(matrix)
    if ax is None:
        _, ax = plt.subplots(figsize=(1.8 + 0.34 * min(values.shape[1], 24), 1.2 + 0.3 * min(values.shape[0], 24)))
    sns.heatmap(
        values,
        ax=ax,
        cmap=SEQUENTIAL if center is None else DIVERGING,
        center=center,
        vmin=vmin,
        vmax=vmax,
        annot=bool(annotate),
        fmt=annotate or ".2g",
        square=True,
        linewidths=0.4 if values.size < 700 else 0,
        linecolor="white",
        cbar=colorbar,
        cbar_kws={"label": unit, "shrink": 0.8} if colorbar else None,
        xticklabels="auto" if xticks is None else list(xticks),
        yticklabels="auto" if yticks is None else list(yticks),
    )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title)
    ax.tick_params(length=0, labelsize=8)
    ax.tick_params(axis="y", rotation=0)
    if xticks is not None and max((len(str(tick)) for tick in xticks), default=0) > 2:
        ax.tick_params(axis="x", rotation=90)
    return ax


def attention(
    weights: Tensor,
    tokens: Sequence[str],
    *,
    keys: Sequence[str] | None = None,
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Attention weights (q_len, k_len): a row is a query, its weights over the keys sum to 1."""
    return heatmap(
        weights,
        xlabel="key: what is looked at",
        ylabel="query: who looks",
        title=title,
        unit="weight",
        xticks=tokens if keys is None else keys,
        yticks=tokens,
        vmin=0,
        vmax=1,
        colorbar=colorbar,
        ax=ax,
    )


def heads(weights: Tensor, *, titles: Sequence[str] | None = None, columns: int = 4, size: float = 2.2) -> Figure:
    """Attention weights of many heads (heads, q_len, k_len) as small multiples on one scale from 0 to 1."""
    count = len(weights)
    rows = math.ceil(count / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(size * columns + 0.8, size * rows + 0.3), squeeze=False, sharex=True, sharey=True
    )
    image = None
    for i, ax in enumerate(axes.flat):
        if i >= count:
            ax.set_visible(False)
            continue
        image = ax.imshow(array(weights[i]), cmap=_sequential(), vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(titles[i] if titles is not None else f"head {i}", fontsize=9)
        ax.grid(False)
        ax.tick_params(labelsize=7)
    fig.supxlabel("key position", fontsize=9)
    fig.supylabel("query position", fontsize=9)
    fig.colorbar(image, ax=axes, label="weight", shrink=0.8)
    return fig


def curves(
    x: Sequence[float] | Tensor,
    lines: Mapping[str, Any],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    logx: bool = False,
    logy: bool = False,
    bands: Mapping[str, tuple[Any, Any]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Lines over one x, each with its name; `bands` gives a line's lower and upper bound, drawn as a shade."""
    if ax is None:
        _, ax = plt.subplots(figsize=(6.2, 3.6))
    for name, y in lines.items():
        (line,) = ax.plot(array(x), array(y), label=name)
        if bands and name in bands:
            low, high = bands[name]
            ax.fill_between(array(x), array(low), array(high), color=line.get_color(), alpha=0.15, linewidth=0)
    if logx:
        ax.set_xscale("log", base=2)
    if logy:
        ax.set_yscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title)
    if len(lines) > 1:
        ax.legend()
    return ax


def roofline(
    points: Mapping[str, tuple[float, float | None]],
    *,
    peak: float,
    bandwidth: float,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """The roofline of a machine of `peak` FLOP/s and `bandwidth` bytes/s, with work placed on it.

    A point is (arithmetic intensity in FLOP/byte, achieved FLOP/s); without a measurement (None) it is drawn, hollow,
    on the roof: the most this intensity allows.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6.2, 3.8))
    ridge = peak / bandwidth
    intensities = [intensity for intensity, _ in points.values()] + [ridge]
    x = np.geomspace(min(intensities) / 4, max(intensities) * 4, 200)
    ax.plot(x, np.minimum(peak, x * bandwidth) / 1e12, color="#555555", linestyle="-")
    ax.axvline(ridge, color="#aaaaaa", linestyle=":", linewidth=1)
    ax.annotate(
        f"ridge: {ridge:.0f} FLOP/byte",
        (ridge, x[0] * bandwidth / 1e12),
        fontsize=8,
        rotation=90,
        ha="right",
        va="bottom",
        color="#555555",
    )
    for i, (name, (intensity, achieved)) in enumerate(points.items()):
        y = (min(peak, intensity * bandwidth) if achieved is None else achieved) / 1e12
        color = COLORS[i % len(COLORS)]
        ax.plot(intensity, y, "o", color=color, markerfacecolor="white" if achieved is None else color, markersize=7)
        on_flat_roof = intensity > ridge  # near the right edge: the name goes below the point
        ax.annotate(
            name,
            (intensity, y),
            textcoords="offset points",
            xytext=(0, -14) if on_flat_roof else (7, -11),
            ha="center" if on_flat_roof else "left",
            fontsize=8,
        )
    ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="TFLOP/s")
    ax.set_title(title)
    return ax


def graph(nodes: Mapping[Any, str], edges: Iterable[tuple[Any, Any]], *, ax: Axes | None = None) -> Axes:
    """A directed graph without cycles: boxes with text (`nodes`, by key) and arrows (`edges`, pairs of keys).

    A node stands in the column of its longest way from a node without predecessors; those are drawn on a shade. Edges
    that pass over a column are bent. Raises ValueError for an unknown key or a cycle.
    """
    edges = list(edges)
    unknown = {end for edge in edges for end in edge} - nodes.keys()
    if unknown:
        raise ValueError(f"edges name what is no node: {sorted(map(str, unknown))}")
    before = {key: [start for start, end in edges if end == key] for key in nodes}
    column: dict[Any, int] = {}
    for key in TopologicalSorter(before).static_order():  # a CycleError is a ValueError
        column[key] = 1 + max((column[start] for start in before[key]), default=-1)
    rows: dict[int, list[Any]] = {}
    for key in nodes:
        rows.setdefault(column[key], []).append(key)
    height = max(map(len, rows.values()))
    place = {key: (2.6 * x, 1.5 * ((len(keys) - 1) / 2 - i)) for x, keys in rows.items() for i, key in enumerate(keys)}
    if ax is None:
        _, ax = plt.subplots(figsize=(2.2 * len(rows) + 0.8, 1.3 * height + 0.8), layout="none")
    boxes = {
        key: ax.text(
            *place[key],
            text,
            ha="center",
            va="center",
            fontsize=10,
            bbox={
                "boxstyle": "round,pad=0.5",
                "edgecolor": COLORS[0],
                "facecolor": "white" if before[key] else "#e8f1f8",
            },
        )
        for key, text in nodes.items()
    }
    ax.set(xlim=(-1, 2.6 * max(rows) + 1), ylim=(-0.75 * height - 0.6, 0.75 * height + 0.6))
    ax.axis("off")
    ax.figure.canvas.draw()  # only now do the boxes have a size, at which the arrows end
    for start, end in edges:
        far = column[end] - column[start] > 1
        bend = 0.0 if not far else -0.28 if place[start][1] > 0 else 0.2
        ax.annotate(
            "",
            place[end],
            place[start],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#777777",
                "connectionstyle": f"arc3,rad={bend}",
                "shrinkA": 3,
                "shrinkB": 3,
                "patchA": boxes[start].get_bbox_patch(),
                "patchB": boxes[end].get_bbox_patch(),
            },
        )
    return ax


TILES = {
    "idle": {"facecolor": "#e8e8e8"},
    "mask": {"facecolor": "white", "hatch": "////"},
    "done": {"facecolor": COLORS[0]},
    "now": {"facecolor": COLORS[1], "edgecolor": "black", "linewidth": 2, "zorder": 3},
}


def tiles(
    states: Sequence[Sequence[str]],
    *,
    size: int = 1,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A matrix cut into tiles, row 0 at the top; each is "idle", "mask" (partly masked), "done", "now", or "" for none.

    Two states, as in "now mask", are drawn into one another. `size` is the side of a tile in elements, for the axes.
    """
    rows, columns = len(states), max(map(len, states))
    if ax is None:
        _, ax = plt.subplots(figsize=(0.35 * columns + 1, 0.35 * rows + 0.8))
    for row, line in enumerate(states):
        for column, state in enumerate(line):
            unknown = set(state.split()) - TILES.keys()
            if unknown:
                raise ValueError(f"a tile is {', '.join(TILES)} or empty, not {state!r}")
            style = {"edgecolor": "#999999", "linewidth": 0.6}
            for name in (name for name in TILES if name in state.split()):
                style |= TILES[name]
            if state:
                ax.add_patch(plt.Rectangle((column * size, row * size), size, size, **style))
    ax.set(xlim=(0, columns * size), ylim=(rows * size, 0), aspect="equal", xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title)
    ax.grid(False)
    return ax


def smooth(values: Sequence[float] | Tensor, width: int = 9) -> np.ndarray:
    """Means of `width` neighbors: shorter than `values` by width − 1, the first being that of the first `width`."""
    return np.convolve(array(values), np.ones(width) / width, mode="valid")


def caption(fig: Figure, text: str) -> None:
    """A caption under the figure: what to see in it."""
    width = int(fig.get_figwidth() * 14)
    lines = textwrap.wrap(text, width)
    fig.text(0.01, -0.02, "\n".join(lines), fontsize=9, style="italic", color="#333333", va="top", ha="left")


def array(values: Any) -> np.ndarray:
    """Tensors (on any device, of any format, with or without a graph), sequences or arrays, as an array to draw."""
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _sequential() -> Any:
    import seaborn as sns

    return sns.color_palette(SEQUENTIAL, as_cmap=True)
