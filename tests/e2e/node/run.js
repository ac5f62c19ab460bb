// Runs an ONNX model on batches: node run.js MODEL FOLDER. FOLDER/batches.json lists, a batch, the inputs' files and
// shapes; the outputs go beside them as raw float32, and their shapes to standard output.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import ort from "onnxruntime-node";

const [model, folder] = process.argv.slice(2);
const session = await ort.InferenceSession.create(model, { logSeverityLevel: 3 });
const shapes = [];
for (const [index, inputs] of JSON.parse(readFileSync(join(folder, "batches.json"))).entries()) {
  const feeds = {};
  for (const [name, { file, dims }] of Object.entries(inputs)) {
    const bytes = readFileSync(join(folder, file));
    feeds[name] = new ort.Tensor("float32", new Float32Array(new Uint8Array(bytes).buffer), dims);
  }
  const outputs = await session.run(feeds);
  shapes.push({});
  for (const [name, { data, dims }] of Object.entries(outputs)) {
    writeFileSync(join(folder, `${index}.${name}.out`), new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    shapes[index][name] = dims;
  }
}
console.log(JSON.stringify(shapes));
