// Formulas: elements with `data-tex` hold readable text, which KaTeX replaces where it can be loaded.

/** Replace the text of all elements with `data-tex`; without KaTeX it stays. */
export async function typeset() {
  const katex = await import("./runtime.js").then(({ loadKatex }) => loadKatex()).catch(() => null);
  if (!katex) return;
  for (const place of document.querySelectorAll("[data-tex]")) {
    katex.render(place.dataset.tex, place, { throwOnError: false, displayMode: place.classList.contains("formula") });
  }
}
