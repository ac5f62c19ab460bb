"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const SIDES = ["original", "patched"];
const element = (id) => document.getElementById(id);

/** `{shape, data, low, high}` -> an array of its values; stored as base64 of integers between low and high. */
function unpack(stored, Integers) {
  const text = atob(stored.data);
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  return new Integers(bytes.buffer);
}
const norms = {}; // [block, image, patch], in medians of the image
for (const side of SIDES) {
  const { low, high } = report.norms[side];
  const step = (high - low) / 65535;
  norms[side] = Float64Array.from(unpack(report.norms[side], Uint16Array), (value) => Math.exp(low + step * value));
}
const attention = {}; // [block, head, image, patch], 0 to 255 of the map's largest
for (const side of SIDES) attention[side] = report.attention && unpack(report.attention[side], Uint8Array);
const activations = unpack(report.activations, Uint8Array); // [neuron, image, patch]

const [rows, columns] = report.grid;
const numPatches = rows * columns;
const numImages = report.images.length;
const numBlocks = report.blocks.length;

function fill(select, labels, chosen = 0) {
  select.replaceChildren(...labels.map((label, value) => new Option(label, value)));
  select.value = chosen;
}
const number = (id) => Number(element(id).value);

// Norms

function thresholdOf(position) {
  return 1.5 * Math.pow(40 / 1.5, position / 100); // 1.5 to 40 medians
}
function positionOf(threshold) {
  return Math.round((100 * Math.log(threshold / 1.5)) / Math.log(40 / 1.5));
}
function normsOf(side, block) {
  const size = numImages * numPatches;
  return norms[side].subarray(block * size, (block + 1) * size);
}
function outliers(side, block, threshold) {
  let count = 0;
  for (const norm of normsOf(side, block)) count += norm > threshold;
  return count / numImages;
}
function histogram(block) {
  const { low, high, bins } = report.histogram;
  const table = [];
  for (const side of SIDES) {
    const counts = new Array(bins).fill(0);
    for (const norm of normsOf(side, block)) {
      const bin = Math.floor((bins * Math.log(norm / low)) / Math.log(high / low));
      counts[Math.min(bins - 1, Math.max(0, bin))] += 1;
    }
    counts.forEach((count, bin) => {
      if (!count) return;
      const edge = (index) => low * Math.pow(high / low, index / bins);
      table.push({ model: side, from: edge(bin), to: edge(bin + 1), patches: count });
    });
  }
  return table;
}

const charts = {};
function theme() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { labelColor: color("--text"), titleColor: color("--text"), gridColor: color("--line"), domainColor: color("--line"), tickColor: color("--line") };
  return { background: null, view: { stroke: null }, axis, legend: { labelColor: color("--text"), titleColor: color("--text") } };
}
async function draw(id, spec) {
  if (charts[id]) charts[id].finalize();
  charts[id] = await vegaEmbed(`#${id}`, spec, { actions: false, renderer: "svg", config: theme() });
  return charts[id].view;
}
async function drawAll() {
  report.charts.histogram.layer[0].data.values = histogram(number("norm-block"));
  await Promise.all(Object.entries(report.charts).map(([id, spec]) => draw(id, spec)));
  showNorms();
}
function showNorms() {
  const block = number("norm-block");
  let threshold = thresholdOf(number("threshold"));
  if (number("threshold") === positionOf(5)) threshold = 5;
  element("threshold-value").textContent = threshold.toFixed(threshold === 5 ? 0 : 1);
  element("threshold").setAttribute("aria-valuetext", `${threshold.toFixed(1)} medians`);
  for (const side of SIDES) element(`count-${side}`).textContent = outliers(side, block, threshold).toFixed(2);
  if (charts.histogram) {
    charts.histogram.view.data("patches", histogram(block)).data("threshold", [{ at: threshold }]).run();
  }
}

// Maps

const colors = unpack(report.colors, Uint8Array); // red, green, blue of 0 to 255
/** A map of patches as a small canvas, one pixel a patch; values 0 to 255. */
function tile(values) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  const picture = new ImageData(columns, rows);
  values.forEach((value, index) => {
    const start = 3 * Math.round(Math.min(255, Math.max(0, value)));
    picture.data.set([...colors.subarray(start, start + 3), 255], 4 * index);
  });
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}
function normMap(side, block, image) {
  const start = (block * numImages + image) * numPatches;
  const values = norms[side].subarray(start, start + numPatches);
  const largest = Math.log(Math.max(report.histogram.high, 2));
  const text = `largest ${Math.max(...values).toFixed(1)} medians`;
  return [Array.from(values, (value) => (255 * Math.max(0, Math.log(value))) / largest), text];
}
function attentionMap(side, block, head, image) {
  const { heads } = report;
  const scale = (which) => report.attention[side].scale[(block * heads + which) * numImages + image];
  const values = new Float64Array(numPatches);
  const chosen = head < 0 ? Array.from({ length: heads }, (_, index) => index) : [head];
  for (const which of chosen) {
    const start = ((block * heads + which) * numImages + image) * numPatches;
    for (let patch = 0; patch < numPatches; patch += 1) {
      values[patch] += (attention[side][start + patch] / 255) * scale(which) / chosen.length;
    }
  }
  const largest = Math.max(...values, 1e-12);
  return [Array.from(values, (value) => (255 * value) / largest), `largest weight ${largest.toFixed(4)}`];
}
const photos = report.images.map((image) => {
  const photo = new Image();
  photo.src = image.src;
  return photo;
});
function box(context, [left, top, right, bottom], color) {
  const { width, height } = context.canvas;
  context.lineWidth = 3;
  context.strokeStyle = color;
  context.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
}
function showMaps() {
  const image = number("image");
  const block = number("map-block");
  const attends = element("kind").value === "attention";
  element("head-label").hidden = !attends;
  for (const side of SIDES) {
    const canvas = element(`map-${side}`);
    const photo = photos[image];
    if (!photo.complete) {
      photo.onload = showMaps;
      return;
    }
    [canvas.width, canvas.height] = [photo.naturalWidth, photo.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(photo, 0, 0);
    const [values, text] = attends ? attentionMap(side, block, number("head") - 1, image) : normMap(side, block, image);
    context.globalAlpha = number("opacity") / 100;
    context.imageSmoothingEnabled = false;
    context.drawImage(tile(values), 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    const { boxes } = report.images[image];
    if (boxes && element("boxes").checked) {
      box(context, boxes[side], side === "original" ? "#ff5a36" : "#39d353");
    }
    const what = attends ? "attention of the class token" : "patch norms";
    canvas.setAttribute("aria-label", `${side}: ${what} after block ${report.blocks[block]}, ${text}`);
    element(`caption-${side}`).textContent = `${side}: ${text}`;
  }
}
function showActivations() {
  const neuron = number("neuron");
  const strip = report.images.map((image, index) => {
    const start = (neuron * numImages + index) * numPatches;
    const canvas = tile(Array.from(activations.subarray(start, start + numPatches)));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `activations of neuron ${report.neurons[neuron]} on ${image.name}`);
    return canvas;
  });
  element("activations").replaceChildren(...strip);
}

const afterBlock = report.blocks.map((block) => `${block}`);
fill(element("norm-block"), afterBlock, report.probe);
fill(element("map-block"), afterBlock, report.probe);
fill(element("image"), report.images.map((image) => image.name));
fill(element("head"), ["mean of all", ...Array.from({ length: report.heads }, (_, head) => `${head}`)]);
element("kind").replaceChildren(new Option("patch norms", "norms"));
if (report.attention) element("kind").append(new Option("attention of the class token", "attention"));
fill(element("neuron"), report.neurons);
element("threshold").value = positionOf(5);

for (const id of ["norm-block", "threshold"]) element(id).addEventListener("input", showNorms);
for (const id of ["image", "kind", "map-block", "head", "opacity", "boxes"]) {
  if (element(id)) element(id).addEventListener("input", showMaps);
}
element("neuron").addEventListener("input", showActivations);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
showMaps();
showActivations();
drawAll().then(() => document.body.setAttribute("data-ready", ""));
