// ---- one feature

const says = (...parts) => el("ul", { class: "said" }, ...parts.filter(Boolean).map((text) => el("li", {}, text)));

function describe(f) {
  const least = D.a.least[f], most = D.a.most[f];
  if (D.dense) {
    const total = D.a.std.reduce((a, b) => a + b * b, 0) || 1;
    const energy = D.a.energy ? `energy ${number(D.a.energy[f])} nats a token` : "";
    return says(`mean ${number(D.a.mean[f])}`, `standard deviation ${number(D.a.std[f])}`,
      `${percent(D.a.std[f] ** 2 / total)} of the features’ variance`, `from ${number(least)} to ${number(most)}`, energy);
  }
  if (!D.a.count[f]) return says(`0 at all ${grouped(D.tokens)} tokens`);
  const mean = (D.a.mean[f] * D.tokens) / D.a.count[f];
  return says(`active at ${percent(density(f))} of the tokens (${grouped(D.a.count[f])} of ${grouped(D.tokens)})`,
    `largest ${number(most)}`, least < 0 ? `smallest ${number(least)}` : "", `mean where active ${number(mean)}`);
}

function context(name, f, c) {
  const [, k, w] = D.shape[`${name}_ids`], start = (f * k + c) * w, middle = (w - 1) / 2;
  const text = el("div", { class: "text" }), unit = scaleOf(f);
  for (let i = 0; i < w; i += 1) {
    const id = D.a[`${name}_ids`][start + i], part = D.a[`${name}_marks`][start + i] / 127;
    if (!id) continue;
    const whole = D.texts[id - 1], bare = whole.trimStart() || whole; // the space before a word is not marked
    const token = el(i === middle ? "mark" : "span", { class: `token${part ? " on" : ""}${part < 0 ? " minus" : ""}` }, bare);
    text.append(whole.slice(0, whole.length - bare.length));
    if (part) {
      token.style.setProperty("--part", (Math.abs(part) ** 1.4).toFixed(3));
      token.title = i === middle ? number(D.a[`${name}_values`][f * k + c]) : `about ${number(unit.middle + part * unit.size)}`;
    }
    text.append(token);
  }
  const value = el("div", { class: "value" }, el("span", { class: "unseen" }, "value "), number(D.a[`${name}_values`][f * k + c]));
  return el("li", {}, value, text);
}
function scaleOf(f) {
  const middle = D.dense ? D.a.mean[f] : 0;
  return { middle, size: Math.max(Math.abs(D.a.most[f] - middle), Math.abs(D.a.least[f] - middle)) };
}
function contexts(name, f) {
  if (!D.a[`${name}_ids`]) return null;
  const k = D.shape[`${name}_ids`][1], list = el("ol", { class: "contexts" });
  for (let c = 0; c < k; c += 1) if (Number.isFinite(D.a[`${name}_values`][f * k + c])) list.append(context(name, f, c));
  return list.children.length ? list : null;
}

function logits(name, f, largest) {
  const k = D.shape[`${name}_tokens`][1], list = el("ol", { class: "bars" });
  for (let i = f * k; i < (f + 1) * k; i += 1) {
    const value = D.a[`${name}_logits`][i], text = D.texts[D.a[`${name}_tokens`][i]], fill = el("i");
    fill.style.width = `${(100 * Math.abs(value)) / largest}%`;
    const track = el("span", { class: `track${value < 0 ? " minus" : ""}`, "aria-hidden": "true" }, fill);
    list.append(el("li", {}, el("span", { class: "token", title: text }, text), track, el("span", { class: "value" }, number(value))));
  }
  return list;
}
function effects(f) {
  if (!D.a.high_tokens) return [el("p", { class: "soft" }, `Not defined, because ${D.effects.why}.`)];
  const k = D.shape.high_tokens[1];
  const largest = Math.max(Math.abs(D.a.high_logits[f * k]), Math.abs(D.a.low_logits[f * k])) || 1;
  const half = (name, title) => el("div", {}, el("h3", {}, title), logits(name, f, largest));
  const note = D.note ? `; directions are ${D.note}` : "";
  return [el("div", { class: "pair" }, half("high", "Raises the logits of"), half("low", "Lowers the logits of")),
    el("p", { class: "soft" }, `Direct effect: ${D.effects.how}${note}.`)];
}

function neighbours(f) {
  if (!D.a.near) return el("p", { class: "soft" }, `Not defined, because ${D.neighbours.why}.`);
  const k = D.shape.near[1], list = el("ul", { class: "near" });
  for (let i = f * k; i < (f + 1) * k; i += 1) {
    if (!D.a.near[i]) continue;
    const other = D.a.near[i] - 1;
    list.append(el("li", {}, el("button", { type: "button", onclick: () => go(other) }, el("b", {}, nameOf(other)),
      el("span", { class: "what" }, labelOf(other) || firesOn(other, 2).join(" ")), el("span", {}, (D.a.cosine[i] / 1000).toFixed(2)))));
  }
  return list.children.length ? list : el("p", { class: "soft" }, "None: its direction is zero.");
}

function bySite(f) {
  const w = D.shape.norms[1], list = el("ol", { class: "bars" });
  const largest = Math.max(1e-30, ...D.a.norms.subarray(f * w, (f + 1) * w));
  for (let i = 0; i < w; i += 1) {
    const value = D.a.norms[f * w + i], fill = el("i");
    if (!value) continue;
    fill.style.width = `${(100 * value) / largest}%`;
    list.append(el("li", {}, el("span", { class: "token", title: D.writes[i] }, D.writes[i]), el("span", { class: "track minus", "aria-hidden": "true" }, fill),
      el("span", { class: "value" }, number(value))));
  }
  return list;
}

function show(f) {
  const body = byId("feature-body"), parts = [];
  byId("feature-title").textContent = `Feature ${nameOf(f)}`;
  byId("link").hidden = !D.link;
  if (D.link) byId("link").href = `${D.link}/${D.a.number[f]}`;
  if (D.labels[f]) {
    parts.push(el("ul", { class: "labels", "aria-label": "Labels" }, ...D.labels[f].map(([text, author, score]) => el("li", {}, text,
      el("small", {}, [` by ${author}`, score === null ? "" : ` (score ${number(score)})`].join(""))))));
  }
  parts.push(describe(f));
  const chart = histogram(f);
  if (chart) parts.push(el("h3", {}, D.dense ? "Values" : "Values that are not 0"), chart);
  for (const [name, title] of [["high", "Where it is largest"], ["low", D.dense ? "Where it is smallest" : "Where it is most negative"]]) {
    const list = contexts(name, f);
    if (list) parts.push(el("h3", {}, title), list);
  }
  if (!D.a.count[f]) parts.push(el("p", { class: "soft" }, "It is active nowhere in these documents."));
  if (!D.a.high_tokens) parts.push(el("h3", {}, "Effect on the logits"));
  parts.push(...effects(f), el("h3", {}, "Nearest directions, with their cosine"), neighbours(f));
  if (D.a.norms && D.shape.norms[1] > 1) parts.push(el("h3", {}, "Length of its direction at each site"), bySite(f));
  body.replaceChildren(...parts);
}
