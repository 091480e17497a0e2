// ---- the list of features: sorted, searched, and only what is seen of it in the page

const ROW = 48, MORE = 8, DELAY = 60;
let order = [], chosen = -1, key = "number", descending = false, timer = 0;
let sorted = null, words = null, place = new Map();

const KEYS = {
  number: ["number", (f) => f, false],
  density: ["density", density, true],
  most: ["largest value", (f) => (D.a.count[f] ? D.a.most[f] : -Infinity), true],
  variance: ["variance", (f) => D.a.std[f] ** 2, true],
  energy: ["energy", (f) => D.a.energy[f], true],
  logit: ["effect on a logit", (f) => Math.max(Math.abs(D.a.high_logits[f * D.shape.high_tokens[1]]), Math.abs(D.a.low_logits[f * D.shape.low_tokens[1]])), true],
  cosine: ["nearest cosine", (f) => D.a.cosine[f * D.shape.near[1]], true],
  label: ["label", (f) => labelOf(f).toLowerCase() || "\uffff", false],
};
const SCOPES = {
  all: ["everywhere", true], fires: ["where active", true], raises: ["raised logits", false], lowers: ["lowered logits", false], label: ["labels", false],
};

function option(value, text) { return el("option", { value }, text); }
function setUp() {
  const has = { density: !D.dense, variance: D.dense, energy: Boolean(D.a.energy), logit: Boolean(D.a.high_tokens), cosine: Boolean(D.a.near), label: Object.keys(D.labels).length > 0 };
  for (const name of Object.keys(KEYS)) if (has[name] !== false) byId("sort").append(option(name, `by ${KEYS[name][0]}`));
  const scopes = { raises: has.logit, lowers: has.logit, label: has.label };
  for (const name of Object.keys(SCOPES)) if (SCOPES[name][1] || scopes[name]) byId("scope").append(option(name, SCOPES[name][0]));
  if (byId("group")) byId("group").append(option("", "all groups"), ...D.groups.map((name, i) => option(String(i), name)));
  let dead = 0;
  for (let f = 0; f < N; f += 1) dead += !D.a.count[f];
  byId("dead-text").textContent = `hide ${grouped(dead)} never active`;
  byId("hiding").hidden = !dead;
  byId("dead").checked = dead > 0 && dead < N;
  key = has.energy ? "energy" : D.dense ? "variance" : "density";
  descending = true;
  byId("sort").value = key;
}

function sort() {
  const value = KEYS[key][1], values = Array.from({ length: N }, (_, f) => value(f)), sign = descending ? -1 : 1;
  sorted = Array.from({ length: N }, (_, f) => f).sort((a, b) => (values[a] < values[b] ? -sign : values[a] > values[b] ? sign : a - b));
  byId("turn").textContent = descending ? "↓" : "↑";
  byId("turn").setAttribute("aria-label", descending ? "Descending; turn the order" : "Ascending; turn the order");
}

// ---- search

function has(array, from, to, found, shift) {
  for (let i = from; i < to; i += 1) if (array[i] >= shift && found[array[i] - shift]) return true;
  return false;
}
function active(name, f, found) { // tokens at which the feature is not 0
  if (!D.a[`${name}_ids`]) return false;
  const [, k, w] = D.shape[`${name}_ids`], ids = D.a[`${name}_ids`], marks = D.a[`${name}_marks`];
  for (let i = f * k * w; i < (f + 1) * k * w; i += 1) {
    if (ids[i] && found[ids[i] - 1] && (D.dense ? (i % w) === (w - 1) / 2 : marks[i])) return true;
  }
  return false;
}
function phrase(f, text) { // in the contexts as they read
  if (words === null) words = new Array(N);
  if (words[f] === undefined) {
    const [, k, w] = D.shape.high_ids, parts = [];
    for (const name of ["high", "low"]) {
      if (!D.a[`${name}_ids`]) continue;
      for (let i = f * k * w; i < (f + 1) * k * w; i += 1) {
        if (i % w === 0) parts.push("\n");
        const id = D.a[`${name}_ids`][i];
        if (id) parts.push(D.lower[id - 1]);
      }
    }
    words[f] = parts.join("");
  }
  return words[f].includes(text);
}
function matcher(raw, scope) {
  const text = raw.trim().toLowerCase();
  if (!text) return null;
  const found = new Uint8Array(D.texts.length);
  D.lower.forEach((each, i) => { if (each.includes(text)) found[i] = 1; });
  const several = /\S\s+\S/u.test(text), k = D.a.high_tokens ? D.shape.high_tokens[1] : 0;
  const exact = /^\d+$/u.test(text) || (D.groups.length > 1 && text.includes("/"));
  const label = (f) => Boolean(D.labels[f]) && D.labels[f].some((each) => each[0].toLowerCase().includes(text));
  const raises = (f) => k > 0 && has(D.a.high_tokens, f * k, (f + 1) * k, found, 0);
  const lowers = (f) => k > 0 && has(D.a.low_tokens, f * k, (f + 1) * k, found, 0);
  const fires = (f) => active("high", f, found) || active("low", f, found) || (several && phrase(f, text));
  const named = (f) => exact && (String(D.a.number[f]) === text || nameOf(f).toLowerCase() === text);
  return { all: (f) => named(f) || label(f) || fires(f) || raises(f), fires, raises, lowers, label }[scope];
}
function search() {
  const matches = matcher(byId("search").value, byId("scope").value);
  const hide = byId("dead").checked, group = byId("group") && byId("group").value !== "" ? Number(byId("group").value) : null;
  const text = byId("search").value.trim();
  const named = (f) => text !== "" && String(D.a.number[f]) === text; // a number is found although it is never active
  order = sorted.filter((f) => (!hide || D.a.count[f] || named(f)) && (group === null || D.a.group[f] === group) && (!matches || matches(f)));
  if (/^\d+$/u.test(text)) order = [...order.filter(named), ...order.filter((f) => !named(f))];
  place = new Map(order.map((f, i) => [f, i]));
  byId("found").textContent = order.length === N ? `${grouped(N)} features` : `${grouped(order.length)} of ${grouped(N)} features`;
  byId("list").scrollTop = 0;
  if (place.has(chosen)) reveal(place.get(chosen));
  draw();
}

// ---- rows

function shareOf(f) { // of the widest bar, and the text beside it
  if (key === "density" || key === "number" || key === "label") {
    if (D.dense) return [D.a.std[f] / Math.max(...D.a.std.subarray(0, 1), largestOf("variance") ** 0.5), `σ ${number(D.a.std[f])}`];
    const d = density(f);
    return [d ? 1 - Math.log10(d) / Math.log10(1 / D.tokens) : 0, percent(d)];
  }
  const value = KEYS[key][1](f), whole = largestOf(key), shown = key === "cosine" ? value / 1000 : value;
  return [whole > 0 ? Math.max(0, value / whole) : 0, Number.isFinite(value) ? number(shown) : "–"];
}
const largest = {};
function largestOf(name) {
  if (!(name in largest)) {
    largest[name] = 0;
    for (let f = 0; f < N; f += 1) largest[name] = Math.max(largest[name], Number.isFinite(KEYS[name][1](f)) ? KEYS[name][1](f) : 0);
  }
  return largest[name];
}
function row(i) {
  const f = order[i], label = labelOf(f), [share, text] = shareOf(f), fill = el("i");
  fill.style.width = `${Math.round(100 * Math.min(1, share))}%`;
  const what = label ? el("span", { class: "what" }, label) : el("span", { class: "what" }, ...firesOn(f).map((each) => el("span", { class: "chip" }, each)));
  const attributes = { class: "row", role: "option", id: `row-${f}`, "aria-selected": String(f === chosen), "aria-posinset": i + 1, "aria-setsize": order.length };
  const element = el("div", attributes, el("div", {}, el("span", { class: "name" }, nameOf(f)), what),
    el("div", { class: "key" }, el("span", { class: "meter", "aria-hidden": "true" }, fill), el("span", {}, text)));
  element.style.top = `${i * ROW}px`;
  element.addEventListener("click", () => { choose(f); enter(); });
  return element;
}
function draw() {
  const list = byId("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - MORE);
  const last = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + MORE);
  byId("rows").style.height = `${order.length * ROW}px`;
  byId("rows").replaceChildren(...Array.from({ length: Math.max(0, last - first) }, (_, i) => row(first + i)));
  if (place.has(chosen) && byId(`row-${chosen}`)) list.setAttribute("aria-activedescendant", `row-${chosen}`);
  else list.removeAttribute("aria-activedescendant");
}
function reveal(i) {
  const list = byId("list"), top = i * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
}

// ---- choosing

const narrow = () => getComputedStyle(byId("back")).display !== "none";
function enter() { // on a narrow page the feature is below the list
  if (narrow()) byId("feature").scrollIntoView({ block: "start" });
}
function choose(f, quiet) {
  chosen = f;
  show(f);
  if (place.has(f)) reveal(place.get(f));
  draw();
  if (!quiet) history.replaceState(null, "", `#${encodeURIComponent(nameOf(f))}`);
}
function go(f) { // to another feature, so that the browser's Back returns
  history.pushState(null, "", `#${encodeURIComponent(nameOf(f))}`);
  choose(f, true);
  byId("feature").scrollIntoView({ block: "nearest" });
  byId("feature").focus({ preventScroll: true });
}
function step(by) {
  if (!order.length) return;
  const at = place.has(chosen) ? place.get(chosen) + by : by > 0 ? 0 : order.length - 1;
  choose(order[Math.max(0, Math.min(order.length - 1, at))]);
}
function fromAddress() {
  let name = "";
  try { name = decodeURIComponent(location.hash.slice(1)); } catch { return; }
  for (let f = 0; f < N && name; f += 1) if (nameOf(f) === name) { choose(f, true); return; }
}

function listen() {
  const list = byId("list"), page = () => Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const moves = { ArrowDown: () => step(1), ArrowUp: () => step(-1), PageDown: () => step(page()), PageUp: () => step(-page()), Home: () => step(-N), End: () => step(N), Enter: enter, " ": enter };
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !moves[event.key]) return;
    moves[event.key]();
    event.preventDefault();
  });
  let drawing = false;
  list.addEventListener("scroll", () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; draw(); });
  });
  new ResizeObserver(draw).observe(list);
  byId("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(search, N > 4000 ? DELAY : 0); });
  const toList = () => { clearTimeout(timer); search(); if (order.length) { choose(order[0]); list.focus(); } };
  byId("search").addEventListener("keydown", (event) => { if (event.key === "ArrowDown") { toList(); event.preventDefault(); } });
  byId("tools").addEventListener("submit", (event) => { event.preventDefault(); toList(); });
  for (const id of ["scope", "dead", "group"]) if (byId(id)) byId(id).addEventListener("change", search);
  byId("sort").addEventListener("change", () => { key = byId("sort").value; descending = KEYS[key][2]; sort(); search(); });
  byId("turn").addEventListener("click", () => { descending = !descending; sort(); search(); });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("back").addEventListener("click", () => { byId("features").scrollIntoView({ block: "start" }); list.focus({ preventScroll: true }); });
  window.addEventListener("popstate", fromAddress);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && byId("search").value) { byId("search").value = ""; search(); }
    else if (event.key === "/" && !["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName)) { byId("search").focus(); event.preventDefault(); }
  });
}

async function start() {
  try {
    await read();
  } catch (error) {
    byId("status").className = "alert";
    byId("status").textContent = `The features cannot be read: ${error.message}. The page needs a browser of 2023 or later.`;
    return;
  }
  const [chart, caption] = overview();
  byId("overview").append(chart, el("figcaption", {}, caption));
  document.querySelector("main").hidden = false;
  byId("status").hidden = true;
  setUp();
  sort();
  search();
  listen();
  fromAddress();
  if (chosen < 0 && order.length) choose(order[0], true);
  document.documentElement.dataset.ready = "1";
}
start();
