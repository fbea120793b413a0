/** Seeded noise: the same seeds give the same numbers in every browser. */

/** Return a generator of 32-bit whole numbers (sfc32 by Chris Doty-Humphrey), seeded by two of them. */
function sfc32(seed, stream) {
  let [a, b, c, counter] = [seed | 0, stream | 0, 0x9e3779b9 | 0, 1];
  const next = () => {
    const result = (((a + b) | 0) + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + result) | 0;
    return result >>> 0;
  };
  for (let i = 0; i < 20; i++) next(); // until all bits depend on the seed
  return next;
}

/** Return draw(count), which returns new normal numbers of unit variance at each call, as a Float64Array. */
export function normalGenerator(seed, stream = 0) {
  const next = sfc32(seed, stream);
  return (count) => {
    const numbers = new Float64Array(count);
    for (let i = 0; i < count; i += 2) { // the Box-Muller transform
      const radius = Math.sqrt(-2 * Math.log((next() + 1) / 2 ** 32));
      const angle = (2 * Math.PI * next()) / 2 ** 32;
      numbers[i] = radius * Math.cos(angle);
      if (i + 1 < count) numbers[i + 1] = radius * Math.sin(angle);
    }
    return numbers;
  };
}

/** Return `count` normal numbers of unit variance. */
export function gaussians(seed, count) {
  return normalGenerator(seed)(count);
}
