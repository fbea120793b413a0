// Images in [-1, 1] on canvases, one canvas pixel for each of theirs; style.css enlarges them by whole numbers.

const SIGMA_DATA = 0.5; // standard deviation of the data in the paper

/** Return a noise level as text: "80", "28", "5.3", "0.0075". */
export const short = (sigma) => (sigma >= 10 ? sigma.toFixed(0) : String(Number(sigma.toPrecision(2))));

/** Return a number of evaluations as text. */
export const counted = (evaluations) => `${evaluations} evaluation${evaluations === 1 ? "" : "s"}`;

/** Return the factor that gives noisy images the data's standard deviation, so that they can be seen. */
export const visible = (sigma) => SIGMA_DATA / Math.hypot(sigma, SIGMA_DATA);

/** Return a black canvas of size x size pixels that is described by `label`. */
export function makeCanvas(size, label = "") {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  canvas.className = "image";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  blacken(canvas);
  return canvas;
}

/** Make a canvas black. */
export function blacken(canvas) {
  canvas.getContext("2d", { willReadFrequently: true }).fillRect(0, 0, canvas.width, canvas.height);
}

/** Draw image number `index` of grey images (B, 1, H, W), multiplied by `scale`. */
export function drawImage(canvas, images, index = 0, scale = 1) {
  const count = canvas.width * canvas.height;
  const pixels = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < count; i++) {
    const grey = Math.round(images[index * count + i] * scale * 127.5 + 127.5); // clamped to 0..255 below
    pixels.data.fill(grey, 4 * i, 4 * i + 3);
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d", { willReadFrequently: true }).putImageData(pixels, 0, 0);
}
