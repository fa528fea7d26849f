// The application: runs the network on the drawing or the chosen example, and updates the page.

const KINDS = { right: "Right", mistake: "Mistakes", corrupted: "Corrupted" };

const isWide = matchMedia("(min-width: 60rem)"); // room for the maps beside the pad

const $ = (selector) => document.querySelector(selector);

class App {
  constructor(data) {
    this.data = data;
    this.networks = data.checkpoints.map(() => null); // created when first needed
    this.chosen = 0; // index of the checkpoint whose answer is shown
    this.example = -1; // index of the example that is shown; -1 for a drawing
    this.pixels = new Uint8Array(SIDE * SIDE);
    this.selected = null; // { maps, place }: the value shown in the inspector
    this.theme = readTheme();
    this.pad = new Pad($("#pad"), (finished) => this.drawn(finished));
    this.bars = new Bars($("#bars"), data.classes);
    this.inspector = new Inspector($("#inspector"));
    this.buildStages();
    this.buildExamples();
    this.buildCheckpoints();
    this.listen();
    this.showExample(0);
  }

  network(i = this.chosen) {
    if (!this.networks[i]) {
      const { graph, weights } = this.data.checkpoints[i];
      this.networks[i] = new Network(graph, bytesOf(weights));
      this.networks[i].stages = findStages(this.networks[i]);
    }
    return this.networks[i];
  }

  // Drawing and answering ----------------------------------------------------------------------------------------------

  drawn(finished) {
    if (!this.pad.backdrop) this.leaveExample();
    if (finished) this.announceNext = true;
    this.update();
  }

  // Schedules one refresh before the next frame, no matter how many events arrive until then.
  update() {
    this.pending ??= requestAnimationFrame(() => {
      this.pending = null;
      this.refresh();
    });
  }

  refresh() {
    this.pixels = this.pad.pixels();
    const blank = this.pad.isEmpty && !this.pad.backdrop;
    const probabilities = this.network().run(this.pixels);
    const isFirst = !document.documentElement.dataset.ready; // the other checkpoint must not delay the first answer
    const other = isFirst || this.data.checkpoints.length < 2 ? null : this.network(1 - this.chosen).run(this.pixels);
    const best = probabilities.indexOf(Math.max(...probabilities));
    this.pad.paint(this.theme.ink);
    paintDigit($("#seen").getContext("2d"), this.pixels);
    $("#hint").hidden = !blank;
    $("#undo").disabled = this.pad.isEmpty;
    $("#clear").disabled = blank;
    this.showAnswer(blank ? null : probabilities, blank ? null : other, best);
    this.showComparison(blank ? null : other);
    this.maps.forEach((maps, i) => {
      maps.stage = this.network().stages[i];
      if (maps.isVisible) this.paint(maps);
    });
    this.explain();
    document.documentElement.dataset.ready = "true";
    if (isFirst) this.update();
  }

  showAnswer(probabilities, other, best) {
    $("#bars").classList.toggle("still", this.pad.pointer !== null);
    this.bars.update(probabilities, other, probabilities ? best : -1);
    const name = this.data.classes[best];
    const sure = probabilities && probabilities[best] >= this.data.checkpoints[this.chosen].doubtful_below;
    setText($("#digit"), probabilities ? name : "–");
    $("#digit").classList.toggle("long", Boolean(probabilities) && name.length > 2);
    $("#digit").classList.toggle("doubtful", Boolean(probabilities) && !sure);
    setText($("#confidence"), !probabilities ? "nothing drawn yet" : sure ? percentage(probabilities[best]) : `a guess: ${percentage(probabilities[best])}`);
    if (this.announceNext) {
      this.announceNext = false;
      $("#live").textContent = probabilities ? `${sure ? "" : "A guess: "}${name}, ${percentage(probabilities[best])}` : "The pad is empty.";
    }
    if (this.example >= 0) $("#caption").textContent = this.captionOf(this.data.examples[this.example], best);
  }

  paint(maps) {
    maps.paint(this.network().values.get(maps.stage.node.name).data, this.theme);
  }

  // Checkpoints ----------------------------------------------------------------------------------------------------------

  buildCheckpoints() {
    const { checkpoints } = this.data;
    $("#checkpoints").hidden = checkpoints.length < 2;
    checkpoints.forEach(({ title }, i) => {
      const input = element("input", { type: "radio", name: "checkpoint", checked: i === this.chosen });
      input.addEventListener("change", () => this.chooseCheckpoint(i));
      $("#checkpoints").append(element("label", {}, input, element("span", { textContent: title })));
    });
  }

  chooseCheckpoint(i) {
    this.chosen = i;
    this.announceNext = true;
    this.update();
  }

  showComparison(other) {
    $("#legend").hidden = !other;
    if (!other) return;
    const best = other.indexOf(Math.max(...other));
    const { title } = this.data.checkpoints[1 - this.chosen];
    setText($("#legend"), `Thin bars: ${title}, which reads ${this.data.classes[best]} (${percentage(other[best])})`);
  }

  // Examples -------------------------------------------------------------------------------------------------------------

  buildExamples() {
    this.buttons = this.data.examples.map((example, i) => {
      const canvas = element("canvas", { width: SIDE, height: SIDE });
      paintDigit(canvas.getContext("2d"), new Uint8Array(bytesOf(example.image)));
      const button = element("button", { type: "button", className: "thumbnail" }, canvas);
      button.setAttribute("aria-label", `${KINDS[example.kind]}: ${example.title}, labelled ${this.data.classes[example.label]}`);
      button.addEventListener("click", () => this.showExample(i));
      return button;
    });
    for (const [kind, title] of Object.entries(KINDS)) {
      const buttons = this.buttons.filter((_, i) => this.data.examples[i].kind === kind);
      if (!buttons.length) continue;
      const group = element("div", { className: "group" }, element("h3", { textContent: title }), element("div", { className: "strip" }, ...buttons));
      $("#examples").append(group);
    }
  }

  showExample(i) {
    const length = this.data.examples.length;
    if (!length) return this.pad.clear();
    this.leaveExample();
    this.example = (i + length) % length;
    this.buttons[this.example].setAttribute("aria-current", "true");
    this.pad.set([], new Uint8Array(bytesOf(this.data.examples[this.example].image)));
  }

  leaveExample() {
    this.buttons[this.example]?.removeAttribute("aria-current");
    this.example = -1;
    $("#caption").textContent = "Your drawing.";
  }

  captionOf({ title, label }, best) {
    const { classes } = this.data;
    return `${title}: labelled ${classes[label]}, ${best === label ? "read correctly" : `read as ${classes[best]}`}. Draw on it to start your own.`;
  }

  // Maps -----------------------------------------------------------------------------------------------------------------

  buildStages() {
    // Maps outside the viewport are painted when they are about to scroll into it.
    const observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const maps = this.maps.find((maps) => maps.figure === target);
        maps.isVisible = isIntersecting;
        if (isIntersecting) this.paint(maps);
      }
    }, { rootMargin: "300px" });
    this.maps = this.network().stages.map((stage) => {
      const maps = new Maps(stage, mapSize(stage.node.shape), isWide.matches);
      const { height, width, channels } = maps;
      const size = height * width > 1 ? `${channels} maps of ${height} × ${width}` : `${channels} values`;
      maps.canvas.setAttribute("aria-label", `${stage.title}, ${size}. The arrow keys choose a value to explain.`);
      const heading = element("h3", {}, stage.title, element("span", { className: "size", textContent: size }), maps.range);
      const figure = element("section", { className: "stage" }, heading, element("div", { className: "frame" }, maps.canvas, maps.marker));
      if (stage.title === "Logits" && channels <= maps.columns && this.data.classes.every((name) => name.length <= 2)) figure.append(this.classLabels(maps.canvas.style.width));
      $("#stages").append(figure);
      maps.figure = figure;
      observer.observe(figure);
      this.listenTo(maps);
      return maps;
    });
  }

  classLabels(width) {
    const labels = element("div", { className: "classes" }, ...this.data.classes.map((name) => element("span", { textContent: name })));
    labels.style.width = width;
    labels.setAttribute("aria-hidden", "true");
    return labels;
  }

  listenTo(maps) {
    const choose = (event) => {
      const place = maps.placeAt(event.clientX, event.clientY);
      if (place) this.select(maps, place);
    };
    maps.canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && choose(event));
    maps.canvas.addEventListener("click", choose);
    maps.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      const from = this.selected?.maps === maps ? this.selected.place : null;
      this.select(maps, from ? maps.neighbour(from, ...step, event.shiftKey) : { y: 0, x: 0, channel: 0 });
      $("#live").textContent = $("#inspector").innerText;
    });
  }

  select(maps, place) {
    this.selected?.maps.mark(null);
    this.selected = { maps, place };
    maps.mark(place);
    this.placeInspector();
    this.explain();
  }

  // Puts the inspector below the pad on a wide page, else below the maps with the selected value.
  placeInspector() {
    const panel = $("#inspector");
    panel.hidden = false;
    const home = isWide.matches ? $("#aside") : this.selected.maps.figure;
    if (panel.parentElement !== home) home.append(panel);
  }

  explain() {
    const field = $("#field");
    field.hidden = !this.selected;
    if (!this.selected) return;
    const { maps, place } = this.selected;
    const network = this.network();
    this.inspector.show({ network, stage: maps.stage, place, theme: this.theme });
    const { top, left, bottom, right } = receptiveField(network, maps.stage.node, place);
    const percent = (pixels) => `${(100 * pixels) / SIDE}%`;
    Object.assign(field.style, { top: percent(top), left: percent(left), width: percent(right - left), height: percent(bottom - top) });
  }

  // Buttons, keys and window events -----------------------------------------------------------------------------------

  listen() {
    $("#undo").addEventListener("click", () => this.pad.undo());
    $("#clear").addEventListener("click", () => this.pad.clear());
    $("#previous").addEventListener("click", () => this.showExample(this.example < 0 ? -1 : this.example - 1));
    $("#next").addEventListener("click", () => this.showExample(this.example + 1));
    addEventListener("keydown", (event) => this.key(event));
    addEventListener("resize", () => {
      if (this.selected) this.placeInspector();
      this.update();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.theme = readTheme();
      this.update();
    });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey ? event.key !== "z" : event.altKey) return;
    if (event.target.matches("input") && event.key.startsWith("Arrow")) return; // radio buttons and sliders use them
    const actions = { ArrowLeft: "#previous", ArrowRight: "#next", u: "#undo", z: "#undo", c: "#clear", Escape: "#clear" };
    const button = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!button) return;
    event.preventDefault();
    $(button).click();
  }
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

const app = new App(JSON.parse($("#data").textContent));
