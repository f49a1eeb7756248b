// Puts each sheet that the server sends into the page. A sheet is whole: nothing is kept from the ones before.
// All text goes in as text, never as markup.

const byId = (id) => document.getElementById(id);
const svg = "http://www.w3.org/2000/svg";
let source, latest, retry, columns, paused = false, missed = 0, caller = byId("caller").value;

function setText(node, text) {
  const held = node.firstChild;
  if (!held) node.append(text);
  else if (held.data !== text) held.data = text;
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

// Gives the parent one child for each item, by key and in this order; what stays is the same element as before.
function patch(parent, items, create, fill) {
  const known = parent.known ?? new Map([...parent.querySelectorAll(":scope > [data-key]")].map((child) => [child.dataset.key, child]));
  const present = new Map();
  let next = known.values().next().value ?? null;
  for (const item of items) {
    let child = known.get(item.key);
    if (child && child.localName !== (item.tag ?? child.localName)) child = undefined;
    if (!child) {
      child = create(item);
      child.dataset.key = item.key;
    }
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
    fill(child, item);
    present.set(item.key, child);
  }
  for (const [key, child] of known) if (present.get(key) !== child) child.remove();
  parent.known = present;
}

function createPart(cell, parts, name, after) {
  const node = document.createElement(name);
  if (after) after.after(node);
  else cell.append(node);
  return (parts[name] = node);
}

function removePart(parts, name) {
  parts[name]?.remove();
  parts[name] = null;
}

function fillCell(node, cell) {
  const shown = node.shown ?? {};
  if (cell.text === shown.text && cell.detail === shown.detail && cell.tone === shown.tone && cell.meter === shown.meter) return;
  const parts = (node.parts ??= Object.fromEntries([...node.children].map((child) => [child.localName, child])));
  const text = parts.span ?? createPart(node, parts, "span");
  setText(text, cell.text);
  if (cell.tone !== shown.tone) text.className = cell.tone;
  if (!cell.meter) removePart(parts, "meter");
  else {
    const fresh = !parts.meter, meter = parts.meter ?? createPart(node, parts, "meter", text);
    if (fresh) meter.max = 1;
    if (fresh || cell.meter !== shown.meter) setAttribute(meter, "value", cell.meter);
    if (fresh) setAttribute(meter, "aria-hidden", "true");
  }
  if (!cell.detail) removePart(parts, "small");
  else setText(parts.small ?? createPart(node, parts, "small"), cell.detail);
  node.shown = cell;
}

function createRow(row) {
  const node = document.createElement("tr");
  row.cells.forEach((_, index) => {
    const cell = document.createElement(index ? "td" : "th");
    if (!index) cell.scope = "row";
    node.append(cell);
  });
  return node;
}

function fillRow(node, row) {
  node.cached ??= [...node.children];
  if (node.cached.length !== row.cells.length) {
    node.cached = [...createRow(row).children];
    node.replaceChildren(...node.cached);
  }
  row.cells.forEach((cell, index) => fillCell(node.cached[index], cell));
}

function createHeading() {
  const node = document.createElement("th");
  node.scope = "col";
  return node;
}

function createGroup() {
  const node = document.createElement("tbody"), line = node.insertRow(), head = document.createElement("th");
  line.className = "group";
  head.scope = "rowgroup";
  head.append(document.createElement("span"), " ", document.createElement("small"));
  line.append(head);
  return node;
}

function fillGroup(node, group) {
  setAttribute(node.querySelector(".group th"), "colspan", String(columns));
  setText(node.querySelector(".group span"), group.heading);
  setText(node.querySelector(".group small"), group.detail);
  patch(node, group.rows, createRow, fillRow);
}

function createLine(line) {
  const node = document.createElement("li");
  if (line.time) node.append(document.createElement("time"), " ");
  node.append(document.createElement("span"));
  return node;
}

function fillLine(node, line) {
  setAttribute(node, "class", line.tone);
  if (line.time) setText(node.querySelector("time"), line.time);
  setText(node.querySelector("span"), line.text);
}

function fillShape(node, shape) {
  for (const [name, value] of Object.entries(shape.attributes)) setAttribute(node, name, value);
  setText(node, shape.text);
}

function show(sheet) {
  const begun = performance.now();
  const root = document.documentElement;
  root.dataset.epoch = sheet.epoch;
  root.dataset.number = sheet.number;
  setText(byId("summary"), sheet.summary);
  setText(byId("at"), sheet.at);
  setText(byId("freshness"), sheet.freshness);
  setText(byId("outage"), sheet.outage);
  byId("outage").hidden = !sheet.outage;
  patch(byId("caller"), sheet.choices.map((choice) => ({ key: choice.value, ...choice })),
    () => document.createElement("option"),
    (node, choice) => { node.value = choice.value; setText(node, choice.label); });
  byId("caller").value = caller;
  columns = sheet.columns.length;
  patch(byId("columns"), sheet.columns.map((text) => ({ key: text, text })), createHeading, (node, { text }) => setText(node, text));
  patch(byId("instances"), sheet.instances, createGroup, fillGroup);
  patch(byId("calls"), sheet.calls, createRow, fillRow);
  patch(byId("disagreements"), sheet.disagreements, createLine, fillLine);
  patch(byId("journal"), sheet.journal, createLine, fillLine);
  const drawing = byId("drawing");
  setAttribute(drawing, "viewBox", `0 0 ${sheet.drawing.width} ${sheet.drawing.height}`);
  patch(drawing, sheet.drawing.shapes, (shape) => document.createElementNS(svg, shape.tag), fillShape);
  performance.measure("sheet", { start: begun });
}

function tell() {
  const open = source?.readyState === EventSource.OPEN;
  setText(byId("live"), paused ? `Paused${open ? "" : ", not connected"}, picture` : open ? "Live, picture" : "Not connected, picture");
}

function connect() {
  clearTimeout(retry);
  source?.close();
  source = undefined;
  if (!document.hidden) {
    const asked = caller, mine = new EventSource(`/topology/stream?caller=${encodeURIComponent(asked)}`);
    source = mine;
    mine.addEventListener("open", tell);
    mine.addEventListener("sheet", (event) => {
      if (mine !== source) return;
      latest = JSON.parse(event.data);
      if (!paused) show(latest);
    });
    // The browser does not try again by itself when it was refused, as by an instance that is leaving.
    mine.addEventListener("error", () => {
      if (mine !== source) return;
      tell();
      mine.close();
      retry = setTimeout(connect, 500 + 1000 * Math.random());
    });
  }
  tell();
}

byId("look").hidden = true;
byId("pause").hidden = false;
byId("pause").addEventListener("click", () => {
  paused = !paused;
  setAttribute(byId("pause"), "aria-pressed", String(paused));
  if (!paused && latest) show(latest);
  tell();
});
byId("caller").addEventListener("change", (event) => {
  caller = event.target.value;
  history.replaceState(null, "", caller ? `/?caller=${encodeURIComponent(caller)}` : "/");
  connect();
});
document.addEventListener("visibilitychange", connect);
connect();
