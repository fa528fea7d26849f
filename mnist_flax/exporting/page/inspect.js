// Finds what the page shows of a network: its layers as maps, and how each value of a map is computed.

const POOLS = { max_pool: "Max pooling", avg_pool: "Average pooling", sum_pool: "Sum pooling", reduce_mean: "Mean of each map" };
const FUNCTIONS = { relu: "ReLU", leaky_relu: "leaky ReLU", elu: "ELU", gelu: "GELU", silu: "SiLU", tanh: "tanh" };

// Lists the stages to show, in order of computation: each convolution or dense layer, and the pooling after it.
// A stage is { title, layer, first, node, steps }: `first` is the convolution, dense layer or pooling, `steps` are the
// operations of the same shape that follow from it, such as the activation, and `node` is the last of these: its output
// is shown.
function findStages(network) {
  const owners = findOwners(network);
  const numbers = {}; // counts the layers of each kind, separately for each member of a committee
  const stages = [];
  for (const first of network.nodes.filter((node) => hasWeights(network, node))) {
    const own = network.nodes.filter((node) => owners.get(node.name) === first.name);
    const isLast = own.some((node) => node.name === network.outputs.logits);
    const member = first.layer.match(/^member_(\d+)/)?.[1];
    const kind = (member ? `Network ${Number(member) + 1}: ` : "") + (first.op === "conv" ? "Convolution" : "Dense layer");
    numbers[kind] = (numbers[kind] ?? 0) + 1;
    const title = isLast && !member ? "Logits" : `${kind} ${numbers[kind]}`;
    stages.push(stageOf(title, first, own));
    const pooling = own.find((node) => isPooling(node));
    if (pooling && !isLast) stages.push(stageOf(POOLS[pooling.op], pooling, own));
  }
  return stages;
}

// A mean is a pooling if it is over the rows and columns of maps, and not, for example, over channels to normalise them.
function isPooling(node) {
  if (node.op !== "reduce_mean") return node.op in POOLS;
  return node.shape.length === 2 && String(node.attrs.axes) === "1,2";
}

function stageOf(title, first, nodes) {
  const names = new Set([first.name]);
  const steps = [];
  for (const node of nodes.slice(nodes.indexOf(first) + 1)) {
    const follows = node.inputs.some((name) => names.has(name));
    if (!follows || node.op === "softmax" || !sameShape(node.shape, first.shape)) continue;
    steps.push(node);
    names.add(node.name);
  }
  return { title, layer: first.layer, first, steps, node: steps[steps.length - 1] ?? first };
}

// For each node, the name of the last node with weights that it depends on, itself included.
function findOwners(network) {
  const owners = new Map();
  const order = new Map(network.nodes.map((node, i) => [node.name, i]));
  for (const node of network.nodes) {
    const found = node.inputs.map((name) => owners.get(name)).filter((name) => name !== undefined);
    const last = found.sort((a, b) => order.get(a) - order.get(b)).pop();
    owners.set(node.name, hasWeights(network, node) ? node.name : last);
  }
  return owners;
}

function hasWeights(network, node) {
  return (node.op === "conv" || node.op === "dense") && node.inputs[1] in network.constants;
}

function sameShape(a, b) {
  return a.length === b.length && a.every((size, axis) => size === b[axis]);
}

// The size of a stage's maps; each value of a vector is a map of one pixel.
function mapSize(shape) {
  const channels = shape[shape.length - 1];
  return shape.length === 4 ? { height: shape[1], width: shape[2], channels } : { height: 1, width: 1, channels };
}

// The index of a map's value in the array of its stage.
function indexOf(shape, { y, x, channel }) {
  const { width, channels } = mapSize(shape);
  return (y * width + x) * channels + channel;
}

// Explains one value of a stage: { window, sum, lines }.
// `window` is the input that the value is computed from: { rows, columns, channels, firstChannel, depth,
// value(i, j, k), weight(i, j, k) }. It covers `channels` input maps, from map `firstChannel` on; the input has `depth`.
// Pooling has one channel, no `firstChannel` and no `depth`, and its `weight` is null.
// `sum` is the result before the bias, and `lines` are the bias and the steps after it, each { label, value }.
function explain(network, stage, place) {
  const { first } = stage;
  const [x, kernel, bias] = first.inputs.map((name) => network.values.get(name));
  const lines = [];
  let window;
  if (first.op === "conv") window = convWindow(x, kernel, first, place);
  else if (first.op === "dense") window = denseWindow(network, first, kernel, place);
  else window = poolWindow(x, first, place);
  let value = network.values.get(first.name).data[indexOf(first.shape, place)];
  if (bias) {
    lines.push({ label: signed(bias.data[place.channel]) + " bias", value });
    value = 0;
    for (let k = 0; k < window.channels; k++) value += contribution(window, k);
  }
  return { window, sum: value, lines: lines.concat(explainSteps(network, stage, place)) };
}

// What input map k adds to the sum.
function contribution({ rows, columns, value, weight }, k) {
  let sum = 0;
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) sum += value(i, j, k) * weight(i, j, k);
  return sum;
}

function convWindow(x, kernel, { attrs, shape }, { y, x: column, channel }) {
  const [, height, width, depth] = x.shape;
  const [rows, columns, groupDepth, channels] = kernel.shape;
  const group = Math.floor(channel / (shape[3] / attrs.groups));
  return {
    rows, columns, channels: groupDepth, firstChannel: group * groupDepth, depth,
    value(i, j, k) {
      const row = y * attrs.strides[0] - attrs.pads[0][0] + i * attrs.dilations[0];
      const at = column * attrs.strides[1] - attrs.pads[1][0] + j * attrs.dilations[1];
      const inside = row >= 0 && row < height && at >= 0 && at < width;
      return inside ? x.data[(row * width + at) * depth + group * groupDepth + k] : 0;
    },
    weight: (i, j, k) => kernel.data[((i * columns + j) * groupDepth + k) * channels + channel],
  };
}

// A dense layer on flattened maps is shown as a convolution whose kernel is as large as the maps, and one on maps as a
// convolution with a 1x1 kernel.
function denseWindow(network, node, kernel, place) {
  const { channel } = place, input = network.values.get(node.inputs[0]);
  if (input.shape.length === 4) {
    const depth = kernel.shape[0], first = indexOf(input.shape, { ...place, channel: 0 });
    return {
      rows: 1, columns: 1, channels: depth, firstChannel: 0, depth,
      value: (i, j, k) => input.data[first + k],
      weight: (i, j, k) => kernel.data[k * kernel.shape[1] + channel],
    };
  }
  let source = node.inputs[0];
  for (let before = network.node(source); before?.op === "reshape"; before = network.node(source)) source = before.inputs[0];
  const { data, shape } = network.values.get(source);
  const { height, width, channels } = count(shape) === kernel.shape[0] ? mapSize(shape) : mapSize([kernel.shape[0]]);
  const index = (i, j, k) => (i * width + j) * channels + k;
  return {
    rows: height, columns: width, channels, firstChannel: 0, depth: channels,
    value: (i, j, k) => data[index(i, j, k)],
    weight: (i, j, k) => kernel.data[index(i, j, k) * kernel.shape[1] + channel],
  };
}

function poolWindow(x, { op, attrs }, { y, x: column, channel }) {
  const { height, width, channels } = mapSize(x.shape);
  const whole = { size: [height, width], strides: [1, 1], pads: [[0, 0], [0, 0]] };
  const { size, strides, pads } = op === "reduce_mean" ? whole : attrs;
  return {
    rows: size[0], columns: size[1], channels: 1, weight: null,
    value(i, j) {
      const row = y * strides[0] - pads[0][0] + i, at = column * strides[1] - pads[1][0] + j;
      const inside = row >= 0 && row < height && at >= 0 && at < width;
      return inside ? x.data[(row * width + at) * channels + channel] : op === "max_pool" ? -Infinity : 0;
    },
  };
}

// One line for each of a stage's steps; the operations of one function (such as SiLU) share a line.
function explainSteps(network, { first, steps }, place) {
  const lines = [];
  steps.forEach((node, i) => {
    if (node.function && node.function === steps[i + 1]?.function && node.layer === steps[i + 1].layer) return;
    const index = indexOf(first.shape, place);
    lines.push({ label: stepLabel(network, node, index), value: network.values.get(node.name).data[index] });
  });
  return lines;
}

function stepLabel(network, node, index) {
  const name = FUNCTIONS[node.function] ?? FUNCTIONS[node.op];
  if (name) return name;
  if (node.inputs.length !== 2) return node.function || node.op;
  const at = node.inputs.findIndex((input) => input in network.constants);
  if (at < 0) return { add: "+ shortcut" }[node.op] ?? (node.function || node.op);
  const input = network.values.get(node.inputs[at]);
  const operand = input.data[broadcastMap(input, node.shape)?.[index] ?? index];
  if (at === 0 && (node.op === "sub" || node.op === "div")) return `${format(operand)} ${node.op === "sub" ? "−" : "÷"} value`;
  const isTemperature = node.name === network.outputs.logits;
  return { add: signed(operand), sub: signed(-operand), mul: `× ${format(operand)}`,
    div: `÷ ${format(operand)}${isTemperature ? " temperature" : ""}` }[node.op] ?? node.op;
}

function format(value) {
  if (!Number.isFinite(value)) return "outside";
  const text = Math.abs(value).toFixed(Math.abs(value) < 100 ? 3 : 1);
  return value < 0 && Number(text) !== 0 ? `−${text}` : text;
}

function signed(value) {
  return value < 0 ? `− ${format(-value)}` : `+ ${format(value)}`;
}

// The part of the image that a value depends on: { top, left, bottom, right }, in pixels, bottom and right exclusive.
// It is the whole image if an operation before the value does not keep rows and columns.
function receptiveField(network, { name }, { y, x }) {
  const boxes = new Map([[name, { top: y, left: x, bottom: y + 1, right: x + 1 }]]);
  for (const node of [...network.nodes].reverse()) {
    const box = boxes.get(node.name);
    if (!box) continue;
    const sources = sourcesOf(network, node);
    if (!sources) return { top: 0, left: 0, bottom: SIDE, right: SIDE };
    const wider = inputBox(network, node, box);
    for (const source of sources) boxes.set(source, union(wider, boxes.get(source) ?? wider));
  }
  const field = boxes.get(network.image);
  return {
    top: Math.max(0, field.top), left: Math.max(0, field.left),
    bottom: Math.min(SIDE, field.bottom), right: Math.min(SIDE, field.right),
  };
}

// The inputs of a node that are not constants; null if their rows and columns are not those of its output.
function sourcesOf(network, node) {
  const sources = node.inputs.filter((input) => !(input in network.constants));
  const shapes = [node, ...sources.map((source) => network.values.get(source))].map(({ shape }) => shape);
  // Several views of the image, [1, views, SIDE, SIDE, 1], become one batch: the first view, which is not shifted, is shown.
  if (node.op === "reshape" && sameShape(shapes[1].slice(2), [SIDE, SIDE, 1])) return [network.image];
  const isMoved = node.op === "concat" ? node.attrs.axis < 3 : ["einsum", "reshape", "transpose"].includes(node.op);
  return isMoved || shapes.some((shape) => shape.length !== 4) ? null : sources;
}

// The part of a node's inputs that a box of its output is computed from.
function inputBox(network, { op, attrs, inputs }, box) {
  if (op === "conv" || /pool/.test(op)) {
    const { strides, pads, dilations = [1, 1] } = attrs;
    const size = attrs.size ?? network.values.get(inputs[1]).shape;
    const reach = [0, 1].map((axis) => (size[axis] - 1) * dilations[axis]);
    return {
      top: box.top * strides[0] - pads[0][0], bottom: (box.bottom - 1) * strides[0] - pads[0][0] + reach[0] + 1,
      left: box.left * strides[1] - pads[1][0], right: (box.right - 1) * strides[1] - pads[1][0] + reach[1] + 1,
    };
  }
  if (op !== "slice" && op !== "pad") return box;
  const [dy, dx] = op === "slice" ? attrs.starts.slice(1) : attrs.low.slice(1).map((width) => -width);
  const [rows, columns] = op === "slice" ? attrs.strides.slice(1) : [1, 1];
  return {
    top: box.top * rows + dy, bottom: (box.bottom - 1) * rows + dy + 1,
    left: box.left * columns + dx, right: (box.right - 1) * columns + dx + 1,
  };
}

function union(a, b) {
  return {
    top: Math.min(a.top, b.top), left: Math.min(a.left, b.left),
    bottom: Math.max(a.bottom, b.bottom), right: Math.max(a.right, b.right),
  };
}
