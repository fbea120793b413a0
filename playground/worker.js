/** Runs the network and the sampler, one request after the other, and answers messages between any two evaluations. */

import { readMetadata } from "./metadata.js";
import { normalGenerator } from "./random.js";
import { locate } from "./runtime.js";
import { guided, noiseLevels, sample } from "./sampler.js";

const ACTIONS = { load, sample: sampleImages, denoise };
const cancelled = new Set(); // ids of requests
const channel = new MessageChannel();
let ort, session, metadata, damaged;
let queue = Promise.resolve();

self.onmessage = ({ data: { id, action, request } }) => {
  if (action === "cancel") cancelled.add(id);
  else queue = queue.then(() => answer(id, action, request));
};

/** Perform a request and post its result, or its error in words. */
async function answer(id, action, request) {
  const started = performance.now();
  try {
    const result = await ACTIONS[action](request, id);
    self.postMessage({ id, result: { ...result, milliseconds: performance.now() - started } });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
  cancelled.delete(id);
}

/** Load the runtime and the model. */
async function load({ modelUrl }) {
  const name = modelUrl.split("/").pop();
  damaged = `The model ${name} is damaged or not one of ours: write it again with python -m lab.export_onnx.`;
  const runtime = locate("onnxruntime-web", "dist/ort.wasm.min.mjs");
  const [runtimeUrl, model] = await Promise.all([runtime, download(modelUrl)]);
  ort = await import(runtimeUrl);
  ort.env.wasm.numThreads = 1; // more need a server that isolates the page from other origins
  ort.env.wasm.wasmPaths = new URL(".", runtimeUrl).href;
  ort.env.logLevel = "error";
  try {
    metadata = readMetadata(model);
    session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  } catch (error) {
    if (/backend/.test(error.message)) {
      throw new Error("onnxruntime-web does not start in this browser: please use a newer one.");
    }
    throw new Error(damaged);
  }
  return { metadata };
}

/** Return the bytes of the model. */
async function download(modelUrl) {
  const advice = `The model ${modelUrl.split("/").pop()} cannot be loaded`;
  const response = await fetch(modelUrl).catch(() => {
    throw new Error(`${advice}: the server does not answer.`);
  });
  if (!response.ok) throw new Error(`${advice}: the server has no such file (${response.status}).`);
  return new Uint8Array(await response.arrayBuffer());
}

/** Sample an image for each label, and post each state. */
async function sampleImages({ settings, guidance = 1, labels, seed, start }, id) {
  const pixels = metadata.channels * metadata.resolution ** 2;
  const generators = labels.map((_, index) => normalGenerator(seed, index)); // an image depends on its own seed alone
  const noise = () => joined(generators.map((draw) => draw(pixels)));
  let latents = noise();
  if (start) {
    latents = latents.map((_, i) => start.x[i % start.x.length] / start.sigma);
    const sigma_steps = [start.sigma, ...noiseLevels(settings).filter((level) => level < start.sigma)];
    settings = { ...settings, sigma_steps };
  }
  const D = denoiser(labels, guidance, id);
  let step = 0, x;
  for await (const state of sample(D, latents, settings, noise)) {
    x = state.x;
    self.postMessage({ id, state: { step: step++, ...state } });
  }
  return { x, evaluations: D.evaluations };
}

/** Evaluate D once. */
async function denoise({ x, sigma, labels, guidance = 1 }, id) {
  return { x: await denoiser(labels, guidance, id)(Float64Array.from(x), sigma) };
}

/** Return D(x, sigma) with guidance, for images of these classes (null: none); it counts its `evaluations`. */
function denoiser(labels, guidance, id) {
  const network = (x, sigma, classes) => {
    D.evaluations += 1;
    return evaluate(x, sigma, classes ?? labels.map(() => null), id);
  };
  const isUnconditional = labels.every((label) => label === null); // guidance would change nothing
  const run = guided(network, isUnconditional ? 1 : guidance);
  const D = (x, sigma) => run(x, sigma, labels);
  D.evaluations = 0;
  return D;
}

/** Evaluate the network in float32, unless the request has been cancelled meanwhile. */
async function evaluate(x, sigma, labels, id) {
  await waitingMessages();
  if (cancelled.has(id)) throw new Error("cancelled");
  const { channels, resolution, classes } = metadata;
  const count = labels.length;
  const inputs = {
    x: new ort.Tensor(Float32Array.from(x), [count, channels, resolution, resolution]),
    sigma: new ort.Tensor(new Float32Array(count).fill(sigma), [count]),
  };
  if (classes > 0) {
    const oneHot = new Float32Array(count * classes);
    labels.forEach((label, index) => {
      if (label !== null) oneHot[index * classes + label] = 1;
    });
    inputs.labels = new ort.Tensor(oneHot, [count, classes]);
  }
  const denoised = Float64Array.from((await session.run(inputs)).D.data);
  if (!denoised.every(Number.isFinite)) throw new Error(damaged);
  return denoised;
}

/** Return a promise that resolves after the messages that have arrived are handled. */
function waitingMessages() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

/** Return arrays of equal length as one. */
function joined(arrays) {
  const whole = new Float64Array(arrays.length * arrays[0].length);
  arrays.forEach((array, index) => whole.set(array, index * array.length));
  return whole;
}
