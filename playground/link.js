// Settings in the page's address, such as #digits&N=18&B.rho=5. Those that are not named there have their start values.

/** Return the fragment of a tab's settings. Parts are { prefix, knobs, settings, start }; `prefix` begins the names. */
export function toHash(tab, parts) {
  const entries = parts.flatMap(({ prefix, knobs, settings, start }) => knobs
    .filter(({ name }) => settings[name] !== start[name])
    .map(({ name, options }) => [prefix + name, options ? settings[name] : Number(settings[name].toPrecision(6))])
    .map((pair) => pair.join("=")));
  return `#${[tab, ...entries].join("&")}`;
}

/** Return the tab that a fragment names, and its entries as a Map. */
export function fromHash(hash) {
  const [tab, ...entries] = hash.replace(/^#/, "").split("&");
  return { tab, values: new Map(entries.map((entry) => entry.split("=")).filter((pair) => pair.length === 2)) };
}

/** Give all settings their values in a fragment, or their start values where it has none that is possible. */
export function restore(parts, values) {
  for (const { prefix, knobs, settings, start } of parts) {
    Object.assign(settings, start);
    for (const knob of knobs) {
      const value = parse(knob, values.get(prefix + knob.name));
      if (value !== undefined) settings[knob.name] = value;
    }
  }
}

/** Return the value of a knob that a text stands for, or undefined if it stands for none. */
function parse({ options, min, max, step }, text) {
  if (options) return options.includes(text) ? text : undefined;
  const value = Number(text || NaN);
  return value >= min && value <= max && (step !== 1 || Number.isInteger(value)) ? value : undefined;
}
