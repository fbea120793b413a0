// Controls made from the knobs of knobs.js: symbol, sentence and place in the paper, and one control for each set-up.

/** Return a new element with these properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const significant = (value) => Number(value.toPrecision(3));

/** Return the control of a knob: { view, update(settings) }. It writes to `settings` and calls `changed()`. */
function makeControl(knob, settings, label, changed) {
  const input = knob.options
    ? element("select", {}, ...knob.options.map((option) => element("option", { value: option }, option)))
    : element("input", { type: "range", step: "any" });
  const output = element("output");
  const place = knob.log ? Math.log10 : (value) => value;
  if (!knob.options) {
    Object.assign(input, { min: place(knob.min), max: place(knob.max), step: knob.log ? 0.01 : knob.step });
  }
  input.setAttribute("aria-label", label);
  input.addEventListener("input", () => {
    const value = knob.log ? significant(10 ** Number(input.value)) : Number(input.value);
    settings[knob.name] = knob.options ? input.value : value;
    update();
    changed(knob.name);
  });

  function update() {
    const value = settings[knob.name];
    input.value = knob.options ? value : place(value);
    input.disabled = knob.applies ? !knob.applies(settings) : false;
    if (!knob.options) {
      output.textContent = String(knob.step === 0.001 ? value : significant(value));
      input.setAttribute("aria-valuetext", output.textContent);
    }
  }

  return { view: element("div", { className: "control" }, input, ...(knob.options ? [] : [output])), update };
}

/** Return the symbol of a knob, which typeset() in formulas.js replaces by KaTeX's. */
function symbolOf({ tex, text }) {
  const symbol = element("span", { className: "symbol", innerHTML: text ?? "" });
  if (tex) symbol.dataset.tex = tex;
  return symbol;
}

/**
 * Add a row for each knob to `container`, and return update(), which shows the settings as they are.
 * @param setups  { name: settings }: a control for each of them; the name, such as "A", may be ""
 * @param changed  called with a set-up's name and a knob's name after a change
 */
export function makeControls(container, knobs, setups, changed) {
  const updates = [];
  const update = () => updates.forEach((each) => each());
  for (const knob of knobs) {
    const head = element("div", { className: "head" }, symbolOf(knob), element("b", {}, knob.title),
      element("span", { className: "place" }, knob.place));
    const controls = Object.entries(setups).map(([setup, settings]) => {
      const control = makeControl(knob, settings, setup ? `${knob.title} of ${setup}` : knob.title, (name) => {
        update(); // other controls may apply now
        changed(setup, name);
      });
      updates.push(control.update);
      return control.view;
    });
    container.append(element("div", { className: "knob" }, head, element("p", { innerHTML: knob.does }), ...controls));
  }
  update();
  return update;
}
