const byId = (id) => document.getElementById(id);
const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int8: Int8Array, int16: Int16Array, float32: Float32Array };
const MINUS = "−";
let D = null; // what the page shows: JSON, and arrays by name in D.a
let N = 0; // number of features

async function read() {
  const text = atob(byId("data").textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const raw = await new Response(stream).arrayBuffer();
  const length = new DataView(raw).getUint32(0, true);
  D = JSON.parse(new TextDecoder().decode(new Uint8Array(raw, 4, length)));
  D.a = {};
  D.shape = {};
  for (const [name, [start, type, shape]] of Object.entries(D.arrays)) {
    D.a[name] = new TYPES[type](raw, 4 + length + start, shape.reduce((x, y) => x * y, 1));
    D.shape[name] = shape;
  }
  D.lower = D.texts.map((each) => each.toLowerCase());
  N = D.shape.number[0];
}

// ---- numbers and texts

function number(x) {
  if (!Number.isFinite(x)) return "";
  const size = Math.abs(x);
  const text = size === 0 ? "0" : size >= 1e5 || size < 1e-4 ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return x < 0 ? MINUS + text : text;
}
function percent(share) {
  if (share === 0) return "0 %";
  const x = 100 * share;
  return `${x >= 1e-4 ? String(Number(x.toPrecision(x >= 10 ? 3 : 2))) : x.toExponential(0)} %`;
}
const grouped = (x) => x.toLocaleString("en");
const nameOf = (f) => (D.groups.length > 1 ? `${D.groups[D.a.group[f]]}/${D.a.number[f]}` : String(D.a.number[f]));
const labelOf = (f) => (D.labels[f] ? D.labels[f][0][0] : "");
const density = (f) => D.a.count[f] / D.tokens;

// tokens that a feature is largest at, each once, of its contexts
function firesOn(f, most = 4) {
  const [, k, w] = D.shape.high_ids, found = [];
  for (let c = 0; c < k && found.length < most; c += 1) {
    const at = (f * k + c) * w + (w - 1) / 2;
    if (D.a.high_ids[at] === 0) break;
    const text = D.texts[D.a.high_ids[at] - 1].trim() || "␠";
    if (!found.includes(text)) found.push(text);
  }
  return found;
}

// ---- elements; texts are only ever text

function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
function svg(name, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}
