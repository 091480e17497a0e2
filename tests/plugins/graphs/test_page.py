"""The page of a graph, in a headless browser."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from featurizers.errors import UsageError
from featurizers_graphs import page
from featurizers_graphs.result import Graph

from tests.support.browser import Tab, browser
from tests.support.graphs import random_graph

HOSTILE = "</script><script>window.bad = 1</script><img src=x onerror='window.bad = 2'>"
TEXTS = ("<bos>", HOSTILE, "\u202eabc", "\n", " is")


def hostile_graph() -> Graph:
    graph = random_graph(texts=TEXTS, about={"model": HOSTILE}, seed=2)
    layer, _, number = graph.features[9].tolist()
    return graph.label({(layer, number): f"{HOSTILE} &amp; \u202e<!--"}).group(HOSTILE, [9, 10])


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as found:
        yield found


@pytest.fixture
def opened(tab: Tab, tmp_path: Path) -> tuple[Tab, Graph]:
    graph = hostile_graph()
    tab.problems.clear()
    tab.requests.clear()
    tab.open(graph.plot(tmp_path / "graph.html"))
    return tab, graph


def mark(graph: Graph, which: Any) -> str:
    """Return the selector of a node's mark."""
    return f'[data-at="{[node.number for node in graph].index(graph.number(which))}"]'


def texts(tab: Tab, selector: str) -> list[str]:
    found = tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
    return [str(text) for text in found]


def test_the_page_runs_its_own_script_alone_and_asks_for_nothing(opened: tuple[Tab, Graph]) -> None:
    tab, graph = opened
    tab.click(mark(graph, 9))
    tab.press("p")
    reader = graph.edges(out_of=9)[0].target
    tab.click(mark(graph, reader))
    assert any(HOSTILE in text for text in texts(tab, "#inputs .what"))
    assert tab.problems == []
    assert all(url.startswith("file:") for url in tab.requests)
    assert len(tab.requests) == 1
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


def test_the_file_is_inert_text(tmp_path: Path) -> None:
    text = hostile_graph().plot(tmp_path / "graph.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 2
    assert text.count("<!--") == 0
    assert "\u202e" not in text
    assert not re.search(r"(src|href)=", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL).replace("src=x", ""))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    for tag, body in (("script", re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]),
                      ("style", re.findall(r"<style>(.*?)</style>", text, re.DOTALL)[0])):  # fmt: skip
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest}&#39;" in policy[1] or f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_marks_are_where_layers_and_tokens_are(opened: tuple[Tab, Graph]) -> None:
    tab, graph = opened
    assert len(texts(tab, ".node")) == len(graph)
    shapes = tab.run(
        "[...document.querySelectorAll('.node')].map(g => { const m = g.querySelector('.mark');"
        " const r = m.getBoundingClientRect();"
        " return [Number(g.dataset.at), m.tagName, r.x + r.width / 2, r.y + r.height / 2, r.width]; })"
    )
    nodes = list(graph)
    by_node = {nodes[at].number: (tag, x, y, width) for at, tag, x, y, width in shapes}
    for node in nodes:
        tag, x, y, _ = by_node[node.number]
        assert tag == ("circle" if node.kind in ("feature", "target") else "rect")
        token = by_node[graph.first_token + node.position]
        right = by_node[graph.first_token + node.position + 1] if node.position + 1 < len(graph.tokens) else None
        assert token[1] - 10 < x
        assert right is None or x < right[1]
        if node.layer is not None and node.layer > 0:
            assert y < by_node[graph.first_error + (node.layer - 1) * len(graph.tokens) + node.position][2]
        assert (y > token[2] - 1) == (node.kind == "token")
        assert node.kind == "target" or y > by_node[graph.first_target][2]
    features = sorted((n for n in nodes if n.kind == "feature"), key=lambda n: n.influence)
    sizes = [by_node[n.number][3] for n in features]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1.5 * sizes[0]


def test_a_click_lists_inputs_and_outputs_and_draws_them(opened: tuple[Tab, Graph]) -> None:
    tab, graph = opened
    node = max((n for n in graph if n.kind == "feature" and n.layer == 1), key=lambda n: n.influence)
    tab.click(mark(graph, node))
    into, out = graph.edges(into=node), graph.edges(out_of=node)
    assert into
    assert out
    shown = [text.replace("−", "-") for text in texts(tab, "#inputs .weight")]
    assert [float(text) for text in shown] == pytest.approx([edge.weight for edge in into], rel=6e-3)
    shown = [text.replace("−", "-") for text in texts(tab, "#outputs .weight")]
    assert [float(text) for text in shown] == pytest.approx([edge.weight for edge in out], rel=6e-3)
    assert tab.run("document.querySelectorAll('.edge').length") == len(into) + len(out)
    down = sum(edge.weight < 0 for edge in into + out)
    assert tab.run("document.querySelectorAll('.edge.down').length") == down
    assert str(node.feature) in texts(tab, "#node-title")[0]
    tab.click("#outputs li button")
    pressed = f"document.querySelector({json.dumps(mark(graph, out[0].target))}).getAttribute('aria-pressed')"
    assert tab.run(pressed) == "true"
    tab.press("Escape")
    assert tab.run("document.querySelectorAll('.edge').length") == 0


def test_pins_become_a_group_that_the_library_takes(opened: tuple[Tab, Graph]) -> None:
    tab, graph = opened
    for number in (3, 12):
        tab.click(mark(graph, number))
        tab.click("#pin")
    assert json.loads(tab.run("document.getElementById('export').value"))["pinned"] == [3, 12]
    assert tab.run("document.querySelectorAll('.node.pinned').length") == 2
    tab.click("#pins .remove")
    tab.click(mark(graph, 9))
    tab.press("p")
    tab.click("#name")
    tab.write("Say <b>it</b>")
    tab.press("Enter")
    found = json.loads(tab.run("document.getElementById('export').value"))
    assert found["pinned"] == []
    names = list(graph.groups)
    assert [len(name) > 0 for name in found["groups"]] == [True, True]
    assert list(found["groups"].values()) == [[10], [12, 9]]  # a node is in one group
    assert names[0][:20] in next(iter(found["groups"]))
    again = random_graph(texts=TEXTS, seed=2)
    for name, numbers in found["groups"].items():
        again = again.group(name, numbers)
    assert again.groups["Say <b>it</b>"] == (12, 9)


def test_search_and_hidden_errors(opened: tuple[Tab, Graph]) -> None:
    tab, graph = opened
    layer, _, number = graph.features[20].tolist()
    tab.click("#search")
    tab.write(f"{layer}/{number}")
    count = sum(node.kind == "feature" and node.layer == layer and node.feature == number for node in graph)
    assert texts(tab, "#found") == [f"{count} found"]
    assert tab.run("document.querySelectorAll('.node:not(.dimmed)').length") == count
    tab.press("Enter")
    assert f"{layer}/{number}" in texts(tab, "#node-title")[0]
    tab.run("document.getElementById('search').value = ''")
    tab.click("#errors")
    visible = "[...document.querySelectorAll('.node')].filter(g => g.getBoundingClientRect().width > 0).length"
    assert tab.run(visible) == sum(node.kind != "error" for node in graph)
    tab.click(mark(graph, graph.first_target))
    kinds = [graph.node(edge.source).kind for edge in graph.edges(into=graph.first_target)]
    assert len(texts(tab, "#inputs .weight")) == sum(kind != "error" for kind in kinds) < len(kinds)


def test_keys_reach_every_node(opened: tuple[Tab, Graph]) -> None:
    tab, graph = opened
    assert tab.run("document.querySelectorAll('.node[tabindex=\"0\"]').length") == 1
    tab.run("document.querySelector('.node[tabindex=\"0\"]').focus()")
    seen = set()
    for _ in range(len(graph)):
        seen.add(tab.run("document.activeElement.dataset.at"))
        tab.press("ArrowRight")
    assert len(seen) == len(graph)
    tab.run(f"document.querySelector('{mark(graph, graph.first_token + 2)}').focus()")
    for key, layer in (("ArrowUp", 0), ("ArrowUp", 1), ("ArrowUp", 2), ("ArrowDown", 1), ("ArrowDown", 0)):
        tab.press(key)
        node = list(graph)[int(tab.run("document.activeElement.dataset.at"))]
        assert (node.layer, node.position) == (layer, 2)
    tab.press(" ")
    assert tab.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert tab.run("document.querySelectorAll('[aria-pressed=\"true\"]').length") == 1
    tab.press("p")
    assert tab.run("document.activeElement.classList.contains('pinned')") is True
    tab.press("/")
    assert tab.run("document.activeElement.id") == "search"


def test_a_screen_reader_is_told_each_node_and_each_field(opened: tuple[Tab, Graph]) -> None:
    tab, graph = opened
    tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = [(each["role"]["value"], each.get("name", {}).get("value", "")) for each in tree if not each["ignored"]]
    marks = [name for role, name in named if (role == "button" and "influence" in name) or "weight" in name]
    assert len(marks) == len(graph)
    assert len(set(marks)) == len(marks)
    fields = {"button", "textbox", "searchbox", "checkbox"}
    assert all(name for role, name in named if role in fields)


def test_colours_follow_the_system(opened: tuple[Tab, Graph]) -> None:
    tab, _ = opened
    back = "getComputedStyle(document.body).backgroundColor"
    light = tab.run(back)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = tab.run(back)
    tab.call("Emulation.setEmulatedMedia", features=[])
    assert sum(map(int, re.findall(r"\d+", light))) > 600
    assert sum(map(int, re.findall(r"\d+", dark))) < 150


def test_a_large_graph_is_drawn(tab: Tab, tmp_path: Path) -> None:
    graph = random_graph(n_layers=16, texts=[f" w{i}" for i in range(10)], per_cell=11, density=0.03)
    assert len(graph) > 1900
    assert graph.n_edges > 20_000
    tab.open(graph.plot(tmp_path / "graph.html"))
    tab.click(mark(graph, graph.first_target))
    assert tab.run("document.querySelectorAll('.node').length") == len(graph)
    assert tab.run("document.querySelectorAll('.edge').length") > 10


def test_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_NODES", 20)
    with pytest.raises(UsageError, match="prune it first"):
        random_graph().plot(tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
