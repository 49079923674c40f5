"""course/index.ipynb, the roadmap with a picture of how the lessons depend on each other, and course/notation.ipynb.

The picture is an SVG inside the notebook's Markdown, so that it shows without running anything.
"""

import base64
import re
from html import escape
from pathlib import Path

from autograder import catalog
from autograder.catalog import Entry, Stage
from autograder.notebooks import format_minutes, make_prose_notebook
from autograder.templating import render

# Where a lesson stands in the picture: (column, row, the title's lines). A lesson stands below all that it requires.
PLACES: dict[int, tuple[float, int, str]] = {
    1: (3.0, 0, "Geometry, high|dimensions"),
    2: (3.0, 1, "Automatic|differentiation"),
    3: (1.2, 2, "Activations|and gates"),
    5: (3.0, 2, "Losses and|distributions"),
    4: (4.65, 2, "Normalization"),
    6: (6.0, 2, "Optimizers"),
    11: (1.9, 3, "FFN, mixture|of experts"),
    7: (3.0, 3, "Tokenization"),
    13: (5.7, 3, "Initialization"),
    8: (3.0, 4, "Embeddings,|positions"),
    15: (4.02, 4, "Data|engineering"),
    9: (3.0, 5, "Attention:|MHA to GQA"),
    29: (0.6, 6, "FlashAttention"),
    10: (1.7, 6, "Attention:|MLA, sparse"),
    14: (3.6, 6, "Building a|model"),
    12: (5.3, 6, "Architecture|variants"),
    35: (-0.2, 7, "Linear|attention"),
    28: (1.75, 7, "The KV cache"),
    16: (3.0, 7, "Pretraining|objectives"),
    17: (4.2, 7, "Scaling laws"),
    18: (5.5, 7, "Mixed|precision"),
    19: (7.47, 7, "Data parallel,|ZeRO, FSDP"),
    36: (-0.2, 8, "State spaces,|Mamba"),
    30: (0.82, 8, "PagedAttention"),
    32: (1.85, 8, "Speculative|decoding"),
    21: (4.2, 8, "Instruction|tuning"),
    31: (6.35, 8, "Quantization"),
    20: (7.47, 8, "Tensor and|pipeline"),
    37: (-0.2, 9, "Hybrid|architectures"),
    34: (1.0, 9, "Serving"),
    22: (2.47, 9, "RLHF"),
    26: (3.47, 9, "Long context"),
    27: (4.47, 9, "Model merging"),
    33: (6.47, 9, "Distillation"),
    38: (7.47, 9, "Vision and|language"),
    25: (5.47, 9, "LoRA, QLoRA"),
    23: (2.47, 10, "PPO, GRPO"),
    24: (3.5, 10, "DPO"),
    39: (7.47, 10, "Video and|audio"),
    40: (1.45, 11, "Toward AGI"),
}
PITCH_X, PITCH_Y, WIDTH, HEIGHT, STRIPE, MARGIN = 138, 84, 130, 46, 14, 10
ALT = "The forty lessons as boxes, with arrows to the lessons that build on them; the tables say the same."
# Of the six stages: told apart by hue and, in grey, by the number in the stripe.
COLORS = ("#4b4b4b", "#0b5a8f", "#00735c", "#a34d00", "#7b2d6b", "#8a1f1f")


def find_drawn_requirements(entry: Entry) -> list[int]:
    """The prerequisites that no other prerequisite implies: an arrow for each of the rest would say nothing new."""

    def find_implied(number: int) -> set[int]:
        requires = catalog.BY_NUMBER[number].requires
        return set(requires).union(*map(find_implied, requires))

    return [n for n in entry.requires if not any(n in find_implied(other) for other in entry.requires if other != n)]


def draw_roadmap(
    written: set[int], shares: dict[int, float] | None = None, links: dict[int, tuple[str, str]] | None = None
) -> str:
    """The SVG of the forty lessons; those in `written` are solid, and a line shows the share of one that is done.

    `links` makes lessons' boxes links: (address, text for the pointer).
    """
    left = min(x for x, _, _ in PLACES.values())
    wide = int((max(x for x, _, _ in PLACES.values()) - left) * PITCH_X) + WIDTH + 2 * MARGIN
    high = max(y for _, y, _ in PLACES.values()) * PITCH_Y + HEIGHT + 2 * MARGIN

    def find_corner(number: int) -> tuple[float, float]:
        x, y, _ = PLACES[number]
        return MARGIN + round((x - left) * PITCH_X), MARGIN + y * PITCH_Y

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
        'font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0.5 L8,4 L0,7.5 z" fill="#555"/></marker></defs>',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>',
    ]
    for entry in catalog.LESSONS:
        x2, y2 = find_corner(entry.number)
        x2 += WIDTH / 2
        for number in find_drawn_requirements(entry):
            x1, y1 = find_corner(number)
            x1, y1 = x1 + WIDTH / 2, y1 + HEIGHT
            turn = y2 - PITCH_Y + HEIGHT  # straight down to the last gap between two rows, and across in that
            bend = (y2 - turn) * 0.7
            parts.append(
                f'<path d="M{x1:g},{y1} V{turn} C{x1:g},{turn + bend:g} {x2:g},{y2 - bend:g} {x2:g},{y2 - 1}" '
                'fill="none" stroke="#555" stroke-width="1.3" marker-end="url(#tip)"/>'
            )
    for entry in catalog.LESSONS:
        x, y = find_corner(entry.number)
        lines = PLACES[entry.number][2].split("|")
        done = entry.number in written
        color = COLORS[entry.stage.number - 1] if done else "#8a8a8a"
        ink = "#111" if done else "#5f5f5f"
        border = 'stroke-width="1.8"' if done else 'stroke-width="1.2" stroke-dasharray="4 3"'
        address, told = (links or {}).get(entry.number, ("", ""))
        if address:
            parts.append(f'<a href="{escape(address)}"><title>{escape(told)}</title>')
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="#fff" stroke="{color}" {border}/>'
        )
        parts.append(f'<rect x="{x}" y="{y}" width="{STRIPE}" height="{HEIGHT}" rx="3" fill="{color}"/>')
        parts.append(
            f'<text x="{x + STRIPE / 2}" y="{y + HEIGHT / 2 + 4}" font-size="11" font-weight="bold" '
            f'fill="#fff" text-anchor="middle">{entry.stage.number}</text>'
        )
        parts.append(
            f'<text x="{x + STRIPE + 5}" y="{y + HEIGHT / 2 + 5}" font-size="14" font-weight="bold" '
            f'fill="{ink}">{entry.number:02}</text>'
        )
        share = (shares or {}).get(entry.number, 0)
        if share:
            long = share * (WIDTH - STRIPE)
            parts.append(f'<rect x="{x + STRIPE}" y="{y + HEIGHT - 6}" width="{long:g}" height="6" fill="{color}"/>')
        for i, line in enumerate(lines):
            middle = y + HEIGHT / 2 + 4 + (i - (len(lines) - 1) / 2) * 14
            parts.append(
                f'<text x="{x + STRIPE + 25}" y="{middle:g}" font-size="12" fill="{ink}">{escape(line)}</text>'
            )
        if address:
            parts.append("</a>")
    return "\n".join([*parts, "</svg>"])


def make_index(minutes: dict[Entry, tuple[int, int]]) -> dict:
    """The roadmap as nbformat 4.5's JSON; `minutes` has (core, whole) of the lessons that are written."""
    svg = draw_roadmap({entry.number for entry in minutes})
    text = render(
        "index.md.j2",
        picture="data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
        alt=ALT,
        stages=list_stages(minutes),
    )
    return make_prose_notebook("roadmap", text.split("\n---\n"))


def list_stages(minutes: dict[Entry, tuple[int, int]]) -> list[tuple[Stage, list[list[str]], str, str]]:
    """(stage, a row of Markdown for each of its lessons, core time, whole time) of the stages."""
    stages = []
    for stage in catalog.STAGES:
        entries = [entry for entry in catalog.LESSONS if entry.stage == stage]
        written = [minutes[entry] for entry in entries if entry in minutes]
        core, whole = (format_minutes(sum(times)) for times in zip(*written, strict=True)) if written else ("", "")
        stages.append((stage, [_make_row(entry, minutes.get(entry)) for entry in entries], core, whole))
    return stages


def make_notation() -> dict:
    """What names, shapes and symbols mean in all lessons: templates/notation.md, a cell for each section."""
    text = Path(__file__).with_name("templates").joinpath("notation.md").read_text(encoding="utf-8")
    return make_prose_notebook("notation", re.split(r"\n(?=## )", text))


def _make_row(entry: Entry, minutes: tuple[int, int] | None) -> list[str]:
    requires = ", ".join(f"{number:02}" for number in entry.requires)
    if minutes is None:
        return [
            show_gray(t) for t in (f"{entry.number:02}", entry.title, entry.title_zh, "not written yet", "", requires)
        ]
    link = f"[{entry.title}]({entry.key}.ipynb)"
    return [f"{entry.number:02}", link, entry.title_zh, *map(format_minutes, minutes), requires]


def show_gray(text: str) -> str:
    return f'<span style="color: #8a8a8a">{escape(text)}</span>' if text else ""
