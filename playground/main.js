// Starts the page: tabs, the settings in its address, the network, the formulas.

import { makeDigits } from "./digits.js";
import { makeDraw } from "./draw.js";
import { Engine } from "./engine.js";
import { typeset } from "./formulas.js";
import { fromHash, restore, toHash } from "./link.js";
import { makeTrajectories } from "./trajectories.js";

const byId = (id) => document.getElementById(id);
const MAKERS = { digits: makeDigits, trajectories: makeTrajectories, draw: makeDraw };
const NEEDS = "images of 1 × 32 × 32 pixels in 10 classes";

const REST = 200; // milliseconds; browsers refuse too many changes of the address

let shown = "digits";
let timer;

/** Write the shown tab's settings into the address, once they rest. */
function writeLink() {
  clearTimeout(timer);
  timer = setTimeout(() => history.replaceState(null, "", toHash(shown, tabs[shown].parts)), REST);
}

const tabs = Object.fromEntries(Object.entries(MAKERS).map(([name, make]) => [name, make(byId(name), writeLink)]));
const names = Object.keys(tabs);
for (const { update } of Object.values(tabs)) update();

/** Show a tab, and end what another one computes. */
function show(name) {
  if (name !== shown) tabs[shown].hide();
  shown = name;
  for (const each of names) {
    byId(each).hidden = each !== name;
    byId(`tab-${each}`).setAttribute("aria-selected", each === name);
    byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  tabs[name].show();
}

/** Show the tab, with the settings, that a fragment of the address names. */
function follow(hash) {
  const { tab, values } = fromHash(hash);
  const name = names.includes(tab) ? tab : "digits";
  restore(tabs[name].parts, values);
  tabs[name].update();
  show(name);
  writeLink(); // without what is not known
}

/** Say in words what does not work. */
function complain(error) {
  byId("trouble").textContent = `${error.message} The tab Trajectories works without the network.`;
  byId("trouble").hidden = false;
}

for (const name of names) {
  byId(`tab-${name}`).addEventListener("click", () => {
    show(name);
    writeLink();
  });
}
document.querySelector("[role=tablist]").addEventListener("keydown", ({ key }) => {
  const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -names.indexOf(shown), End: -1 - names.indexOf(shown) };
  if (!(key in steps)) return;
  const next = byId(`tab-${names.at((names.indexOf(shown) + steps[key]) % names.length)}`);
  next.focus();
  next.click();
});
byId("reset").addEventListener("click", () => follow(shown));
window.addEventListener("hashchange", ({ newURL }) => follow(new URL(newURL).hash));

byId("starting").hidden = true;
follow(location.hash);
typeset();
Engine.load(new URL("edm_small.onnx", import.meta.url).href).then((engine) => {
  const { resolution, channels, classes } = engine.metadata;
  if (resolution !== 32 || channels !== 1 || classes !== 10) {
    const found = `${channels} × ${resolution} × ${resolution} in ${classes}`;
    throw new Error(`This page shows ${NEEDS}, the model makes ${found}.`);
  }
  for (const { connect } of Object.values(tabs)) connect?.(engine);
}).catch(complain);
