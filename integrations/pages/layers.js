// Layers x steps as a heat map, of which a click on a row draws the layer below.
const VIRIDIS = [[68,1,84],[72,40,120],[62,74,137],[49,104,142],[38,130,142],[31,158,137],[53,183,121],[109,205,89],[180,222,44],[253,231,37]];
function viridis(t) {
  const p = Math.min(Math.max(t, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(p), VIRIDIS.length - 2);
  return VIRIDIS[i].map((c, k) => Math.round(c + (VIRIDIS[i + 1][k] - c) * (p - i)));
}

/* layers, names: of the rows, whole and shortened; steps: of the columns; measures: [{title, low, high, linear, data}], of
   which one is shown at a time. data has 16 bits per value, of a scale from low to high; 0 stands for a missing one. */
function layerMap(parent, { layers, names, steps, measures }) {
  const columns = steps.length, rows = layers.length;
  let measure, raw;
  const level = (row, column) => { const i = 2 * (row * columns + column); return raw.charCodeAt(i) | raw.charCodeAt(i + 1) << 8; };
  const value = (row, column) => {
    const q = level(row, column), share = (q - 1) / 65534, { low, high, linear } = measure;
    return !q ? NaN : linear ? low + share * (high - low) : low * Math.exp(share * (Math.log(high / low) || 1));
  };

  const card = make("div", { class: "card", style: "margin-top:12px" }, parent), head = make("h3", {}, card, "Layers × steps");
  make("span", { class: "unit" }, head, "click a row to draw it below");
  const scale = make("div", { class: "scale" }, card), lowest = make("span", { id: "scale-low" }, scale);
  const bar = make("canvas", { id: "scale", width: 220, height: 11 }, scale).getContext("2d");
  const highest = make("span", { id: "scale-high" }, scale), unit = make("span", {}, scale);
  for (let i = 0; i < 220; i++) { bar.fillStyle = `rgb(${viridis(i / 219)})`; bar.fillRect(i, 0, 1, 11); }
  const heat = make("div", { class: "heat" }, card), canvas = make("canvas", { id: "heat-map" }, heat), tip = make("div", { class: "tip" }, heat);

  const below = make("div", { class: "card", style: "margin-top:12px" }, parent), single = make("div", { id: "layer-chart" }, below);
  const tools = make("div", { class: "tools" }, below);
  const filter = make("input", { id: "filter", type: "search", placeholder: "find layers", "aria-label": "find layers" }, tools);
  const none = make("button", { id: "none" }, make("span", { class: "legend" }, tools), "hide all");
  const chipBox = make("div", { class: "chips", id: "chips" }, below);

  const pixels = make("canvas", { width: columns, height: rows });
  const chosen = new Map();
  let geometry = null;
  const layerChart = chart(single, { title: "Single layers", xName: "step", canLog: true, log: true, legend: true, height: 270, lines: [] });
  single.firstChild.style.border = 0; single.firstChild.style.padding = 0;

  function choose(one) {
    measure = one; raw = atob(one.data);
    const image = pixels.getContext("2d").createImageData(columns, rows);
    for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
      const q = level(r, c), at = 4 * (r * columns + c);
      if (q) { image.data.set(viridis((q - 1) / 65534), at); image.data[at + 3] = 255; }
    }
    pixels.getContext("2d").putImageData(image, 0, 0);
    lowest.textContent = plain(one.low); highest.textContent = plain(one.high);
    unit.textContent = `${one.title}, ${one.linear ? "linear" : "log"} scale`;
    Object.assign(layerChart.options, { unit: one.title, log: !one.linear });
    for (const [r, line] of chosen) line.y = steps.map((_, c) => value(r, c));
    show();
  }
  function drawHeat(hover = null) {
    const density = window.devicePixelRatio || 1, width = heat.clientWidth, row = Math.max(2.6, Math.min(16, 640 / rows));
    const left = Math.min(230, width * 0.3), top = 6, bottom = 34, height = top + row * rows + bottom;
    canvas.width = width * density; canvas.height = height * density; canvas.style.height = height + "px";
    const paint = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    paint.scale(density, density); paint.imageSmoothingEnabled = false;
    paint.drawImage(pixels, left, top, width - left - 6, row * rows);
    paint.fillStyle = style.getPropertyValue("--soft"); paint.textBaseline = "middle"; paint.textAlign = "right";
    paint.font = "11.5px system-ui, 'Liberation Sans', sans-serif";
    const every = Math.ceil(13 / row);
    for (let r = 0; r < rows; r += every) { paint.fillStyle = style.getPropertyValue(chosen.has(r) ? "--ink" : "--soft"); paint.fillText(names[r], left - 8, top + (r + 0.5) * row, left - 10); }
    paint.fillStyle = style.getPropertyValue("--soft"); paint.textBaseline = "top";
    for (let k = 0; k <= 6; k++) {
      const c = Math.round(k / 6 * (columns - 1)), x = left + (c + 0.5) / columns * (width - left - 6);
      paint.textAlign = k === 6 && columns > 1 ? "right" : "center"; paint.fillText(steps[c].toLocaleString("en"), x, top + row * rows + 6);
      if (columns === 1) break;
    }
    paint.textAlign = "right"; paint.fillText("step", width - 6, top + row * rows + 21);
    if (hover) { paint.strokeStyle = "rgb(255 255 255 / 0.85)"; paint.lineWidth = 1; paint.strokeRect(left + 0.5, top + hover.r * row, width - left - 7, row); }
    geometry = { left, top, row, width };
  }
  const cell = event => {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left - geometry.left, y = event.clientY - box.top - geometry.top;
    const c = Math.floor(x / (geometry.width - geometry.left - 6) * columns), r = Math.floor(y / geometry.row);
    return r >= 0 && r < rows && c < columns ? { r, c: Math.max(c, 0), inside: c >= 0 } : null;
  };
  canvas.addEventListener("pointermove", event => {
    const at = cell(event);
    drawHeat(at);
    if (!at) { tip.style.visibility = "hidden"; return; }
    tip.replaceChildren();
    make("b", {}, tip, layers[at.r]);
    if (at.inside) make("div", {}, tip, `step ${steps[at.c].toLocaleString("en")}: ${plain(value(at.r, at.c))}`);
    place(tip, heat, event);
  });
  canvas.addEventListener("pointerleave", () => { tip.style.visibility = "hidden"; drawHeat(); });
  canvas.addEventListener("click", event => { const at = cell(event); if (at) toggle(at.r); });

  function freeColour() {
    const taken = new Set([...chosen.values()].map(line => line.colour));
    for (let k = 0; ; k++) { const colour = COLOURS[k] || `hsl(${Math.round(k * 137.5) % 360} 45% 52%)`; if (!taken.has(colour)) return colour; }
  }
  const chips = layers.map((layer, r) => {
    const chip = make("button", { title: layer }, chipBox);
    make("i", {}, chip);
    chip.append(names[r]);
    chip.onclick = () => toggle(r);
    return chip;
  });
  function show() {
    layerChart.options.lines = [...chosen.values()];
    chips.forEach((chip, r) => { chip.classList.toggle("off", !chosen.has(r)); chip.firstChild.style.background = chosen.has(r) ? chosen.get(r).colour : "var(--line)"; });
    layerChart.draw(); drawHeat();
  }
  function toggle(r) {
    if (!chosen.delete(r)) chosen.set(r, { name: names[r], x: steps, y: steps.map((_, c) => value(r, c)), colour: freeColour() });
    show();
  }

  if (measures.length > 1) {
    const select = make("select", { id: "measure", "aria-label": "what is shown" });
    head.after(select);
    measures.forEach((one, k) => make("option", { value: k }, select, one.title));
    select.onchange = () => choose(measures[select.value]);
  }
  choose(measures[0]);
  const first = Math.min(6, rows);
  for (let k = 0; k < first; k++) toggle(Math.round(k * (rows - 1) / Math.max(1, first - 1)));
  none.onclick = () => { chosen.clear(); show(); };
  filter.oninput = () => { const wanted = filter.value.toLowerCase(); chips.forEach((chip, r) => { chip.hidden = !(layers[r] + " " + names[r]).toLowerCase().includes(wanted); }); };
  redraws.push(() => drawHeat());
}
