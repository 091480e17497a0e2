// Columns over a scale: values from `edges[i]` to `edges[i + 1]` were counted `counts[i]` times.
function columns(counts, ticks, label, size) {
  const { width, height } = size, left = 6, bottom = 18, top = 14;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  const most = Math.max(1, ...counts), step = (width - 2 * left) / counts.length, base = height - bottom;
  counts.forEach((count, i) => {
    if (!count) return;
    const tall = Math.max(1.5, ((base - top) * count) / most);
    const bar = svg("rect", { class: "column", x: left + i * step + 0.5, y: base - tall, width: Math.max(1, step - 1), height: tall, rx: 1 }, root);
    svg("title", {}, bar, size.title(i));
  });
  svg("line", { class: "axis", x1: left, x2: width - left, y1: base + 0.5, y2: base + 0.5 }, root);
  for (const [at, text] of ticks) {
    const x = left + at * step;
    const anchor = x < 30 ? "start" : x > width - 30 ? "end" : "middle";
    svg("text", { x, y: height - 4, "text-anchor": anchor }, root, text);
  }
  svg("text", { x: left, y: 10 }, root, `${grouped(most)} ${size.unit}`);
  return root;
}

// Histogram of one feature: bars from the first to the last that have a value.
function histogram(f) {
  const bars = D.shape.bars[1], half = bars / 2, counts = D.a.bars.subarray(f * bars, (f + 1) * bars);
  let first = 0, last = bars - 1;
  while (first < bars && !counts[first]) first += 1;
  while (last > first && !counts[last]) last -= 1;
  if (first === bars) return null;
  if (!D.dense && D.a.least[f] >= 0) first = half; // values above 0: from 0 on
  const edge = (i) => D.a.centre[f] + (i - half) * 2 ** D.a.exponent[f];
  const shown = [...counts.subarray(first, last + 1)];
  const ticks = [[0, number(edge(first))], [shown.length, number(edge(last + 1))]];
  if (shown.length > 3) ticks.push([shown.length / 2, number((edge(first) + edge(last + 1)) / 2)]);
  const what = D.dense ? "Values" : "Values that are not 0";
  const label = `${what}: ${grouped(shown.reduce((a, b) => a + b, 0))} from ${number(D.a.least[f])} to ${number(D.a.most[f])}`;
  const title = (i) => `${number(edge(first + i))} to ${number(edge(first + i + 1))}: ${grouped(shown[i])}`;
  return columns(shown, ticks, label, { width: 460, height: 110, title, unit: "tokens" });
}

// Densities of all features by their logarithm; of dense features, their variance one by one.
function overview() {
  if (D.dense) {
    const total = D.a.std.reduce((a, b) => a + b * b, 0) || 1;
    const shares = [...D.a.std].map((s) => (s * s) / total).sort((a, b) => b - a).slice(0, 128);
    const label = `Share of the features' variance, largest first: ${shares.slice(0, 5).map(percent).join(", ")}`;
    const scaled = shares.map((s) => Math.round(1e4 * s));
    const size = { width: 640, height: 120, unit: "", title: (i) => `${i + 1}: ${percent(shares[i])}` };
    const chart = columns(scaled, [[0, "largest"], [shares.length, `${shares.length}th`]], label, size);
    chart.lastChild.textContent = percent(shares[0]);
    return [chart, "Share of the variance of all features that each one has, largest first"];
  }
  const lowest = Math.floor(Math.log10(1 / D.tokens)), parts = 4, bars = new Array(-lowest * parts).fill(0);
  let dead = 0;
  for (let f = 0; f < N; f += 1) {
    if (!D.a.count[f]) dead += 1;
    else bars[Math.min(bars.length - 1, Math.floor((Math.log10(density(f)) - lowest) * parts))] += 1;
  }
  const ticks = Array.from({ length: -lowest + 1 }, (_, i) => [i * parts, percent(10 ** (lowest + i))]);
  const label = `Features by the share of tokens at which they are active; ${grouped(dead)} never are`;
  const title = (i) => `${percent(10 ** (lowest + i / parts))} to ${percent(10 ** (lowest + (i + 1) / parts))}: ${grouped(bars[i])}`;
  return [columns(bars, ticks, label, { width: 640, height: 130, title, unit: "features" }), `${label} on these tokens`];
}
