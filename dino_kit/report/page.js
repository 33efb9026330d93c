"use strict";
// The curves and the film. A figure is {key, title, unit, scale, floor, ceiling, curves, points, lines};
// a curve is {name, x, y, low, high}: steps, means, and the range that a mean was taken over.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const STATES = {
  "warming up": "--warming", "learning": "--learning", "uniform collapse": "--uniform",
  "one-point collapse": "--one-point", "dead student": "--dead",
  "unsteady teacher": "--dead",
};
const FAULT = (state) => !["warming up", "learning"].includes(state);
const colour = (state) => `var(${STATES[state] || "--open"})`;
const figures = new Map(data.groups.flatMap((group) => group.figures.map((one) => [one.key, one])));
let chosen = null; // the step that is pointed at; null: the last

function svg(parent, tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}
function element(parent, tag, className, text = "") {
  const made = Object.assign(document.createElement(tag), { className, textContent: text });
  parent.append(made);
  return made;
}

const tidy = (text) => text.replace("e-", "e−").replace(/^-/, "−");
function written(value, span) {
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 10000) return tidy(Math.round(value).toLocaleString("en"));
  if (value !== 0 && size < 0.001) return tidy(value.toExponential(2));
  const digits = Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(span || size || 1))));
  return tidy(value.toFixed(digits));
}
const epoch = (step) => (step / data.each).toFixed(data.byEpoch ? 0 : data.last / data.each < 3 ? 2 : 1);
function when(step) {
  if (data.byEpoch) return `epoch ${step}`;
  const steps = `step ${step.toLocaleString("en")}`;
  return data.each ? `epoch ${epoch(step)}, ${steps}` : steps;
}

// Round numbers from low to high, about `most` of them.
function ticks(low, high, most, whole = false) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of high / low > 50 ? [1] : [1, 2, 5]) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  if (found.length < 2) return ticks(low, high, 3); // so little of the scale that it is nearly linear
  const each = Math.ceil(found.length / 5);
  return found.filter((_, place) => place % each === 0);
}
function label(value, scale) {
  const size = Math.abs(value);
  if (size >= 10000) return `${+(value / 1000).toPrecision(3)}k`;
  if (value && size < 0.001) return tidy(value.toExponential().replace(/\.(\d{1,2})\d*e/, ".$1e"));
  return tidy(String(+value.toPrecision(scale === "log" ? 3 : 6)));
}

function reach(figure) {
  const values = [];
  for (const one of [...figure.curves, ...figure.points]) {
    for (const list of [one.y, one.low, one.high]) {
      for (const value of list || []) if (value !== null) values.push(value);
    }
  }
  if (figure.scale === "log") {
    const above = values.filter((value) => value > 0);
    for (const line of figure.lines) if (line.wanted) above.push(line.value);
    if (!above.length) return null;
    const low = Math.min(...above), high = Math.max(...above);
    return low < high ? [low / 1.1, high * 1.1] : [low / 2, high * 2];
  }
  let low = Math.min(...values), high = Math.max(...values);
  for (const line of figure.lines) {
    if (line.wanted) [low, high] = [Math.min(low, line.value), Math.max(high, line.value)];
  }
  const room = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
  low = figure.floor ?? low - room;
  high = figure.ceiling ?? high + room;
  return [low, high];
}

// All curves of a figure, with the colour of each; what a probe measured comes after the others.
const drawn = (figure) => [...figure.curves, ...figure.points].map((one, place) => ({
  ...one, dots: figure.points.includes(one), colour: `var(${place % 2 ? "--second" : "--first"})`,
}));

function draw(holder) {
  const figure = figures.get(holder.dataset.key), plot = holder.querySelector(".plot");
  const width = plot.clientWidth, height = plot.clientHeight, bounds = reach(figure);
  if (!width || !bounds) return;
  const [low, high] = bounds, logarithmic = figure.scale === "log";
  const marks = logarithmic ? logTicks(low, high) : ticks(low, high, 4);
  const names = marks.map((value) => label(value, figure.scale) + (figure.unit === "%" ? " %" : ""));
  const left = 10 + 6.3 * Math.max(...names.map((name) => name.length)), right = width - 10;
  const top = figure.lines.length ? 20 : 9, bottom = height - (data.states.length ? 36 : 24);
  const across = (step) => left + (right - left) * (data.last ? step / data.last : 0);
  const share = logarithmic
    ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => (value - low) / (high - low);
  const up = (value) => bottom - (bottom - top) * Math.min(1.02, Math.max(-0.02, share(value)));
  const fits = (value) => value !== null && (!logarithmic || value > 0);

  const root = svg(null, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const span = (from, to, y, tall, attributes) => svg(root, "rect", {
    x: across(from), y, width: Math.max(1, across(to) - across(from)), height: tall, ...attributes,
  });
  if (data.warmup) span(0, Math.min(data.warmup, data.last), top, bottom - top, { class: "shade" });
  marks.forEach((value, place) => {
    svg(root, "line", { class: "grid", x1: left, x2: right, y1: up(value), y2: up(value) });
    svg(root, "text", { x: left - 6, y: up(value) + 4, "text-anchor": "end" }, names[place]);
  });
  for (const [from, to, state] of data.states) {
    // A fault stands out by its height too, not only by its colour.
    if (FAULT(state)) span(from, to, top, bottom - top, { fill: colour(state), opacity: 0.09 });
    span(from, to, bottom + (FAULT(state) ? 4 : 6), FAULT(state) ? 9 : 5, { fill: colour(state), class: "state" });
  }
  const unit = data.each || 1, foot = height - 8;
  const times = ticks(0, data.last / unit, width < 300 ? 4 : 5, data.last / unit >= 4);
  let free = Infinity; // where the label to the right begins
  for (const [place, value] of [...times.entries()].reverse()) {
    const last = place === times.length - 1;
    const text = (value && last ? (data.each ? "epoch " : "step ") : "") + label(value), wide = 6.3 * text.length;
    const from = Math.min(across(value * unit) - (place ? wide / 2 : 0), right - wide);
    if (from + wide + 6 > free) continue;
    free = from;
    svg(root, "text", { x: from + wide / 2, y: foot, "text-anchor": "middle" }, text);
  }

  for (const one of drawn(figure)) {
    const point = (value, place) => `${across(one.x[place]).toFixed(1)} ${up(value).toFixed(1)}`;
    if (one.low) {
      const known = one.x.map((_, place) => place).filter((place) => fits(one.low[place]) && fits(one.high[place]));
      const around = [...known.map((place) => point(one.high[place], place)),
        ...known.reverse().map((place) => point(one.low[place], place))];
      svg(root, "path", { class: "range", fill: one.colour, d: `M${around.join("L")}Z` });
    }
    let path = "", open = false;
    one.y.forEach((value, place) => {
      if (fits(value)) path += (open ? "L" : "M") + point(value, place);
      // A single point is seen because its line has round ends.
      if (fits(value) && !open) path += `L${point(value, place)}`;
      open = fits(value);
    });
    if (path) svg(root, "path", { class: "curve", stroke: one.colour, d: path });
    if (one.dots && one.x.length <= 80) {
      one.y.forEach((value, place) => fits(value) && svg(root, "circle",
        { class: "dot", fill: one.colour, r: 3.2, cx: across(one.x[place]), cy: up(value) }));
    }
  }
  for (const line of figure.lines) {
    if (line.value < low || line.value > high) continue;
    const y = up(line.value);
    svg(root, "line", { class: "reference", x1: left, x2: right, y1: y, y2: y });
    svg(root, "text", { class: "halo", x: right, y: y - 5, "text-anchor": "end" }, line.label);
  }
  const cursor = svg(root, "g", { class: "pointer" });
  plot.replaceChildren(root);
  holder.geometry = { across, up, left, right, top, bottom, cursor, low, high, fits };
  read(holder);
}

// The place in a curve that is nearest to a step, among those with a value.
function nearest(one, step) {
  let best = -1;
  one.x.forEach((x, place) => {
    if (one.y[place] !== null && (best < 0 || Math.abs(x - step) < Math.abs(one.x[best] - step))) best = place;
  });
  return best;
}

// Write a figure's values at the chosen step into its head, and mark them.
function read(holder) {
  const figure = figures.get(holder.dataset.key), at = holder.geometry, out = holder.querySelector("output");
  if (!at) return;
  const step = chosen ?? data.last, unit = figure.unit ? (figure.unit === "%" ? " %" : ` ${figure.unit}`) : "";
  at.cursor.replaceChildren();
  out.replaceChildren();
  if (chosen !== null) {
    svg(at.cursor, "line", { class: "cursor", x1: at.across(step), x2: at.across(step), y1: at.top, y2: at.bottom });
  }
  const all = drawn(figure), words = [];
  for (const one of all) {
    const place = nearest(one, step);
    if (place < 0) continue;
    const text = written(one.y[place], figure.scale === "log" ? 0 : at.high - at.low);
    const name = one.name ? element(out, "i", "", `${one.name} `) : null;
    const value = element(out, "b", "", text + (one === all.at(-1) || unit === " %" ? unit : ""));
    if (all.length > 1) {
      // Within the first word, from which no end of a line can part it.
      const key = element(name || value, "span", "key");
      key.style.background = one.colour;
      (name || value).prepend(key);
    }
    words.push(`${one.name} ${text}${unit}`.trim());
    if (chosen !== null && at.fits(one.y[place])) {
      svg(at.cursor, "circle", { class: "swatch", fill: one.colour, r: 4.5, cx: at.across(one.x[place]), cy: at.up(one.y[place]) });
    }
  }
  const state = data.states.find(([from, to]) => step > from && step <= to)?.[2];
  if (chosen !== null) {
    const text = when(step) + (state ? `, ${state}` : ""), x = at.across(step), middle = (at.left + at.right) / 2;
    svg(at.cursor, "text", { class: "halo", x: x + (x > middle ? -7 : 7), y: at.top + 9, "text-anchor": x > middle ? "end" : "start" }, text);
  }
  holder.setAttribute("aria-label", `${figure.title}: ${words.join(", ")} at ${when(step)}`);
}

function choose(step) {
  chosen = step;
  for (const holder of document.querySelectorAll(".chart")) read(holder);
}

for (const holder of document.querySelectorAll(".chart")) {
  const plot = holder.querySelector(".plot");
  const point = (event) => {
    const at = holder.geometry;
    if (!at) return;
    const x = event.clientX - plot.getBoundingClientRect().left;
    choose(Math.round(data.last * Math.min(1, Math.max(0, (x - at.left) / (at.right - at.left)))));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && choose(null));
  holder.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], step = Math.max(1, Math.round(data.last / 100));
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (by) choose(Math.min(data.last, Math.max(0, (chosen ?? data.last) + by * step)));
    else if (event.key === "Home") choose(0);
    else if (event.key === "End") choose(data.last);
    else if (event.key === "Escape") choose(null);
    else return;
    event.preventDefault();
  });
  new ResizeObserver(() => draw(holder)).observe(plot);
}

function legend() {
  const entry = (text, paint) => {
    const holder = element($("legend"), "span", "");
    paint(svg(holder, "svg", { width: 22, height: 12, "aria-hidden": "true" }));
    holder.append(text);
  };
  for (const state of new Set(data.states.map((span) => span[2]))) {
    const tall = FAULT(state) ? 9 : 5;
    entry(state, (it) => svg(it, "rect", { y: 6 - tall / 2, width: 22, height: tall, fill: colour(state) }));
  }
  if (data.warmup) {
    entry("the learning rate warms up", (it) => svg(it, "rect", { width: 22, height: 12, style: "fill: var(--shade); stroke: var(--line)" }));
  }
  if (data.groups.some((group) => group.figures.some((one) => one.curves.some((curve) => curve.low)))) {
    entry("least to largest, around the mean", (it) => {
      svg(it, "rect", { class: "range", width: 22, height: 12, fill: "var(--first)" });
      svg(it, "line", { x2: 22, y1: 6, y2: 6, stroke: "var(--first)", "stroke-width": 2 });
    });
  }
}
legend();

if (data.film.length && $("movie")) {
  const film = data.film, seek = $("seek");
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    $("play").textContent = "▶";
    $("play").setAttribute("aria-label", "Play");
  };
  const show = (place) => {
    const frame = film[place], words = [];
    words.push(frame.epoch === 0 ? "before training" : frame.epoch === undefined ? when(frame.step) : `after epoch ${frame.epoch}`);
    if (frame.knn !== undefined) words.push(`k-NN ${frame.knn.toFixed(1)} %`);
    if (frame.rank !== undefined) words.push(`rank ${frame.rank.toFixed(1)}`);
    if (frame.retrieval !== undefined) words.push(`retrieval ${(100 * frame.retrieval).toFixed(0)} %`);
    $("frame").src = frame.source;
    seek.value = place;
    seek.setAttribute("aria-valuetext", words[0]);
    $("caption").textContent = words.join(" · ");
  };
  const step = (by) => show(Math.min(film.length - 1, Math.max(0, Number(seek.value) + by)));
  const play = () => {
    if (timer) return stop();
    if (Number(seek.value) === film.length - 1) show(0);
    $("play").textContent = "❚❚";
    $("play").setAttribute("aria-label", "Pause");
    timer = setInterval(() => {
      step(1);
      if (Number(seek.value) === film.length - 1) stop();
    }, 700);
  };
  $("play").addEventListener("click", play);
  seek.addEventListener("input", () => { stop(); show(Number(seek.value)); });
  $("movie").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === $("play") && event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") { stop(); step(event.key === "ArrowLeft" ? -1 : 1); }
    else if (event.key === "Home") { stop(); show(0); }
    else if (event.key === "End") { stop(); show(film.length - 1); }
    else if (event.key === " " || event.key === "Enter") play();
    else return;
    event.preventDefault();
  });
  $("play").disabled = seek.disabled = film.length < 2;
  show(film.length - 1);
}
// Small pictures are enlarged in squares.
for (const image of document.querySelectorAll(".row img")) {
  image.decode().then(() => image.classList.toggle("tiny", image.naturalWidth <= 64), () => {});
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
document.documentElement.dataset.ready = "yes";
