// What a reader would see and do; added to a copy of the page, it leaves what it found in an element.
const found = { charts: {}, canvases: {}, errors: [] };
const hover = (node, x, y) => { const box = node.getBoundingClientRect();
  node.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true })); };
const tips = () => [...document.querySelectorAll(".tip")].filter(t => t.style.visibility === "visible").map(t => t.textContent).join(" | ");
for (const card of document.querySelectorAll(".chart")) {
  const box = card.querySelector("svg").getBoundingClientRect();
  found.charts[card.querySelector("svg").getAttribute("aria-label")] = {
    points: [...card.querySelectorAll("path.curve")].map(p => (p.getAttribute("d").match(/[ML]/g) || []).length),
    width: box.width, height: box.height, texts: card.querySelectorAll("svg text").length };
}
for (const canvas of document.querySelectorAll("canvas")) {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, colours = new Set();
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3]) colours.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
  found.canvases[canvas.id] = colours.size;
}
const first = document.querySelector(".chart svg");
if (first) { hover(first, 0.5, 0.5); found.chartTip = tips(); first.dispatchEvent(new PointerEvent("pointerleave")); }
const heat = document.getElementById("heat-map");
if (document.getElementById("ratios").hidden === false) {
  const layers = () => document.querySelectorAll("#layer-chart path.curve").length;
  hover(heat, 0.9, 0.3); found.heatTip = tips();
  const box = heat.getBoundingClientRect(), before = layers();
  heat.dispatchEvent(new MouseEvent("click", { clientX: box.left + 0.9 * box.width, clientY: box.top + 0.3 * box.height, bubbles: true }));
  found.toggled = [before, layers()];
  document.getElementById("none").click(); found.hidden = layers();
  document.querySelector("#chips button").click(); found.shown = layers();
}
const legend = document.querySelector(".chart .legend button"), curves = () => document.querySelector(".chart").querySelectorAll("path.curve").length;
if (legend) { const before = curves(); legend.click(); found.legend = [before, curves()]; }
found.overflow = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.appendChild(Object.assign(document.createElement("pre"), { id: "probe", textContent: JSON.stringify(found) }));
