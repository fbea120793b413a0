// Tab Digits: the ten classes, sampled by two set-ups from the same noise, and one of them step by step.

import { element, makeControls } from "./controls.js";
import { makeFilm } from "./film.js";
import { MORE, SAMPLER, SEED, starts } from "./knobs.js";
import { latest } from "./latest.js";
import { counted, drawImage, makeCanvas, short, visible } from "./pixels.js";
import { PRESETS } from "./sampler.js";

const RESOLUTION = 32;
const CLASSES = [...Array(10).keys()];
const KNOBS = [...SAMPLER, ...MORE];
const DIGIT = { name: "digit", min: 0, max: 9, step: 1, start: 3 }; // whose film is shown
const evaluationsOf = ({ solver, N }) => (solver === "heun" ? 2 * N - 1 : N);

const START_A = { ...starts(KNOBS), ...PRESETS.EDM };
const START_B = { ...starts(KNOBS), ...PRESETS.VE, N: evaluationsOf(START_A) }; // as many evaluations as A's

/** Give settings a column of Table 1, without churn; the number of evaluations stays where it can. */
function applyPreset(settings, name) {
  const evaluations = evaluationsOf(settings);
  Object.assign(settings, PRESETS[name], { S_churn: 0 });
  settings.N = Math.min(settings.solver === "heun" ? Math.ceil((evaluations + 1) / 2) : evaluations, 64);
}

/** Return whether settings are those of a column of Table 1; links round numbers to six digits. */
function isPreset(settings, name) {
  return settings.S_churn === 0 && Object.entries(PRESETS[name]).every(([key, value]) => (
    typeof value === "string" ? settings[key] === value : Math.abs(settings[key] / value - 1) < 1e-5
  ));
}

/** Return one set-up: its view, its settings, and what it has computed. */
function makeSide(name, start, shared, choose) {
  const settings = { ...start };
  const canvases = CLASSES.map((digit) => makeCanvas(RESOLUTION, `Digit ${digit} of ${name}`));
  const buttons = CLASSES.map((digit) => element("button", { className: "digit", onclick: () => choose(digit) },
    canvases[digit], element("span", {}, String(digit))));
  const presets = Object.keys(PRESETS).map((preset) => {
    const button = element("button", { className: `preset ${preset}` }, preset);
    button.setAttribute("aria-label", `${preset} for ${name}`);
    return button;
  });
  const progress = element("span", { className: "progress" });
  const caption = element("span"); // read out when it changes, unlike the progress
  caption.setAttribute("role", "status");
  const trouble = element("p", { className: "error", hidden: true });
  trouble.setAttribute("role", "alert");
  const film = makeFilm(name);
  const bar = element("div", { className: "bar" }, element("h2", {}, name), ...presets,
    element("p", { className: "caption" }, progress, caption));
  const side = {
    name, start, settings, presets, film, isStale: true,
    view: element("section", { className: "side" }, bar, element("div", { className: "ten" }, ...buttons), trouble),

    /** Drop what was computed; the digits stay until there are new ones. */
    makeStale() {
      side.isStale = true;
      caption.textContent = "";
      progress.textContent = "waiting for the network";
    },

    /** Show which digit is chosen, and which presets the settings are. */
    update() {
      buttons.forEach((button, digit) => button.setAttribute("aria-pressed", digit === shared.digit));
      presets.forEach((button) => button.setAttribute("aria-pressed", isPreset(settings, button.textContent)));
      film.show(shared.digit);
    },

    /** Sample, and draw the digits after each step. Errors are said in words, and returned; the old digits stay. */
    async compute(engine, signal) {
      trouble.hidden = true;
      let message = "";
      try {
        film.begin(settings, shared.seed);
        const onState = (state) => {
          CLASSES.forEach((digit) => drawImage(canvases[digit], state.x, digit, visible(state.sigma)));
          film.add(state);
          progress.textContent = `step ${state.step + 1} of ${settings.N}, σ = ${short(state.sigma)}`;
        };
        const request = { settings, guidance: settings.guidance, labels: CLASSES, seed: shared.seed };
        const made = await engine.sample(request, { onState, signal });
        progress.textContent = "";
        caption.textContent = `${counted(made.evaluations)}, ${Math.round(made.milliseconds).toLocaleString("en")} ms`;
      } catch (error) {
        if (signal.aborted) throw error;
        progress.textContent = "";
        message = error.message;
      }
      trouble.textContent = message;
      trouble.hidden = !message;
      side.isStale = false;
      return message;
    },
  };
  return side;
}

/** Fill the tab's panel, and return what main.js needs to know of it. */
export function makeDigits(panel, changed) {
  const shared = starts([SEED, DIGIT]);
  let engine = null;
  const sides = [["A", START_A], ["B", START_B]].map(([name, start]) => makeSide(name, start, shared, (digit) => {
    shared.digit = digit;
    refresh();
    changed();
  }));
  const work = latest(async (signal) => {
    for (const side of sides.filter(({ isStale }) => isStale)) {
      const error = await side.compute(engine, signal);
      more.open ||= MORE.some(({ title }) => error.includes(title));
    }
  });

  /** Compute anew what has become stale. */
  function start() {
    work.cancel();
    if (engine && !panel.hidden && sides.some(({ isStale }) => isStale)) work.start();
  }

  /** Show settings that have changed, and sample with them. */
  function change(stale) {
    stale.forEach((side) => side.makeStale());
    refresh();
    changed();
    start();
  }

  function refresh() {
    updates.forEach((update) => update());
    sides.forEach((side) => side.update());
  }

  const knobs = panel.querySelector(".knobs");
  const more = element("details", {}, element("summary", {}, "More knobs"));
  const setups = Object.fromEntries(sides.map(({ name, settings }) => [name, settings]));
  const changedIn = (name) => change(sides.filter((side) => side.name === name));
  knobs.append(element("div", { className: "knob names" }, element("b", {}, "A"), element("b", {}, "B")));
  const updates = [
    makeControls(knobs, SAMPLER, setups, changedIn),
    makeControls(knobs, [SEED], { "": shared }, () => change(sides)),
    makeControls(more, MORE, setups, changedIn),
  ];
  knobs.append(more);
  for (const side of sides) {
    panel.querySelector(".sides").append(side.view);
    panel.querySelector(".films").append(side.film.view);
    for (const button of side.presets) {
      button.addEventListener("click", () => {
        applyPreset(side.settings, button.textContent);
        change([side]);
      });
    }
  }
  return {
    parts: [
      { prefix: "", knobs: [SEED, DIGIT], settings: shared, start: starts([SEED, DIGIT]) },
      { prefix: "", knobs: KNOBS, settings: sides[0].settings, start: START_A },
      { prefix: "B.", knobs: KNOBS, settings: sides[1].settings, start: START_B },
    ],
    update() { // after all settings may have changed
      sides.forEach((side) => side.makeStale());
      more.open ||= sides.some(({ settings, start }) => MORE.some(({ name }) => settings[name] !== start[name]));
      refresh();
    },
    show: start,
    hide: work.cancel,
    connect(loaded) {
      engine = loaded;
      start();
    },
  };
}
