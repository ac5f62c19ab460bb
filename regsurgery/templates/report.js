
// What the report can do beyond `maps.js`, in this order: the data, norms and their charts, kinds of maps, the two large
// maps, the grid of all images, the neurons, the line to copy, and what starts it all.

// ---- The data

/** Side -> what `make` gives for it. */
function bothSides(make) {
  return Object.fromEntries(SIDES.map((side) => [side, make(side)]));
}
// [block, image, patch], in medians of the image
const norms = bothSides((side) => {
  const { low, high } = report.norms[side];
  const step = (high - low) / 65535;
  return Float64Array.from(unpack(report.norms[side], Uint16Array), (value) => Math.exp(low + step * value));
});
// [block, head, image, patch], 0 to 255 of the map's largest, which is in `scale`
const attention = report.attention && bothSides((side) => unpack(report.attention[side], Uint8Array));
// axes -> side -> [image, patch, red green blue]
const components = Object.fromEntries(
  Object.entries(report.components).map(([axes, found]) => [axes, bothSides((side) => unpack(found[side], Uint8Array))]),
);
const activations = unpack(report.activations, Uint8Array); // [neuron, image, patch], 0 to 255 of the neuron's range
const numImages = report.images.length;

function normsOf(side, block, image) {
  const start = (block * numImages + image) * numPatches;
  return norms[side].subarray(start, start + numPatches);
}
/** Attention of the class token to every patch, `head` -1 being the mean of all. */
function attentionOf(side, block, head, image) {
  const { heads } = report;
  const values = new Float64Array(numPatches);
  const chosen = head < 0 ? Array.from({ length: heads }, (_, index) => index) : [head];
  for (const which of chosen) {
    const map = (block * heads + which) * numImages + image;
    const step = report.attention[side].scale[map] / 255 / chosen.length;
    for (let patch = 0; patch < numPatches; patch += 1) values[patch] += attention[side][map * numPatches + patch] * step;
  }
  return values;
}

// ---- Norms, and the charts that Vega draws

function thresholdOf(position) {
  return 1.5 * Math.pow(40 / 1.5, position / 100); // 1.5 to 40 medians
}
function positionOf(threshold) {
  return Math.round((100 * Math.log(threshold / 1.5)) / Math.log(40 / 1.5));
}
function normsAfter(side, block) {
  const size = numImages * numPatches;
  return norms[side].subarray(block * size, (block + 1) * size);
}
function outliers(side, block, threshold) {
  let count = 0;
  for (const norm of normsAfter(side, block)) count += norm > threshold;
  return count / numImages;
}
function histogram(block) {
  const { low, high, bins } = report.histogram;
  const edge = (index) => low * Math.pow(high / low, index / bins);
  const table = [];
  for (const side of SIDES) {
    const counts = new Array(bins).fill(0);
    for (const norm of normsAfter(side, block)) {
      const bin = Math.floor((bins * Math.log(norm / low)) / Math.log(high / low));
      counts[Math.min(bins - 1, Math.max(0, bin))] += 1;
    }
    counts.forEach((patches, bin) => {
      if (patches) table.push({ model: side, from: edge(bin), to: edge(bin + 1), patches });
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
}
async function drawCharts() {
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

// ---- Kinds of maps

// Kind -> what the map is, how it is drawn, and its legend. `scale(view, image)` is shared by both models.
const KINDS = {
  norms: {
    label: "patch norms",
    explained: "Norms are in medians of the image: a usual patch has 1, an outlier more than 5. The scale is the same for all blocks, images and both models.",
    scale: () => Math.log(Math.max(report.histogram.high, 2)),
    ends: (scale) => ["1 median or less", `${Math.exp(scale).toPrecision(2)} medians`],
    shares: (side, { block }, image, scale) => normsOf(side, block, image).map((norm) => Math.log(norm) / scale),
    summary: (side, { block }, image) => `largest ${Math.max(...normsOf(side, block, image)).toFixed(1)} medians`,
  },
  attention: {
    label: "attention of the class token",
    explained: "How the class token shares its attention among the patches; what it gives to itself and to registers is not in the map. The scale is the same for both models, and ends at the smaller maximum of the two, so that outliers do not make all else dark.",
    scale: ({ block, head }, image) => Math.max(1e-12, Math.min(...SIDES.map((side) => Math.max(...attentionOf(side, block, head, image))))),
    ends: (scale) => ["0\u00a0%", `${percent(scale)} or more`],
    shares: (side, { block, head }, image, scale) => attentionOf(side, block, head, image).map((weight) => weight / scale),
    summary: (side, { block, head }, image) => `largest ${percent(Math.max(...attentionOf(side, block, head, image)))}`,
  },
  shared: {
    label: "features as colours (shared axes)",
    axes: "shared",
    explained: "The first three principal components of the patch features after the last block are red, green and blue. Here they are those of the patched model for both models: equal colours are equal features.",
  },
  own: {
    label: "features as colours (own axes)",
    axes: "own",
    explained: "The first three principal components of the patch features after the last block are red, green and blue. Here each model has its own: if outliers are most of what differs between patches, they get the colours and all else looks alike.",
  },
};

/** What the controls ask for. */
function view() {
  return { kind: KINDS[element("kind").value], block: number("map-block"), head: number("head") - 1, strength: number("strength") / 100 };
}
/** The map of an image as a picture: opaque, or for a photo below it. */
function mapTile(side, asked, image, scale, overPhoto) {
  const { kind, strength } = asked;
  if (kind.axes) {
    const colors = components[kind.axes][side].subarray(3 * image * numPatches);
    const alpha = overPhoto ? Math.round(255 * strength) : 255;
    return tile((patch) => [colors[3 * patch], colors[3 * patch + 1], colors[3 * patch + 2], alpha]);
  }
  const shares = kind.shares(side, asked, image, scale);
  return tile((patch) => shade(shares[patch], overPhoto ? clearing(shares[patch], strength) : 255));
}

// ---- The two large maps

const photos = report.images.map((image) => {
  const photo = new Image();
  photo.src = image.src;
  return photo;
});

function drawMap(side, asked, image, scale) {
  const canvas = element(`map-${side}`);
  const context = paint(canvas, photos[image], mapTile(side, asked, image, scale, true));
  const { boxes } = report.images[image];
  if (boxes && element("boxes").checked) outline(context, boxes[side], "#39d353", 5);
  outlineCursor(context);
  const summary = asked.kind.summary ? asked.kind.summary(side, asked, image) : "";
  const where = asked.kind.axes ? "the last block" : `block ${asked.block}`;
  canvas.setAttribute("aria-label", [`${side}: ${asked.kind.label} after ${where}`, summary].filter(Boolean).join(", "));
  element(`caption-${side}`).textContent = [side, summary].filter(Boolean).join(": ");
}
function showMaps() {
  const asked = view();
  const image = number("image");
  if (!photos[image].complete) {
    photos[image].onload = showMaps;
    return;
  }
  const { kind } = asked;
  element("head-label").hidden = kind !== KINDS.attention;
  element("block-label").hidden = Boolean(kind.axes);
  const scale = kind.axes ? null : kind.scale(asked, image);
  for (const side of SIDES) drawMap(side, asked, image, scale);
  element("scale").parentElement.hidden = scale === null;
  if (scale !== null) legend("scale", ...kind.ends(scale), asked.strength);
  element("explained").textContent = kind.explained;
  element("taken").textContent = kind === KINDS.attention ? whatRegistersTook(asked, image) : "";
  showPatch();
}
/** The patch that is pointed at, in both models. */
function showPatch() {
  if (cursor === null) {
    element("readout").textContent = "No patch chosen.";
    return;
  }
  const { block, head } = view();
  const image = number("image");
  const [row, column] = placeOf(cursor);
  const [norm, normNow] = SIDES.map((side) => normsOf(side, block, image)[cursor].toFixed(1));
  const parts = [`Row ${row}, column ${column}, after block ${block}: norm ${norm} → ${normNow} medians`];
  if (report.attention) {
    const [given, givenNow] = SIDES.map((side) => percent(attentionOf(side, block, head, image)[cursor]));
    parts.push(`attention of the class token ${given} → ${givenNow}`);
  }
  element("readout").textContent = `${parts.join("; ")}.`;
}
/** Where the attention went that the outliers had; without this, a patch that stays the brightest looks like a failure. */
function whatRegistersTook({ block, head }, image) {
  const taken = report.registers[block][image];
  const wasOutlier = normsOf("original", report.probe, image).map((norm) => norm > 5);
  const count = wasOutlier.reduce((sum, is) => sum + is, 0);
  const [before, after] = SIDES.map((side) =>
    attentionOf(side, block, head, image).reduce((sum, weight, patch) => sum + (wasOutlier[patch] ? weight : 0), 0),
  );
  const there = count ? `The ${count} patches that were outliers had ${percent(before)} of the class token's attention here and have ${percent(after)} now. ` : "";
  return `${there}The registers take ${percent(taken)} (mean of the heads). A patch can stay the brightest of its map and still have lost most of its share.`;
}
// ---- All images at once

const cards = report.images.map((image, index) => {
  const button = document.createElement("button");
  button.type = "button";
  const photo = document.createElement("img");
  [photo.src, photo.alt] = [image.src, ""];
  const name = document.createElement("span");
  name.textContent = image.name;
  button.append(photo, ...SIDES.map(() => document.createElement("canvas")), name);
  button.addEventListener("click", () => {
    element("image").value = index;
    showMaps();
    markCard();
    element("maps").scrollIntoView();
  });
  return button;
});
function showGrid() {
  const asked = view();
  cards.forEach((card, image) => {
    const scale = asked.kind.axes ? null : asked.kind.scale(asked, image);
    SIDES.forEach((side, place) => {
      const canvas = mapTile(side, asked, image, scale, false);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", side);
      card.children[1 + place].replaceWith(canvas);
    });
  });
  markCard();
}
function markCard() {
  cards.forEach((card, image) => card.setAttribute("aria-pressed", String(image === number("image"))));
}

// ---- Register neurons

function showActivations() {
  const neuron = number("neuron");
  const strip = report.images.map((image, index) => {
    const values = activations.subarray((neuron * numImages + index) * numPatches);
    const canvas = tile((patch) => shade(values[patch] / 255));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `activations of neuron ${report.neurons[neuron]} on ${image.name}`);
    return canvas;
  });
  element("activations").replaceChildren(...strip);
  const { low, high } = report.activations;
  legend("neuron-scale", low[neuron].toPrecision(3), high[neuron].toPrecision(3));
}

// ---- The line to copy

async function copy() {
  const line = element("load");
  line.select();
  try {
    await navigator.clipboard.writeText(line.value);
    element("copied").textContent = "Copied.";
  } catch (refused) { // the browser allows no clipboard: the line is selected
    element("copied").textContent = "Press Ctrl+C.";
  }
}

// ---- The start

function fill(select, labels, chosen = 0) {
  select.replaceChildren(...labels.map((label, value) => new Option(label, value)));
  select.value = chosen;
}
const afterBlock = report.blocks.map(String);
fill(element("norm-block"), afterBlock, report.probe);
fill(element("map-block"), afterBlock, report.probe);
fill(element("image"), report.images.map((image) => image.name));
fill(element("head"), ["mean of all", ...Array.from({ length: report.heads }, (_, head) => `${head}`)]);
fill(element("neuron"), report.neurons);
for (const [kind, { label }] of Object.entries(KINDS)) {
  if (kind !== "attention" || report.attention) element("kind").append(new Option(label, kind));
}
element("threshold").value = positionOf(5);
element("grid").append(...cards);

function listen(ids, ...shows) {
  for (const id of ids) {
    for (const show of shows) element(id)?.addEventListener("input", show);
  }
}
listen(["norm-block", "threshold"], showNorms);
listen(["image"], showMaps, markCard);
listen(["kind", "map-block", "head"], showMaps, showGrid);
listen(["strength", "boxes"], showMaps);
listen(["neuron"], showActivations);
listenToMaps();
element("copy").addEventListener("click", copy);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
showMaps();
showGrid();
if (report.neurons.length) showActivations();
drawCharts().then(() => document.body.setAttribute("data-ready", ""));
