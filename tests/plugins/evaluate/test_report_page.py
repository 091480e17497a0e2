"""The page of a report, in a headless browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Label
from featurizers.errors import ArtefactError
from featurizers_evaluate.reporting.page import page_of
from featurizers_evaluate.reporting.result import Report

from tests.support.browser import Tab, browser
from tests.support.dictionaries import dictionary
from tests.support.models import tiny_model

HOSTILE = "</script><script>window.bad = 1</script><img src=x onerror='window.bad = 2'>"
LABEL = f"{HOSTILE} &amp; {{7*7}} <!--"
IDS = torch.randint(0, 64, (24, 30), generator=torch.Generator().manual_seed(3))


class HostileTokenizer:
    """Tokens that would break a page that took them for more than text."""

    texts = (HOSTILE, "\u202eabc", "\x00", "\ud800", "\n", "\u05d0\u05d1", "{{7*7}}", "&lt;b&gt;")

    def decode(self, ids: list[int]) -> str:
        return self.texts[ids[0]] if ids[0] < len(self.texts) else f" w{ids[0]}"

    def convert_ids_to_tokens(self, number: int) -> str:
        return f"token{number}"


def report_of(f: Any, **options: Any) -> Report:
    given = {"tokenizer": HostileTokenizer(), "effect_tokens": 60, "progress": False, "site": "resid.post:1", **options}
    found: Report = featurizers.report(f, tiny_model("llama"), IDS, **given)
    return found


@pytest.fixture(scope="module")
def report() -> Report:
    """Return a report of 64 features with hostile names, tokens and labels; feature 63 is never active."""
    f = dictionary("topk", d_in=32, k=5)
    f.get_parameter("b_enc").data[63] = -1e6
    f.id = HOSTILE
    f.metadata = {"sae_lens": {"metadata": {"neuronpedia_id": "gpt2-small/1-res-jb"}}}
    f.labels = [Label(3, LABEL, HOSTILE, score=0.75), Label(5, "a zebra", "alice"), Label(5, "stripes", "bob")]
    return report_of(f, data=HOSTILE)


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as found:
        yield found


@pytest.fixture
def opened(tab: Tab, report: Report, tmp_path: Path) -> tuple[Tab, Report]:
    tab.problems.clear()
    tab.requests.clear()
    tab.open(report.save(tmp_path / "report.html"))
    return tab, report


def texts(tab: Tab, selector: str) -> list[str]:
    found = tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
    return [str(text) for text in found]


def names(tab: Tab) -> list[str]:
    return texts(tab, ".row .name")


def title(tab: Tab) -> str:
    return texts(tab, "#feature-title")[0]


def is_active(context: Any, token: str) -> bool:
    """Return whether the feature is not 0 at this token of a context."""
    return any(text == token and value != 0 for text, value in zip(context.tokens, context.values, strict=True))


def searched(tab: Tab, text: str, scope: str = "all") -> list[str]:
    """Type a text into the search, and return all features that are found."""
    tab.run(f"document.getElementById('scope').value = {json.dumps(scope)}")
    tab.run("document.getElementById('search').value = ''")
    tab.click("#search")
    tab.write(text)
    tab.run("search()")  # at once, and not after the pause
    return [str(name) for name in tab.run("order.map(nameOf)")]


# ---------------------------------------------------------------------- safe, whole, the same


def test_the_page_runs_its_own_script_alone_and_asks_for_nothing(opened: tuple[Tab, Report]) -> None:
    tab, _ = opened
    for number in (3, 5, 63):
        tab.run(f"choose({number})")
    assert tab.problems == []
    assert len(tab.requests) == 1
    assert tab.requests[0].startswith("file:")
    assert tab.run("window.bad") is None
    assert tab.run("document.images.length") == 0
    assert tab.run("document.scripts.length") == 2
    tab.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=https://example.com/x.png onerror=\"window.bad=3\">')"
    )
    tab.run("fetch('https://example.com').catch(() => 0)")
    tab.run("const s = document.createElement('script'); s.textContent = 'window.bad = 4'; document.body.append(s)")
    assert tab.run("window.bad") is None
    assert any("Content Security Policy" in problem for problem in tab.problems)


def test_hostile_texts_are_shown_as_texts(opened: tuple[Tab, Report]) -> None:
    tab, report = opened
    assert texts(tab, "h1")[0].startswith("</script><script>window.bad = 1</script><img")
    tab.run("choose(3)")
    label = texts(tab, ".labels li")[0]
    assert label.startswith(HOSTILE)
    assert label == f"{LABEL} by {HOSTILE} (score 0.75)"
    shown = {token for each in texts(tab, ".token") for token in [each]}
    for number in range(0, 64, 5):
        tab.run(f"choose({number})")
        shown |= set(texts(tab, ".token"))
    assert "\\u202eabc" in shown
    assert "\u05d0\u05d1" in shown
    assert any(text.startswith("</script><script>") for text in shown)
    assert tab.run("document.querySelectorAll('main script, main img').length") == 0
    assert tab.run("getComputedStyle(document.querySelector('.token')).unicodeBidi") == "isolate"
    assert report.names[0] == "0"


def test_the_file_is_inert_text_and_the_same_in_every_byte(report: Report, tmp_path: Path) -> None:
    first, second = report.save(tmp_path / "a.html"), report.save(tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 2
    assert "<!--" not in text
    assert "\u202e" not in text
    assert "\ud800" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    assert "unsafe" not in policy[1]
    for tag, body in (("script", re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]),
                      ("style", re.findall(r"<style>(.*?)</style>", text, re.DOTALL)[0])):  # fmt: skip
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest}&#39;" in policy[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_page_replaces_a_file_as_a_whole_or_says_why_not(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    report.save(path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(ArtefactError, match="it cannot be written"):
        report.save(tmp_path / "none" / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


# ---------------------------------------------------------------------- what it shows


def test_a_feature_is_shown_as_the_report_has_it(opened: tuple[Tab, Report]) -> None:
    tab, report = opened
    each = max(report, key=lambda one: one.density)
    assert title(tab) == f"Feature {each.name}"  # the densest is first
    said = texts(tab, ".said li")
    assert said[0].startswith(f"active at {100 * each.density:.3g} %")
    assert f"({round(each.density * 720)} of 720)" in said[0]
    values = [float(text.removeprefix("value ")) for text in texts(tab, ".contexts .value")]
    assert values == pytest.approx([context.value for context in each.high], rel=6e-3)
    rows = tab.run("[...document.querySelectorAll('.contexts .text')].map(e => e.textContent)")
    assert rows == ["".join(context.tokens) for context in each.high]
    marks = texts(tab, "mark.token")
    assert len(marks) == len(each.high)
    on = tab.run("[...document.querySelectorAll('.contexts li')].map(li => li.querySelectorAll('.token.on').length)")
    assert on == [sum(value != 0 for value in context.values) for context in each.high]
    for name, tokens in (("first", each.promoted), ("last", each.suppressed)):
        box = f".pair > div:{name}-child"
        assert [text.strip() for text in texts(tab, f"{box} .token")] == [text.strip() for text, _ in tokens]
        numbers = [float(text.replace("−", "-")) for text in texts(tab, f"{box} .value")]
        assert numbers == pytest.approx([value for _, value in tokens], rel=6e-3)
    assert texts(tab, ".near b") == [name for name, _ in each.neighbours]
    bars = tab.run("[...document.querySelectorAll('#feature-body svg .column')].map(b => b.textContent)")
    assert [int(text.rpartition(": ")[2].replace(",", "")) for text in bars] == [n for n in each.histogram[1] if n]
    assert tab.run("document.getElementById('link').href") == each.link
    assert tab.run("document.getElementById('link').rel") == "noopener noreferrer"


def test_the_head_has_metrics_facts_and_densities(opened: tuple[Tab, Report]) -> None:
    tab, report = opened
    tiles = dict(zip(texts(tab, "#tiles span"), texts(tab, "#tiles b"), strict=True))
    assert tiles["features of a token"] == "5"
    assert tiles["never active"] == f"{100 * report.evaluation['dead_features']:.1f} %"
    rows = tab.run(
        "[...document.querySelectorAll('#metrics tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    shown = {name: (value, tokens) for name, value, _, tokens, *_ in rows}
    assert shown["fvu"] == (f"{report.evaluation['fvu']:.4g}", "720")
    assert report.effect
    assert shown["kl"] == (f"{report.effect['kl']:.4g}", "60")
    facts = dict(zip(texts(tab, "dt"), texts(tab, "dd"), strict=True))
    assert facts["site"] == "resid.post:1"
    assert facts["rule_options.k (config)"] == "5"
    bars = tab.run("[...document.querySelectorAll('#overview .column')].map(b => b.textContent)")
    counted = sum(int(text.rpartition(": ")[2]) for text in bars)
    assert counted == int((report.count > 0).sum())


def test_both_ends_of_a_dense_feature_are_shown(tab: Tab, tmp_path: Path) -> None:
    report = report_of(featurizers.create("subspace", d_in=32, n_features=4, seed=0), effect_tokens=0)
    tab.open(report.save(tmp_path / "report.html"))
    assert tab.run("key") == "variance"
    order = sorted(range(4), key=lambda i: -float(report.std[i]))
    assert names(tab) == [str(i) for i in order]
    headings = texts(tab, "#feature-body h3")
    assert {"Where it is largest", "Where it is smallest", "Values"} < set(headings)
    assert tab.run("document.querySelectorAll('.token.on.minus').length") > 10
    assert any("orthogonal" in text for text in texts(tab, ".soft"))
    assert tab.run("document.getElementById('hiding').hidden") is True


def test_a_map_has_groups_and_lengths_by_site(tab: Tab, tmp_path: Path) -> None:
    from featurizers_transcoder import CrossLayerTranscoder

    from tests.support.site_maps import linear_map
    from tests.support.site_maps import model as decoder

    f = linear_map(CrossLayerTranscoder, {0: (["a"], ["x", "y"]), 1: (["b"], ["y"])}, rule="relu")
    f.reads, f.writes = {"a": "mlp.in:0", "b": "mlp.in:1"}, {"x": "mlp.out:0", "y": "mlp.out:1"}
    report = featurizers.report(f, decoder("llama"), IDS % 40, effect_tokens=0, progress=False)
    tab.open(report.save(tmp_path / "report.html"))
    tab.run("document.getElementById('group').value = '1'; search()")
    assert all(name.startswith("layer-1/") for name in names(tab))
    assert searched(tab, "layer-1/3") == ["layer-1/3"]
    tab.run("document.getElementById('group').value = ''; search()")
    assert set(searched(tab, "3")) >= {"layer-0/3", "layer-1/3"}
    tab.run("choose(5)")
    assert texts(tab, "#feature-body > .bars .token") == ["x (mlp.out:0)", "y (mlp.out:1)"]


# ---------------------------------------------------------------------- search, sorting, keys


def test_search_finds_numbers_labels_and_tokens(opened: tuple[Tab, Report]) -> None:
    tab, report = opened
    assert searched(tab, "63")[0] == "63"  # although it is never active
    assert "63" not in searched(tab, "")
    tab.click("#dead")
    assert len(searched(tab, "")) == 64
    assert searched(tab, "zebra", "label") == ["5"]
    assert searched(tab, "STRIPES") == ["5"]
    assert searched(tab, HOSTILE, "label") == ["3"]
    token = " w41"
    fires = [each.name for each in report if any(is_active(context, token) for context in each.high)]
    assert sorted(searched(tab, token, "fires")) == sorted(fires)
    raises = [each.name for each in report if any(text == token for text, _ in each.promoted)]
    assert sorted(searched(tab, token, "raises")) == sorted(raises)
    assert sorted(searched(tab, token)) == sorted({*fires, *raises})
    context = next(each for each in report if each.high).high[0]
    phrase = "".join(context.tokens[:2]).strip().lower()
    assert phrase.count(" ") == 1 or len(context.tokens) < 2 or " " not in phrase
    assert searched(tab, "no such token") == []
    assert texts(tab, "#found") == ["0 of 64 features"]
    tab.press("Escape")
    assert texts(tab, "#found") == ["64 features"]


def test_a_phrase_is_found_in_the_contexts(opened: tuple[Tab, Report]) -> None:
    tab, report = opened
    words = next(
        (a, b)
        for each in report
        for context in each.high
        for a, b in zip(context.tokens, context.tokens[1:], strict=False)
        if a.startswith(" w") and b.startswith(" w")
    )
    phrase = "".join(words).strip()
    expected = [each.name for each in report if any(phrase in "".join(context.tokens) for context in each.high)]
    assert sorted(searched(tab, phrase, "fires")) == sorted(expected)


def test_sorting_is_by_each_number_in_both_directions(opened: tuple[Tab, Report]) -> None:
    tab, report = opened
    tab.click("#dead")
    keys = {
        "density": lambda each: -each.density,
        "most": lambda each: -(each.most if each.most is not None else -1e9),
        "number": lambda each: int(each.name),
        "logit": lambda each: -max(abs(each.promoted[0][1]), abs(each.suppressed[0][1])),
        "cosine": lambda each: -round(1000 * each.neighbours[0][1]),
        "label": lambda each: each.labels[0].text if each.labels else "\uffff",
    }
    assert tab.run("[...document.getElementById('sort').options].map(o => o.value)") == [
        "number",
        "density",
        "most",
        "logit",
        "cosine",
        "label",
    ]
    for name, value in keys.items():
        tab.run(f"{{ const s = byId('sort'); s.value = '{name}'; s.dispatchEvent(new Event('change')); }}")
        found = [report[each] for each in tab.run("order.map(nameOf)")]
        numbers = [value(each) for each in found]
        if isinstance(numbers[0], str):
            assert [each.name for each in found[:2]] == ["3", "5"]
        else:
            assert numbers == pytest.approx(sorted(numbers), rel=2e-3)
        tab.click("#turn")
        again = [value(report[each]) for each in tab.run("order.map(nameOf)")]
        if not isinstance(numbers[0], str):
            assert again == pytest.approx(sorted(numbers, reverse=True), rel=2e-3)


def test_the_keyboard_is_enough(opened: tuple[Tab, Report]) -> None:
    tab, _ = opened
    tab.run("document.activeElement.blur()")
    tab.press("/")
    assert tab.run("document.activeElement.id") == "search"
    tab.write("w")
    tab.press("ArrowDown")
    assert tab.run("document.activeElement.id") == "list"
    order = tab.run("order.map(nameOf)")
    assert title(tab) == f"Feature {order[0]}"
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", len(order) - 1), ("Home", 0)):
        tab.press(key)
        assert title(tab) == f"Feature {order[place]}"
        active = tab.run("byId(byId('list').getAttribute('aria-activedescendant')).getAttribute('aria-selected')")
        assert active == "true"
    tab.press("PageDown")
    assert tab.run("place.get(chosen)") > 1
    box = "document.getElementById('list').getBoundingClientRect()"
    row = "document.querySelector('.row[aria-selected=true]').getBoundingClientRect()"
    assert tab.run(f"{row}.top >= {box}.top - 1 && {row}.bottom <= {box}.bottom + 1")
    tab.press("Escape")
    assert tab.run("document.getElementById('search').value") == ""
    reached = set()
    for _ in range(40):
        tab.press("Tab")
        reached.add(tab.run("document.activeElement.id || document.activeElement.textContent"))
    assert {"search", "scope", "sort", "turn", "dead", "list", "next", "link", "All metrics", "About"} <= reached


def test_neighbours_and_addresses_lead_to_features(opened: tuple[Tab, Report]) -> None:
    tab, report = opened
    first = title(tab).removeprefix("Feature ")
    near = report[first].neighbours[0][0]
    tab.click(".near button")
    assert title(tab) == f"Feature {near}"
    assert tab.run("location.hash") == f"#{near}"
    tab.run(
        "new Promise(done => { addEventListener('popstate', () => setTimeout(done), { once: true }); history.back(); })"
    )
    tab.click("#next")
    tab.click("#previous")
    tab.run("location.hash = '#63'")
    tab.until("document.getElementById('feature-title').innerText == 'Feature 63'")
    assert any("active nowhere" in text for text in texts(tab, ".soft"))


def test_a_screen_reader_is_told_each_field_and_row(opened: tuple[Tab, Report]) -> None:
    tab, _ = opened
    tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = [(each["role"]["value"], each.get("name", {}).get("value", "")) for each in tree if not each["ignored"]]
    fields = {"button", "textbox", "searchbox", "checkbox", "combobox", "listbox", "image", "link", "option"}
    assert all(name for role, name in named if role in fields), [each for each in named if not each[1]]
    roles = {role for role, _ in named}
    assert {"main", "listbox", "heading", "search", "image", "status"} <= roles
    assert tab.run("document.querySelector('.row').getAttribute('aria-setsize')") == str(tab.run("order.length"))
    assert any(role == "image" and "never are" in name for role, name in named)


# ---------------------------------------------------------------------- screens


def test_colours_follow_the_system(opened: tuple[Tab, Report]) -> None:
    tab, _ = opened
    seen = {}
    for scheme in ("light", "dark"):
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for part in ("backgroundColor", "color"):
            seen[scheme, part] = sum(
                map(int, re.findall(r"\d+", tab.run(f"getComputedStyle(document.body).{part}"))[:3])
            )
    tab.call("Emulation.setEmulatedMedia", features=[])
    assert seen["light", "backgroundColor"] > 600
    assert seen["dark", "backgroundColor"] < 150
    assert seen["light", "color"] < 150
    assert seen["dark", "color"] > 600


def test_a_narrow_screen_shows_everything_without_scrolling_sideways(opened: tuple[Tab, Report]) -> None:
    tab, _ = opened
    tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    try:
        assert tab.run("document.documentElement.scrollWidth") <= 360
        tab.click(".row:nth-child(4)")
        top = "document.getElementById('feature').getBoundingClientRect().top"
        tab.until(f"-5 < {top} && {top} < 40")
        assert tab.run("document.documentElement.scrollWidth") <= 360
        tab.click("#back")
        tab.until(f"document.activeElement.id == 'list' && {top} > 200")
    finally:
        tab.call("Emulation.clearDeviceMetricsOverride")


# ---------------------------------------------------------------------- many features


def test_sixteen_thousand_features_are_below_ten_megabytes_and_few_are_in_the_page(
    tab: Tab, report: Report, tmp_path: Path
) -> None:
    """Numbers by chance, which compress worse than real ones."""
    n, g = 16_384, torch.Generator().manual_seed(0)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(0, 50_000, shape, generator=g, dtype=torch.int32)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).abs() + 0.1

    effects, near = report.effects, report.neighbours
    assert not isinstance(effects, str)
    assert not isinstance(near, str)
    active = torch.rand(n, 5, 21, generator=g) < 0.2
    strengths = floats(n, 5, 21) * active
    strengths[..., 10] = 1.0
    large = replace(
        report,
        names=[str(i) for i in range(n)],
        numbers=torch.arange(n),
        groups=torch.zeros(n, dtype=torch.long),
        count=torch.randint(1, 700, (n,), generator=g),
        mean=floats(n).double(),
        std=floats(n).double(),
        least=torch.zeros(n) + 0.01,
        most=floats(n) + 1,
        bars=torch.poisson(torch.ones(n, 64), generator=g).long(),
        centre=torch.zeros(n),
        exponent=torch.full((n,), -4),
        high=replace(report.high, values=floats(n, 5), ids=ids(n, 5, 21), strengths=strengths),
        effects=replace(effects, high=ids(n, 10), high_values=floats(n, 10), low=ids(n, 10), low_values=-floats(n, 10)),
        neighbours=replace(near, rows=torch.randint(0, n, (n, 6), generator=g).int(), cosines=floats(n, 6) / 9),
        norms=floats(n, 1),
        texts={i: f" token{i}" for i in range(50_000)},
        about={**report.about, "n_features": n, "features": n},
    )
    path = large.save(tmp_path / "large.html")
    assert path.stat().st_size < 10_000_000
    tab.open(path)
    assert len(names(tab)) < 60
    tab.run(
        "byId('list').scrollTop = 1e9;new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
    assert names(tab)[-1] == tab.run("nameOf(order[order.length - 1])")
    assert len(names(tab)) < 60
    token = large.texts[int(large.high.ids[77, 2, 10])]
    assert "77" in searched(tab, token, "fires")
    assert searched(tab, "16000")[0] == "16000"


def test_the_data_is_what_gzip_and_json_read(report: Report) -> None:
    """Read as the page reads it, by other means."""
    text = page_of(report)
    raw = gzip.decompress(base64.b64decode(re.findall(r'id="data">([^<]*)<', text)[0]))
    length = int.from_bytes(raw[:4], "little")
    data = json.loads(raw[4 : 4 + length])
    start, kind, shape = data["arrays"]["count"]
    assert (4 + length + start) % 8 == 0
    assert shape == [64]
    size = {"uint8": 1, "uint16": 2, "uint32": 4}[kind]
    counts = [
        int.from_bytes(raw[i : i + size], "little")
        for i in range(4 + length + start, 4 + length + start + 64 * size, size)
    ]
    assert counts == report.count.tolist()
