// Draws the parts of the page: digits, maps, bars, and the input window of a value.

const LEVELS = 255; // steps of the colour scale on each side of 0
const GAP = 1; // between two maps, in pixels of their canvas
const ROOM = 832; // width of a row of maps on a wide page

// The colours of the page's current theme, read from its style sheet.
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim().match(/\w\w/g).map((pair) => parseInt(pair, 16));
  const zero = color("--map-zero"), positive = color("--map-positive"), negative = color("--map-negative");
  const mix = (to, share) => {
    const [r, g, b] = zero.map((from, i) => Math.round(from + (to[i] - from) * share));
    return (255 << 24) | (b << 16) | (g << 8) | r;
  };
  const scale = new Uint32Array(2 * LEVELS + 1);
  for (let i = 0; i <= LEVELS; i++) {
    scale[LEVELS + i] = mix(positive, (i / LEVELS) ** 0.7);
    scale[LEVELS - i] = mix(negative, (i / LEVELS) ** 0.7);
  }
  return { ink: color("--ink"), scale };
}

// The index of a value in the colour scale; `most` is the largest absolute value.
function level(value, most) {
  return LEVELS + Math.round(clamp(value / most || 0, -1, 1) * LEVELS);
}

function cssColor(theme, value, most) {
  const color = theme.scale[level(value, most)];
  const rgb = [color & 255, (color >> 8) & 255, (color >> 16) & 255];
  const dark = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 140;
  return { background: `rgb(${rgb})`, color: dark ? "#fff" : "#000" };
}

// Paints a 28x28 image: white on black as the network gets it, or in the colour `ink`, [r, g, b], on transparent.
function paintDigit(context, pixels, ink = null) {
  const image = context.createImageData(SIDE, SIDE);
  const cells = new Uint32Array(image.data.buffer);
  const color = ink && (ink[2] << 16) | (ink[1] << 8) | ink[0];
  for (let i = 0; i < cells.length; i++) cells[i] = ink ? (pixels[i] << 24) | color : (255 << 24) | (pixels[i] * 0x010101);
  context.putImageData(image, 0, 0);
}

// Sets a text only if it has changed, because the browser would lay out even the same text again.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// The maps of one stage, side by side on one canvas. A value is a square of `zoom` by `zoom` canvas pixels, and the gap
// between maps is `GAP` canvas pixels. The browser magnifies the canvas, to at most 4 CSS pixels per canvas pixel.
class Maps {
  constructor(stage, { height, width, channels }, isWide) {
    Object.assign(this, { stage, height, width, channels });
    const most = isWide ? (width === 1 ? 32 : width <= 24 ? 16 : 8) : width <= 16 ? 16 : 8; // maps in a row, at most
    this.columns = Math.min(channels, most);
    this.rows = Math.ceil(channels / this.columns);
    const side = clamp(Math.floor((ROOM / most - 4) / width), 1, 24); // of a value, in CSS pixels
    this.zoom = Math.ceil(side / 4);
    this.canvas = element("canvas", { className: "maps", tabIndex: 0,
      width: this.columns * (width * this.zoom + GAP) - GAP,
      height: this.rows * (height * this.zoom + GAP) - GAP });
    this.canvas.style.width = `${this.canvas.width * Math.floor(side / this.zoom)}px`;
    this.canvas.setAttribute("role", "application"); // so that the arrow keys reach it
    this.context = this.canvas.getContext("2d");
    this.image = this.context.createImageData(this.canvas.width, this.canvas.height);
    this.cells = new Uint32Array(this.image.data.buffer);
    this.marker = element("div", { className: "marker", hidden: true });
    this.range = element("span", { className: "range" });
  }

  paint(values, theme) {
    const { height, width, channels, columns, zoom, cells } = this;
    const across = this.canvas.width;
    let low = 0, high = 0;
    for (let i = 0; i < height * width * channels; i++) {
      if (values[i] < low) low = values[i];
      if (values[i] > high) high = values[i];
    }
    const most = Math.max(-low, high);
    for (let channel = 0; channel < channels; channel++) {
      const left = (channel % columns) * (width * zoom + GAP);
      const top = Math.floor(channel / columns) * (height * zoom + GAP);
      for (let y = 0; y < height; y++) {
        const start = (top + y * zoom) * across + left;
        for (let x = 0, at = start; x < width; x++) {
          const color = theme.scale[level(values[(y * width + x) * channels + channel], most)];
          for (const end = at + zoom; at < end; at++) cells[at] = color;
        }
        for (let copy = 1; copy < zoom; copy++) cells.copyWithin(start + copy * across, start, start + width * zoom);
      }
    }
    this.context.putImageData(this.image, 0, 0);
    setText(this.range, low < 0 ? `${format(low)} to ${format(high)}` : `0 to ${format(high)}`);
  }

  // The place of the value under a point of the window; null outside the maps. A gap belongs to the map before it.
  placeAt(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    const pitch = [this.height * this.zoom + GAP, this.width * this.zoom + GAP];
    const at = [(clientY - box.top) * scale, (clientX - box.left) * scale];
    const tile = at.map((value, axis) => Math.floor(value / pitch[axis]));
    const within = at.map((value, axis) => Math.floor((value - tile[axis] * pitch[axis]) / this.zoom));
    const [y, x] = [Math.min(within[0], this.height - 1), Math.min(within[1], this.width - 1)];
    const channel = tile[0] * this.columns + tile[1];
    const inside = x >= 0 && y >= 0 && tile[1] >= 0 && tile[1] < this.columns && channel < this.channels;
    return inside ? { y, x, channel } : null;
  }

  // The place one step away, which may be in the next map; with `leap`, the same place in the next map.
  neighbour({ y, x, channel }, dy, dx, leap) {
    const row = Math.floor(channel / this.columns) * this.height + y + dy * (leap ? this.height : 1);
    const column = (channel % this.columns) * this.width + x + dx * (leap ? this.width : 1);
    const next = Math.floor(row / this.height) * this.columns + Math.floor(column / this.width);
    const inside = row >= 0 && column >= 0 && column < this.columns * this.width && next < this.channels;
    return inside ? { y: row % this.height, x: column % this.width, channel: next } : { y, x, channel };
  }

  mark(place) {
    this.marker.hidden = !place;
    if (!place) return;
    const left = (place.channel % this.columns) * (this.width * this.zoom + GAP) + place.x * this.zoom;
    const top = Math.floor(place.channel / this.columns) * (this.height * this.zoom + GAP) + place.y * this.zoom;
    const percent = (length, whole) => `${(100 * length) / whole}%`;
    Object.assign(this.marker.style, {
      left: percent(left, this.canvas.width), top: percent(top, this.canvas.height),
      width: percent(this.zoom, this.canvas.width), height: percent(this.zoom, this.canvas.height),
    });
  }
}

// A bar for each class, and a thin bar below it for the other checkpoint.
class Bars {
  constructor(list, classes) {
    this.classes = classes;
    this.rows = classes.map((name) => {
      const row = element("li", {}, element("span", { className: "name", textContent: name }),
        element("span", { className: "track" }, element("i", { className: "bar" }), element("i", { className: "other" })),
        element("span", { className: "percent" }));
      list.append(row);
      return row;
    });
  }

  update(probabilities, others, best) {
    this.rows.forEach((row, i) => {
      const [, track, percent] = row.children;
      row.classList.toggle("best", i === best);
      track.children[0].style.transform = `scaleX(${probabilities ? probabilities[i] : 0})`;
      track.children[1].style.transform = `scaleX(${others ? others[i] : 0})`;
      setText(percent, probabilities ? percentage(probabilities[i]) : "");
    });
  }
}

function percentage(value) {
  if (value > 0 && value < 0.001) return "< 0.1 %";
  if (value < 1 && value > 0.999) return "> 99.9 %";
  return `${(100 * value).toFixed(1)} %`;
}

// The input window of a value as a small table: its inputs, their weights, or the products.
function windowTable(caption, window, cell, theme) {
  const values = Array.from({ length: window.rows * window.columns },
    (_, i) => cell(Math.floor(i / window.columns), i % window.columns));
  const most = Math.max(...values.filter(Number.isFinite).map(Math.abs), 1e-9);
  if (window.rows * window.columns > 36) return windowPicture(caption, window, values, most, theme);
  const table = element("table", {}, element("caption", { textContent: caption }));
  table.style.setProperty("--columns", window.columns);
  for (let i = 0; i < window.rows; i++) {
    const row = table.insertRow();
    for (const value of values.slice(i * window.columns, (i + 1) * window.columns)) {
      const data = row.insertCell();
      data.textContent = Number.isFinite(value) ? shortNumber(value) : "";
      Object.assign(data.style, cssColor(theme, value, most));
    }
  }
  return table;
}

// Formats a number for a small cell: two decimals without the leading 0, or one decimal from 1 on.
function shortNumber(value) {
  return value.toFixed(Math.abs(value) < 0.995 ? 2 : 1).replace("-", "−").replace(/^(−?)0\./, "$1.");
}

// The input window as a picture, if it is too large for a table of numbers.
function windowPicture(caption, window, values, most, theme) {
  const canvas = element("canvas", { width: window.columns, height: window.rows });
  const context = canvas.getContext("2d");
  const image = context.createImageData(window.columns, window.rows);
  new Uint32Array(image.data.buffer).set(values.map((value) => theme.scale[level(value, most)]));
  context.putImageData(image, 0, 0);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  return element("figure", {}, element("figcaption", { textContent: caption }), canvas);
}
