// The knobs: each has a name in links, a title, a symbol (in TeX, and as text where KaTeX is missing), one sentence,
// and its place in the paper. A knob is a choice among `options`, or a number from `min` to `max`, on a logarithmic
// scale if it is `log`.

import { DISCRETIZATIONS, SCALINGS, SCHEDULES, SOLVERS } from "./sampler.js";

export const N = {
  name: "N", title: "steps", tex: "N", text: "N", min: 1, max: 64, step: 1, start: 9, place: "Table 1",
  does: "The number of time steps: Euler's method evaluates D once in each, Heun's twice, and once in the last.",
};
export const SOLVER = {
  name: "solver", title: "solver", options: SOLVERS, start: "heun", place: "Algorithm 1, Section 3",
  does: "Euler's method follows the slope at the start of a step, Heun's averages it with the slope at the end; "
    + "dpmpp_2m (Lu et al., 2022) uses the step before instead.",
};
export const RHO = {
  name: "rho", title: "spacing", tex: "\\rho", text: "ρ", min: 1, max: 15, step: 0.5, start: 7, place: "Eq. 5",
  does: "The larger it is, the more of EDM's time steps lie near σ<sub>min</sub>; 1 spaces the noise levels evenly.",
  applies: (settings) => (settings.discretization ?? "edm") === "edm",
};

const followsSlopes = (settings) => settings.solver !== "dpmpp_2m"; // which has neither sigma(t), s(t) nor churn
const isChurning = (settings) => settings.S_churn > 0 && followsSlopes(settings);

export const SAMPLER = [
  N,
  SOLVER,
  {
    name: "discretization", title: "time steps", tex: "t_i", text: "t<sub>i</sub>",
    options: DISCRETIZATIONS, start: "edm",
    place: "Table 1, “Time steps”",
    does: "Where the steps lie: most at low noise (edm), evenly in t (vp), or in geometric progression (ve).",
  },
  RHO,
  {
    name: "schedule", title: "schedule", tex: "\\sigma(t)", text: "σ(t)",
    options: SCHEDULES, start: "linear",
    place: "Table 1, Section 3",
    does: "The noise level at time t, which decides how curved the solutions are; linear is σ(t) = t.",
    applies: followsSlopes,
  },
  {
    name: "scaling", title: "scaling", tex: "s(t)", text: "s(t)",
    options: SCALINGS, start: "none", place: "Eq. 4, Table 1",
    does: "vp shrinks noisy images so that their variance stays near 1; none leaves them as they are.",
    applies: followsSlopes,
  },
  {
    name: "S_churn", title: "churn", tex: "S_{churn}", text: "S<sub>churn</sub>",
    min: 0, max: 80, step: 1, start: 0,
    place: "Algorithm 2",
    does: "How much new noise is added while sampling, so that later steps correct the errors of earlier ones.",
    applies: followsSlopes,
  },
  {
    name: "guidance", title: "guidance", tex: "w", text: "w",
    min: 0, max: 4, step: 0.1, start: 1,
    place: "not in this paper: Ho and Salimans, 2022",
    does: "1 draws the class as trained, more exaggerates it, 0 ignores it; all but 1 evaluate the network twice.",
  },
];

export const MORE = [
  {
    name: "sigma_min", title: "lowest noise", tex: "\\sigma_{min}", text: "σ<sub>min</sub>",
    min: 0.001, max: 1, log: true,
    start: 0.002, place: "Eq. 5, Table 1", does: "The last noise level before 0.",
  },
  {
    name: "sigma_max", title: "highest noise", tex: "\\sigma_{max}", text: "σ<sub>max</sub>",
    min: 1, max: 200, log: true,
    start: 80, place: "Eq. 5, Table 1", does: "The noise level that sampling starts from.",
  },
  {
    name: "S_min", title: "churn from", tex: "S_{min}", text: "S<sub>min</sub>",
    min: 0.001, max: 10, log: true, start: 0.05,
    place: "Algorithm 2, Table 5", does: "The lowest noise level at which noise is added.", applies: isChurning,
  },
  {
    name: "S_max", title: "churn to", tex: "S_{max}", text: "S<sub>max</sub>",
    min: 0.1, max: 200, log: true, start: 50,
    place: "Algorithm 2, Table 5", does: "The highest noise level at which noise is added.", applies: isChurning,
  },
  {
    name: "S_noise", title: "size of the noise", tex: "S_{noise}", text: "S<sub>noise</sub>",
    min: 0.9, max: 1.1, step: 0.001,
    start: 1.003, place: "Algorithm 2, Table 5", applies: isChurning,
    does: "Standard deviation of the added noise; a little above 1 makes up for detail that D removes.",
  },
];

export const SEED = {
  name: "seed", title: "seed", min: 0, max: 99, step: 1, start: 0, place: "Algorithm 1, line 2",
  does: "Which noise sampling starts from; A and B start from the same.",
};

/** Return the settings that knobs start with. */
export const starts = (knobs) => Object.fromEntries(knobs.map(({ name, start }) => [name, start]));
