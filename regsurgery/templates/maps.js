"use strict";
// Maps of patches as pictures, and one cursor for a pair of them: what the report and the live page share. Each has a
// script of its own after this one, whose `showMaps` draws the canvases `map-original` and `map-patched`.
// Names come from files, so they reach the page as text and attributes only, never as markup.

const report = JSON.parse(document.getElementById("data").textContent);
const SIDES = ["original", "patched"];
const element = (id) => document.getElementById(id);
const number = (id) => Number(element(id).value);

/** The integers of `{data}`, which are stored as base64. */
function unpack(stored, Integers) {
  const text = atob(stored.data);
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  return new Integers(bytes.buffer);
}
const palette = unpack(report.palette, Uint8Array); // [0 to 255, red green blue]
const [rows, columns] = report.grid;
const numPatches = rows * columns;

// ---- Maps as pictures

/** A picture of one pixel a patch; `color(patch)` gives red, green, blue and alpha, 0 to 255. */
function tile(color) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  const picture = new ImageData(columns, rows);
  for (let patch = 0; patch < numPatches; patch += 1) picture.data.set(color(patch), 4 * patch);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}
/** The colour of a share of the scale, 0 to 1. */
function shade(share, alpha = 255) {
  const start = 3 * Math.round(255 * Math.min(1, Math.max(0, share)));
  return [palette[start], palette[start + 1], palette[start + 2], alpha];
}
/** Over a photo, what is low is clear: the photo stays visible where nothing stands out. */
function clearing(share, strength) {
  return Math.round(255 * strength * Math.min(1, 0.1 + 1.2 * Math.max(0, share)));
}
function legend(id, low, high, strength = null) {
  const context = element(id).getContext("2d");
  context.fillStyle = "#808080"; // stands for a photo
  context.fillRect(0, 0, 256, 1);
  for (let step = 0; step < 256; step += 1) {
    const [red, green, blue, alpha] = shade(step / 255, strength === null ? 255 : clearing(step / 255, strength));
    context.fillStyle = `rgb(${red} ${green} ${blue} / ${alpha / 255})`;
    context.fillRect(step, 0, 1, 1);
  }
  [element(`${id}-low`).textContent, element(`${id}-high`).textContent] = [low, high];
}
const percent = (share) => `${(100 * share).toPrecision(2)}\u00a0%`;
/** A photo, at twice its size, below a map; gives the canvas's context. */
function paint(canvas, photo, map) {
  [canvas.width, canvas.height] = [2 * (photo.naturalWidth ?? photo.width), 2 * (photo.naturalHeight ?? photo.height)];
  const context = canvas.getContext("2d");
  context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(map, 0, 0, canvas.width, canvas.height);
  return context;
}

// ---- One cursor for both maps

let cursor = null; // the patch that is pointed at

function outline(context, [left, top, right, bottom], color, width) {
  const { width: across, height: down } = context.canvas;
  context.lineWidth = width;
  context.strokeStyle = color;
  context.strokeRect(left * across, top * down, (right - left) * across, (bottom - top) * down);
}
function placeOf(patch) {
  return [Math.floor(patch / columns), patch % columns];
}
function outlineCursor(context) {
  if (cursor === null) return;
  const [row, column] = placeOf(cursor);
  const square = [column / columns, row / rows, (column + 1) / columns, (row + 1) / rows];
  outline(context, square, "#000000", 7);
  outline(context, square, "#ffffff", 3);
}
function point(patch) {
  if (patch === cursor) return;
  cursor = patch;
  showMaps();
}
function pointWithMouse(event) {
  const { left, top, width, height } = event.currentTarget.getBoundingClientRect();
  const row = Math.floor((rows * (event.clientY - top)) / height);
  const column = Math.floor((columns * (event.clientX - left)) / width);
  if (row >= 0 && row < rows && column >= 0 && column < columns) point(row * columns + column);
}
function pointWithKeys(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (event.key === "Escape") point(null);
  if (!(event.key in steps)) return;
  event.preventDefault();
  const [row, column] = cursor === null ? [0, 0] : placeOf(cursor);
  const [down, right] = cursor === null ? [0, 0] : steps[event.key];
  point(Math.min(rows - 1, Math.max(0, row + down)) * columns + Math.min(columns - 1, Math.max(0, column + right)));
}
/** Pointing at either map moves the cursor; on a phone, where one map is shown, a choice says which. */
function listenToMaps() {
  for (const side of SIDES) {
    element(`map-${side}`).addEventListener("pointermove", pointWithMouse);
    element(`map-${side}`).addEventListener("pointerdown", pointWithMouse);
    element(`map-${side}`).addEventListener("keydown", pointWithKeys);
  }
  for (const choice of document.querySelectorAll("input[name=side]")) {
    choice.addEventListener("input", () => element("pair").setAttribute("data-side", choice.value));
  }
}
