// What a reader would see and do; added to a copy of the page, it leaves what it found in an element.
const found = { charts: {} }, all = (query, parent = document) => [...parent.querySelectorAll(query)];
for (const card of all(".chart")) {
  found.charts[card.querySelector("svg").getAttribute("aria-label")] = {
    curves: all("path.curve", card).map(path => (path.getAttribute("d").match(/[ML]/g) || []).length),
    dots: all("circle:not([visibility])", card).length };
}
const heat = document.getElementById("heat-map"), box = heat.getBoundingClientRect();
const pixels = heat.getContext("2d").getImageData(0, 0, heat.width, heat.height).data, colours = new Set();
for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3]) colours.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
found.colours = colours.size;
const at = { clientX: box.left + 0.6 * box.width, clientY: box.top + 6 + 1.5 * Math.max(2.6, Math.min(16, 640 / page.map.layers.length)), bubbles: true };
heat.dispatchEvent(new PointerEvent("pointermove", at));
found.tip = all(".heat .tip")[0].textContent;
heat.dispatchEvent(new MouseEvent("click", at));
found.toggled = all("#layer-chart path.curve").length;
const select = document.getElementById("measure"), scale = () => all(".scale")[0].textContent;
found.measures = select.options.length; found.before = scale();
select.value = 1; select.dispatchEvent(new Event("change")); found.switched = scale();
found.notices = all(".notice").map(notice => notice.textContent);
const column = name => all("#layers th").find(th => th.textContent === name), rows = () => all("#layers tbody tr").map(tr => tr.firstChild.textContent);
const ends = () => [rows()[0], rows()[rows().length - 1]];
found.unsorted = ends();
column("layer").click(); found.ascending = ends();
column("update").click(); found.largest = rows().slice(0, 2);
column("update").click(); found.smallest = rows().slice(0, 2);
found.overflow = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.appendChild(Object.assign(document.createElement("pre"), { id: "probe", textContent: JSON.stringify(found) }));
