"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const FIELDS = ["number", "kind", "layer", "position", "feature", "value", "influence", "label"];
const nodes = data.nodes.map((row, at) => Object.assign({ at, ins: [], outs: [] },
  Object.fromEntries(FIELDS.map((name, i) => [name, row[i]]))));
for (const [source, target, weight] of data.edges) {
  nodes[target].ins.push([source, weight]);
  nodes[source].outs.push([target, weight]);
}
const larger = (a, b) => Math.abs(b[1]) - Math.abs(a[1]);
for (const node of nodes) { node.ins.sort(larger); node.outs.sort(larger); }

const byId = (id) => document.getElementById(id);
const svg = byId("graph");
const MOST_DRAWN = 300, MOST_LISTED = 100, STEP = 16, LEFT = 44;
let chosen = null, pinned = [], focused = null;
const groups = new Map(Object.entries(data.groups));

// ---- texts

const number = (x) => (x === null ? "" : Number(x).toPrecision(3));
const share = (x) => `${(100 * x).toPrecision(3)} %`;
const where = (node) => `token ${node.position} ${JSON.stringify(data.tokens[node.position])}`;
function title(node) {
  if (node.kind === "feature") {
    const name = `${node.layer}/${node.feature}`;
    return node.label === name ? `feature ${name}` : `feature ${name}: ${node.label}`;
  }
  if (node.kind === "token") return `token ${node.position}: ${node.label}`;
  if (node.kind === "target") return `target: ${node.label}`;
  return node.label;
}
function describe(node) {
  const parts = [];
  if (node.kind !== "token") parts.push(`at ${where(node)}`);
  if (node.kind === "feature") parts.push(`activation ${number(node.value)}`);
  if (node.kind === "target") parts.push(`weight ${number(node.value)}`);
  else parts.push(`influence ${share(node.influence)}`);
  parts.push(`${node.ins.length} inputs, ${node.outs.length} outputs`);
  return parts.join(", ");
}

// ---- layout: rows from targets above to tokens below, columns of tokens

const row = (node) => (node.kind === "target" ? 0 : node.kind === "token" ? data.layers + 1 : data.layers - node.layer);
const rows = data.layers + 2, columns = data.tokens.length;
const cells = Array.from({ length: rows }, () => Array.from({ length: columns }, () => []));
for (const node of nodes) cells[row(node)][node.position].push(node);
for (const line of cells) for (const cell of line) cell.sort((a, b) => b.influence - a.influence || a.at - b.at);

const widths = [], heights = [];
for (let c = 0; c < columns; c += 1) {
  const most = Math.max(1, ...cells.map((line) => line[c].length));
  const text = 7 * Math.min(data.tokens[c].length, 14);
  widths.push(Math.max(48, Math.min(most, 8) * STEP + 8, text + 10, 60 * Math.min(cells[0][c].length, 4)));
}
const perLine = (r, c) => (r === 0 ? Math.max(1, Math.floor(widths[c] / 60)) : Math.max(1, Math.floor((widths[c] - 8) / STEP)));
for (let r = 0; r < rows; r += 1) {
  const lines = Math.max(1, ...cells[r].map((cell, c) => Math.ceil(cell.length / perLine(r, c))));
  heights.push(r === 0 ? lines * 34 + 6 : lines * STEP + 10);
}
const sums = (sizes, start) => sizes.reduce((all, size) => [...all, all[all.length - 1] + size], [start]);
const lefts = sums(widths, LEFT), tops = sums(heights, 4);

function make(name, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}
const width = lefts[columns] + 4, height = tops[rows] + 4;
for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) svg.setAttribute(key, value);
for (let r = 0; r < rows; r += 1) {
  if (r % 2) make("rect", { class: "band", x: 0, y: tops[r], width, height: heights[r] }, svg);
}
const edgeLayer = make("g", { "aria-hidden": "true", id: "edges" }, svg);
const nodeLayer = make("g", {}, svg);
const largest = Math.max(1e-9, ...nodes.filter((node) => node.kind !== "target").map((node) => node.influence));
const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const order = []; // nodes as the arrow keys go through them
for (let r = 0; r < rows; r += 1) {
  for (let c = 0; c < columns; c += 1) {
    const line = perLine(r, c);
    cells[r][c].forEach((node, i) => {
      const step = r === 0 ? 60 : STEP;
      node.x = lefts[c] + 4 + step * (i % line) + step / 2;
      node.y = tops[r] + 5 + (r === 0 ? 34 : STEP) * Math.floor(i / line) + STEP / 2;
      node.row = r;
      const part = node.kind === "target" ? node.value : node.influence / largest;
      const size = 2 + 5.5 * Math.sqrt(Math.max(0, Math.min(1, part)));
      const g = make("g", { class: `node ${node.kind}`, role: "button", tabindex: -1, "data-at": node.at,
        "aria-label": `${title(node)}, ${describe(node)}`, "aria-pressed": "false" }, nodeLayer);
      make("rect", { class: "hit", x: node.x - STEP / 2, y: node.y - STEP / 2, width: STEP, height: STEP }, g);
      if (node.kind === "feature" || node.kind === "target") make("circle", { class: "mark", cx: node.x, cy: node.y, r: size }, g);
      else make("rect", { class: "mark", x: node.x - size, y: node.y - size, width: 2 * size, height: 2 * size }, g);
      if (node.kind === "target") make("text", { x: node.x, y: node.y + 19 }, g, short(node.label, 9));
      make("title", {}, g, `${title(node)}, ${describe(node)}`);
      node.g = g;
      order.push(node);
    });
  }
}
data.tokens.forEach((text, c) => make("text", { x: lefts[c] + 4, y: height + 12, "aria-hidden": "true", class: "column" }, svg, short(text, 14)));
const labels = make("g", { id: "labels", "aria-hidden": "true" }, svg); // stay at the left
make("rect", { x: 0, y: 0, width: LEFT - 4, height: height + 20 }, labels);
for (let r = 1; r < rows - 1; r += 1) make("text", { x: 6, y: tops[r] + heights[r] / 2 + 4 }, labels, `L${data.layers - r}`);
byId("scroll").addEventListener("scroll", () => labels.setAttribute("transform", `translate(${byId("scroll").scrollLeft} 0)`));
svg.setAttribute("height", height + 20);
svg.setAttribute("viewBox", `0 0 ${width} ${height + 20}`);

// ---- drawing what is chosen and pinned

function curve(a, b, weight, most, extra) {
  const middle = (a.y + b.y) / 2;
  make("path", { class: `edge ${weight < 0 ? "down" : "up"}${extra}`, "stroke-width": 0.6 + 4 * Math.abs(weight) / most,
    d: `M${a.x} ${a.y} C${a.x} ${middle} ${b.x} ${middle} ${b.x} ${b.y}` }, edgeLayer);
}
const hidden = (node) => byId("errors").checked && node.kind === "error";
const shownOf = (edges) => edges.filter(([other]) => !hidden(nodes[other]));

function drawEdges() {
  edgeLayer.replaceChildren();
  for (const node of nodes) node.g.classList.remove("linked");
  const set = new Set(pinned);
  const among = pinned.flatMap((at) => shownOf(nodes[at].ins).filter(([source]) => set.has(source)).map(([source, w]) => [source, at, w]));
  const most = Math.max(1e-30, ...among.map((edge) => Math.abs(edge[2])));
  for (const [source, target, weight] of among) curve(nodes[source], nodes[target], weight, most, " among");
  if (chosen === null || hidden(chosen)) return;
  for (const [edges, into] of [[shownOf(chosen.ins), true], [shownOf(chosen.outs), false]]) {
    for (const [other, weight] of edges.slice(0, MOST_DRAWN)) {
      const [a, b] = into ? [nodes[other], chosen] : [chosen, nodes[other]];
      curve(a, b, weight, Math.abs(edges[0][1]) || 1, "");
      nodes[other].g.classList.add("linked");
    }
  }
}

function entry(node, weight) {
  const li = document.createElement("li"), button = document.createElement("button");
  button.type = "button";
  const what = document.createElement("span");
  what.className = "what";
  what.textContent = node.kind === "token" ? title(node) : `${title(node)} @ ${node.position} ${data.tokens[node.position]}`;
  if (weight !== undefined) {
    const value = document.createElement("span");
    value.className = `weight ${weight < 0 ? "down" : "up"}`;
    value.textContent = `${weight < 0 ? "−" : "+"}${number(Math.abs(weight))}`;
    button.append(value);
  }
  button.append(what);
  button.addEventListener("click", () => { choose(node); focus(node, false); });
  li.append(button);
  return li;
}

function list(id, edges, all) {
  const place = byId(id), visible = shownOf(edges);
  place.replaceChildren(...visible.slice(0, all ? visible.length : MOST_LISTED).map(([at, weight]) => entry(nodes[at], weight)));
  if (!visible.length) place.append(Object.assign(document.createElement("li"), { textContent: "none" }));
  if (!all && visible.length > MOST_LISTED) {
    const more = Object.assign(document.createElement("button"), { type: "button", textContent: `all ${visible.length}` });
    more.addEventListener("click", () => list(id, edges, true));
    place.append(more);
  }
}

function choose(node) {
  if (chosen) { chosen.g.classList.remove("chosen"); chosen.g.setAttribute("aria-pressed", "false"); }
  chosen = node;
  if (node) { node.g.classList.add("chosen"); node.g.setAttribute("aria-pressed", "true"); }
  byId("node-title").textContent = node ? title(node) : "No node chosen";
  byId("node-about").textContent = node ? describe(node) : "Choose a mark, or an entry of a list.";
  byId("lists").hidden = byId("pin").hidden = !node;
  if (node) {
    list("inputs", node.ins, false);
    list("outputs", node.outs, false);
    byId("pin").textContent = pinned.includes(node.at) ? "Unpin" : "Pin";
  }
  drawEdges();
}

function setPinned(list_) {
  pinned = list_;
  for (const node of nodes) node.g.classList.toggle("pinned", pinned.includes(node.at));
  byId("pins").replaceChildren(...pinned.map((at) => {
    const li = entry(nodes[at]);
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Unpin ${title(nodes[at])}`);
    remove.addEventListener("click", () => toggle(nodes[at]));
    remove.className = "remove";
    li.append(remove);
    return li;
  }));
  if (chosen) byId("pin").textContent = pinned.includes(chosen.at) ? "Unpin" : "Pin";
  showGroups();
  drawEdges();
}
const toggle = (node) => setPinned(pinned.includes(node.at) ? pinned.filter((at) => at !== node.at) : [...pinned, node.at]);

function showGroups() {
  byId("groups").replaceChildren(...[...groups].map(([name, members]) => {
    const li = document.createElement("li");
    const show = Object.assign(document.createElement("button"), { type: "button", textContent: `${name} (${members.length})` });
    show.addEventListener("click", () => setPinned([...members]));
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove the group ${name}`);
    remove.addEventListener("click", () => { groups.delete(name); showGroups(); });
    li.append(show, remove);
    return li;
  }));
  const numbers = (list_) => list_.map((at) => nodes[at].number);
  const named = Object.fromEntries([...groups].map(([name, members]) => [name, numbers(members)]));
  byId("export").value = JSON.stringify({ pinned: numbers(pinned), groups: named });
}

// ---- search

function search() {
  const text = byId("search").value.trim().toLowerCase();
  const matches = (node) => title(node).toLowerCase().includes(text) || data.tokens[node.position].toLowerCase().includes(text);
  const found = text ? order.filter((node) => !hidden(node) && matches(node)) : [];
  const set = new Set(found);
  for (const node of nodes) node.g.classList.toggle("dimmed", text !== "" && !set.has(node));
  byId("found").textContent = text ? `${found.length} found` : "";
  return found;
}

// ---- keys

function reachable(node) { // by the Tab key, the only one
  if (focused) focused.g.setAttribute("tabindex", -1);
  focused = node;
  node.g.setAttribute("tabindex", 0);
}
function focus(node, move = true) {
  reachable(node);
  if (move) node.g.focus();
  node.g.scrollIntoView({ block: "nearest", inline: "nearest" });
}
function neighbour(node, key) {
  const visible = order.filter((other) => !hidden(other));
  if (key === "ArrowLeft" || key === "ArrowRight") return visible[visible.indexOf(node) + (key === "ArrowLeft" ? -1 : 1)];
  const side = key === "ArrowUp" ? -1 : 1;
  const beyond = visible.filter((other) => Math.sign(other.row - node.row) === side);
  const next = side < 0 ? Math.max(...beyond.map((o) => o.row)) : Math.min(...beyond.map((o) => o.row));
  return beyond.filter((other) => other.row === next).sort((a, b) => Math.abs(a.x - node.x) - Math.abs(b.x - node.x))[0];
}
const nodeOf = (event) => { const g = event.target.closest(".node"); return g ? nodes[g.getAttribute("data-at")] : null; };
svg.addEventListener("click", (event) => { const node = nodeOf(event); if (node) { focus(node); choose(node); } });
svg.addEventListener("keydown", (event) => {
  const node = nodeOf(event);
  if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith("Arrow")) { const next = neighbour(node, event.key); if (next) focus(next); }
  else if (event.key === "Enter" || event.key === " ") choose(node);
  else if (event.key.toLowerCase() === "p") toggle(node);
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") choose(null);
  else if (event.key === "/" && !["INPUT", "TEXTAREA"].includes(event.target.tagName)) { byId("search").focus(); event.preventDefault(); }
});
byId("pin").addEventListener("click", () => toggle(chosen));
byId("search").addEventListener("input", search);
byId("tools").addEventListener("submit", (event) => {
  event.preventDefault();
  const found = search();
  if (found.length) { choose(found[0]); focus(found[0], false); }
});
byId("errors").addEventListener("change", () => {
  svg.classList.toggle("no-errors", byId("errors").checked);
  search();
  choose(chosen && hidden(chosen) ? null : chosen);
  if (focused && hidden(focused)) focus(order.find((node) => !hidden(node)), false);
});
byId("help-button").addEventListener("click", () => {
  byId("help").hidden = !byId("help").hidden;
  byId("help-button").setAttribute("aria-expanded", String(!byId("help").hidden));
});
byId("naming").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("name").value.trim();
  if (!name || !pinned.length) return;
  for (const [other, members] of [...groups]) { // a node is in one group
    const left = members.filter((at) => !pinned.includes(at));
    if (left.length) groups.set(other, left); else groups.delete(other);
  }
  groups.set(name, [...pinned]);
  byId("name").value = "";
  setPinned([]);
});
byId("copy").addEventListener("click", async () => {
  const area = byId("export");
  area.select();
  let done = false;
  try { await navigator.clipboard.writeText(area.value); done = true; } catch { done = document.execCommand("copy"); }
  byId("copied").textContent = done ? "copied" : "select the text and copy it";
});
if (order.length) reachable(order[0]);
setPinned([]);
document.documentElement.dataset.ready = "1";
