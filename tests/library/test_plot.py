"""The figures: drawn from tensors of every kind, in the course's style, and readable without color."""

import itertools

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from llm40 import plot


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def lightness(color) -> float:
    return float(np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722)))


def test_the_color_scale_is_monotone_in_lightness():
    scale = plot._sequential()
    steps = [lightness(scale(i / 31)) for i in range(32)]
    assert all(a > b for a, b in itertools.pairwise(steps))


def test_lines_differ_without_color():
    ax = plot.curves(range(3), {name: [1, 2, i] for i, name in enumerate("abcdefg")}, xlabel="step", ylabel="loss")
    assert len({str(line.get_linestyle()) + str(line._unscaled_dash_pattern) for line in ax.lines}) == 7


def test_heatmap_takes_a_tensor_with_a_graph_in_half_precision():
    weights = torch.rand(2, 3, dtype=torch.bfloat16, requires_grad=True)
    ax = plot.heatmap(weights, xlabel="key", ylabel="query", xticks="abc", yticks="de", unit="weight")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list("abc")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")


def test_attention_names_its_tokens():
    ax = plot.attention(torch.eye(2), ["你好", "world"])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["你好", "world"]


def test_heads_hides_the_empty_places():
    fig = plot.heads(torch.rand(5, 4, 4), columns=3)
    assert sum(ax.get_visible() for ax in fig.axes) == 5 + 1  # and the color bar


def test_roofline_puts_unmeasured_work_on_the_roof():
    ax = plot.roofline({"decode": (1.0, None), "prefill": (500.0, 4e14)}, peak=1e15, bandwidth=4e12)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(dot.get_ydata()[0]) for dot in dots] == pytest.approx([4.0, 400.0])
    assert dots[0].get_markerfacecolor() == "white"


def test_caption_wraps_to_the_figure():
    fig, _ = plt.subplots(figsize=(4, 2))
    plot.caption(fig, "word " * 40)
    assert max(map(len, fig.texts[0].get_text().splitlines())) <= 4 * 14


def test_graph_puts_nodes_behind_their_longest_way():
    nodes = {"w": "w", "x": "x", "b": "b", "wx": "w · x", "sum": "w · x + b"}
    edges = [("w", "wx"), ("x", "wx"), ("wx", "sum"), ("b", "sum")]
    ax = plot.graph(nodes, edges)
    x = {text.get_text(): text.get_position()[0] for text in ax.texts if text.get_text()}
    assert x["w"] == x["x"] == x["b"] < x["w · x"] < x["w · x + b"]
    arrows = [text for text in ax.texts if not text.get_text()]
    assert len(arrows) == 4
    with pytest.raises(ValueError, match="no node: \\['z'\\]"):
        plot.graph(nodes, [("w", "z")])
    with pytest.raises(ValueError, match="cycle"):
        plot.graph(nodes, [*edges, ("sum", "w")])


def test_tiles():
    ax = plot.tiles([["done", "now mask", ""], ["idle", "done", "mask"]], size=16, xlabel="key", ylabel="query")
    assert len(ax.patches) == 5
    done, now, idle, _, mask = ax.patches
    assert now.get_hatch() == mask.get_hatch() == "////"
    assert len({p.get_facecolor() for p in (done, now, idle, mask)}) == 4
    assert len({round(lightness(p.get_facecolor()[:3]), 2) for p in (done, now, idle, mask)}) == 4
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 48), (32, 0))
    with pytest.raises(ValueError, match="not 'over'"):
        plot.tiles([["over"]])


def test_smooth():
    assert plot.smooth([1, 2, 3, 4], 2).tolist() == [1.5, 2.5, 3.5]
    assert plot.smooth(torch.arange(20.0)).shape == (12,)
