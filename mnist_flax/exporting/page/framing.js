// Frames a drawing as in MNIST, with the same steps as mnist_flax/data/framing.py. The network on this page thus gets
// the same 28x28 pixels as in `python -m mnist_flax.predict`.

const SIDE = 28; // of the framed image
const BOX = 20; // longer side of the ink in it
const MIDDLE = 14; // row and column of the ink's centre of mass

// Scales and centres the ink of a white-on-black image: u8[height * width] -> u8[28 * 28].
function frame(pixels, width, height) {
  const canvas = new Uint8Array(SIDE * SIDE);
  const box = inkBox(pixels, width, height);
  if (!box) return canvas;
  const longest = Math.max(box.width, box.height);
  const w = Math.max(1, roundHalfEven((box.width * BOX) / longest));
  const h = Math.max(1, roundHalfEven((box.height * BOX) / longest));
  const tight = cut(pixels, width, box);
  const ink = resizeBicubic(tight, box.width, box.height, w, h);
  let mass = 0, rows = 0, columns = 0, most = 0;
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const value = ink[y * w + x];
      mass += value;
      rows += value * y;
      columns += value * x;
      most = Math.max(most, value);
    }
  }
  if (!mass) return canvas;
  const top = clamp(roundHalfEven(MIDDLE - rows / mass), 0, SIDE - h);
  const left = clamp(roundHalfEven(MIDDLE - columns / mass), 0, SIDE - w);
  const scale = 255 / most;
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      canvas[(top + y) * SIDE + left + x] = roundHalfEven(ink[y * w + x] * scale);
    }
  }
  return canvas;
}

// The smallest box around all pixels that are not 0; null if there are none.
function inkBox(pixels, width, height) {
  let left = width, right = -1, top = height, bottom = -1;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!pixels[i]) continue;
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < top) top = y;
      bottom = y;
    }
  }
  return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

function cut(pixels, width, box) {
  const part = new Uint8Array(box.width * box.height);
  for (let y = 0; y < box.height; y++) {
    const start = (box.top + y) * width + box.left;
    part.set(pixels.subarray(start, start + box.width), y * box.width);
  }
  return part;
}

// Pillow's Image.resize(..., BICUBIC) for 8-bit grey images, rounding included: first horizontally, then vertically.
function resizeBicubic(pixels, width, height, newWidth, newHeight) {
  let image = pixels;
  if (newWidth !== width) image = resample(image, height, width, 1, width, bicubicWeights(width, newWidth));
  if (newHeight !== height) image = resample(image, newWidth, 1, newWidth, height, bicubicWeights(height, newHeight));
  return image;
}

// Resamples each of `lines` lines. In the array, lines are `lineStep` apart, and the pixels of a line `step`.
function resample(pixels, lines, lineStep, step, length, weights) {
  const newLength = weights.length;
  const newLineStep = step === 1 ? newLength : 1;
  const result = new Uint8Array(lines * newLength);
  for (let i = 0; i < newLength; i++) {
    const { first, values } = weights[i];
    for (let line = 0; line < lines; line++) {
      let sum = HALF;
      for (let k = 0; k < values.length; k++) sum += pixels[line * lineStep + (first + k) * step] * values[k];
      result[line * newLineStep + i * step] = clamp(Math.floor(sum / ONE), 0, 255);
    }
  }
  return result;
}

const ONE = 2 ** 22; // Pillow's weights are fixed-point numbers with 22 bits after the point
const HALF = ONE / 2;

// For each new pixel: the first old pixel that it depends on, and the weights of the old pixels from there on.
function bicubicWeights(length, newLength) {
  const scale = length / newLength;
  const stretch = Math.max(scale, 1); // a wider kernel averages when the image shrinks
  const support = 2 * stretch;
  return Array.from({ length: newLength }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(length, Math.trunc(center + support + 0.5));
    const values = Array.from({ length: end - first }, (_, k) => bicubic((first + k - center + 0.5) * (1 / stretch)));
    const norm = 1 / values.reduce((sum, value) => sum + value, 0);
    return { first, values: values.map((value) => roundHalfAway(value * norm * ONE)) };
  });
}

// Keys' cubic convolution kernel (1981) with a = -0.5.
function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

function roundHalfAway(value) {
  return Math.trunc(value + (value < 0 ? -0.5 : 0.5));
}

// Rounds ties to even, as Python and NumPy do.
function roundHalfEven(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}
