// Runs the graph that mnist_flax/exporting/graph.py describes, one image at a time.
//
// Each node is compiled once into a function that fills its own array. All activations of the last image can thus be
// inspected, and running the network allocates no arrays. Layout operations (slice, pad, transpose, ...) and broadcasting
// become index maps, computed when the graph is compiled.

class Network {
  // graph: the parsed JSON of Graph.to_json(); weights: an ArrayBuffer with what Graph.weights() returns.
  constructor(graph, weights) {
    this.outputs = graph.outputs;
    this.nodes = graph.nodes.map((node) => ({ ...node, shape: concrete(node.shape) }));
    this.byName = new Map(this.nodes.map((node) => [node.name, node]));
    this.constants = graph.constants;
    this.values = new Map(); // name -> { data, shape }
    for (const [name, constant] of Object.entries(graph.constants)) {
      this.values.set(name, { data: decode(weights, constant), shape: constant.shape });
    }
    this.image = graph.input; // the name of the input
    this.input = { data: new Float32Array(SIDE * SIDE), shape: [1, SIDE, SIDE, 1] };
    this.values.set(this.image, this.input);
    this.steps = this.nodes.map((node) => this.compile(node));
  }

  // Runs the forward pass on one image, u8[28 * 28], and returns the probabilities, f32[C].
  run(pixels) {
    this.input.data.set(pixels);
    for (const step of this.steps) step();
    return this.values.get(this.outputs.probabilities).data;
  }

  // The node with this name; undefined for the input image and for constants.
  node(name) {
    return this.byName.get(name);
  }

  compile(node) {
    const inputs = node.inputs.map((name) => this.values.get(name));
    const size = count(node.shape);
    if (node.op === "reshape") {
      this.values.set(node.name, { data: inputs[0].data, shape: node.shape });
      return () => {};
    }
    const output = { data: new Float32Array(size), shape: node.shape };
    this.values.set(node.name, output);
    const make = OPERATIONS[node.op] ?? (UNARY[node.op] && unary) ?? (BINARY[node.op] && binary);
    if (!make) throw new Error(`the operation ${node.op} is unknown`);
    const step = make(node, inputs, output);
    return node.dtype === "bfloat16" ? () => (step(), roundToBfloat16(output.data)) : step;
  }
}

// A size of -k means k times the number of images, which is one here.
function concrete(shape) {
  return shape.map(Math.abs);
}

function count(shape) {
  return shape.reduce((product, size) => product * size, 1);
}

function stridesOf(shape) {
  const strides = new Array(shape.length);
  for (let axis = shape.length - 1, step = 1; axis >= 0; step *= shape[axis--]) strides[axis] = step;
  return strides;
}

// Reads a constant out of the weights; all values are stored in float32.
function decode(weights, { shape, dtype, offset }) {
  const size = count(shape);
  if (dtype === "bfloat16") {
    const halves = new Uint16Array(weights, offset, size);
    return new Float32Array(Uint32Array.from(halves, (bits) => bits << 16).buffer);
  }
  if (dtype === "int64" || dtype === "uint64") return Float32Array.from(new BigInt64Array(weights, offset, size), Number);
  const types = { float32: Float32Array, float64: Float64Array, int32: Int32Array, uint32: Uint32Array,
    int8: Int8Array, uint8: Uint8Array, bool: Uint8Array };
  if (!types[dtype]) throw new Error(`constants of type ${dtype} are not supported`);
  const values = new types[dtype](weights, offset, size);
  return dtype === "float32" ? values : Float32Array.from(values);
}

const bits = new Uint32Array(1);
const bitsAsFloat = new Float32Array(bits.buffer);

// Rounds to 8 significant bits, ties to even.
function roundToBfloat16(values) {
  for (let i = 0; i < values.length; i++) {
    bitsAsFloat[0] = values[i];
    bits[0] = (bits[0] + 0x7fff + ((bits[0] >>> 16) & 1)) & 0xffff0000;
    values[i] = bitsAsFloat[0];
  }
}

// Index maps ---------------------------------------------------------------------------------------------------------

// For each output element, the flat index of the input element to copy, or -1 where inside(coordinates) is false.
// The index begins at `start` and changes by steps[axis] along each axis of the output.
function indexMap(shape, steps, start = 0, inside = null) {
  const map = new Int32Array(count(shape));
  const place = new Array(shape.length).fill(0);
  for (let i = 0, index = start; i < map.length; i++) {
    map[i] = !inside || inside(place) ? index : -1;
    for (let axis = shape.length - 1; axis >= 0; axis--) {
      index += steps[axis];
      if (++place[axis] < shape[axis]) break;
      index -= steps[axis] * shape[axis];
      place[axis] = 0;
    }
  }
  return map;
}

// The index map of a broadcast as in NumPy; null if input and output have the same number of elements.
function broadcastMap(input, shape) {
  if (count(input.shape) === count(shape)) return null;
  const missing = shape.length - input.shape.length;
  const strides = stridesOf(input.shape);
  const steps = shape.map((_, axis) => (axis < missing || input.shape[axis - missing] === 1 ? 0 : strides[axis - missing]));
  return indexMap(shape, steps);
}

function gather(input, output, map, fill = null) {
  return () => {
    for (let i = 0; i < map.length; i++) output.data[i] = map[i] < 0 ? fill.data[0] : input.data[map[i]];
  };
}

// Elementwise operations ---------------------------------------------------------------------------------------------

const UNARY = {
  relu: (x) => (x + Math.abs(x)) / 2, // without a branch, which the processor would mispredict every other time
  neg: (x) => -x, abs: Math.abs, sign: Math.sign, floor: Math.floor, exp: Math.exp, log: Math.log, sqrt: Math.sqrt,
  tanh: Math.tanh, sin: Math.sin, cos: Math.cos, not: (x) => (x ? 0 : 1),
  logistic: (x) => 1 / (1 + Math.exp(-x)), erf,
};

const BINARY = {
  add: (x, y) => x + y, sub: (x, y) => x - y, mul: (x, y) => x * y, div: (x, y) => x / y, pow: Math.pow,
  max: (x, y) => (x > y ? x : y), min: (x, y) => (x < y ? x : y), and: (x, y) => x && y, or: (x, y) => x || y,
  equal: (x, y) => +(x === y), less: (x, y) => +(x < y), less_equal: (x, y) => +(x <= y),
  greater: (x, y) => +(x > y), greater_equal: (x, y) => +(x >= y),
};

function unary(node, [x], output) {
  const f = UNARY[node.op];
  return () => {
    for (let i = 0; i < output.data.length; i++) output.data[i] = f(x.data[i]);
  };
}

function binary(node, [x, y], output) {
  const f = BINARY[node.op];
  const xMap = broadcastMap(x, output.shape), yMap = broadcastMap(y, output.shape);
  return () => {
    for (let i = 0; i < output.data.length; i++) {
      output.data[i] = f(x.data[xMap ? xMap[i] : i], y.data[yMap ? yMap[i] : i]);
    }
  };
}

// The error function, accurate to 1.2e-7 (Press et al., Numerical Recipes, 1992, section 6.2).
function erf(x) {
  const t = 1 / (1 + 0.5 * Math.abs(x));
  const powers = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
    -0.82215223, 0.17087277];
  let sum = 0;
  for (let i = powers.length - 1; i >= 0; i--) sum = sum * t + powers[i];
  const tail = t * Math.exp(-x * x + sum);
  return x >= 0 ? 1 - tail : tail - 1;
}

// The other operations -----------------------------------------------------------------------------------------------

const OPERATIONS = {
  conv, dense, einsum, softmax,
  max_pool: pool, sum_pool: pool, avg_pool: pool,
  reduce_sum: reduce, reduce_mean: reduce, reduce_max: reduce, reduce_min: reduce,
  broadcast: (node, [x], output) => gather(x, output, broadcastMap(x, output.shape) ?? indexMap(output.shape, stridesOf(output.shape))),
  transpose(node, [x], output) {
    const strides = stridesOf(x.shape);
    return gather(x, output, indexMap(output.shape, node.attrs.axes.map((axis) => strides[axis])));
  },
  slice(node, [x], output) {
    const strides = stridesOf(x.shape);
    const start = node.attrs.starts.reduce((sum, first, axis) => sum + first * strides[axis], 0);
    return gather(x, output, indexMap(output.shape, strides.map((step, axis) => step * node.attrs.strides[axis]), start));
  },
  pad(node, [x, fill], output) {
    const strides = stridesOf(x.shape), { low } = node.attrs;
    const start = -low.reduce((sum, width, axis) => sum + width * strides[axis], 0);
    const inside = (place) => place.every((at, axis) => at >= low[axis] && at < low[axis] + x.shape[axis]);
    return gather(x, output, indexMap(output.shape, strides, start, inside), fill);
  },
  concat(node, inputs, output) {
    const inner = count(output.shape.slice(node.attrs.axis + 1));
    const widths = inputs.map((input) => input.shape[node.attrs.axis] * inner);
    const width = output.shape[node.attrs.axis] * inner;
    return () => {
      for (let row = 0; row < output.data.length; row += width) {
        for (let i = 0, at = row; i < inputs.length; at += widths[i++]) {
          const start = (row / width) * widths[i];
          output.data.set(inputs[i].data.subarray(start, start + widths[i]), at);
        }
      }
    };
  },
  cast(node, [x], output) {
    if (node.dtype === "bool") return () => x.data.forEach((value, i) => (output.data[i] = value ? 1 : 0));
    if (/int/.test(node.dtype)) return () => x.data.forEach((value, i) => (output.data[i] = Math.trunc(value)));
    return () => output.data.set(x.data);
  },
  where(node, inputs, output) {
    const [c, x, y] = inputs;
    const [cMap, xMap, yMap] = inputs.map((input) => broadcastMap(input, output.shape));
    return () => {
      for (let i = 0; i < output.data.length; i++) {
        output.data[i] = c.data[cMap ? cMap[i] : i] ? x.data[xMap ? xMap[i] : i] : y.data[yMap ? yMap[i] : i];
      }
    };
  },
};

// For each output position, lists the nonzero inputs (ReLU makes many zeros), then adds up their products with weights.
function conv(node, [x, kernel, bias], output) {
  const [, height, width, depth] = x.shape;
  const [kernelHeight, kernelWidth, groupDepth, channels] = kernel.shape;
  const [images, newHeight, newWidth] = output.shape;
  const { strides, pads, dilations, groups } = node.attrs;
  const groupChannels = channels / groups;
  const sums = new Float64Array(channels);
  const terms = new Terms(kernel.data, kernelHeight * kernelWidth * groupDepth);

  function list(image, y, column, group) {
    terms.clear();
    for (let i = 0; i < kernelHeight; i++) {
      const row = y * strides[0] - pads[0][0] + i * dilations[0];
      if (row < 0 || row >= height) continue;
      for (let j = 0; j < kernelWidth; j++) {
        const place = column * strides[1] - pads[1][0] + j * dilations[1];
        if (place < 0 || place >= width) continue;
        const from = ((image * height + row) * width + place) * depth + group * groupDepth;
        const to = (i * kernelWidth + j) * groupDepth;
        for (let k = 0; k < groupDepth; k++) terms.push(x.data[from + k], (to + k) * channels);
      }
    }
  }

  return () => {
    let at = 0;
    for (let image = 0; image < images; image++) {
      for (let y = 0; y < newHeight; y++) {
        for (let column = 0; column < newWidth; column++, at += channels) {
          if (bias) sums.set(bias.data);
          else sums.fill(0);
          for (let group = 0; group < groups; group++) {
            list(image, y, column, group);
            terms.addTo(sums, group * groupChannels, (group + 1) * groupChannels);
          }
          output.data.set(sums, at);
        }
      }
    }
  };
}

function dense(node, [x, kernel, bias], output) {
  const [depth, units] = kernel.shape;
  const sums = new Float64Array(units);
  const terms = new Terms(kernel.data, depth);
  return () => {
    for (let row = 0; row < x.data.length / depth; row++) {
      if (bias) sums.set(bias.data);
      else sums.fill(0);
      terms.clear();
      for (let k = 0; k < depth; k++) terms.push(x.data[row * depth + k], k * units);
      terms.addTo(sums, 0, units);
      output.data.set(sums, row * units);
    }
  };
}

// A list of nonzero inputs, each with the index of the first of its weights: one per output channel, contiguous.
class Terms {
  constructor(weights, most) {
    this.weights = weights;
    this.values = new Float64Array(most);
    this.places = new Int32Array(most);
    this.count = 0;
  }

  clear() {
    this.count = 0;
  }

  push(value, place) {
    if (value === 0) return;
    this.values[this.count] = value;
    this.places[this.count++] = place;
  }

  // Adds value * weight to the sums of the channels from `first` to `end - 1`, four inputs at a time.
  addTo(sums, first, end) {
    const { weights, values, places, count } = this;
    let i = 0;
    for (; i + 4 <= count; i += 4) {
      const a = values[i], b = values[i + 1], c = values[i + 2], d = values[i + 3];
      const p = places[i], q = places[i + 1], r = places[i + 2], s = places[i + 3];
      for (let k = first; k < end; k++) {
        sums[k] += a * weights[p + k] + b * weights[q + k] + c * weights[r + k] + d * weights[s + k];
      }
    }
    for (; i < count; i++) {
      for (let k = first; k < end; k++) sums[k] += values[i] * weights[places[i] + k];
    }
  }
}

// The summed axes vary fastest, so each value of the output is the sum of consecutive products.
function einsum(node, inputs, output) {
  const [operands, result] = node.attrs.equation.split("->");
  const letters = operands.split(",");
  const sizes = {};
  letters.forEach((axes, i) => [...axes].forEach((letter, axis) => (sizes[letter] = inputs[i].shape[axis])));
  const loop = [...result, ...Object.keys(sizes).filter((letter) => !result.includes(letter))];
  const shape = loop.map((letter) => sizes[letter]);
  const mapOf = (axes, strides) => indexMap(shape, loop.map((letter) => (axes.includes(letter) ? strides[axes.indexOf(letter)] : 0)));
  const [xMap, yMap] = letters.map((axes, i) => mapOf(axes, stridesOf(inputs[i].shape)));
  const [x, y] = inputs;
  const terms = count(shape) / output.data.length;
  return () => {
    for (let i = 0, at = 0; i < output.data.length; i++) {
      let sum = 0;
      for (const end = at + terms; at < end; at++) sum += x.data[xMap[at]] * y.data[yMap[at]];
      output.data[i] = sum;
    }
  };
}

function pool(node, [x], output) {
  const [, height, width, channels] = x.shape;
  const [images, newHeight, newWidth] = output.shape;
  const { size, strides, pads } = node.attrs;
  const isMax = node.op === "max_pool";
  const share = node.op === "avg_pool" ? 1 / (size[0] * size[1]) : 1;
  const pooled = output.data;
  return () => {
    pooled.fill(isMax ? -Infinity : 0);
    let at = 0;
    for (let image = 0; image < images; image++) {
      for (let y = 0; y < newHeight; y++) {
        for (let column = 0; column < newWidth; column++, at += channels) {
          for (let i = 0; i < size[0]; i++) {
            const row = y * strides[0] - pads[0][0] + i;
            if (row < 0 || row >= height) continue;
            for (let j = 0; j < size[1]; j++) {
              const place = column * strides[1] - pads[1][0] + j;
              if (place < 0 || place >= width) continue;
              const from = ((image * height + row) * width + place) * channels;
              for (let c = 0; c < channels; c++) {
                const value = x.data[from + c];
                if (!isMax) pooled[at + c] += value * share;
                else if (value > pooled[at + c]) pooled[at + c] = value;
              }
            }
          }
        }
      }
    }
  };
}

function reduce(node, [x], output) {
  const kept = x.shape.map((_, axis) => !node.attrs.axes.includes(axis));
  const strides = stridesOf(x.shape.filter((_, axis) => kept[axis]));
  let next = 0;
  const map = indexMap(x.shape, kept.map((is) => (is ? strides[next++] : 0)));
  const f = { reduce_max: BINARY.max, reduce_min: BINARY.min }[node.op] ?? BINARY.add;
  const start = { reduce_max: -Infinity, reduce_min: Infinity }[node.op] ?? 0;
  const share = node.op === "reduce_mean" ? output.data.length / x.data.length : 1;
  const result = new Float64Array(output.data.length);
  return () => {
    result.fill(start);
    for (let i = 0; i < map.length; i++) result[map[i]] = f(result[map[i]], x.data[i]);
    for (let i = 0; i < result.length; i++) output.data[i] = result[i] * share;
  };
}

// Softmax over the last axis.
function softmax(node, [x], output) {
  const width = x.shape[x.shape.length - 1];
  return () => {
    for (let row = 0; row < x.data.length; row += width) {
      const logits = x.data.subarray(row, row + width);
      const most = Math.max(...logits);
      let sum = 0;
      for (let i = 0; i < width; i++) sum += output.data[row + i] = Math.exp(logits[i] - most);
      for (let i = 0; i < width; i++) output.data[row + i] /= sum;
    }
  };
}
