// The drawing pad. Strokes of a mouse, finger or pen are kept as lines, so they can be undone and drawn at any size.

const PAD = 280; // the pad's side in its own units
const PEN = 20; // width of the pen in these units
const MARGIN = 20; // around the pad in the raster: widened strokes can extend beyond the edge of the pad
const RASTER = (PAD + 2 * MARGIN) / 2; // side of the raster in pixels

class Pad {
  // onDraw(finished) is called after every change; finished is false during a stroke.
  constructor(canvas, onDraw) {
    this.canvas = canvas;
    this.onDraw = onDraw;
    this.strokes = []; // each a list of [x, y]
    this.backdrop = null; // a 28x28 image shown instead of strokes
    this.pointer = null;
    this.rasterContext = Object.assign(document.createElement("canvas"), { width: RASTER, height: RASTER })
      .getContext("2d", { willReadFrequently: true });
    canvas.addEventListener("pointerdown", (event) => this.start(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.end(event));
  }

  start(event) {
    if (this.pointer !== null || event.button !== 0) return;
    this.pointer = event.pointerId;
    this.canvas.setPointerCapture(event.pointerId);
    this.backdrop = null;
    this.strokes.push([this.place(event)]);
    this.onDraw(false);
  }

  move(event) {
    if (event.pointerId !== this.pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    const stroke = this.strokes[this.strokes.length - 1];
    for (const part of events.length ? events : [event]) stroke.push(this.place(part));
    this.onDraw(false);
  }

  end(event) {
    if (event.pointerId !== this.pointer) return;
    this.pointer = null;
    this.onDraw(true);
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const inside = (at, length) => clamp((at * PAD) / length, 0, PAD);
    return [inside(event.clientX - box.left, box.width), inside(event.clientY - box.top, box.height)];
  }

  // Replaces the drawing; a stroke that is being drawn ends.
  set(strokes, backdrop = null) {
    this.pointer = null;
    this.strokes = strokes;
    this.backdrop = backdrop;
    this.onDraw(true);
  }

  undo() {
    this.set(this.strokes.slice(0, -1), this.strokes.length ? null : this.backdrop);
  }

  clear() {
    this.set([]);
  }

  get isEmpty() {
    return !this.strokes.length;
  }

  // The drawing as grey values, white on black: u8[160 * 160].
  //
  // Strokes thinner than a tenth of the drawing would fade in the 28x28 image, so they are widened to a tenth, as in
  // mnist_flax.predict.
  raster() {
    const context = this.rasterContext;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, RASTER, RASTER);
    context.scale(0.5, 0.5);
    context.translate(MARGIN, MARGIN);
    drawStrokes(context, this.strokes, Math.max(PEN, 0.1 * this.extent()), "#fff");
    const { data } = context.getImageData(0, 0, RASTER, RASTER);
    const grey = new Uint8Array(RASTER * RASTER);
    for (let i = 0; i < grey.length; i++) grey[i] = data[4 * i];
    return grey;
  }

  // The longer side of the drawing's bounding box, including the pen's width.
  extent() {
    const points = this.strokes.flat();
    const lengths = [0, 1].map((axis) => {
      const places = points.map((point) => point[axis]);
      return Math.max(...places) - Math.min(...places);
    });
    return points.length ? Math.max(...lengths) + PEN : 0;
  }

  // The 28x28 pixels for the network.
  pixels() {
    return this.backdrop ?? frame(this.raster(), RASTER, RASTER);
  }

  // Paints the drawing at the screen's resolution; ink is [r, g, b].
  paint(ink) {
    const side = Math.round(this.canvas.clientWidth * devicePixelRatio) || PAD;
    if (this.canvas.width !== side) this.canvas.width = this.canvas.height = side;
    const context = this.canvas.getContext("2d");
    context.setTransform(side / PAD, 0, 0, side / PAD, 0, 0);
    context.clearRect(0, 0, PAD, PAD);
    if (this.backdrop) paintBackdrop(context, this.backdrop, ink);
    drawStrokes(context, this.strokes, PEN, `rgb(${ink})`);
  }
}

function drawStrokes(context, strokes, width, color) {
  Object.assign(context, { lineWidth: width, lineCap: "round", lineJoin: "round", strokeStyle: color });
  for (const [first, ...rest] of strokes) {
    context.beginPath();
    context.moveTo(...first);
    for (const point of rest.length ? rest : [first]) context.lineTo(...point);
    context.stroke();
  }
}

function paintBackdrop(context, pixels, ink) {
  const digit = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  paintDigit(digit.getContext("2d"), pixels, ink);
  context.imageSmoothingEnabled = false;
  context.drawImage(digit, 0, 0, PAD, PAD);
}
