// What every report is drawn with: numbers, axes, curves. A page adds to `redraws` what must be drawn anew when it is resized.
const byId = id => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const COLOURS = ["blue", "orange", "green", "violet", "rose", "teal", "olive", "grey"].map(name => `var(--${name})`);

function make(tag, attributes = {}, parent = null, text = null) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(tag);
  const node = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

// Numbers ------------------------------------------------------------------------------------------------------
const finite = v => typeof v === "number" && Number.isFinite(v);
const plain = v => { // four significant digits, thousands separated
  if (!finite(v)) return "–";
  const a = Math.abs(v);
  if (a !== 0 && (a < 1e-3 || a >= 1e15)) return v.toExponential(2).replace("e-", "e−").replace("e+", "e");
  return v.toLocaleString("en", { maximumSignificantDigits: a >= 1000 ? Math.ceil(Math.log10(a + 1)) : 4 });
};
const SI = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
const short = v => {
  if (!finite(v)) return "–";
  for (const [size, letter] of SI) if (Math.abs(v) >= size) return (v / size).toLocaleString("en", { maximumSignificantDigits: 4 }) + letter;
  return plain(v);
};
const percent = v => finite(v) ? (100 * v).toLocaleString("en", { maximumSignificantDigits: 3 }) + " %" : "–";
const minutes = s => { const m = Math.floor(s / 60), h = Math.floor(m / 60); return h ? `${h} h ${m % 60} min` : m ? `${m} min ${Math.round(s % 60)} s` : `${s.toFixed(1)} s`; };

function niceTicks(low, high, count, whole = false) {
  const raw = Math.max((high - low) / count, whole ? 1 : 0), power = 10 ** Math.floor(Math.log10(raw));
  const step = (whole ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10]).map(m => m * power).find(s => s >= raw * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step + 0);
  return ticks;
}
function logTicks(low, high) {
  const ticks = [], wide = Math.log10(high / low) > 2.2;
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const m of wide ? [1] : [1, 2, 5]) { const t = m * 10 ** e; if (t >= low * 0.999 && t <= high * 1.001) ticks.push(t); }
  return ticks.length > 1 ? ticks : [low, high];
}

// Charts -------------------------------------------------------------------------------------------------------
const redraws = [];
/* options: title, unit, xName, format, tick, log, canLog, zero, height,
   lines: [{name, x, y, low, high, colour, dash, dots, bare (dots alone), hidden}] */
function chart(parent, options) {
  const card = make("div", { class: "card chart" }, parent);
  const head = make("h3", {}, card, options.title);
  const unit = make("span", { class: "unit" }, head);
  const logButton = options.canLog ? make("button", { title: "linear or logarithmic axis" }, head, "log") : null;
  if (logButton) logButton.onclick = () => { options.log = !options.log; draw(); };
  const legend = make("div", { class: "legend" }, card);
  const svg = make("svg", { role: "img", "aria-label": options.title }, card);
  const tip = make("div", { class: "tip" }, card);
  const format = options.format || plain, tick = options.tick || format;
  let area = null;

  function drawLegend() {
    legend.replaceChildren();
    if (options.lines.length < 2 && !options.legend) return;
    for (const line of options.lines.slice(0, 14)) {
      const button = make("button", {}, legend);
      make("i", { style: `background:${line.colour}` }, button);
      button.append(line.name);
      button.classList.toggle("off", Boolean(line.hidden));
      button.onclick = () => { line.hidden = !line.hidden; draw(); };
    }
  }
  function draw() {
    drawLegend();
    unit.textContent = options.unit || "";
    if (logButton) logButton.classList.toggle("off", !options.log);
    const width = Math.max(300, card.clientWidth - 28), height = options.height || 230;
    const left = 56, right = 14, top = 8, bottom = 36;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = height + "px";
    svg.replaceChildren();
    const lines = options.lines.filter(line => !line.hidden);
    const usable = v => finite(v) && (!options.log || v > 0);
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    for (const line of lines) {
      for (const x of line.x) { if (x < x0) x0 = x; if (x > x1) x1 = x; }
      for (const values of [line.y, line.low, line.high]) for (const v of values || []) if (usable(v)) { if (v < y0) y0 = v; if (v > y1) y1 = v; }
    }
    if (!(x1 >= x0) || !(y1 >= y0)) { make("text", { x: left, y: height / 2 }, svg, lines.length ? "no values" : "nothing chosen"); area = null; return; }
    if (options.zero && !options.log) y0 = Math.min(0, y0);
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    if (options.log) { if (y0 === y1) { y0 /= 1.5; y1 *= 1.5; } y0 /= 1.04; y1 *= 1.04; }
    else { const pad = (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || 1; if (!(options.zero && y0 === 0)) y0 -= pad; y1 += pad; }
    const sx = x => left + (x - x0) / (x1 - x0) * (width - left - right);
    const sy = options.log
      ? v => height - bottom - Math.log(v / y0) / Math.log(y1 / y0) * (height - top - bottom)
      : v => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
    for (const t of options.log ? logTicks(y0, y1) : niceTicks(y0, y1, 5)) {
      make("line", { class: "gridline", x1: left, x2: width - right, y1: sy(t), y2: sy(t) }, svg);
      make("text", { x: left - 7, y: sy(t) + 4, "text-anchor": "end" }, svg, tick(t));
    }
    for (const t of niceTicks(x0, x1, Math.max(3, width / 95), true)) {
      if (t < x0 || t > x1) continue;
      make("line", { class: "axis", x1: sx(t), x2: sx(t), y1: height - bottom, y2: height - bottom + 4 }, svg);
      make("text", { x: sx(t), y: height - bottom + 17, "text-anchor": "middle" }, svg, short(t));
    }
    make("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }, svg);
    make("text", { x: width - right, y: height - 3, "text-anchor": "end" }, svg, options.xName);
    for (const line of lines) {
      if (line.low) {
        const there = [], back = [];
        line.x.forEach((x, i) => { if (usable(line.low[i]) && usable(line.high[i])) { there.push(`${sx(x).toFixed(1)} ${sy(line.high[i]).toFixed(1)}`); back.unshift(`${sx(x).toFixed(1)} ${sy(line.low[i]).toFixed(1)}`); } });
        if (there.length > 1) make("path", { d: "M" + there.concat(back).join("L") + "Z", fill: line.colour, opacity: 0.16, stroke: "none" }, svg);
      }
      let d = "", open = false, marks = 0;
      line.x.forEach((x, i) => { if (usable(line.y[i])) { d += (open ? "L" : "M") + sx(x).toFixed(1) + " " + sy(line.y[i]).toFixed(1); open = true; marks++; } else if (!line.sparse) open = false; });
      if (!line.bare) make("path", { class: "curve", d, fill: "none", stroke: line.colour, "stroke-width": line.width || 1.7, "stroke-linejoin": "round", ...(line.dash ? { "stroke-dasharray": "6 4" } : {}) }, svg);
      if (line.dots || marks === 1) line.x.forEach((x, i) => { if (usable(line.y[i])) make("circle", { cx: sx(x), cy: sy(line.y[i]), r: marks > 60 ? 1.8 : 3, fill: line.colour }, svg); });
    }
    const cross = make("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" }, svg);
    const marks = lines.map(line => make("circle", { r: 3.5, fill: line.colour, visibility: "hidden" }, svg));
    area = { lines, sx, sy, x0, x1, left, right, width, cross, marks, usable };
  }
  svg.addEventListener("pointermove", event => {
    if (!area) return;
    const box = svg.getBoundingClientRect();
    const wanted = area.x0 + ((event.clientX - box.left) * area.width / box.width - area.left) / (area.width - area.left - area.right) * (area.x1 - area.x0);
    const nearest = line => { let a = 0, b = line.x.length - 1; while (b - a > 1) { const m = (a + b) >> 1; if (line.x[m] < wanted) a = m; else b = m; } return Math.abs(line.x[a] - wanted) <= Math.abs(line.x[b] - wanted) ? a : b; };
    const solid = area.lines.filter(line => !line.dash);
    const main = (solid.length ? solid : area.lines).reduce((best, line) => line.x.length > best.x.length ? line : best);
    const at = main.x[nearest(main)];
    tip.replaceChildren();
    make("b", {}, tip, `${options.xName} ${at.toLocaleString("en")}`);
    area.lines.forEach((line, index) => {
      const i = nearest(line), shown = area.usable(line.y[i]);
      const mark = area.marks[index];
      mark.setAttribute("visibility", shown && !line.dash ? "visible" : "hidden");
      if (shown && !line.dash) { mark.setAttribute("cx", area.sx(line.x[i])); mark.setAttribute("cy", area.sy(line.y[i])); }
      const row = make("div", {}, tip);
      make("i", { style: `background:${line.colour}` }, row);
      row.append(`${line.name}: ${format(line.y[i])}` + (line.low && line.name !== "median" ? ` (${format(line.low[i])} to ${format(line.high[i])})` : "") + (line.x[i] !== at && !line.dash ? ` at ${line.x[i].toLocaleString("en")}` : ""));
    });
    area.cross.setAttribute("x1", area.sx(at)); area.cross.setAttribute("x2", area.sx(at));
    area.cross.setAttribute("visibility", "visible");
    place(tip, card, event);
  });
  svg.addEventListener("pointerleave", () => { tip.style.visibility = "hidden"; if (area) { area.cross.setAttribute("visibility", "hidden"); area.marks.forEach(m => m.setAttribute("visibility", "hidden")); } });
  redraws.push(draw);
  return { draw, options };
}
function place(tip, card, event) {
  const box = card.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  tip.style.visibility = "visible";
  tip.style.left = (x + 18 + tip.offsetWidth > box.width ? Math.max(4, x - tip.offsetWidth - 14) : x + 18) + "px";
  tip.style.top = Math.max(4, y - tip.offsetHeight / 2) + "px";
}

function drawAll() { redraws.forEach(draw => draw()); }
let waiting = null;
window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 80); });
