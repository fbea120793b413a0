// Tab Trajectories: the paper's Figure 3. Data in one dimension, the exact denoiser, and three schedules.

import { element, makeControls } from "./controls.js";
import { twoPeaks } from "./exact.js";
import { N, RHO, SOLVER, starts } from "./knobs.js";
import { counted, short } from "./pixels.js";
import { plot } from "./plot.js";
import { PRESETS, makeSchedule, noiseLevels, sample } from "./sampler.js";

const SIGMA_MAX = 25; // the range of noise levels in Figure 3
const LATENTS = Float64Array.of(-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75);
const FINE = 500; // steps of the solutions
const COLUMNS = {
  VP: "Solutions flatten out at high noise. They turn to the data late, at low noise.",
  VE: "Solutions bend sharply near the data, and are curved everywhere.",
  EDM: "σ(t) = t, as in DDIM: solutions are nearly straight at high and at low noise. Tangents end at D(x; σ).",
};
const KNOBS = [
  { ...N, start: 8, max: 32 },
  { ...SOLVER, start: "euler" },
  {
    name: "sigma", title: "tangents at", tex: "\\sigma", text: "σ",
    min: 0.05, max: SIGMA_MAX, log: true, start: 0.5,
    place: "Figure 3, Eq. 4",
    does: "Where the tangents touch the solutions (circles): an Euler step from there moves along them.",
  },
  {
    name: "steps", title: "time steps", tex: "t_i", text: "t<sub>i</sub>",
    options: ["own", "edm"], start: "own", place: "Table 1",
    does: "Its own for each column, or EDM's for all: then only the curvature of the solutions differs.",
  },
  RHO,
  {
    name: "data", title: "data", options: ["points", "peaks"], start: "points", place: "Figure 3, Appendix B.3",
    does: "Two points, −1 and 1, as in the paper; or two Gaussian peaks there, of standard deviation 0.2.",
  },
];

/** Return the noise levels (N + 1) and the unscaled x at each of them, of a sampler that starts from LATENTS. */
async function path(D, settings) {
  const sigma = [...settings.sigma_steps ?? noiseLevels(settings)];
  const x = [LATENTS.map((value) => value * sigma[0])];
  for await (const state of sample(D, LATENTS, settings)) x.push(state.x);
  return { sigma, x };
}

/** Return x on the solutions at a noise level, interpolated. */
export function between({ sigma, x }, level) {
  const i = sigma.findIndex((next, k) => k > 0 && next <= level);
  const share = (sigma[i - 1] - level) / (sigma[i - 1] - sigma[i]);
  return x[i].map((value, k) => x[i - 1][k] + share * (value - x[i - 1][k]));
}

/** Return as text the mean error of x: during sampling as a multiple of the noise level, and at the end. */
function meanError({ sigma, x }, solutions) {
  const apart = (i) => mean(between(solutions, sigma[i]).map((value, k) => Math.abs(x[i][k] - value)));
  const way = [...sigma.keys()].slice(1, -1);
  const during = way.length ? `${short(mean(way.map((i) => apart(i) / sigma[i])))} σ during sampling, ` : "";
  return `Mean error: ${during}${short(apart(sigma.length - 1))} at the end.`;
}

const mean = (numbers) => numbers.reduce((sum, value) => sum + value, 0) / numbers.length;

/** Return a line for each latent: its points (t, s(t) x). */
const lines = ({ sigma, x }, schedule) => [...LATENTS.keys()].map((k) => sigma.map((level, i) => {
  const t = schedule.t(level);
  return [t, schedule.s(t) * x[i][k]];
}));

/** Return the tangents of the solutions at a noise level, as lines from time 0 to where they touch. */
export function tangents(D, solutions, level, schedule) {
  const x = between(solutions, level);
  const denoised = D(x, level);
  const t = schedule.t(level);
  const [s, [dsigma, ds]] = [schedule.s(t), schedule.derivatives(t)];
  return [...LATENTS.keys()].map((k) => {
    const slope = ds * x[k] + (s * dsigma * (x[k] - denoised[k])) / level; // Eq. 4
    return [[0, s * x[k] - t * slope], [t, s * x[k]]];
  });
}

/** Fill the tab's panel, and return what main.js needs to know of it. */
export function makeTrajectories(panel, changed) {
  const start = starts(KNOBS);
  const settings = { ...start };
  const panels = Object.fromEntries(Object.entries(COLUMNS).map(([name, text]) => {
    const [whole, near, caption] = [element("div"), element("div"), element("p", { className: "caption" })];
    panel.querySelector(".columns").append(element("section", { className: `column ${name}` },
      element("h3", {}, name), element("p", { className: "says" }, text),
      element("div", { className: "pair" }, whole, near), caption));
    return [name, { whole, near, caption }];
  }));
  const update = makeControls(panel.querySelector(".knobs"), KNOBS, { "": settings }, () => {
    changed();
    draw();
  });
  const solved = {}; // the solutions by the data's name
  let drawing = 0;

  async function draw() {
    const turn = ++drawing;
    const D = twoPeaks(settings.data === "points" ? 0 : 0.2);
    solved[settings.data] ??= await path(D, { ...PRESETS.EDM, N: FINE, sigma_min: 0.001, sigma_max: SIGMA_MAX });
    const solutions = solved[settings.data];
    for (const [name, { whole, near, caption }] of Object.entries(panels)) {
      const { solver, N: steps, rho } = settings;
      const chosen = { ...PRESETS[name], sigma_max: SIGMA_MAX, solver, N: steps, rho };
      if (settings.steps === "edm") {
        chosen.sigma_steps = noiseLevels({ ...PRESETS.EDM, sigma_max: SIGMA_MAX, N: steps, rho });
      }
      const taken = await path(D, chosen);
      if (turn !== drawing) return; // a newer change is drawn already
      const schedule = makeSchedule(chosen);
      const evaluations = solver === "heun" ? 2 * steps - 1 : steps;
      caption.textContent = `${counted(evaluations)}. ${meanError(taken, solutions)}`;
      const stepped = lines(taken, schedule);
      const parts = { solutions: lines(solutions, schedule), stepped };
      parts.tangents = tangents(D, solutions, settings.sigma, schedule);
      whole.replaceChildren(view(name, parts, schedule, SIGMA_MAX, whole.clientWidth));
      near.replaceChildren(view(name, parts, schedule, 1, near.clientWidth));
    }
  }

  window.addEventListener("resize", () => panel.hidden || draw());
  return {
    parts: [{ prefix: "", knobs: KNOBS, settings, start }],
    update,
    show: draw,
    hide() {},
  };
}

/** Return the plot of the lines where the noise level is at most `highest`. */
function view(name, { solutions, stepped, tangents }, schedule, highest, width) {
  const time = schedule.t(highest);
  const reach = 2 * schedule.s(time) * highest + 1;
  const rounded = reach > 10 ? 50 : Math.ceil(reach);
  const shown = (points) => points.filter(([t], i) => t <= time || points[i + 1]?.[0] <= time); // one beyond the edge
  const curve = (kind) => (points) => ({ points, kind });
  return plot({
    width, height: 190, xRange: [0, time], yRange: [-rounded, rounded],
    xTicks: [0, time / 2, time], yTicks: [-rounded, 0, rounded],
    xLabel: `t, up to σ = ${highest}`, yLabel: "s(t) x",
    curves: [...solutions.map(shown).map(curve("solution")), ...stepped.map(curve("step")),
      ...tangents.map(curve("tangent"))],
    dots: [{ points: stepped.flat(), kind: "step" }, { points: tangents.map(([end]) => end), kind: "tangent" },
      { points: tangents.map(([, touch]) => touch), kind: "touch" }],
    label: `${name}: solutions, steps and tangents over the time t, for noise levels up to ${highest}`,
  });
}
