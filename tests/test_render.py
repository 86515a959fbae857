from __future__ import annotations

import csv
import io
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from spp_cls.intervals import Estimate
from spp_cls.render import COLOURS, DASHES, MARKERS, as_csv, draw, html, latex, markdown
from spp_cls.tabular import Cell, Curve, Difference, Figure, Page, Table

NAN = math.nan
HOSTILE = "<script>&_%"
SMALL = Table(
    title="Table 2",
    about="Ten views.",
    rows=("no SPP", "SPP"),
    columns=("ZF-5", "Convnet*-5"),
    cells={
        ("no SPP", "ZF-5"): Cell(35.99, Estimate(40.0, 39.5, 40.5, 5), Estimate(40.0, 39.0, 41.25, 5)),
        ("SPP", "ZF-5"): Cell(34.98, Estimate(38.5, NAN, NAN, 1)),
        ("SPP", "Convnet*-5"): Cell(34.38),
    },
    differences=(
        Difference("SPP", "no SPP", "ZF-5", -1.01, Estimate(-1.5, NAN, NAN, 1), None, "not known yet"),
        Difference("SPP", "no SPP", "Convnet*-5", -0.55, None, None, "not run yet"),
    ),
    notes=("Of 50 % of the images.",),
)
PLAIN = Table("Alone", "", ("a",), ("b",), {("a", "b"): Cell(None, Estimate(1.0, 0.5, 1.5, 3))})
EMPTY = Table("Nothing", "", (), (), {})
STRANGE = Table("T", "", (HOSTILE, "[b] | c", "*"), ("x",), {})
LINES = Figure(
    "By size",
    "test size, px",
    "top-1 error, %",
    (
        Curve("single", (180.0, 224.0, 256.0), tuple(Estimate(m, m - 1, m + 1, 3) for m in (32.0, 30.0, 31.0))),
        Curve(
            "_multi $x$",
            (180.0, 224.0, 256.0),
            (Estimate(31.0, NAN, NAN, 1), Estimate(NAN, NAN, NAN, 0), Estimate(30.0, 29.5, 30.5, 2)),
        ),
    ),
    marks=(180.0, 224.0),
)
BARS = Figure(
    "By row",
    "",
    "top-1 error, %",
    (
        Curve("ZF-5", (HOSTILE, "SPP"), (Estimate(36.0, 35.0, 37.0, 3), Estimate(35.0, 34.0, 36.0, 3))),
        Curve("O-7", ("SPP",), (Estimate(30.0, 30.5, 31.0, 3),)),  # a percentile interval beside its mean
    ),
    kind="bars",
)

# --- Markdown, CSV, LaTeX


def test_markdown() -> None:
    assert (
        markdown(SMALL)
        == """\
## Table 2

Ten views.

| % | ZF-5: paper | ZF-5: ours | Convnet\\*-5: paper | Convnet\\*-5: ours |
|---|---:|---:|---:|---:|
| no SPP | 35.99 | 40.00 ± 0.50 (n = 5) [39.00, 41.25] | – | not run yet |
| SPP | 34.98 | 38.50 (n = 1) | 34.38 | not run yet |

| difference | column | paper | ours | what it says |
|---|---|---:|---:|---|
| SPP − no SPP | ZF-5 | −1.01 | −1.50 | not known yet |
| SPP − no SPP | Convnet\\*-5 | −0.55 | not run yet | not run yet |

- Ours: mean over n seeds ± half of its 95 % interval (Student's t, over seeds alone).
- In brackets: 95 % interval over seeds and test images, for other images of the same kind would have been easier or \
harder.
- Differences are in points, over pairs of runs of one seed.
- Of 50 % of the images.
"""
    )


def test_csv() -> None:
    assert as_csv(SMALL) == (
        "row,baseline,column,paper,mean,low,high,n,level,low_over_images,high_over_images,conclusion\n"
        "no SPP,,ZF-5,35.99,40,39.5,40.5,5,0.95,39,41.25,\n"
        "no SPP,,Convnet*-5,,,,,0,,,,\n"
        "SPP,,ZF-5,34.98,38.5,,,1,0.95,,,\n"
        "SPP,,Convnet*-5,34.38,,,,0,,,,\n"
        "SPP,no SPP,ZF-5,-1.01,-1.5,,,1,0.95,,,not known yet\n"
        "SPP,no SPP,Convnet*-5,-0.55,,,,0,,,,not run yet\n"
    )


def test_latex() -> None:
    assert (
        latex(SMALL) == r"""% \usepackage{booktabs}
% Of 50 % of the images.
\begin{table}
\centering
\caption{Table 2. Ten views. Ours: mean over n seeds $\pm$ half of its 95 \% interval (Student's t, over seeds """
        r"""alone). In brackets: 95 \% interval over seeds and test images, for other images of the same kind would """
        r"""have been easier or harder. Differences are in points, over pairs of runs of one seed.}
\begin{tabular}{lrrrr}
\toprule
\% & \multicolumn{2}{c}{ZF-5} & \multicolumn{2}{c}{Convnet*-5} \\
\cmidrule(lr){2-3} \cmidrule(lr){4-5}
 & paper & ours & paper & ours \\
\midrule
no SPP & 35.99 & 40.00 $\pm$ 0.50 (n = 5) [39.00, 41.25] & -- & not run yet \\
SPP & 34.98 & 38.50 (n = 1) & 34.38 & not run yet \\
\bottomrule
\end{tabular}
\end{table}

\begin{table}
\centering
\caption{Table 2: differences}
\begin{tabular}{llrrp{0.4\linewidth}}
\toprule
difference & column & paper & ours & what it says \\
\midrule
SPP $-$ no SPP & ZF-5 & $-$1.01 & $-$1.50 & not known yet \\
SPP $-$ no SPP & Convnet*-5 & $-$0.55 & not run yet & not run yet \\
\bottomrule
\end{tabular}
\end{table}
"""
    )


def test_a_table_without_the_papers_numbers_has_no_column_for_them() -> None:
    assert "| % | b |\n|---|---:|\n| a | 1.00 ± 0.50 (n = 3) |\n" in markdown(PLAIN)
    row = "\\midrule\na & 1.00 $\\pm$ 0.50 (n = 3) \\\\\n"
    assert "\\begin{tabular}{lr}\n\\toprule\n\\% & b \\\\\n" + row in latex(PLAIN)
    assert "paper" not in markdown(PLAIN) + latex(PLAIN)
    assert 'colspan="2"' not in html(Page("", "", (PLAIN,))) and 'colspan="2"' in html(Page("", "", (SMALL,)))


def test_intervals_over_images_have_a_column_where_there_are_any() -> None:
    each = Difference("SPP", "no", "x", None, Estimate(0.5, 0.1, 0.9, 4, 0.97), Estimate(0.5, -0.25, 1.25, 4), "")
    table = Table("T", "", ("SPP",), ("x",), {}, (each,))
    line = "| SPP − no | x | – | +0.50 ± 0.40 | [−0.25, +1.25] | – |"
    assert line in markdown(table)
    assert "| difference | column | paper | ours | over seeds and images | what it says |" in markdown(table)
    assert "±" in markdown(table) and "97 % interval (Student's t" in markdown(table)
    assert "[−0.25, +1.25]" in html(Page("", "", (table,)))


def test_an_empty_table() -> None:
    says = "Nothing to show: the table has no rows or no columns."
    assert markdown(EMPTY) == f"## Nothing\n\n- {says}\n"
    assert as_csv(EMPTY).count("\n") == 1
    assert "tabular" not in latex(EMPTY) and says in latex(EMPTY)
    assert says in html(Page("", "", (EMPTY,)))


def test_names_in_markdown() -> None:
    text = markdown(STRANGE)
    assert "| \\<script\\>\\&\\_% | not run yet |" in text and "| \\[b] \\| c |" in text and "| \\* |" in text
    assert markdown(Table("1. a\n\nb", "# c", (), (), {})).startswith("## 1\\. a b\n\n\\# c\n")


def test_names_in_csv() -> None:
    names = ('a,"b"', "line\nbreak", HOSTILE)
    read = list(csv.DictReader(io.StringIO(as_csv(Table("", "", names, ("x",), {})), newline="")))
    assert tuple(row["row"] for row in read) == names


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (HOSTILE, r"\textless{}script\textgreater{}\&\_\%"),
        ("#{}~^\\$", r"\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}\$"),
        ("±–−", r"$\pm$--$-$"),
        ("a--b---c", "a-{}-b-{}--c"),
        ("[a]", "{}[a]"),  # after \\ it would be a length
        ("*a", "{}*a"),
        ('"`|', r"''\`{}\textbar{}"),
    ],
)
def test_names_in_latex(name: str, written: str) -> None:
    lines = latex(Table("", "", (name,), ("x",), {})).splitlines()
    assert lines[lines.index("\\midrule") + 1] == f"{written} & not run yet \\\\"


# --- figures


@pytest.mark.parametrize("figure", [LINES, BARS, Figure("None", "x", "y", ())], ids=lambda figure: figure.title)
@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_a_figure_has_the_same_bytes_twice(figure: Figure, suffix: str, tmp_path: Path) -> None:
    import matplotlib

    draw(figure, tmp_path / f"a.{suffix}")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):  # somebody's own settings
        draw(figure, tmp_path / "below" / f"b.{suffix}")
        assert matplotlib.rcParams["font.size"] == 30
    first, second = (tmp_path / f"a.{suffix}").read_bytes(), (tmp_path / "below" / f"b.{suffix}").read_bytes()
    assert first == second and len(first) > 1000
    assert b"CreationDate" not in first and b"<dc:date>" not in first
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{suffix}", "below"]


def texts(svg: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_text_in_a_figure_stays_text(tmp_path: Path) -> None:
    draw(LINES, tmp_path / "lines.svg")
    draw(BARS, tmp_path / "bars.svg")
    draw(Figure("None", "x", "y", (Curve("a", (1.0,), (Estimate(NAN, NAN, NAN, 0),)),), (1.0,)), tmp_path / "none.svg")
    lines, bars = texts(tmp_path / "lines.svg"), texts(tmp_path / "bars.svg")
    assert {"By size", "single", "_multi $x$", "test size, px", "top-1 error, %", "180", "224", "256"} <= set(lines)
    assert lines.count("180") == 2  # a tick and a mark
    assert {"By row", "ZF-5", "O-7", HOSTILE, "SPP", "top-1 error, %"} <= set(bars)
    assert "not run yet" in texts(tmp_path / "none.svg")


def test_a_curve_of_many_points_has_few_markers(tmp_path: Path) -> None:
    for points, markers in ((20, 20), (21, 11), (90, 10)):
        x = tuple(map(float, range(points)))
        curve = Curve("a", x, tuple(Estimate(50 - at / 2, 48 - at / 2, 52 - at / 2, 3) for at in x))
        draw(Figure("Learning", "epoch", "error", (curve,)), tmp_path / "a.svg")
        colour = f"fill: {next(iter(COLOURS))}; stroke: #ffffff"
        uses = re.findall(rf"<use [^>]*{colour}", (tmp_path / "a.svg").read_text())
        assert len(uses) == markers + 1  # and one in the legend


def test_a_path_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.png: its suffix has to be .svg or .pdf"):
        draw(LINES, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_curve_needs_an_estimate_an_x() -> None:
    with pytest.raises(ValueError, match="curve a: 2 x but 1 estimates"):
        Curve("a", (1.0, 2.0), (Estimate(1, 1, 1, 1),))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_curves_can_be_seen_and_told_apart() -> None:
    for light, dark in COLOURS.items():  # WCAG 2.1, 1.4.3: 4.5 to one
        assert 1.05 / (luminance(light) + 0.05) >= 4.5, light
        assert (luminance(dark) + 0.05) / (luminance("#171a20") + 0.05) >= 4.5, dark
    looks = [(list(COLOURS)[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(42)]
    assert len(set(looks)) == 42 and len(set(DASHES)) == 4


# --- the page

PAGE = Page(f"Tables {HOSTILE}", "About </main>", (SMALL, STRANGE), (LINES, BARS), (f"note {HOSTILE}",), "a: </pre>\n")


class Reader(HTMLParser):
    """Tags in balance, what they hold and the names they bear."""

    VOID = {"meta", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, name: str) -> Iterator[str]:
        return (value for key, value in self.attributes if key == name)


@pytest.fixture(scope="module")
def reader() -> Reader:
    found = Reader()
    found.feed(html(PAGE))
    found.close()
    assert found.open == []
    return found


def test_the_page_is_the_same_twice() -> None:
    assert html(PAGE) == html(PAGE)


def test_the_page_needs_nothing_else(reader: Reader) -> None:
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    links = [*reader.of("href"), *reader.of("xlink:href"), *reader.of("src")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    styles = " ".join([*reader.of("style"), html(PAGE)])
    assert not re.search(r"url\((?!#)|@import", styles)


def test_names_on_the_page_are_text(reader: Reader) -> None:
    assert f"Tables {HOSTILE}" in reader.text and "a: </pre>\n" in reader.text and "About </main>" in reader.text
    assert reader.text.count(HOSTILE) == 2  # a row of the table, a row of the figure
    assert "not run yet" in reader.text and "–" in reader.text


def test_names_in_the_page_are_borne_once(reader: Reader) -> None:
    ids = list(reader.of("id"))
    assert len(ids) == len(set(ids)) and {"table-1", "table-2", "figure-1", "figure-2"} <= set(ids)
    used = [*re.findall(r"url\(#([^)]+)\)", html(PAGE)), *(h[1:] for h in reader.of("xlink:href"))]
    assert used and set(used) <= set(ids)


def test_drawings_take_their_colours_from_the_page() -> None:
    drawings = re.findall(r"<svg.*?</svg>", html(PAGE), re.DOTALL)
    assert len(drawings) == 4  # two differences, two figures
    assert not [colour for svg in drawings for colour in re.findall(r"#[0-9a-f]{6}\b", svg)]
    used = {name for svg in drawings for name in re.findall(r"var\(--(\w+)\)", svg)}
    light, dark = re.findall(r":root\{(.*?)\}", html(PAGE))
    for colours in (light, dark):
        assert used <= set(re.findall(r"--(\w+):#", colours))
    assert "@media (prefers-color-scheme:dark)" in html(PAGE)


def test_downloads_are_the_files(reader: Reader) -> None:
    links = [unquote(link.split(",", 1)[1]) for link in reader.of("href") if link.startswith("data:")]
    assert links[:3] == [as_csv(SMALL), latex(SMALL), markdown(SMALL)]
    assert list(reader.of("download"))[:3] == ["table-2.csv", "table-2.tex", "table-2.md"]


def test_a_difference_is_drawn_to_scale() -> None:
    each = Difference("a", "b", "x", -2.0, Estimate(1.0, 0.0, 2.0, 3), None, "")
    page = html(Page("", "", (Table("", "", ("a",), ("x",), {}, (each,)),)))
    # 130 px wide, nought in its middle, the largest number 7 px from the edge: 29 px a point.
    assert '<path class="ours" d="M65.0 11H123.0"/><circle cx="94.0" cy="11" r="3.5"/>' in page
    assert '<path class="theirs" d="M7.0 5l6 6l-6 6l-6 -6z"/>' in page


def test_matplotlib_is_loaded_to_draw_alone() -> None:
    code = "import sys, spp_cls.render; print(*{'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
