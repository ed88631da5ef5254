// The index (FEATURES, COLUMNS) and a feature's page (FEATURE). Texts are put in as text, never as HTML.
"use strict";

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

const short = (value) => Number(value.toPrecision(4)).toString();

// ---- the index

function index() {
  const size = 200;
  const rows = document.getElementById("rows");
  let shown = [], from = 0, by = 1, down = true;

  function fill(more) {
    if (!more) { rows.replaceChildren(); from = 0; }
    for (const row of shown.slice(from, from + size)) {
      const line = make("tr");
      const cell = make("td");
      cell.append(make("a", row[0], { href: `features/${row[0]}.html` }));
      line.append(cell, ...row.slice(1).map((value) => make("td", typeof value === "number" ? short(value) : value)));
      rows.append(line);
    }
    from += size;
    document.getElementById("more").hidden = from >= shown.length;
  }

  function update() {
    const words = document.getElementById("search").value.trim().toLowerCase();
    const fits = (row) => /^\d+$/.test(words) ? String(row[0]) === words || row.at(-1).toLowerCase().includes(words)
      : row.at(-1).toLowerCase().includes(words);
    shown = words ? FEATURES.filter(fits) : FEATURES.slice();
    const order = (a, b) => (a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : 0) * (down ? -1 : 1) || a[0] - b[0];
    shown.sort(order);
    document.getElementById("count").textContent = `${shown.length} of ${FEATURES.length} features`;
    for (const [i, head] of [...document.getElementById("heads").children].entries()) {
      if (i === by) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    fill(false);
  }

  COLUMNS.forEach((name, i) => {
    const head = make("th", undefined, { scope: "col" });
    const button = make("button", name, { type: "button" });
    button.addEventListener("click", () => { down = by === i ? !down : i !== 0 && i !== COLUMNS.length - 1; by = i; update(); });
    head.append(button);
    document.getElementById("heads").append(head);
  });
  document.getElementById("search").addEventListener("input", update);
  document.getElementById("more").addEventListener("click", () => fill(true));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && event.target.tagName !== "INPUT") { event.preventDefault(); document.getElementById("search").focus(); }
  });
  update();
}

// ---- a feature's page

function contexts(title, found, most) {
  const part = [make("h2", title)];
  for (const { tokens, codes, at } of found) {
    const line = make("div", undefined, { class: "context" });
    line.append(make("b", short(codes[at] ?? 0)));
    tokens.forEach((token, i) => {
      const code = codes[i];
      if (code === undefined) { line.append(token); return; }
      const colour = `rgba(var(--${code > 0 ? "warm" : "cold"}), ${0.15 + 0.5 * Math.min(Math.abs(code) / most, 1)})`;
      const span = make("span", token, { title: short(code), style: `background: ${colour}` });
      if (i === at) span.className = "at";
      line.append(span);
    });
    part.push(line);
  }
  if (!found.length) part.push(make("p", "none", { class: "note" }));
  return part;
}

function histogram({ low, high, counts }) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", `0 0 ${counts.length} 10`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "bars");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `codes from ${short(low)} to ${short(high)}`);
  const top = Math.log1p(Math.max(...counts));
  counts.forEach((count, i) => {
    const bar = document.createElementNS(space, "rect");
    const height = 10 * Math.log1p(count) / top;
    const middle = low + (high - low) * (i + 0.5) / counts.length;
    for (const [key, value] of Object.entries({ x: i + 0.05, width: 0.9, y: 10 - height, height, class: middle > 0 ? "up" : "down" }))
      bar.setAttribute(key, value);
    const told = document.createElementNS(space, "title");
    told.textContent = `${count} tokens with codes about ${short(middle)}`;
    bar.append(told);
    svg.append(bar);
  });
  return [make("h2", "Codes"), svg, make("p", `${short(low)} to ${short(high)}; heights are logarithmic`, { class: "note" })];
}

function table(title, heads, lines) {
  const own = make("table", undefined, { class: "text" });
  const head = make("tr");
  head.append(...heads.map((name) => make("th", name, { scope: "col" })));
  own.append(head);
  for (const line of lines) {
    const row = make("tr");
    row.append(...line.map((cell) => {
      const place = make("td");
      place.append(cell instanceof Node ? cell : document.createTextNode(typeof cell === "number" ? short(cell) : cell));
      return place;
    }));
    own.append(row);
  }
  const part = make("div");
  part.append(make("h2", title), own);
  return part;
}

const link = (number) => make("a", number, { href: `${number}.html` });

function feature() {
  const place = document.getElementById("feature");
  const facts = make("p", undefined, { class: "facts" });
  for (const [name, value] of FEATURE.facts) {
    const fact = make("span", `${name} `);
    fact.append(make("b", typeof value === "number" ? short(value) : value));
    facts.append(fact);
  }
  place.append(facts);
  if (FEATURE.label) place.append(make("p", `label: ${FEATURE.label}`));
  if (FEATURE.contexts) {
    const { positive, negative, drawn, most } = FEATURE.contexts;
    if (positive.length || !negative.length) place.append(...contexts("Greatest codes", positive, most));
    if (negative.length) place.append(...contexts("Least codes: the negative tail", negative, most));
    place.append(...contexts("Drawn from all tokens on which it fires", drawn, most));
  } else {
    place.append(make("p", FEATURE.without, { class: "note" }));
  }
  if (FEATURE.histogram) place.append(...histogram(FEATURE.histogram));
  const tables = make("div", undefined, { class: "columns" });
  if (FEATURE.lens) {
    tables.append(table("Logit lens: promoted", ["token", "logit"], FEATURE.lens.up.map(([t, v]) => [make("code", t), v])));
    tables.append(table("Logit lens: suppressed", ["token", "logit"], FEATURE.lens.down.map(([t, v]) => [make("code", t), v])));
  }
  tables.append(table("Nearest atoms", ["feature", "cosine"], FEATURE.near.map(([i, v]) => [link(i), v])));
  if (FEATURE.together) tables.append(table("Fires together with", ["feature", "share of either's tokens"], FEATURE.together.map(([i, v]) => [link(i), v])));
  place.append(tables);
  if (FEATURE.steering.length)
    place.append(table("Steered along", ["concept", "KL, nats", "effect", "fluent", "a text"], FEATURE.steering));
  document.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: "previous", ArrowRight: "next" }[event.key];
    if (way && !event.altKey && !event.metaKey) document.getElementById(way)?.click();
  });
}

if (typeof FEATURES !== "undefined") index();
else feature();
