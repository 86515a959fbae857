"""Draws docs/bins/*.svg, the pictures of docs/bins.md: `python scripts/draw_bins.py` writes them anew."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from spp_cls.models.bins import RULES, Rule, appendix_a, is_right

FOLDER = Path(__file__).parents[1] / "docs" / "bins"
LEVELS = (6, 3, 2, 1)  # the paper's 50 bins
MAPS = {
    (13, 13): "13×13 cells: ZF-5 and Convnet*-5 at 224 px",
    (10, 10): "10×10 cells: ZF-5 and Convnet*-5 at 180 px",
    (10, 20): "10×20 cells: no square is needed",
}
FORMULAS = {
    "appendix_a": "bin i = [floor(i·a/n), ceil((i+1)·a/n))",
    "window": "window ceil(a/n), stride floor(a/n)",
    "floor": "window = stride = floor(a/n)",
    "same": "window ceil(a/n), stride floor(a/n), SAME padding",
    "ceil_padded": "window = stride = k = ceil(a/n), padding floor((k·n − a + 1)/2)",
}
INK, FAINT, GRID = "#1f2430", "#5b6270", "#d5d9e0"
# Bins that overlap never have the same colour: it alternates along rows and along columns.
BIN_COLOURS = {(0, 0): "#0072b2", (0, 1): "#d55e00", (1, 0): "#8f5aa8", (1, 1): "#00815c"}
# state: (fill, words); told apart by lightness and by their marks too, not by colour alone
STATES = {
    "right": ("#7fb8e6", "Appendix A's bins"),
    "other": ("#f4cf6b", "n bins, but of other cells"),
    "count": ("#b3392f", "wrong count (bins per side)"),
    "error": ("#3a3f4a", "no bins: stride 0 or a bin without cells"),
}


def drawings() -> dict[str, str]:
    """File name → SVG text."""
    maps = {f"appendix_a_{h}x{w}.svg": draw_map(h, w, title) for (h, w), title in MAPS.items()}
    return maps | {f"rule_{name}.svg": draw_rule(name, rule) for name, rule in RULES.items()}


# --- the bins of one map


def draw_map(h: int, w: int, title: str, cell: int = 17, left: int = 62, top: int = 62) -> str:
    across = 4 if w <= 13 else 2
    panel_w, panel_h = left + w * cell + 14, top + h * cell + 16
    parts = [text(16, 26, title, size=16, weight="bold")]
    for i, n in enumerate(LEVELS):
        x, y = 4 + i % across * panel_w + left, 34 + i // across * panel_h + top
        parts += draw_level(h, w, n, x, y, cell)
    height = 34 + -(-len(LEVELS) // across) * panel_h + 26
    note = "2–5 holds the cells 2, 3 and 4. The darker a cell, the more bins share it."
    parts.append(text(16, height - 12, note, size=12, fill=FAINT))
    return svg(across * panel_w + 8, height, parts)


def draw_level(h: int, w: int, n: int, x: int, y: int, cell: int) -> list[str]:
    rows, columns = appendix_a(h, w, n)
    inside = [[sum(a <= c < b for a, b in axis) for c in range(cells)] for axis, cells in ((rows, h), (columns, w))]
    shared = sum(r * c > 1 for r, c in product(*inside))
    parts = [
        text(x, y - 43, f"{n}×{n}", size=14, weight="bold"),
        text(x + w * cell, y - 43, f"{shared} of {h * w} cells shared", size=11, fill=FAINT, anchor="end"),
    ]
    lines = [f"M{x + c * cell} {y}v{h * cell}" for c in range(w + 1)]
    lines += [f"M{x} {y + r * cell}h{w * cell}" for r in range(h + 1)]
    parts.append(f'<path d="{"".join(lines)}" stroke="{GRID}" fill="none"/>')
    for (i, (a, b)), (j, (c, d)) in product(enumerate(rows), enumerate(columns)):
        colour = BIN_COLOURS[i % 2, j % 2]
        parts.append(
            f'<rect x="{x + c * cell + 2}" y="{y + a * cell + 2}" width="{(d - c) * cell - 4}"'
            f' height="{(b - a) * cell - 4}" rx="4" fill="{colour}" fill-opacity="0.22" stroke="{colour}"'
            f' stroke-width="1.4"/>'
        )
    for j, (c, d) in enumerate(columns):
        lane = y - 7 - 16 * (j % 2)
        parts.append(bracket(x + c * cell + 2, lane, x + d * cell - 2, lane, BIN_COLOURS[0, j % 2]))
        parts.append(text(x + (c + d) * cell / 2, lane - 4, f"{c}–{d}", size=11, anchor="middle"))
    for i, (a, b) in enumerate(rows):
        lane = x - 7 - 7 * (i % 2)
        parts.append(bracket(lane, y + a * cell + 2, lane, y + b * cell - 2, BIN_COLOURS[i % 2, 0]))
        parts.append(text(x - 19, y + (a + b) * cell / 2 + 4, f"{a}–{b}", size=11, anchor="end"))
    return parts


def bracket(x1: int, y1: int, x2: int, y2: int, colour: str) -> str:
    return f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'


# --- where a rule is right


def draw_rule(name: str, rule: Rule, cell: int = 15, left: int = 62, top: int = 76) -> str:
    sizes, levels = range(1, 65), (1, 2, 3, 4, 6)
    bottom = top + len(levels) * (cell + 3)
    all_right = sum(all(is_right(rule, a, a, n) for n in LEVELS) for a in sizes)
    parts = [
        text(16, 26, name, size=16, weight="bold"),
        text(left + 64 * cell, 26, FORMULAS[name], size=14, anchor="end"),
        text(16, 47, "square maps of a×a cells in n×n bins", size=12, fill=FAINT),
        text(
            left + 64 * cell,
            47,
            f"right under {{6,3,2,1}}: {all_right} of the 64 sizes",
            size=12,
            anchor="end",
        ),
        text(left - 10, top - 6, "a", size=12, anchor="end", fill=FAINT),
    ]
    for a in sizes:
        paper = a in (10, 13, 18)  # conv5 of the paper's nets at 180 and at 224 px
        if paper or a % 5 == 0 or a == 1:
            weight, fill = ("bold", INK) if paper else ("normal", FAINT)
            parts.append(text(left + (a - 0.5) * cell, top - 6, str(a), 11, fill, weight, "middle"))
        if paper:
            x = left + (a - 1) * cell
            parts.append(
                f'<rect x="{x - 0.5}" y="{top - 2.5}" width="{cell}" height="{bottom - top + 2}" rx="2"'
                f' fill="none" stroke="{INK}" stroke-width="1.5"/>'
            )
    for (row, n), a in product(enumerate(levels), sizes):
        if a == 1:
            parts.append(text(left - 10, top + row * (cell + 3) + 12, f"n = {n}", size=12, anchor="end"))
        parts += draw_state(rule, a, n, left + (a - 1) * cell, top + row * (cell + 3), cell - 1)
    x = left
    for fill, words in STATES.values():
        parts.append(square(x, bottom + 13, 12, fill))
        parts.append(text(x + 18, bottom + 23, words, size=12))
        x += 38 + round(6.6 * len(words))
    parts.append(
        text(
            left,
            bottom + 43,
            "framed: the paper's maps, 10 (at 180 px), 13 and 18 (at 224 px)",
            size=12,
            fill=FAINT,
        )
    )
    if name == "ceil_padded":
        parts.append(f'<circle cx="{left + 420}" cy="{bottom + 39}" r="3" fill="{INK}"/>')
        words = "Caffe pools here, PyTorch refuses the padding (also at every dark square)"
        parts.append(text(left + 428, bottom + 43, words, size=12, fill=FAINT))
    return svg(left + 64 * cell + 16, bottom + 56, parts)


def draw_state(rule: Rule, a: int, n: int, x: int, y: int, side: int) -> list[str]:
    state, mark = state_of(rule, a, n)
    parts = [square(x, y, side, STATES[state][0])]
    centre = x + side / 2
    if mark == "•":
        parts.append(f'<circle cx="{centre}" cy="{y + side / 2}" r="3" fill="{INK}"/>')
    elif mark:
        parts.append(text(centre, y + 11, mark, size=10, fill="#ffffff", weight="bold", anchor="middle"))
    return parts


def state_of(rule: Rule, a: int, n: int) -> tuple[str, str]:
    """(key of STATES, mark in the square): a wrong count's mark is its number, • that PyTorch refuses."""
    try:
        rule(a, a, n)
    except ValueError as error:
        given = re.search(r"gives (\d+)×\d+ bins", str(error))
        return ("count", given[1]) if given else ("error", "×")
    k = -(-a // n)
    refused = rule is RULES["ceil_padded"] and (k * n - a + 1) // 2 > k / 2
    return "right" if is_right(rule, a, a, n) else "other", "•" if refused else ""


# --- SVG


def svg(width: int, height: int, parts: list[str]) -> str:
    # A background and a frame of its own: legible on a dark page too.
    size = f'width="{width}" height="{height}"'
    font = "Helvetica, Arial, DejaVu Sans, sans-serif"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" font-family="{font}">'
    inner = f'width="{width - 1}" height="{height - 1}"'
    paper = f'<rect x="0.5" y="0.5" {inner} rx="6" fill="#ffffff" stroke="{GRID}"/>'
    return "\n".join([head, paper, *parts, "</svg>"]) + "\n"


def text(
    x: float, y: float, words: str, size: int, fill: str = INK, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{fill}"'
        f' text-anchor="{anchor}">{words}</text>'
    )


def square(x: int, y: int, side: int, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" rx="2" fill="{fill}"/>'


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings().items():
        (FOLDER / name).write_text(drawing, encoding="utf-8", newline="\n")
        print(FOLDER / name)
