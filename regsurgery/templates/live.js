
// Both models on a photo, in this order: from a file to pixels, the networks, one photo through both, the maps, and what
// starts it all. `maps.js` comes before.

const { preprocessing, files } = report;
const STRENGTH = 0.85;
const MIB = 2 ** 20;

// ---- From a file to pixels: as Pillow resizes, so that both models see here what they see in Python

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
// name -> [how far it reaches, its weight at a distance]
const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    const far = Math.abs(x);
    if (far < 1) return (1.5 * far - 2.5) * far * far + 1;
    return far < 2 ? ((-0.5 * far + 2.5) * far - 4) * far + 2 : 0;
  }],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const BITS = 22; // of the fraction of Pillow's weights

/** For `count` places from `start` on, of a side that is resized from `from` to `to` pixels: first pixel and weights. */
function weightsOf(from, to, start, count) {
  const [reach, weight] = FILTERS[preprocessing.filter];
  const scale = from / to;
  const spread = Math.max(1, scale);
  return Array.from({ length: count }, (_, index) => {
    const center = (start + index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach * spread + 0.5));
    const end = Math.min(from, Math.trunc(center + reach * spread + 0.5));
    const weights = Array.from({ length: end - first }, (_, place) => weight((place + first - center + 0.5) / spread));
    const sum = weights.reduce((total, one) => total + one, 0);
    return { first, weights: weights.map((one) => Math.trunc((one / sum) * 2 ** BITS + (one < 0 ? -0.5 : 0.5))) };
  });
}
/** Half to even where the preprocessing rounds; otherwise the fraction is dropped. */
function whole(value, rounds) {
  const below = Math.floor(value);
  if (!rounds || value - below < 0.5) return below;
  return value - below > 0.5 || below % 2 ? below + 1 : below;
}
/** [height, width] that a photo is resized to. */
function sizeOf(height, width) {
  if (Array.isArray(preprocessing.resized)) return preprocessing.resized;
  const longer = whole((preprocessing.resized * Math.max(width, height)) / Math.min(width, height), preprocessing.rounds);
  return width >= height ? [preprocessing.resized, longer] : [longer, preprocessing.resized];
}
/** `ImageData`, resized along one axis and cropped to the places of `weights`; `across`: the axis is the width. */
function resample(image, weights, across) {
  const result = across ? new ImageData(weights.length, image.height) : new ImageData(image.width, weights.length);
  const step = across ? 4 : 4 * image.width;
  for (let row = 0; row < result.height; row += 1) {
    for (let column = 0; column < result.width; column += 1) {
      const { first, weights: own } = weights[across ? column : row];
      const start = across ? 4 * (row * image.width + first) : 4 * (first * image.width + column);
      const target = 4 * (row * result.width + column);
      for (let channel = 0; channel < 3; channel += 1) {
        let sum = 2 ** (BITS - 1);
        for (let place = 0; place < own.length; place += 1) sum += image.data[start + place * step + channel] * own[place];
        result.data[target + channel] = Math.floor(sum / 2 ** BITS); // clamped to 0 to 255 by the array
      }
      result.data[target + 3] = 255;
    }
  }
  return result;
}
/** A bitmap resized and cropped as the model's preprocessing does it; `isCrop`: it is what that gives, cropped before. */
function cropped(bitmap, isCrop) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const image = context.getImageData(0, 0, bitmap.width, bitmap.height);
  // A canvas that is too large stays empty in some browsers, without a word.
  if (!image.data.some((value, place) => place % 4 === 3 && value > 0)) throw new Error("this browser draws nothing of it (too large, or all transparent)");
  const [cropHeight, cropWidth] = preprocessing.crop;
  const [height, width] = isCrop ? preprocessing.crop : sizeOf(image.height, image.width);
  const startOf = (size, crop) => whole((size - crop) / 2, preprocessing.crop_rounds);
  const narrow = resample(image, weightsOf(image.width, width, startOf(width, cropWidth), cropWidth), true);
  return resample(narrow, weightsOf(image.height, height, startOf(height, cropHeight), cropHeight), false);
}
/** The pixels of a crop as the networks take them, [channel, row, column]. */
function normalised(crop) {
  const size = crop.width * crop.height;
  const pixels = new Float32Array(3 * size);
  for (let channel = 0; channel < 3; channel += 1) {
    const [mean, scale] = [preprocessing.mean[channel], preprocessing.scale[channel]];
    for (let place = 0; place < size; place += 1) {
      pixels[channel * size + place] = (crop.data[4 * place + channel] / 255 - mean) * scale;
    }
  }
  return pixels;
}

// ---- The networks

let ort = null;
const networks = {}; // side -> session

function say(text) {
  element("status").textContent = text;
}
/** The bytes of a file beside the page, told as they come. */
async function fetched({ name, bytes }, tell) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: HTTP ${answer.status}`);
  const content = new Uint8Array(bytes);
  let done = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { value } = await reader.read();
    if (!value) break;
    if (done + value.length <= bytes) content.set(value, done);
    done += value.length;
    tell(value.length);
  }
  if (done !== bytes) throw new Error(`${name} has ${done} bytes instead of ${bytes}: it is not the one that this page was written with`);
  return content;
}
/** Time for the browser to show what was said: a network holds it up while it runs. */
function breathe() {
  return new Promise((go) => setTimeout(go, 30));
}
async function start() {
  const total = Object.values(files).reduce((sum, { bytes }) => sum + bytes, 0);
  let done = 0;
  const tell = (more) => {
    done += more;
    say(`Loading the models: ${(done / MIB).toFixed(0)} of ${(total / MIB).toFixed(0)} MiB.`);
  };
  ort = await import(`./${files.script.name}`);
  ort.env.wasm.numThreads = 1; // more need headers that a static host does not send
  ort.env.wasm.wasmBinary = await fetched(files.program, tell);
  tell(files.script.bytes);
  for (const side of SIDES) {
    const network = await fetched(files[side], tell);
    say(`Starting the ${side} model.`);
    await breathe();
    networks[side] = await ort.InferenceSession.create(network, { executionProviders: ["wasm"] });
    await through(side, new Float32Array(3 * preprocessing.crop[0] * preprocessing.crop[1])); // the first run is slower
  }
}
/** What a network makes of pixels, and how long it takes. */
async function through(side, pixels) {
  const given = { [report.input]: new ort.Tensor("float32", pixels, [1, 3, ...preprocessing.crop]) };
  const began = performance.now();
  const outputs = await networks[side].run(given);
  const took = performance.now() - began;
  return { took, ...Object.fromEntries(Object.entries(outputs).map(([name, { data }]) => [name, Array.from(data)])) };
}

// ---- One photo through both

let shown = null; // the last photo: its name, its crop on a canvas, its pixels, and side -> what the network made of it
let waiting = null; // what was given while the networks load or run; the last one counts
let isBusy = true; // until the networks are there

async function look(name, blob, isCrop = false) {
  waiting = { name, blob, isCrop };
  if (isBusy) return;
  await lookAtWaiting();
}
async function lookAtWaiting() {
  isBusy = true;
  while (waiting !== null) {
    const next = waiting;
    waiting = null;
    try {
      await lookAt(next);
    } catch (error) { // it is no picture, or too large for this browser
      say(`${next.name} cannot be shown: ${error.message}`);
    }
  }
  isBusy = false;
}
async function lookAt({ name, blob, isCrop }) {
  say(`Looking at ${name}.`);
  await breathe();
  const crop = cropped(await createImageBitmap(blob, { colorSpaceConversion: "none" }), isCrop);
  const photo = document.createElement("canvas");
  [photo.width, photo.height] = [crop.width, crop.height];
  photo.getContext("2d").putImageData(crop, 0, 0);
  const pixels = normalised(crop);
  const found = { name, photo, pixels };
  for (const side of SIDES) {
    found[side] = await through(side, pixels);
    await breathe();
  }
  for (const side of SIDES) found[side].medians = inMedians(found[side].norms);
  shown = found;
  cursor = null;
  showOutcome();
}
/** Norms in medians of the photo; of an even number of patches the lower middle one, as in torch. */
function inMedians(norms) {
  const median = [...norms].sort((a, b) => a - b)[Math.floor((norms.length - 1) / 2)];
  return norms.map((norm) => norm / median);
}
function outliersOf(side) {
  return shown[side].medians.filter((norm) => norm > report.factor).length;
}
function showOutcome() {
  const both = (figure) => SIDES.map(figure).join(" → ");
  element("outliers").textContent = both(outliersOf);
  element("largest").textContent = both((side) => Math.max(...shown[side].medians).toFixed(1));
  element("milliseconds").textContent = both((side) => shown[side].took.toFixed(0));
  element("outcome").hidden = false;
  showMaps();
  say(`What both models make of ${shown.name}:`);
}

// ---- The maps

// Kind -> what the map is. `scale()` is shared by both models.
const KINDS = {
  norms: {
    label: "patch norms",
    explained: "The brighter a patch is, the larger is the norm of what the model holds there; a very bright one no longer describes the photo at its place. Norms are in medians of the photo, the scale is logarithmic and the same for both models.",
    scale: () => Math.log(Math.max(2 * report.factor, ...SIDES.flatMap((side) => shown[side].medians))),
    ends: (scale) => ["1 median or less", `${Math.exp(scale).toPrecision(2)} medians`],
    shares: (side, scale) => shown[side].medians.map((norm) => Math.log(norm) / scale),
    summary: (side) => `${outliersOf(side)} outlier patches, largest ${Math.max(...shown[side].medians).toFixed(1)} medians`,
  },
  attention: {
    label: "attention of the class token",
    explained: "How the class token shares its attention among the patches in the last block, mean of the heads. The scale is the same for both models, and ends at the smaller maximum of the two, so that outliers do not make all else dark.",
    scale: () => Math.max(1e-12, Math.min(...SIDES.map((side) => Math.max(...shown[side].attention)))),
    ends: (scale) => ["0\u00a0%", `${percent(scale)} or more`],
    shares: (side, scale) => shown[side].attention.map((weight) => weight / scale),
    summary: (side) => {
      const { attention, medians, registers } = shown[side];
      const ofOutliers = attention.filter((_, patch) => medians[patch] > report.factor);
      const parts = [`largest ${percent(Math.max(...attention))}`];
      if (ofOutliers.length) parts.push(`outlier patches take ${percent(ofOutliers.reduce((sum, one) => sum + one, 0))}`);
      if (registers) parts.push(`registers take ${percent(registers[0])}`);
      return parts.join(", ");
    },
  },
};
function showMaps() {
  const kind = KINDS[element("kind").value];
  const scale = kind.scale();
  for (const side of SIDES) {
    const shares = kind.shares(side, scale);
    const canvas = element(`map-${side}`);
    outlineCursor(paint(canvas, shown.photo, tile((patch) => shade(shares[patch], clearing(shares[patch], STRENGTH)))));
    canvas.setAttribute("aria-label", `${side}: ${kind.label}, ${kind.summary(side)}`);
    element(`caption-${side}`).textContent = `${side}: ${kind.summary(side)}`;
  }
  legend("scale", ...kind.ends(scale), STRENGTH);
  element("explained").textContent = kind.explained;
  showPatch();
}
/** The patch that is pointed at, in both models. */
function showPatch() {
  if (cursor === null) {
    element("readout").textContent = "Point at a patch, or focus a map and use the arrow keys: both maps show the same place.";
    return;
  }
  const [row, column] = placeOf(cursor);
  const both = (figure) => SIDES.map(figure).join(" → ");
  const parts = [`Row ${row}, column ${column}: norm ${both((side) => shown[side].medians[cursor].toFixed(1))} medians`];
  if (shown.original.attention) {
    parts.push(`attention of the class token ${both((side) => percent(shown[side].attention[cursor]))}`);
  }
  element("readout").textContent = `${parts.join("; ")}.`;
}

// ---- The start

const samples = report.samples.map(({ name, data }, index) => {
  const button = document.createElement("button");
  [button.type, button.disabled] = ["button", true];
  const picture = document.createElement("img");
  [picture.src, picture.alt] = [`data:image/jpeg;base64,${data}`, name];
  button.append(picture);
  button.addEventListener("click", () => lookAtSample(index));
  return button;
});
element("samples").append(...samples);

function press(chosen) {
  samples.forEach((button) => button.setAttribute("aria-pressed", String(button === chosen)));
}
function lookAtSample(index) {
  press(samples[index]);
  const { name } = report.samples[index];
  return look(name, new Blob([unpack(report.samples[index], Uint8Array)], { type: "image/jpeg" }), true);
}
function take(given) {
  const [file] = given ?? [];
  if (!file) return;
  press(null);
  look(file.name, file);
}
function listen() {
  element("photo").addEventListener("change", (event) => take(event.target.files));
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      element("drop").classList.toggle("over", kind === "dragover");
      if (kind !== "drop") return;
      if (event.dataTransfer.files.length) take(event.dataTransfer.files);
      else say("What was dropped is no file. Save the photo first, then drop it from its folder.");
    });
  }
  element("kind").addEventListener("input", showMaps);
  listenToMaps();
}
/** Opened as a file: what to type, with the folder as the browser names it. */
function sayHowToServe() {
  const parts = decodeURIComponent(location.pathname).replace(/^\/(?=\w:)/, "").split("/");
  const [folder, site] = [parts.at(-2), parts.slice(0, -2).join("/") || "/"];
  const quoted = /^\w:/.test(site) ? `"${site}"` : `'${site.replaceAll("'", String.raw`'\''`)}'`; // a name is no command
  element("serve").textContent = `python -m http.server -b 127.0.0.1 -d ${quoted}`;
  element("address").textContent = `http://127.0.0.1:8000/${encodeURIComponent(folder)}/`;
  [element("served").hidden, element("live").hidden] = [false, true];
}
async function begin() {
  if (location.protocol === "file:") {
    sayHowToServe();
    return;
  }
  listen();
  try {
    await start();
  } catch (error) { // a file that is missing, or a browser without WebAssembly: nothing can run
    say(`The models cannot be loaded (${error.message}). Reload the page, or try another browser.`);
    return;
  }
  for (const control of [element("photo"), ...samples]) control.disabled = false;
  if (waiting === null && samples.length) lookAtSample(0); // otherwise a photo was dropped meanwhile
  if (waiting === null) say("Ready: give a photo.");
  await lookAtWaiting();
}
begin().then(() => document.body.setAttribute("data-ready", ""));
