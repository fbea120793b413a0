// A pad to draw digits on, and MNIST's way of making small images of large ones.

const PAD = 288; // pixels of the pad
const PEN = 22; // width of a stroke
const RESOLUTION = 32, BOX = 20; // MNIST fits a digit in 20 x 20 pixels, with black around it
const CONTRAST = 0.1; // between background and ink, of 1; less is no digit
const POINTS = 8; // a small pixel is the mean of 8 x 8 points

/** Return the grey values 0..1 of a canvas, row by row. */
function greys(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return Float64Array.from({ length: canvas.width * canvas.height }, (_, i) => (
    (0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2]) / 255
  ));
}

/** Return a black canvas. */
function makeBlack(width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillRect(0, 0, width, height);
  return canvas;
}

/** Return the smallest rectangle of a canvas that holds all its bright pixels, or null if there are none. */
function bounds(canvas) {
  const places = [...greys(canvas).entries()].filter(([, value]) => value > 0.2).map(([i]) => i);
  if (!places.length) return null;
  const [rows, columns] = [places.map((i) => Math.floor(i / canvas.width)), places.map((i) => i % canvas.width)];
  const least = (numbers) => numbers.reduce((a, b) => Math.min(a, b));
  const most = (numbers) => numbers.reduce((a, b) => Math.max(a, b));
  const [left, top] = [least(columns), least(rows)];
  return { left, top, width: most(columns) - left + 1, height: most(rows) - top + 1 };
}

/**
 * Return the digit of a canvas as MNIST has it: 32 x 32 in [-1, 1], 20 pixels at most, its centre of mass in the
 * middle. Return null if the canvas is black.
 */
export function likeMnist(canvas) {
  const [found, values] = [bounds(canvas), greys(canvas)];
  if (!found) return null;
  const { left, top, width, height } = found;
  const scale = BOX / Math.max(width, height);

  /** Return the mean of the canvas in each small pixel, with the middle of the rectangle at (x, y). */
  const shrink = (x, y) => Float64Array.from({ length: RESOLUTION ** 2 }, (_, i) => {
    let sum = 0;
    for (let k = 0; k < POINTS ** 2; k++) {
      const column = (i % RESOLUTION) + ((k % POINTS) + 0.5) / POINTS;
      const row = Math.floor(i / RESOLUTION) + (Math.floor(k / POINTS) + 0.5) / POINTS;
      const u = Math.floor((column - x) / scale + left + width / 2);
      const v = Math.floor((row - y) / scale + top + height / 2);
      const isInside = u >= left && u < left + width && v >= top && v < top + height;
      sum += isInside ? values[v * canvas.width + u] : 0;
    }
    return sum / POINTS ** 2;
  });
  const middle = RESOLUTION / 2;
  const centred = shrink(middle, middle);
  const total = centred.reduce((sum, value) => sum + value, 0);
  const mean = (coordinate) => centred.reduce((sum, value, i) => sum + value * (coordinate(i) + 0.5), 0) / total;
  const [x, y] = [mean((i) => i % RESOLUTION), mean((i) => Math.floor(i / RESOLUTION))];
  return shrink(2 * middle - x, 2 * middle - y).map((value) => 2 * value - 1);
}

/**
 * Draw an image as large as the pad allows, with a black background and white ink. The background is the mean of the
 * edge, the ink is the grey that differs most from it. If the edge is transparent, opaque pixels are ink.
 */
export function drawPicture(pad, picture) {
  const scale = PAD / Math.max(picture.width, picture.height);
  const part = makeBlack(Math.ceil(picture.width * scale), Math.ceil(picture.height * scale));
  const context = part.getContext("2d");
  context.clearRect(0, 0, part.width, part.height);
  context.drawImage(picture, 0, 0, part.width, part.height);
  const pixels = context.getImageData(0, 0, part.width, part.height);
  const meanOfEdge = (values) => {
    const edge = values.filter((_, i) => i < part.width || i % part.width === 0);
    return edge.reduce((sum, value) => sum + value, 0) / edge.length;
  };
  const alpha = Float64Array.from({ length: part.width * part.height }, (_, i) => pixels.data[4 * i + 3] / 255);
  context.globalCompositeOperation = "destination-over";
  Object.assign(context, { fillStyle: "#fff" }).fillRect(0, 0, part.width, part.height); // under what is transparent
  const values = meanOfEdge(alpha) < 0.5 ? alpha : greys(part);
  const background = meanOfEdge(values);
  const ink = values.reduce((best, value) => (
    Math.abs(value - background) > Math.abs(best - background) ? value : best), background);
  if (Math.abs(ink - background) < CONTRAST) return clear(pad);
  values.forEach((value, i) => {
    pixels.data.fill((255 * (value - background)) / (ink - background), 4 * i, 4 * i + 3); // clamped to 0..255
    pixels.data[4 * i + 3] = 255;
  });
  clear(pad);
  pad.getContext("2d").putImageData(pixels, Math.floor((PAD - part.width) / 2), Math.floor((PAD - part.height) / 2));
}

/** Draw a small canvas on the whole pad, each of its pixels as a square. */
export function enlarge(pad, small) {
  const context = pad.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, PAD, PAD);
}

/** Make the pad black. */
export function clear(pad) {
  pad.getContext("2d").fillRect(0, 0, PAD, PAD);
}

/** Return a pad for strokes of mouse, finger or pen; `started()` is called before each, `changed()` along it. */
export function makePad(started, changed) {
  const pad = makeBlack(PAD, PAD);
  pad.className = "drawing";
  const context = pad.getContext("2d");
  let last = null;
  const place = ({ offsetX, offsetY }) => [(offsetX * PAD) / pad.clientWidth, (offsetY * PAD) / pad.clientHeight];

  function stroke(event) {
    const next = place(event);
    Object.assign(context, { strokeStyle: "#fff", lineWidth: PEN, lineCap: "round" });
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...next);
    context.stroke();
    last = next;
    changed();
  }

  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    started();
    last = place(event);
    stroke(event);
  });
  pad.addEventListener("pointermove", (event) => {
    if (last) (event.getCoalescedEvents?.() ?? [event]).forEach(stroke);
  });
  for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => { last = null; });
  return pad;
}
