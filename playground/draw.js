// Tab Draw: the visitor's digit, with noise, and what the network makes of it.

import { element, makeControls } from "./controls.js";
import { N, SEED, starts } from "./knobs.js";
import { latest } from "./latest.js";
import { clear, drawPicture, enlarge, likeMnist, makePad } from "./pen.js";
import { blacken, counted, drawImage, makeCanvas, short, visible } from "./pixels.js";
import { gaussians } from "./random.js";
import { PRESETS } from "./sampler.js";

const RESOLUTION = 32;
const CLASSES = [...Array(10).keys()];
const KNOBS = [
  {
    name: "sigma", title: "noise", tex: "\\sigma", text: "σ", min: 0.05, max: 20, log: true, start: 2, place: "Eq. 2",
    does: "Standard deviation of the noise: a little hides details, more hides which digit it was.",
  },
  {
    name: "label", title: "class", options: ["none", ...CLASSES.map(String)], start: "none",
    place: "Table 2, “conditional”",
    does: "What the network is told about the digit: nothing, or which it is. Tell it a wrong one.",
  },
  {
    ...N, start: 18, place: "Eq. 5, Algorithm 1",
    does: "EDM's time steps from noise level 80 to 0; sampling takes those below σ, with Heun's method.",
  },
  { ...SEED, place: "Eq. 2", does: "Which noise is added." },
];
const OWN = "own";
const EXAMPLE = { name: "example", options: [OWN, ...CLASSES.map(String)], start: "3" };
const PICTURES = {
  y: "y, centred as in MNIST",
  x: "x = y + σ n",
  denoised: "D(x; σ), the best guess",
  sample: "a sample from there",
};
const DRAW = "Draw a digit here.";
const NOT_FOUND = "No digit was found in this image.";

/** Fill the tab's panel, and return what main.js needs to know of it. */
export function makeDraw(panel, changed) {
  const known = [...KNOBS, EXAMPLE];
  const start = starts(known);
  const settings = { ...start };
  let engine = null, examples = null;

  const hint = element("p", { className: "hint" }); // on the pad while it is empty
  hint.setAttribute("role", "status");
  const pad = makePad(() => {
    if (settings.example !== OWN) clear(pad);
    hint.textContent = "";
  }, () => choose(OWN));
  pad.setAttribute("role", "img");
  pad.setAttribute("aria-label", "Pad to draw a digit on");
  const canvases = CLASSES.map((digit) => makeCanvas(RESOLUTION, `Example: digit ${digit}, made by the network`));
  const buttons = canvases.map((canvas, digit) => element("button", {
    className: "digit", onclick: () => choose(String(digit)),
  }, canvas));
  const empty = element("button", {
    onclick() {
      clear(pad);
      hint.textContent = DRAW;
      choose(OWN);
    },
  }, "Clear");
  const file = element("input", {
    type: "file", accept: "image/*",
    async onchange() {
      const picture = await createImageBitmap(file.files[0]).catch(() => null);
      file.value = ""; // the same file may be loaded again
      if (!picture) return say("This file is not an image that the browser can read.");
      drawPicture(pad, picture);
      hint.textContent = likeMnist(pad) ? "" : NOT_FOUND;
      choose(OWN);
    },
  });
  const message = element("p", { className: "error", hidden: true });
  message.setAttribute("role", "alert");
  const pictures = Object.fromEntries(Object.entries(PICTURES).map(([name, text]) => [name, {
    canvas: makeCanvas(RESOLUTION, text), note: element("small"), text,
  }]));
  const frame = element("div", { className: "frame" }, pad, hint, message);
  panel.querySelector(".pad").append(frame, element("div", { className: "tools" },
    element("div", { className: "buttons" }, empty, element("label", { className: "button" }, "Load an image", file)),
    element("p", {}, "Or take a digit that the network made:"),
    element("div", { className: "ten" }, ...buttons)));
  panel.querySelector(".outcome").append(...Object.values(pictures).map(({ canvas, note, text }) => (
    element("figure", {}, canvas, element("figcaption", {}, text, note)))));
  const updateControls = makeControls(panel.querySelector(".knobs"), KNOBS, { "": settings }, change);

  const work = latest(async (signal) => {
    try {
      await compute(signal);
      say("");
      await makeExamples();
    } catch (error) {
      if (signal.aborted) throw error;
      say(error.message);
    }
  });

  /** Say in words what does not work, or "" when it works again. */
  function say(text) {
    message.textContent = text;
    message.hidden = !text;
  }

  /** Return a promise of the examples, which are sampled once: nothing cancels that. */
  function makeExamples() {
    const onState = ({ x, sigma }) => CLASSES.forEach((digit) => drawImage(canvases[digit], x, digit, visible(sigma)));
    const request = { settings: { ...PRESETS.EDM, N: 9 }, labels: CLASSES, seed: 0 };
    examples ??= engine.sample(request, { onState });
    return examples;
  }

  /** Add noise to the digit, denoise it, and sample from there. */
  async function compute(signal) {
    const { sigma, label, N: steps, seed, example } = settings;
    const size = RESOLUTION ** 2;
    const all = example === OWN ? null : (await makeExamples()).x;
    signal.throwIfAborted();
    if (all) {
      enlarge(pad, canvases[example]);
      hint.textContent = "";
    }
    const y = all ? all.slice(example * size, (Number(example) + 1) * size) : likeMnist(pad);
    if (!y) return showNothing();
    const noise = gaussians(seed, size);
    const x = Float64Array.from(y, (value, i) => value + sigma * noise[i]);
    const labels = [label === "none" ? null : Number(label)];
    drawImage(pictures.y.canvas, y);
    drawImage(pictures.x.canvas, x, 0, visible(sigma));
    drawImage(pictures.denoised.canvas, await engine.denoise({ x, sigma, labels }, { signal }));
    pictures.denoised.note.textContent = counted(1);
    const made = await engine.sample(
      { settings: { ...PRESETS.EDM, N: steps }, labels, seed, start: { x, sigma } },
      { signal, onState: (state) => drawImage(pictures.sample.canvas, state.x, 0, visible(state.sigma)) },
    );
    pictures.sample.note.textContent = counted(made.evaluations);
  }

  /** Show that there is no digit. */
  function showNothing() {
    hint.textContent ||= DRAW;
    for (const { canvas } of Object.values(pictures)) blacken(canvas);
    for (const { note } of [pictures.denoised, pictures.sample]) note.textContent = "";
  }

  function refresh() {
    updateControls();
    buttons.forEach((button, digit) => button.setAttribute("aria-pressed", String(digit) === settings.example));
    pictures.x.note.textContent = `σ = ${short(settings.sigma)}`;
  }

  function change() {
    refresh();
    changed();
    begin();
  }

  function choose(example) {
    settings.example = example;
    change();
  }

  function begin() {
    work.cancel();
    if (engine && !panel.hidden) work.start();
  }

  return {
    parts: [{ prefix: "", knobs: known, settings, start }],
    update: refresh,
    show: begin,
    hide: work.cancel,
    connect(loaded) {
      engine = loaded;
      begin();
    },
  };
}
