"""Tables, figures and pages of `tabular` as files: Markdown, CSV, LaTeX, SVG, PDF and HTML that needs nothing else."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
import warnings
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .intervals import Estimate, signed
from .tabular import Cell, Curve, Difference, Figure, Page, Table
from .whole import written_whole

NONE, NOT_RUN = "–", "not run yet"

INK, FAINT, GRID, PAPER = "#1f2430", "#5b6270", "#d5d9e0", "#ffffff"
# Colours of Okabe and Ito, darkened to be read on white, and what replaces each where the reader's screen is dark.
COLOURS = {
    "#0072b2": "#5db7f0",
    "#c25100": "#f59a55",
    "#00805c": "#41cf9f",
    "#8f5aa8": "#cf9fe6",
    "#7a6200": "#e3c23c",
    "#5f6570": "#b4bac6",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one more than colours: pairs repeat after 42 curves, not after 6
DASHES = ("-", "--", "-.", ":")
_MANY = 20  # a curve of more points, such as epochs, has a marker at a tenth of them and its band alone

CSV_COLUMNS = (
    "row", "baseline", "column", "paper", "mean", "low", "high", "n", "level", "low_over_images", "high_over_images",
    "conclusion",
)  # fmt: skip


# --- what all of them say


def markdown(table: Table) -> str:
    """A section: the paper's numbers beside ours, then the differences with what each says, then the notes."""
    parts = [f"## {_plain_markdown(table.title)}", _plain_markdown(table.about)]
    if not _is_empty(table):
        papers = _has_paper(table)
        heads = [table.unit]
        for column in table.columns:
            heads += [f"{column}: paper", f"{column}: ours"] if papers else [column]
        lines = [[row, *(text for cell in _row(table, row) for text in cell)] for row in table.rows]
        parts.append(_markdown_table(heads, lines, "l" + "r" * (len(heads) - 1)))
    if table.differences:
        heads, lines = _differences(table)
        parts.append(_markdown_table(heads, lines, "ll" + "r" * (len(heads) - 3) + "l"))
    notes = [*_legend(table), *table.notes]
    parts.append("\n".join(f"- {_plain_markdown(note)}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def as_csv(table: Table) -> str:
    """A line a cell, then a line a difference, which has a baseline; empty where there is no number."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in table.rows:
        for column in table.columns:
            cell = table.cell(row, column)
            writer.writerow([row, "", column, *_numbers(cell.paper, cell.ours, cell.over_images), ""])
    for each in table.differences:
        numbers = _numbers(each.paper, each.ours, each.over_images)
        writer.writerow([each.row, each.baseline, each.column, *numbers, each.conclusion])
    return file.getvalue()


def latex(table: Table) -> str:
    """One or two `table` environments for booktabs, notes as comments; letters beyond Latin need XeLaTeX, LuaLaTeX."""
    caption = f"\\caption{{{_latex(table.title)}. {_latex(' '.join([table.about, *_legend(table)]))}}}"
    notes = [f"% {' '.join(note.split())}" for note in table.notes]
    parts = ["% \\usepackage{booktabs}", *notes, "\\begin{table}", "\\centering", caption]
    if not _is_empty(table):
        width = 2 if _has_paper(table) else 1
        parts.append(f"\\begin{{tabular}}{{l{'r' * (width * len(table.columns))}}}")
        parts.append("\\toprule")
        parts.append(_latex_row([table.unit, *table.columns], width))
        if width == 2:
            ends = (2 + 2 * i for i in range(len(table.columns)))
            parts.append(" ".join(f"\\cmidrule(lr){{{at}-{at + 1}}}" for at in ends))
            parts.append(_latex_row(["", *("paper", "ours") * len(table.columns)]))
        parts.append("\\midrule")
        for row in table.rows:
            parts.append(_latex_row([row, *(text for cell in _row(table, row) for text in cell)]))
        parts += ["\\bottomrule", "\\end{tabular}"]
    parts.append("\\end{table}")
    if table.differences:
        heads, lines = _differences(table)
        caption = f"\\caption{{{_latex(table.title)}: differences}}"
        columns = f"ll{'r' * (len(heads) - 3)}p{{0.4\\linewidth}}"
        parts += ["", "\\begin{table}", "\\centering", caption, f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
        parts += [_latex_row(heads), "\\midrule", *(_latex_row(line) for line in lines)]
        parts += ["\\bottomrule", "\\end{tabular}", "\\end{table}"]
    return "\n".join(parts) + "\n"


def _is_empty(table: Table) -> bool:
    return not (table.rows and table.columns)


def _has_paper(table: Table) -> bool:
    return any(cell.paper is not None for cell in table.cells.values())


def _has_images(differences: Iterable[Difference]) -> bool:
    return any(_is_known(each.over_images) for each in differences)


def _row(table: Table, row: str) -> list[list[str]]:
    """The texts of each column: the paper's, where the table has any, and ours."""
    cells = [table.cell(row, column) for column in table.columns]
    papers = _has_paper(table)
    return [[*([_number(cell.paper)] if papers else []), _ours(cell, table.missing)] for cell in cells]


def _differences(table: Table) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table of differences."""
    images = _has_images(table.differences)
    heads = ["difference", "column", "paper", "ours", *(["over seeds and images"] if images else []), "what it says"]
    lines = [
        [
            f"{each.row} − {each.baseline}",
            each.column,
            NONE if each.paper is None else signed(each.paper),
            _mean_half(each.ours, sign=True),
            *([_brackets(each.over_images, sign=True)] if images else []),
            each.conclusion or NONE,
        ]
        for each in table.differences
    ]
    return heads, lines


def _legend(table: Table) -> list[str]:
    """What the numbers are, in sentences; nothing where there are none."""
    if _is_empty(table):
        return ["Nothing to show: the table has no rows or no columns."]
    both: list[Cell | Difference] = [*table.cells.values(), *table.differences]
    ours = [each.ours for each in both if each.ours is not None and not math.isnan(each.ours.half)]
    images = [each.over_images for each in both if each.over_images is not None]
    lines = []
    if ours:
        lines.append(f"Ours: mean over n seeds ± half of its {_levels(ours)} interval (Student's t, over seeds alone).")
    if images:
        lines.append(
            f"In brackets: {_levels(images)} interval over seeds and test images, "
            "for other images of the same kind would have been easier or harder."
        )
    if table.differences:
        lines.append(
            f"Differences are in {'points' if table.unit == '%' else table.unit}, over pairs of runs of one seed."
        )
    return lines


def _levels(estimates: Iterable[Estimate]) -> str:
    return " or ".join(f"{100 * level:g} %" for level in sorted({each.level for each in estimates}))


def _is_known(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.n > 0 and not math.isnan(estimate.mean)


def _number(value: float | None, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return NONE
    return signed(value) if sign else f"{value:.2f}".replace("-", "−")


def _mean_half(estimate: Estimate | None, sign: bool = False) -> str:
    if estimate is None or not _is_known(estimate):
        return NOT_RUN
    half = "" if math.isnan(estimate.half) else f" ± {estimate.half:.2f}"
    return _number(estimate.mean, sign) + half


def _ours(cell: Cell, missing: str) -> str:
    if cell.ours is None or not _is_known(cell.ours):
        return missing
    images = "" if cell.over_images is None else f" {_brackets(cell.over_images)}"
    return f"{_mean_half(cell.ours)} (n = {cell.ours.n}){images}"


def _brackets(estimate: Estimate | None, sign: bool = False) -> str:
    if estimate is None or math.isnan(estimate.half):
        return NONE
    return f"[{_number(estimate.low, sign)}, {_number(estimate.high, sign)}]"


def _numbers(paper: float | None, ours: Estimate | None, over_images: Estimate | None) -> list[str]:
    def text(value: float | None) -> str:
        return "" if value is None or math.isnan(value) else f"{value:.6g}"

    of_seeds = ours or Estimate(math.nan, math.nan, math.nan, 0)
    of_images = over_images or Estimate(math.nan, math.nan, math.nan, 0)
    n = str(of_seeds.n)
    level = f"{of_seeds.level:g}" if ours else ""
    mean, low, high = (text(value) for value in (of_seeds.mean, of_seeds.low, of_seeds.high))
    return [text(paper), mean, low, high, n, level, text(of_images.low), text(of_images.high)]


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]], sides: str) -> str:
    rule = "|" + "|".join("---:" if side == "r" else "---" for side in sides) + "|"
    rows = ["| " + " | ".join(_plain_markdown(text) for text in line) + " |" for line in [heads, *lines]]
    return "\n".join([rows[0], rule, *rows[1:]])


def _plain_markdown(text: str) -> str:
    """`text` on one line, so that Markdown shows it as it is."""
    # An interval's bracket opens no link; written as \[ some readers would take it for a formula.
    marked = re.sub(r"([\\`*_<>|~&$]|\[(?![−+]?\d+\.\d\d, ))", r"\\\1", " ".join(text.split()))
    return re.sub(r"^([#+-]|\d+[.)])(?=\s|$)", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", marked)


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\`{}", '"': "''", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$",
    "≤": r"$\leq$", "≥": r"$\geq$", "→": r"$\rightarrow$", "–": "--", "—": "---", "…": r"\ldots{}", "·": r"$\cdot$",
    "’": "'", "\u00a0": "~",
}  # fmt: skip


def _latex(text: str) -> str:
    """`text` on one line, so that LaTeX shows it as it is."""
    # Two hyphens would become a dash.
    plain = "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()).replace("--", "-\0-"))
    return plain.replace("\0", "{}")


def _latex_row(texts: Sequence[str], width: int = 1) -> str:
    cells = [_latex(text) for text in texts]
    if width > 1:
        cells[1:] = [f"\\multicolumn{{{width}}}{{c}}{{{cell}}}" for cell in cells[1:]]
    # After \\ and \midrule a bracket would open an option, and a star would be one.
    guard = "{}" if cells[0][:1] in ("[", "*") else ""
    return guard + " & ".join(cells) + r" \\"


# --- figures


def draw(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`, whole or not at all, as its suffix says: `.svg` (text stays text) or `.pdf`.

    One version of matplotlib gives the same bytes each time. A figure of kind "bars" has a dot with its interval for
    each row, and not a bar from nought, beside which a difference of a point could not be seen.
    """
    form = path.suffix[1:].lower()
    if form not in ("svg", "pdf"):
        raise ValueError(f"path={path}: its suffix has to be .svg or .pdf")
    picture = _drawn(figure, form, alone=True)
    with written_whole(path) as beside:
        beside.write_bytes(picture)


def _drawn(figure: Figure, form: str, alone: bool) -> bytes:
    """The file's bytes; `alone`: with its title, on white."""
    import matplotlib
    from matplotlib.figure import Figure as Sheet
    from matplotlib.font_manager import FontProperties

    # Readers' own settings would make other files of the same numbers.
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every glyph of a PDF
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "spp_cls", "svg.fonttype": "none", "pdf.fonttype": 42, "text.parse_math": False,
                "font.size": 10, "axes.titlesize": 11, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
                "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
                "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID,
            }
        )  # fmt: skip
        rows = _row_names(figure)
        # Wide enough for eight numbers, narrow enough that its text can be read on a telephone.
        height = 1.6 + max(0.34, 0.17 * len(figure.curves) + 0.1) * len(rows) if figure.kind == "bars" else 3.7
        sheet = Sheet(figsize=(5.6, height), layout="constrained")
        axes = sheet.add_subplot()
        axes.set_axisbelow(True)
        if any(_is_known(each) for curve in figure.curves for each in curve.estimates):
            handles = _draw_bars(axes, figure, rows) if figure.kind == "bars" else _draw_lines(axes, figure)
            for mark in figure.marks:
                axes.axvline(mark, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                at = axes.get_xaxis_transform()
                axes.text(mark, 1.01, f"{mark:g}", transform=at, ha="center", va="bottom", fontsize=8, color=FAINT)
            longest = max(len(curve.name) for curve in figure.curves)
            # matplotlib leaves names out that begin with an underscore, were they not put in afterwards.
            legend = sheet.legend(
                handles, ["-"] * len(handles), loc="outside upper left", frameon=False, fontsize=9, alignment="left",
                ncols=max(1, min(len(handles), 84 // (longest + 6))),
            )  # fmt: skip
            for text, curve in zip(legend.get_texts(), figure.curves, strict=True):
                text.set_text(curve.name)
            if alone:
                legend.set_title(figure.title, prop=FontProperties(size=11, weight="bold"))
        else:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, NOT_RUN, transform=axes.transAxes, ha="center", va="center", color=FAINT)
            if alone:
                axes.set_title(figure.title, loc="left", fontweight="bold")
        buffer = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {"CreationDate": None}
        sheet.savefig(buffer, format=form, transparent=not alone, metadata=metadata)
    return buffer.getvalue()


def _row_names(figure: Figure) -> list[str]:
    return list(dict.fromkeys(str(x) for curve in figure.curves for x in curve.x))


def _look(number: int) -> dict[str, Any]:
    """The colour and marker of the curve of that number: told apart in grey too."""
    return {
        "color": list(COLOURS)[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 6,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.8,
    }


def _ends(curve: Curve) -> tuple[list[float], list[float]]:
    """How far the interval reaches below and above the mean of each estimate; nought where it is not known."""
    # A percentile interval need not hold the mean.
    below = [0.0 if math.isnan(each.low) else max(0.0, each.mean - each.low) for each in curve.estimates]
    above = [0.0 if math.isnan(each.high) else max(0.0, each.high - each.mean) for each in curve.estimates]
    return below, above


def _draw_lines(axes: Any, figure: Figure) -> list[Any]:
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    axes.grid(axis="y", linewidth=0.8)
    handles = []
    for i, curve in enumerate(figure.curves):
        look = _look(i)
        x = [float(at) for at in curve.x]
        means = [each.mean for each in curve.estimates]
        low, high = [each.low for each in curve.estimates], [each.high for each in curve.estimates]
        axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
        if len(x) <= _MANY:
            axes.errorbar(x, means, yerr=_ends(curve), fmt="none", ecolor=look["color"], elinewidth=1, zorder=2)
        every = max(1, len(x) // 10) if len(x) > _MANY else 1
        dash = DASHES[i % len(DASHES)]
        handles += axes.plot(x, means, linestyle=dash, linewidth=1.8, zorder=3, markevery=every, **look)
    ticks: list[float] = []
    at = sorted({float(x) for curve in figure.curves for x in curve.x})
    for tick in at:
        if not ticks or tick - ticks[-1] > 0.07 * (at[-1] - at[0]):  # nearer, and their numbers would touch
            ticks.append(tick)
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    return handles


def _draw_bars(axes: Any, figure: Figure, rows: Sequence[str]) -> list[Any]:
    axes.set(xlabel=figure.y_label, ylabel=figure.x_label)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    handles = []
    for i, curve in enumerate(figure.curves):
        look = _look(i)
        offset = 0.7 * ((i + 0.5) / len(figure.curves) - 0.5)
        y = [rows.index(str(x)) + offset for x in curve.x]
        means = [each.mean for each in curve.estimates]
        axes.errorbar(means, y, xerr=_ends(curve), fmt="none", ecolor=look["color"], elinewidth=1.8, zorder=2)
        handles += axes.plot(means, y, linestyle="none", zorder=3, **look)
    return handles


# --- the page


def html(page: Page) -> str:
    """One HTML file that needs no other, no network and no script; light or dark as the reader's system is."""
    parts = [f"<h1>{escape(page.title)}</h1>", _paragraph(page.about, "about")]
    parts += [_html_table(table, i) for i, table in enumerate(page.tables)]
    parts += [_html_figure(figure, i) for i, figure in enumerate(page.figures)]
    if page.notes:
        parts.append(f"<section><h2>Notes</h2>{_html_list(page.notes)}</section>")
    if page.config:
        parts.append(f"<details><summary>Config</summary><pre>{escape(page.config)}</pre></details>")
    return document(page.title, "\n".join(part for part in parts if part))


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """The file round a page's `body`: no request can leave it, and no script runs in it but `script`.

    With a script pictures are allowed besides, as data of the page itself.
    """
    allowed = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        allowed += f"; img-src data:; script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_css()}{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def _paragraph(text: str, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return f"<p{of}>{escape(text)}</p>" if text else ""


def _html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _html_table(table: Table, number: int) -> str:
    parts = [f'<section id="table-{number + 1}"><h2>{escape(table.title)}</h2>', _paragraph(table.about)]
    if not _is_empty(table):
        papers = _has_paper(table)
        span, below = (' colspan="2"', ' rowspan="2"') if papers else ("", "")
        heads = "".join(f'<th scope="col"{span}>{escape(column)}</th>' for column in table.columns)
        parts.append(
            f'<div class="wide"><table class="cells"><thead><tr><th{below}>{escape(table.unit)}</th>{heads}</tr>'
        )
        if papers:
            parts.append(f"<tr>{'<th>paper</th><th>ours</th>' * len(table.columns)}</tr>")
        parts.append("</thead><tbody>")
        for row in table.rows:
            cells = "".join(_html_cell(table, row, column, papers) for column in table.columns)
            parts.append(f'<tr><th scope="row">{escape(row)}</th>{cells}</tr>')
        parts.append("</tbody></table></div>")
    if table.differences:
        parts.append(_html_differences(table))
    parts.append(f'<div class="notes">{_html_list([*_legend(table), *table.notes])}</div>')
    name = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-") or "table"
    links = [
        f'<a download="{name}.{suffix}" href="data:{kind};charset=utf-8,{quote(text, safe="")}">{label}</a>'
        for label, suffix, kind, text in (
            ("CSV", "csv", "text/csv", as_csv(table)),
            ("LaTeX", "tex", "text/plain", latex(table)),
            ("Markdown", "md", "text/plain", markdown(table)),
        )
    ]
    parts.append(f'<p class="downloads">{" · ".join(links)}</p></section>')
    return "\n".join(part for part in parts if part)


def _html_cell(table: Table, row: str, column: str, papers: bool) -> str:
    cell = table.cell(row, column)
    paper = f'<td class="paper">{_number(cell.paper)}</td>' if papers else ""
    if not _is_known(cell.ours):
        return f'{paper}<td class="missing">{escape(table.missing)}</td>'
    assert cell.ours is not None
    half = "" if math.isnan(cell.ours.half) else f" ± {cell.ours.half:.2f}"
    images = "" if cell.over_images is None else f"<br>{_brackets(cell.over_images)}"
    return f"{paper}<td><b>{_number(cell.ours.mean)}</b>{half}<small>n = {cell.ours.n}{images}</small></td>"


def _html_differences(table: Table) -> str:
    images = _has_images(table.differences)
    reach = _reach(table.differences)
    parts = [
        '<div class="wide"><table class="differences"><thead><tr><th>difference</th>'
        "<th>what it says</th><th>better ← 0 → worse<small>● ours ◇ the paper's</small></th><th>paper</th><th>ours</th>"
        f"{'<th>over seeds and images</th>' if images else ''}</tr></thead><tbody>"
    ]
    for each in table.differences:
        missing = "" if _is_known(each.ours) else ' class="missing"'
        against = f"<small>− {escape(each.baseline)}</small><small>{escape(each.column)}</small>"
        parts.append(
            f'<tr><th scope="row">{escape(each.row)}{against}</th>'
            f'<td class="says">{escape(each.conclusion or NONE)}</td>'
            f"<td>{_whisker(each, reach)}</td>"
            f'<td class="paper">{_number(each.paper, sign=True)}</td>'
            f"<td{missing}>{_mean_half(each.ours, sign=True)}</td>"
            + (f"<td>{_brackets(each.over_images, sign=True)}</td>" if images else "")
            + "</tr>"
        )
    return "\n".join([*parts, "</tbody></table></div>"])


def _reach(differences: Iterable[Difference]) -> float:
    """The largest of all numbers that `_whisker` shows, without a sign."""
    numbers = [1e-6]
    for each in differences:
        ours = [each.ours.mean, each.ours.low, each.ours.high] if each.ours else []
        numbers += [abs(value) for value in [each.paper, *ours] if value is not None and not math.isnan(value)]
    return max(numbers)


def _whisker(difference: Difference, reach: float, width: int = 130, height: int = 22) -> str:
    """A drawing of one difference: our interval, our mean as a dot, the paper's as a diamond, nought as a line."""

    def x(value: float) -> str:
        return f"{width / 2 + value / reach * (width / 2 - 7):.1f}"

    middle = height / 2
    parts = [f'<path class="nought" d="M{width / 2:g} 0V{height}"/>']
    ours = difference.ours
    if ours is not None and _is_known(ours):
        if not math.isnan(ours.half):
            parts.append(f'<path class="ours" d="M{x(ours.low)} {middle:g}H{x(ours.high)}"/>')
        parts.append(f'<circle cx="{x(ours.mean)}" cy="{middle:g}" r="3.5"/>')
    if difference.paper is not None and not math.isnan(difference.paper):
        parts.append(f'<path class="theirs" d="M{x(difference.paper)} {middle - 6:g}l6 6l-6 6l-6 -6z"/>')
    return (
        f'<svg class="whisker" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(_mean_half(ours, sign=True))}">{"".join(parts)}</svg>'
    )


def _html_figure(figure: Figure, number: int) -> str:
    svg = _drawn(figure, "svg", alone=False).decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    size = re.search(r' width="([0-9.]+)pt" height="[0-9.]+pt"', svg)
    assert size is not None
    svg = svg.replace(size[0], f' role="img" aria-label="{escape(figure.title)}"', 1)
    # Names in the drawing are the page's names too, so each drawing gets its own.
    prefix = f"figure-{number + 1}-"
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'<style type="text/css">\*\{(.*?)\}</style>', "", svg)
    for colour in [INK, FAINT, GRID, PAPER, *COLOURS]:
        svg = svg.replace(f": {colour}", f": var(--{colour[1:]})")
    return f'<figure id="figure-{number + 1}"><figcaption>{escape(figure.title)}</figcaption>\n{svg}</figure>'


def _css() -> str:
    """Colours are named after what they are in light, so that drawings can be told in dark what replaces them."""
    light = {colour: colour for colour in [INK, FAINT, GRID, PAPER, *COLOURS]}
    dark = {INK: "#e6e8ee", FAINT: "#a3abba", GRID: "#3a404c", PAPER: "#171a20", **COLOURS}

    def names(colours: dict[str, str]) -> str:
        return ";".join(f"--{name[1:]}:{colour}" for name, colour in colours.items())

    ink, faint, grid, paper, blue = (f"var(--{colour[1:]})" for colour in (INK, FAINT, GRID, PAPER, "#0072b2"))
    orange = "var(--c25100)"
    return f"""
:root{{{names(light)}}}
@media (prefers-color-scheme:dark){{:root{{{names(dark)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:{paper};color:{ink};font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}}
main{{max-width:70rem;margin:0 auto;padding:1.5rem 1rem 4rem}}
h1{{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}}
h2{{font-size:1.2rem;line-height:1.3;margin:2.5rem 0 .25rem}}
p{{margin:.25rem 0 .75rem;max-width:46rem}}
.wide{{overflow-x:auto;margin:.75rem 0}}
table{{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}}
th,td{{padding:.4rem .6rem;text-align:right;vertical-align:top;white-space:nowrap;border-bottom:1px solid {grid}}}
thead th{{font-weight:600;vertical-align:bottom;border-bottom-color:{faint}}}
thead th[colspan]{{text-align:center;border-bottom:0}}
th:first-child{{text-align:left;position:sticky;left:0;background:{paper};padding-left:0}}
.differences thead th{{white-space:normal}}
.differences :is(th,td):nth-child(-n+2){{text-align:left}}
.differences th:nth-child(3){{text-align:center;white-space:nowrap}}
tbody th{{font-weight:600;white-space:normal;min-width:9.5rem}}
td.says{{white-space:normal;min-width:17rem}}
@media (max-width:40rem){{tbody th{{min-width:6.5rem;max-width:8rem}}td.says{{min-width:14rem}}}}
.paper,.missing,small,.notes,.downloads{{color:{faint}}}
.missing{{font-style:italic}}
small{{display:block;font-weight:400;font-size:.8rem}}
.notes{{font-size:.85rem;max-width:46rem}}
ul{{margin:.25rem 0;padding-left:1.2rem}}
a{{color:{blue}}}
.downloads{{font-size:.85rem}}
figure{{margin:2.5rem 0 0;max-width:46rem}}
figcaption{{font-size:1.2rem;font-weight:600;margin-bottom:.5rem}}
figure svg{{display:block;width:100%;height:auto;stroke-linejoin:round;stroke-linecap:butt}}
.whisker{{display:block;margin:0 auto;fill:{blue}}}
.whisker path{{fill:none;stroke-width:2;stroke:{blue}}}
.whisker .nought{{stroke:{faint};stroke-width:1}}
.whisker .theirs{{stroke:{orange};stroke-width:1.5}}
details{{margin-top:2.5rem}}
summary{{cursor:pointer;font-weight:600}}
pre{{overflow-x:auto;font-size:.8rem;padding:.75rem;border:1px solid {grid};border-radius:.4rem;overflow-wrap:normal}}
"""
