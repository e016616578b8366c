"use strict";
// All text goes in as text nodes: names of folders and messages of commands are not to be trusted as markup.
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7a5195"];
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "4 2", "12 4", "1 3"];
const SVG = "http://www.w3.org/2000/svg";
const QUIET = ["absorbed", "touched", "note"];
let version = -1, missed = 0, latest = null;

const byId = (id) => document.getElementById(id);
function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
function number(value, digits = 4) {
  return value === null || value === undefined ? "–" : Number(value).toFixed(digits);
}
function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
  return String(Number(value.toPrecision(4)));
}
function bytes(value) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 100 ? `${seconds.toFixed(1)} s` : seconds < 6000 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// A name keeps its colour and dashes on all charts: the checkpoint itself has the first.
function style(name, names) {
  const place = name === "live" ? 0 : 1 + names.indexOf(name);
  return { stroke: COLORS[place % COLORS.length], "stroke-dasharray": DASHES[place % DASHES.length] };
}
function chart(place, series, names, { low, high, ignoreFirst = false } = {}) {
  const narrow = window.matchMedia("(max-width: 720px)").matches;
  const wide = place.parentElement.classList.contains("wide");
  const width = wide && !narrow ? 1100 : 720, height = narrow ? 460 : wide ? 340 : 300;
  const left = narrow ? 100 : 62, right = 14, top = narrow ? 20 : 12, bottom = narrow ? 44 : 28;
  const shown = series.filter(([, points]) => points.length);
  place.replaceChildren();
  if (!shown.length) { place.append(element("p", "nothing yet", { class: "note" })); return; }
  const steps = shown.flatMap(([, points]) => points.map((point) => point[0]));
  const first = Math.min(...steps), last = Math.max(...steps);
  // The first losses of a run are far above all others: the axis is for the last three quarters, lines are cut off.
  const from = ignoreFirst ? first + (last - first) / 4 : first;
  const values = shown.flatMap(([, points]) => points.filter((point) => point[0] >= from).map((point) => point[1]));
  let least = low ?? Math.min(...values), most = high ?? Math.max(...values);
  if (low === undefined) { const room = (most - least || Math.abs(most) || 1) * 0.06; least -= room; most += room; }
  if (most === least) most = least + 1;
  const x = (step) => left + (last === first ? 0.5 : (step - first) / (last - first)) * (width - left - right);
  const y = (value) => top + (1 - (value - least) / (most - least)) * (height - top - bottom);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const spoken = shown.map(([name, points]) => `${name}: ${short(points[points.length - 1][1])} at step ${points[points.length - 1][0]}`);
  svg.append(drawn("title", {}, spoken.join("; ")));
  const clip = `clip-${place.id}`;
  const region = drawn("clipPath", { id: clip });
  region.append(drawn("rect", { x: left, y: top - 2, width: width - left - right + 6, height: height - top - bottom + 4 }));
  svg.append(region);
  for (let i = 0; i <= 4; i += 1) {
    const value = least + ((most - least) * i) / 4;
    svg.append(drawn("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  const ticks = last === first ? 0 : narrow ? 2 : 4;
  for (let i = 0; i <= ticks; i += 1) {
    const step = Math.round(first + ((last - first) * i) / (ticks || 1));
    const anchor = !ticks ? "middle" : i === 0 ? "start" : i === ticks ? "end" : "middle";
    svg.append(drawn("text", { x: x(step), y: height - 8, "text-anchor": anchor }, short(step)));
  }
  const group = drawn("g", { "clip-path": `url(#${clip})` });
  for (const [name, points] of shown) {
    const line = points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" ");
    group.append(drawn("polyline", { class: "series", points: line, ...style(name, names) }));
    if (points.length === 1) group.append(drawn("circle", { cx: x(points[0][0]), cy: y(points[0][1]), r: 4, fill: style(name, names).stroke }));
  }
  svg.append(group);
  const legend = element("ul", undefined, { class: "legend" });
  for (const [name] of shown) {
    const item = element("li"), key = drawn("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    key.append(drawn("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2.5, ...style(name, names) }));
    item.append(key, document.createTextNode(name === "live" ? "live (the checkpoint itself)" : name));
    legend.append(item);
  }
  place.append(svg, legend);
}

function table(data) {
  const head = element("tr"), rows = [];
  for (const title of ["average", "loss", "over live", "mean age (steps)", "weight on θ₀", "settings"]) head.append(element("th", title));
  const last = (name) => (data.losses[name] || []).slice(-1)[0];
  const live = last("live");
  const ranked = data.averages.slice().sort((a, b) => (last(a.name)?.[1] ?? Infinity) - (last(b.name)?.[1] ?? Infinity));
  for (const average of live ? [{ name: "live", settings: {} }, ...ranked] : ranked) {
    const found = last(average.name), row = element("tr");
    if (live && average === ranked[0]) row.className = "first";
    const gap = found && live && found[0] === live[0] && average.name !== "live" ? live[1] - found[1] : null;
    const settings = [average.rule, ...Object.entries(average.settings).map(([key, value]) => `${key}=${value}`)].join(", ");
    const loss = found ? number(found[1]) + (found[2] ? ` ± ${number(found[2])}` : "") : "–";
    for (const text of [average.name, loss, gap === null ? "–" : (gap >= 0 ? "+" : "") + number(gap),
      average.mean_age === undefined ? "–" : average.mean_age.toFixed(1), number(average.on_start),
      average.name === "live" ? "the checkpoint itself" : average.mean_age === undefined ? "no average yet" : settings]) row.append(element("td", text));
    rows.push(row);
  }
  byId("averages").replaceChildren(head, ...rows);
}

function show(data) {
  const names = data.averages.map((average) => average.name);
  byId("run").textContent = data.run;
  document.title = `${data.step ?? "–"} · lagless watch`;
  const pending = data.pending.length ? `; not complete: ${data.pending.join("; ")}` : "";
  byId("status").textContent = data.step === null ? `no checkpoint yet${pending}` : `step ${data.step}, ${data.checkpoints} checkpoints in the averages${pending}`;
  byId("best").textContent = data.best
    ? `${data.best.name} as of step ${data.best.step}${data.best.loss === null ? "" : `, loss ${number(data.best.loss)}`} — ${data.best.path}`
    : "no averaged model yet";
  byId("advice").replaceChildren(...data.advice.map((text) => element("li", text)));
  const order = ["live", ...names].filter((name) => data.losses[name]);
  chart(byId("losses"), order.map((name) => [name, data.losses[name]]), names, { ignoreFirst: true });
  table(data);
  const formed = data.averages.filter((average) => average.weights);
  chart(byId("weights"), formed.map((average) => [average.name, average.weights]), names);
  chart(byId("schedules"), formed.map((average) => [average.name, average.schedule.slice(1)]), names, { low: 0, high: Math.max(1, ...formed.flatMap((average) => average.schedule.map((point) => point[1]))) });
  const resources = [
    ["state on disk", bytes(data.disk.state)], ["models on disk", bytes(data.disk.models)],
    ["taking up checkpoints", `${duration(data.seconds.absorbing)} in all, ${duration(data.seconds.last)} for the last`],
    ["evaluating", `${duration(data.seconds.evaluating)} in all`], ["output folder", data.out],
  ];
  byId("resources").replaceChildren(...resources.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
  byId("events").replaceChildren(...data.events.slice().reverse().map((event) => {
    const clock = event.time ? new Date(event.time * 1000).toLocaleTimeString() + " " : "";
    return element("li", `${clock}${event.step === null ? "" : `step ${event.step}: `}${event.text}`, QUIET.includes(event.event) ? {} : { class: "bad" });
  }));
}

async function look() {
  try {
    const answer = await fetch(`data.json?version=${version}`, { cache: "no-store" });
    if (answer.status === 200) {
      const data = await answer.json();
      version = data.version;
      latest = data;
      show(data);
    }
    if (missed) byId("status").classList.remove("away");
    missed = 0;
  } catch (error) {
    missed += 1;
    if (missed === 2) { byId("status").textContent = "the watch has ended, or cannot be reached; this is what it said last"; byId("status").classList.add("away"); version = -1; }
  }
  setTimeout(look, missed > 5 ? 5000 : missed ? 1000 : 250); // the server answers when there is news
}
window.matchMedia("(max-width: 720px)").addEventListener("change", () => { if (latest) show(latest); });
look();
