/**
 * Finds the packages that package.json pins: on a public CDN, or in node_modules, where `npm install` puts them.
 * node_modules comes first on the visitor's own machine, where it may be the only one that can be reached.
 */

const OWN_MACHINE = ["localhost", "127.0.0.1", "[::1]"];
const TIMEOUT = 15_000; // milliseconds until an address counts as unreachable

/** Return the address of a file of a package; rejects with an Error in words if it can be reached nowhere. */
export async function locate(name, file) {
  const version = (await pinned())[name];
  const local = new URL(`node_modules/${name}/`, import.meta.url).href;
  const cdn = `https://cdn.jsdelivr.net/npm/${name}@${version}/`;
  for (const folder of OWN_MACHINE.includes(location.hostname) ? [local, cdn] : [cdn, local]) {
    if (await isReachable(folder + file)) return folder + file;
  }
  throw new Error(`${name} cannot be loaded: connect to the internet, or run "npm install" in the folder playground.`);
}

/** Load KaTeX with its style sheet; returns it, or null if it cannot be loaded. */
export async function loadKatex() {
  try {
    const module = await locate("katex", "dist/katex.mjs");
    const sheet = document.createElement("link");
    sheet.rel = "stylesheet";
    sheet.href = new URL("katex.min.css", module).href;
    document.head.append(sheet);
    return (await import(module)).default;
  } catch {
    return null;
  }
}

/** Return the versions that package.json pins, by name. */
async function pinned() {
  const response = await fetch(new URL("package.json", import.meta.url));
  if (!response.ok) throw new Error("The file package.json is missing: serve all files of the folder playground.");
  return (await response.json()).dependencies;
}

/** Return whether there is a file at this address. */
async function isReachable(url) {
  try {
    return (await fetch(url, { method: "HEAD", signal: AbortSignal.timeout(TIMEOUT) })).ok;
  } catch {
    return false;
  }
}
