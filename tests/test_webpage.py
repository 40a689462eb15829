"""The page is one whole file: nothing to fetch, no script, every text escaped, every section there, usable anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from records import document, predictions, samples

from pard_train.reports.charts import GLYPHS, NUM_COLORS, TEMPLATES, Chart, Point, assign_styles, draw_svg, write_png
from pard_train.reports.comparison import compare_results, render_comparison_page
from pard_train.reports.sections import build_sections
from pard_train.reports.webpage import render_page

VOID = {"meta", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Outline(HTMLParser):
    """Tags with their attributes, texts by the tag they stand in, and whether every tag is closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def ids(self) -> list[str]:
        """Anchors of sections, in order."""
        return [attributes["id"] or "" for tag, attributes in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The whole matrix."""
    return document()


@pytest.fixture(scope="module")
def page(whole: dict[str, Any]) -> str:
    """Its page."""
    return render_page(whole, predictions(whole), samples(whole))


def pages(page: str) -> list[str]:
    """The page of a result and that of a comparison."""
    main, mine = document(drafts=["pard-0.5b"]), document(drafts=["pard-0.5b-dpace"])
    return [page, render_comparison_page(compare_results({"main": main, "mine": mine}), ["mine: <b>below</b>"])]


def test_the_pages_are_well_formed_fetch_nothing_and_run_nothing(page: str) -> None:
    for text in pages(page):
        outline = Outline(text)
        assert outline.open == []
        for tag, attributes in outline.tags:
            assert tag not in ("script", "link", "img", "iframe", "object", "form", "base", "image"), tag
            assert not {"src", "srcset", "data", "action"} & attributes.keys(), tag
            assert (attributes.get("href") or "#").startswith("#")
            assert not [name for name in attributes if name.startswith("on")]
        assert not re.search(r"url\((?!#)|@import|https?://", text)
        ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
        assert len(ids) == len(set(ids)) > 0
        (policy,) = (a["content"] for _, a in outline.tags if "http-equiv" in a)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_section_is_there_and_every_link_leads_to_one(page: str) -> None:
    outline = Outline(page)
    ids = ["drafts", "k", "positions", "histogram", "speed", "prediction", "category", "turn", "prompt_length"]
    assert outline.ids() == [*ids, "position", "context", "answers", "numbers", "terms", "origin"]
    links = [(attributes["href"] or "")[1:] for tag, attributes in outline.tags if tag == "a"]
    assert len(links) > 9
    assert set(links) <= set(outline.ids())


def test_sections_without_content_are_left_out(whole: dict[str, Any]) -> None:
    records = [r for r in whole["records"] if r["mode"] == "replay" and r["num_draft_tokens"] == 8]
    records = [{**r, "groups": []} for r in records if (r["target"], r["benchmark"]) == (records[0]["target"], "gsm8k")]
    outline = Outline(render_page({**whole, "records": records, "failures": []}, [], []))
    assert outline.ids() == ["drafts", "positions", "histogram", "numbers", "terms", "origin"]
    assert "Failed" not in "".join(outline.texts["h2"])


def test_a_result_of_sampled_runs_alone_has_a_page_too(whole: dict[str, Any]) -> None:
    records = [r for r in whole["records"] if r["temperature"] > 0]
    outline = Outline(render_page({**whole, "records": records}, [], []))
    assert {"drafts", "positions", "histogram", "speed"} <= set(outline.ids())


def test_what_models_and_users_wrote_is_text_and_nothing_else(whole: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script> & \"quotes\" 'x' </svg></style> \U0001f33a\n\n  two\tspaces"
    changed = {
        **whole,
        "records": [{**r, "draft": evil, "target": evil, "benchmark": evil} for r in whole["records"][:6]],
        "failures": [{"draft": evil, "target": evil, "benchmark": None, "reason": evil}],
    }
    for record in changed["records"]:
        record["system_prompt"] = record["prompt_template"] = evil
        record["groups"] = [{**group, "name": f"{group['name']} {evil}"} for group in record["groups"]]
        record["provenance"] = {**record["provenance"], "command": ["evaluate.py", evil]}
    sample = {**samples(whole)[0], "draft": evil, "target": evil, "prompt_id": evil, "question": evil}
    sample["steps"] = [{"accepted": evil, "target_token": evil}]
    prediction = {**predictions(whole)[0], "draft": evil, "target": evil}
    text = render_page(changed, [prediction], [sample])
    outline = Outline(text)
    assert "<script" not in text
    assert outline.open == []
    assert evil in outline.texts["mark"]
    for tag in ("div", "text", "figcaption", "td", "b", "dd"):
        assert any(evil.split("\n")[0] in piece for piece in outline.texts[tag]), tag
    assert any("<script>alert(1)</script>" in piece for piece in outline.texts["pre"])


def test_answers_are_shown_letter_by_letter_with_accepted_runs_marked(whole: dict[str, Any], page: str) -> None:
    shown = re.findall(r'<div class="answer" dir="auto">(.*?)</div>', page, flags=re.DOTALL)
    for html, sample in zip(shown, samples(whole), strict=True):
        text = Outline(f"<div>{html}</div>").texts
        assert text.get("mark", []) == [step["accepted"] for step in sample["steps"] if step["accepted"]]
        plain = unescape(re.sub(r"</?mark>", "", html))
        assert plain == "".join(step["accepted"] + step["target_token"] for step in sample["steps"])


def test_failures_stand_before_every_figure(page: str) -> None:
    assert page.index("Tried to allocate 2.00 GiB &lt;tag&gt; &amp; more") < page.index("<svg")
    assert page.index('role="alert"') < page.index("<svg")


def test_models_versions_and_the_command_are_on_the_page(whole: dict[str, Any], page: str) -> None:
    pieces = [piece for texts in Outline(page).texts.values() for piece in texts]
    record = whole["records"][0]
    for kind in ("draft", "target", "benchmark"):
        assert record[f"{kind}_fingerprint"] in pieces
    for value in (*record["provenance"]["versions"].values(), record["provenance"]["git"]["commit"]):
        assert value in pieces
    assert "recipes/evaluate.py 'draft=outputs/my draft/export' 'targets=[Qwen/Qwen2.5-7B-Instruct]'" in pieces


def test_both_conventions_stand_side_by_side_in_every_row(whole: dict[str, Any], page: str) -> None:
    numbers = page[page.index('id="numbers"') : page.index('id="terms"')]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", numbers)[1:]]
    assert len(rows) == len(whole["records"])
    for row, r in zip(rows, whole["records"], strict=True):
        assert row[5] == f"{r['tau']:.2f} [{r['tau_low']:.2f}, {r['tau_high']:.2f}]"
        assert row[6] == (f"{r['vllm_tau']:.2f}" if "vllm_tau" in r else "-")


def test_the_recommended_k_of_every_prediction_is_ringed_and_named(whole: dict[str, Any], page: str) -> None:
    (section,) = (s for s in build_sections(whole, predictions(whole)) if s.anchor == "prediction")
    marked = [
        (name, p.x) for chart in section.charts for name, points in chart.series.items() for p in points if p.is_marked
    ]
    found = predictions(whole)
    assert sorted(marked) == sorted((p["draft"], p["recommended_num_draft_tokens"]) for p in found)
    for row, p in zip(section.tables[0].rows, found, strict=True):
        assert row[:4] == [p["draft"], p["target"], str(p["batch_size"]), str(p["recommended_num_draft_tokens"])]
        assert row[4:] == [f"{r['speedup']:.2f}x" for r in p["rows"]]


def test_more_panels_than_fit_are_folded_away(whole: dict[str, Any]) -> None:
    found = [{**r, "groups": []} for r in whole["records"] if r["draft"] == "pard-0.5b" and r["mode"] == "replay"]
    many = {**whole, "records": [{**r, "target": f"{r['target']}-{i}"} for i in range(2) for r in found]}
    text = render_page(many, [], [])
    section = text[text.index('id="positions"') : text.index('id="histogram"')]
    assert section.split("<details>")[0].count("<figure>") == 6
    assert section.split("<details>")[1].count("<figure>") == 6
    assert "<summary>6 more</summary>" in section


def test_both_color_schemes_define_the_same_colors_with_enough_contrast() -> None:
    css = (TEMPLATES / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    )
    assert light.keys() == dark.keys()
    for scheme in (light, dark):
        for name, ratio in [("text", 7), ("muted", 4.5), *((f"c{slot}", 3) for slot in range(8))]:
            assert contrast(scheme[name], scheme["card"]) >= ratio, (name, scheme[name])
        assert contrast(scheme["run-text"], scheme["run"]) >= 7
        assert contrast(scheme["alert"], scheme["alert-card"]) >= 4.5
    assert "text-decoration: underline" in css[css.index("\nmark {") :]  # color is not the only cue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2.2."""
    values = sorted((luminance(one), luminance(other)))
    return (values[1] + 0.05) / (values[0] + 0.05)


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2.2."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------------------------------

STYLES = {"a": 0, "b": 1}


def marks(svg: str, style: str) -> list[tuple[float, float]]:
    """Places of the markers whose style begins so, in the order of the drawing."""
    found = re.findall(r'<use href="#\w+" x="([\d.]+)" y="([\d.]+)" style="([^"]*)', svg)
    return [(float(x), float(y)) for x, y, found_style in found if found_style.startswith(style)]


def lines(svg: str, color: str) -> list[tuple[float, float]]:
    """Left and right end of the straight lines of a color."""
    found = re.findall(r'<path d="M ([\d.]+) [\d.]+ L ([\d.]+) [\d.]+ "[^>]*stroke: var\(--(\w+)\)', svg)
    return [(float(left), float(right)) for left, right, name in found if name == color]


def test_a_line_charts_points_lie_where_their_values_are() -> None:
    points = [Point(1, 1.0, 0.8, 1.2), Point(2, 2.0, 1.9, 2.1, is_marked=True), Point(3, 3.0, 2.5, 3.5)]
    chart = Chart("a chart", "line", {"a": points}, (0.0, 4.0), "tau", "K", [1, 2, 3], baseline=1.0)
    svg = draw_svg(chart, STYLES)
    assert ElementTree.fromstring(svg).get("aria-label") == "a chart: tau"
    (x1, y1), (x2, y2), (x3, y3) = marks(svg, "fill: var(--c0); stroke")
    assert (x2 - x1, y1 - y2) == pytest.approx((x3 - x2, y2 - y3), abs=0.2)
    assert marks(svg, "fill-opacity: 0; stroke: var(--c0)") == [(x2, y2)]  # the ring
    (baseline,) = re.findall(r"M [\d.]+ ([\d.]+) L [\d.]+ [\d.]+ [^>]*stroke-dasharray", svg)
    assert float(baseline) == pytest.approx(y1, abs=0.2)


@pytest.mark.parametrize(
    ("most", "shown"), [(3.2e-5, "3e-5"), (1e-3, "8e-4"), (1.25e-4, "7.5e-5"), (0.4, "0.3"), (2.3e5, "1.5e5")]
)
def test_labels_of_very_small_and_large_values_fit_into_the_margin(most: float, shown: str) -> None:
    svg = draw_svg(
        Chart("rate", "line", {"a": [Point(0, 0.0), Point(1, most)]}, (0.0, most), "rate", "x", [0, 1]), STYLES
    )
    labels = re.findall(r"<text[^>]*>([^<]+)<", svg)[2:-1]  # without those of x, and y's name
    assert shown in labels and max(map(len, labels)) <= 7


def test_bars_are_as_high_as_their_values_and_do_not_overlap() -> None:
    series = {"a": [Point(0, 0.5), Point(1, 0.25)], "b": [Point(0, 0.1), Point(1, 0.9)]}
    svg = draw_svg(Chart("bars", "bar", series, (0.0, 1.0), "share", "n", [0, 1]), STYLES)
    found = re.findall(
        r'd="M ([\d.]+) ([\d.]+) L ([\d.]+) [\d.]+ L [\d.]+ ([\d.]+) [^"]*z "[^>]*fill: var\(--c[01]\)', svg
    )
    bars = [tuple(map(float, bar)) for bar in found]
    heights = [foot - top for _, foot, _, top in bars]
    assert [h / heights[0] for h in heights] == pytest.approx([1.0, 0.5, 0.2, 1.8], abs=0.01)
    spans = sorted((left, right) for left, _, right, _ in bars)
    assert all(right <= left + 0.1 for (_, right), (left, _) in pairwise(spans))


def test_an_interval_chart_prints_the_value_of_every_row_in_order() -> None:
    series = {"a": [Point(0, 1.5, 1.2, 1.8), Point(1, 2.5, 2.2, 2.8)], "b": [Point(1, 2.0)]}
    chart = Chart("rows", "interval", series, (1.0, 3.0), "tau", baseline=1.0, rows=["first", "second"])
    svg = draw_svg(chart, STYLES)
    texts = {text: float(y) for y, text in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>([^<]+)<', svg)}
    shown = ["first", "1.50", "second", "2.50", "2.00"]
    assert sorted(shown, key=lambda text: texts[text]) == shown
    widths = [right - left for left, right in lines(svg, "c0")]  # from the baseline to the value; the interval
    assert widths[0] < widths[2] and widths[1] == pytest.approx(widths[3], abs=0.2)
    assert widths[0] / widths[1] == pytest.approx(0.5 / 0.6, abs=0.02)
    assert len(lines(svg, "c1")) == 1


def test_drawings_are_deterministic_and_keep_texts_and_numbers_as_they_are(tmp_path: Path) -> None:
    name = 'a $x$ #0b6fb8 1.23456 <b> id="a_1" \U0001f33a'
    chart = Chart(name, "interval", {name: [Point(0, 1.5)]}, (1.0, 3.0), name, rows=[name])
    svg = draw_svg(chart, {name: 9})
    assert svg == draw_svg(chart, {name: 9})
    texts = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert texts.count(name) == 2
    assert (
        "var(--c1)" in svg
        and "http" not in svg
        and "#" not in re.sub(r"url\(#|href=\"#|>[^<]*<|label=\"[^\"]*", "", svg)
    )
    for file in (tmp_path / "one.png", tmp_path / "two.png"):
        write_png([[chart], [chart] * 4], file)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_drawing_leaves_the_settings_of_matplotlib_alone_and_loads_no_pyplot() -> None:
    code = """
import sys
from pard_train.reports.charts import Chart, Point, draw_svg
assert "matplotlib" not in sys.modules
import matplotlib
before = [*dict.items(matplotlib.rcParams)]
draw_svg(Chart("a", "line", {"a": [Point(1, 1.0)]}, (0.0, 2.0), "tau"), {"a": 0})
assert [*dict.items(matplotlib.rcParams)] == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("is_old", [False, True], ids=["now", "without a range"])
def test_the_lines_of_measured_speed_ups_span_the_ratios_of_the_rounds(whole: dict[str, Any], is_old: bool) -> None:
    record = next(r for r in whole["records"] if r["mode"] == "live")
    ratios = {"speedup": 2.0} | ({} if is_old else {"speedup_low": 1.0, "speedup_high": 4.0})
    rates = {"tokens_per_second": 10.0, "tokens_per_second_low": 1.0, "tokens_per_second_high": 90.0}
    speed = {"ar_tokens_per_second": 5.0, "num_identical_answers": 8, "num_rounds": 3} | ratios | rates
    sections = build_sections({**whole, "records": [record | {"speed": speed}]})
    (chart,) = next(section.charts for section in sections if section.anchor == "speed")
    ((point,),) = chart.series.values()
    assert (point.y, point.low, point.high) == (2.0, *((None, None) if is_old else (1.0, 4.0)))


def test_a_breakdown_into_a_single_group_is_not_drawn(page: str) -> None:
    section = page[page.index('id="category"') : page.index('id="turn"')]
    captions = re.findall(r"<figcaption>(\S+) on", section)
    assert captions == ["mt-bench", "mt-bench"]  # the only benchmark with several categories, on both targets


def test_every_draft_looks_the_same_on_the_whole_page_and_unlike_any_other(page: str) -> None:
    looks: dict[str, set[tuple[str, str]]] = {}
    for color, glyph, name in re.findall(r'<span class="(c\d)" aria-hidden="true">(.)</span>([^<]+)<', page):
        looks.setdefault(name, set()).add((color, glyph))
    assert {"untrained", "pard-0.5b", "pard-0.5b-dpace"} < looks.keys()
    assert all(len(found) == 1 for found in looks.values())
    assert len({(style % NUM_COLORS, GLYPHS[style % len(GLYPHS)]) for style in range(40)}) == 40
    charts = [Chart("", "line", {name: []}, (0.0, 1.0), "") for name in ("b", "a", "b")]
    assert assign_styles(charts) == {"b": 0, "a": 1}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_lays_the_page_out_within_a_phones_width(page: str, tmp_path: Path) -> None:
    file = tmp_path / "phone.html"
    frame = f'<iframe id="phone" style="width: 360px; border: 0" srcdoc="{escape(page)}"></iframe>'
    measure = "const page = phone.contentDocument.documentElement; document.title = page.scrollWidth - page.clientWidth"
    file.write_text(f"<!doctype html><title></title>{frame}<script>onload = () => {{ {measure} }}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    result = subprocess.run([str(CHROMIUM), *options, f"file://{file}"], capture_output=True, text=True, timeout=120)
    assert re.search(r"<title>(-?\d+)</title>", result.stdout).group(1) == "0", result.stderr[-500:]
