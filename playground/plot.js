// A plot of curves in the plane, as SVG. Colours and line widths stand in style.css, by class.

const LEFT = 38, RIGHT = 10, TOP = 8, BOTTOM = 34; // margins in pixels

const round = (number) => Math.round(number * 100) / 100;

/**
 * Return an <svg> element.
 * @param xRange, yRange  [low, high] of the axes
 * @param xTicks, yTicks  where the axes have numbers
 * @param curves  [{ points: [[x, y], ...], kind }]: lines of the class `kind`
 * @param dots  [{ points, kind }]: circles
 * @param label  describes the picture to readers who cannot see it
 */
export function plot({ width, height, xRange, yRange, xTicks, yTicks, xLabel, yLabel, curves, dots, label }) {
  const inner = { width: width - LEFT - RIGHT, height: height - TOP - BOTTOM };
  const x = (value) => round(((value - xRange[0]) / (xRange[1] - xRange[0])) * inner.width);
  const y = (value) => round((1 - (value - yRange[0]) / (yRange[1] - yRange[0])) * inner.height);
  const text = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
  const lines = curves.map(({ points, kind }) => `<polyline class="${kind}" points="${points.map(
    ([a, b]) => `${x(a)},${y(b)}`).join(" ")}"/>`);
  const circles = dots.flatMap(({ points, kind }) => points.map(
    ([a, b]) => `<circle class="${kind}" cx="${x(a)}" cy="${y(b)}" r="2.5"/>`));
  const ticks = [
    ...xTicks.map((value, i) => `<text x="${LEFT + x(value)}" y="${height - BOTTOM + 14}" text-anchor="${
      i === 0 ? "start" : i === xTicks.length - 1 ? "end" : "middle"}">${text(value)}</text>`),
    ...yTicks.map((value) => `<text x="${LEFT - 5}" y="${TOP + y(value) + 4}" text-anchor="end">${text(value)}</text>
      <line class="grid" x1="${LEFT}" x2="${width - RIGHT}" y1="${TOP + y(value)}" y2="${TOP + y(value)}"/>`),
  ];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of Object.entries({ width, height, role: "img", "aria-label": label, class: "plot" })) {
    svg.setAttribute(name, value);
  }
  svg.innerHTML = `${ticks.join("")}
    <text x="${LEFT + inner.width / 2}" y="${height - 5}" text-anchor="middle">${xLabel}</text>
    <text transform="translate(11 ${TOP + inner.height / 2}) rotate(-90)" text-anchor="middle">${yLabel}</text>
    <svg x="${LEFT}" y="${TOP}" width="${inner.width}" height="${inner.height}">${[...lines, ...circles].join("")}</svg>
    <path class="axis" d="M${LEFT} ${TOP}v${inner.height}h${inner.width}"/>`;
  return svg;
}
