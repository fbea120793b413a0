// The film of one digit: the noisy x above D(x; sigma), from the first noise level to 0.

import { element } from "./controls.js";
import { drawImage, makeCanvas, short, visible } from "./pixels.js";
import { normalGenerator } from "./random.js";
import { noiseLevels } from "./sampler.js";

const RESOLUTION = 32;
const CLASSES = [...Array(10).keys()];
const FRAMES = 10;

/** Return the x that sampling starts from, drawn as in worker.js. */
const first = (sigma, seed) => CLASSES.flatMap((digit) => (
  [...normalGenerator(seed, digit)(RESOLUTION ** 2)].map((value) => sigma * value)));

/** Return the indices of up to FRAMES noise levels, evenly spaced in sigma / (sigma + 2), to show shapes appear. */
function chosen(levels) {
  if (levels.length <= FRAMES) return [...levels.keys()];
  const places = levels.map((sigma) => sigma / (sigma + 2));
  const wanted = Array.from({ length: FRAMES }, (_, i) => places[0] * (1 - i / (FRAMES - 1)));
  const nearest = (place) => places.reduce((best, other, i) => (
    Math.abs(other - place) < Math.abs(places[best] - place) ? i : best), 0);
  return [...new Set(wanted.map(nearest))];
}

/** Return the film of a set-up: its view, and begin(settings, seed), add(state) and show(digit). */
export function makeFilm(name) {
  const title = element("h3");
  const strip = element("div", { className: "strip" });
  let [frames, states, digit] = [[], [], 0];

  /** Draw a frame, as far as it is known: x after `index` steps, and D(x; sigma), which the next step computes. */
  function draw({ index, sigma, x, denoised }) {
    x.setAttribute("aria-label", `Digit ${digit} of ${name}: x at noise level ${sigma}`);
    denoised.setAttribute("aria-label", `Digit ${digit} of ${name}: D(x) at noise level ${sigma}`);
    const before = states[index], after = states[index + 1];
    if (before) drawImage(x, before.x, digit, visible(before.sigma));
    if (after) drawImage(denoised, after.denoised, digit);
    else if (before?.sigma === 0) drawImage(denoised, before.x, digit); // D(x; 0) is x
  }

  return {
    view: element("section", { className: "film" }, title, strip),

    /** Make a frame for each noise level that will be shown; the first one holds noise. */
    begin(settings, seed) {
      const levels = [...noiseLevels(settings)];
      states = [{ x: first(levels[0], seed), sigma: levels[0] }];
      frames = chosen(levels).map((index) => {
        const [x, denoised] = [makeCanvas(RESOLUTION), makeCanvas(RESOLUTION)];
        return { index, sigma: short(levels[index]), x, denoised };
      });
      strip.replaceChildren(...frames.map(({ sigma, x, denoised }) => element("figure", {}, x, denoised,
        element("figcaption", {}, sigma))));
      frames.forEach(draw);
    },

    /** Keep the state after the next step, and draw what it shows. */
    add(state) {
      states.push(state);
      frames.forEach(draw);
    },

    /** Show another digit. */
    show(another) {
      digit = another;
      title.textContent = `${name}, digit ${digit}: x above, D(x; σ) below, by noise level σ`;
      frames.forEach(draw);
    },
  };
}
