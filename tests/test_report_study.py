"""The page of a study: it is whole, stands alone, and its figures, captions and data are those of the runs."""

import io
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pandas
import pytest
from made_laws import POWER, SURGE, fitted
from worlds import World

from scaling_jax.errors import UserError
from scaling_jax.laws import lr_optimum
from scaling_jax.laws.compare import Comparison
from scaling_jax.laws.finding import Finding, Number
from scaling_jax.laws.lr_surface import bend_form, power_form
from scaling_jax.report.study import build
from scaling_jax.report.study.plot import amount, short
from scaling_jax.report.study.svg import inline

WORLD = World(batches=(512.0, 2048.0, 8192.0), horizons=(2.0**17, 2.0**19, 2.0**21), lrs_each=7, seeds=1, diverge=3.0)
_VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """What a page holds: its elements in order, and whether they are closed in the order that they were opened."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag] = self.texts.get(tag, "") + data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def surface():
    batches, reach = (512.0, 8192.0), {"batch_tokens": (512.0, 8192.0), "tokens": (2.0**17, 2.0**21)}
    fits = {
        "surge": fitted(bend_form("surge", 1e9, batches, 0.01), SURGE, 0.02, reach),
        "power": fitted(power_form(1e9, 1e5), POWER, 0.02, reach, unidentified=("batch_exponent",)),
    }
    tied = Comparison("tokens", 5e5, 9, 6, [], "surge", ["surge", "power"], "surge and power cannot be told apart beyond tokens 5e+05")
    numbers = [Number("B_crit ∝ T^p by surge", 0.5, 0.4, None, published=1.0), Number("B_crit ∝ T^p by plateau", None)]
    return Finding("lr_surface", "η*(B, T)", fits, "surge", numbers, ["A sentence < of the surface."], pandas.DataFrame(), 42, tied)


def analyse(table, progress=None):
    progress("lr_optimum")
    (optimum,) = lr_optimum.ANALYSES
    try:
        optima = optimum.run(table)
    except UserError as error:
        optima = str(error)
    return {"lr_optimum": optima, "lr_surface": surface(), "kaplan_d": "needs runs on subsets of the data"}


def text_of(page):
    return re.sub(r"<[^>]+>", "|", (page.parent / "index.html").read_text())


@pytest.fixture(scope="module")
def table():
    return WORLD.table(0)


@pytest.fixture(scope="module")
def report(table, tmp_path_factory):
    return build.report_table(table, None, "a <planted> study", tmp_path_factory.mktemp("out") / "report", analyse)


@pytest.fixture(scope="module")
def parsed(report):
    return Page(report.read_text())


def csv(parsed, name):
    (link,) = [a for a in parsed.all("a") if a.get("download") == f"{name}.csv"]
    head, _, data = link["href"].partition(",")
    assert head == "data:text/csv;charset=utf-8"
    return pandas.read_csv(io.StringIO(unquote(data)))


def test_the_page_stands_alone(parsed, report):
    for tag, attrs in parsed.elements:
        assert tag not in ("link", "script", "img", "iframe", "object")
        for name in ("src", "href", "data", "xmlns"):
            assert re.match(r"(?:#|data:text/csv|figures/)", attrs.get(name, "#")), (tag, attrs[name][:80])
    text = report.read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert len(text) < 2e6


def test_ids_are_unique_and_links_of_the_page_lead_somewhere(parsed):
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"][1:] for _, attrs in parsed.elements if attrs.get("href", "").startswith("#")]
    assert targets and set(targets) <= set(ids)
    assert all(part in ids for svg in parsed.all("svg") for part in svg["aria-labelledby"].split())


def test_headings_stand_in_order(parsed):
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert parsed.texts["h1"] == "a <planted> study"


def test_every_figure_has_caption_alternative_data_and_files(parsed, report):
    figures = [attrs["id"] for attrs in parsed.all("figure")]
    expected = ["loss_curves", "noise_scale", "lr_curves_n24576", "lr_curves_n98304", "lr_against_tokens", "lr_against_batch"]
    assert figures[:6] == expected and {"critical_batch", "width_transfer", "loss_c"} <= set(figures)
    text = report.read_text()
    assert sorted(path.name for path in (report.parent / "figures").iterdir()) == sorted(
        f"{n}.{k}" for n in figures for k in ("png", "pdf")
    )
    for name in figures:
        part = re.search(rf'<figure id="{name}">.*?</figure>', text, re.DOTALL)[0]
        title, description, caption = (
            re.search(p, part, re.DOTALL)[1] for p in (r"<title[^>]*>(.*?)<", r"<desc[^>]*>(.*?)<", r"<figcaption><p>(.*?)</p>")
        )
        assert (
            len(title) > 10 and len(description) > 100 and "To be seen:" in caption and re.search(r"\d[\d,]* (?:run|row|minima)", caption)
        )
        assert "nan" not in caption and "None" not in caption
        assert len(csv(parsed, name)) > 0
        pixels = read_png(report.parent / "figures" / f"{name}.png")
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 10
        assert (report.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def read_png(path):
    from matplotlib.image import imread

    return 255 * imread(path)[..., :3]


def test_the_csv_of_a_curve_has_what_is_drawn(parsed, table):
    data = csv(parsed, "lr_curves_n24576")
    kept = table[(table["params"] == 24576) & (table["status"] == "finished")]
    means = data[data["what"] == "mean loss"].set_index(["batch_tokens", "tokens", "lr"])["loss"].sort_index()
    expected = kept.assign(lr=kept["lr"].map(lambda v: float(f"{v:.6g}"))).set_index(["batch_tokens", "tokens", "lr"])["loss"].sort_index()
    assert len(means) == len(expected) and np.allclose(means, expected, rtol=1e-5)
    least = data[data["what"] == "minimum"]
    truth = WORLD.best_lr(least["batch_tokens"], least["tokens"])
    assert len(least) >= 7 and np.abs(np.log(least["lr"] / truth)).max() < 0.25
    lost = data[data["what"] == "diverged"]
    assert lost["runs"].sum() == ((table["params"] == 24576) & (table["status"] == "diverged")).sum()


def test_the_forms_lines_are_theirs(parsed):
    data = csv(parsed, "lr_against_batch")
    line = data[(data["what"] == "fit") & (data["form"] == "surge")]
    crit = SURGE["batch_crit"] * (line["tokens"] / 1e9) ** SURGE["batch_crit_tokens_exponent"]
    top = SURGE["lr_crit"] * (line["tokens"] / 1e9) ** SURGE["lr_crit_tokens_exponent"]
    ratio = line["batch_tokens"] / crit
    assert len(line) == 120 and np.allclose(line["lr"], 2 * top / (np.sqrt(ratio) + 1 / np.sqrt(ratio)), rtol=1e-4)
    assert (line["low"] < line["lr"]).all() and (line["lr"] < line["high"]).all()
    bend = csv(parsed, "critical_batch").query("definition == 'kink_surge'")
    crit = SURGE["batch_crit"] * (bend["tokens"] / 1e9) ** SURGE["batch_crit_tokens_exponent"]
    assert len(bend) and np.allclose(bend["batch_tokens"], crit, rtol=1e-4)


def test_what_was_run_and_what_came_out(report, table):
    text = text_of(report)
    assert f"{len(table)} measurements" in text and f"{table['point'].nunique()} runs" in text
    counts = table["status"].value_counts()
    assert f"Rows: {counts['finished']} finished, {counts['diverged']} diverged." in text
    best = re.search(r"Best learning rate at T = 2\.1M, N = 24\.6k; its batch size B = ([\d,]+)\|+([\d.]+)\|+([\d.]+) to ([\d.]+)", text)
    batch, value, low, high = (float(v.replace(",", "")) for v in best.groups())
    assert low < value < high and abs(np.log(value / WORLD.best_lr(batch, 2.0**21))) < 0.25
    points = lr_optimum.lr_points(table).query("params == 24576 and tokens == 2**21 and batch_tokens == @batch")
    error = 1.96 * points["lr_log_se"].item()
    assert error > 1e-3 and np.allclose([value / low, high / value], np.exp(error), rtol=2e-3)


def test_fits_say_what_is_not_identified_open_or_tied(report):
    page, text = report.read_text(), text_of(report)
    row = re.search(r"batch_exponent</th>.*?</tr>", page, re.DOTALL)[0]
    assert "not identified" in row and "0.3" not in row
    assert "at least 0.4" in text and "interval open" in text and "so it was made" in text
    assert "Tied on what is held out (tokens beyond 5" in text and "surge and power" in text
    assert "A sentence &lt; of the surface." in text
    assert "kaplan_d" in text and "Needs runs on subsets of the data." in text
    assert "Loss against data, L(D)" in text.split("What is left out, and why")[-1]


def changed(**fields):
    values = {name: getattr(WORLD, name) for name in WORLD.__dataclass_fields__}
    return World(**(values | fields)).table(0)


@pytest.mark.parametrize(
    ("world", "gone", "why"),
    [
        ({"widths": (32,)}, "Transfer of the learning rate across widths", "The table has one width."),
        ({"horizons": (2.0**19,)}, "Best learning rate against tokens", "There is one horizon."),
        ({"batches": (2048.0,)}, "Best learning rate against batch size", "There is one batch size."),
        ({"lrs": (0.01,)}, "Loss against learning rate", "No batch size and horizon has more than one learning rate."),
    ],
)
def test_what_the_data_do_not_support_is_left_out_with_its_reason(tmp_path, world, gone, why, monkeypatch):
    drawn = []
    monkeypatch.setattr(build.page, "draw", lambda plot: drawn.append(plot.title) or (_ for _ in ()).throw(UserError("not drawn here")))
    build.report_table(changed(**world), None, "less", tmp_path / "out", analyse)
    text = text_of(tmp_path / "out" / "index.html").split("What is left out, and why")[-1]
    assert drawn and not any(title.startswith(gone) for title in drawn)
    assert re.search(re.escape(gone) + r"[|\s]*" + re.escape(why), text)


def test_minima_at_the_edge_are_bounds(tmp_path):
    far = pandas.concat([changed(grid_off=6.0, diverge=100.0, widths=(32,)), changed(widths=(64,))], ignore_index=True)
    page = build.report_table(far, None, "edge", tmp_path / "out", analyse)
    parsed, text = Page(page.read_text()), text_of(page)
    points = csv(parsed, "lr_curves_n24576")
    assert not (points["what"] == "minimum").any() and (points["what"] == "bound low").sum() == 9
    assert "Large rings are minima of local parabolas (0); open triangles are lowest losses at the edge of their grid (9)" in text
    assert "a bound: edge of the grid" in text and "at most 0.0" in text


def test_a_table_without_any_loss_writes_nothing(tmp_path, table):
    with pytest.raises(UserError, match="diverged"):
        build.report_table(table.assign(status="diverged", loss=np.nan), None, "none", tmp_path / "out", analyse)
    assert not (tmp_path / "out").exists()


def test_courses_of_runs_are_averaged_and_the_best_stand_out(tmp_path, table):
    from scaling_jax.report.study.curves import loss_curves
    from scaling_jax.report.study.plot import Source

    rows = table[table["status"] == "finished"]
    steps = np.arange(1, 1001)
    names = rows["point"].unique()
    parts = [
        pandas.DataFrame({"point": name, "trajectory": name, "tokens": 2048.0 * steps, "loss": 5.0 + i / steps})
        for i, name in enumerate(names)
    ]
    plot = loss_curves(Source(table, rows, {}, pandas.concat(parts)))
    assert set(plot.data["point"]) == set(names) and len(plot.data) <= 80 * 2 + 24 * len(names)
    best = rows[rows["tokens"] == 2.0**21].groupby("params")["loss"].idxmin()
    shown = plot.data.dropna(subset=["params"])
    assert set(shown["point"]) == set(rows.loc[best, "point"])
    last = shown.groupby("point")["loss"].last()
    assert all(abs(last[name] - 5.0 - list(names).index(name) / 980) < 2e-3 for name in last.index)
    assert f"{len(names)} runs" in plot.caption


def test_a_course_of_warmup_stable_decay_is_its_trunk_and_last_decay():
    from scaling_jax.report.study.curves import _longest_leg

    legs = {"trunk": range(1, 9), "decay-6": range(5, 7), "decay-10": range(8, 11)}
    course = pandas.DataFrame([{"leg": leg, "tokens": t, "loss": len(leg)} for leg, tokens in legs.items() for t in tokens])
    kept = _longest_leg(course)
    assert kept["tokens"].tolist() == list(range(1, 11)) and kept["leg"].tolist() == ["trunk"] * 7 + ["decay-10"] * 3
    assert _longest_leg(course[course["leg"] == "trunk"])["tokens"].tolist() == list(range(1, 9))


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path, table):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files and no report"):
        build.report_table(table, None, "x", out, analyse)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    build.page.write(out, f"{build.page.GENERATOR}<a href='figures/other.png'></a>" + '<a href="figures/old.png">', [])
    (out / "figures").mkdir()
    for name in ("old.png", "mine.png"):
        (out / "figures" / name).write_bytes(b"x")
    (out / "notes.txt").write_text("mine")
    build.page.write(out, f"{build.page.GENERATOR} new", [])
    assert sorted(path.name for path in out.rglob("*.*")) == ["index.html", "mine.png", "notes.txt"]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        build.page.check_out(file)


def test_ink_follows_the_page():
    svg = (
        b'<?xml version="1.0"?><!DOCTYPE svg><svg xmlns:xlink="http://w/x" width="10pt" viewBox="0 0 10 20" xmlns="http://w/s">'
        b'<metadata>http://m</metadata><defs><path id="a" d="M 1.23456 2 z" style="stroke: #000000"/></defs>'
        b'<use xlink:href="#a" transform="scale(0.015625)" clip-path="url(#p)" style="fill: #0072b2"/></svg>'
    )
    text = inline(svg, "one", "A title", "What it shows")
    assert text.startswith('<svg role="img" aria-labelledby="one-t one-d" viewBox="0 0 10 20"') and "http" not in text
    assert 'id="one-a" d="M 1.23 2 z" style="stroke: currentColor"' in text
    assert 'href="#one-a" transform="scale(0.015625)" clip-path="url(#one-p)" style="fill: #0072b2"' in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234567.0, "1.23×10⁶"), (-4.56e-5, "−4.56×10⁻⁵"), (12345.6, "12,346"), (0.25, "0.25"), (float("nan"), "–")],
)
def test_numbers_for_people(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(256, "256"), (8192, "8,192"), (16384, "16.4k"), (2**20, "1.05M"), (999600, "1M"), (7e9, "7B")]
)
def test_amounts_for_people(value, text):
    assert amount(value) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("T^0.45 <", "T<sup>0.45</sup> &lt;"),
        ("N^(α_N/α_D)", "N<sup>α<sub>N</sub>/α<sub>D</sub></sup>"),
        ("B_crit, 1.05e+06", "B<sub>crit</sub>, 1.05×10<sup>6</sup>"),
        ("alpha_n", "α<sub>n</sub>"),
        ("growth_tokens batch_crit", "growth_tokens batch_crit"),
    ],
)
def test_powers_and_indices(text, shown):
    assert build.page.rich(text) == shown
