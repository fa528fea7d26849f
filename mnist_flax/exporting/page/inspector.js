// The panel that shows how one value of a map is computed.

class Inspector {
  constructor(panel) {
    this.panel = panel;
    this.title = panel.querySelector("h3");
    this.tables = panel.querySelector(".tables");
    this.lines = panel.querySelector(".arithmetic");
    this.picker = panel.querySelector(".picker");
    this.slider = this.picker.querySelector("input");
    this.pickerLabel = this.picker.querySelector("output");
    this.contributions = this.picker.querySelector("canvas");
    this.slider.addEventListener("input", () => this.show({ ...this.shown, input: Number(this.slider.value) }));
    this.contributions.addEventListener("pointerdown", (event) => {
      const box = this.contributions.getBoundingClientRect();
      const share = clamp((event.clientX - box.left) / box.width, 0, 0.9999);
      this.show({ ...this.shown, input: Math.floor(share * (Number(this.slider.max) + 1)) });
    });
  }

  // shown: { network, stage, place, theme, input }; `input` is the index of the input map to show, by default that of
  // the largest contribution in absolute value.
  show(shown) {
    this.shown = shown;
    const { network, stage, place, theme } = shown;
    const { window, sum, lines } = explain(network, stage, place);
    this.title.textContent = describePlace(stage, place);
    const isLayer = window.weight !== null;
    this.picker.hidden = !isLayer || window.channels === 1;
    if (isLayer) this.showProducts(window, shown.input, theme);
    else this.tables.replaceChildren(windowTable("Window", window, window.value, theme));
    const first = isLayer ? `sum of ${window.rows * window.columns * window.channels} products` : stage.title.toLowerCase();
    this.lines.replaceChildren(...[{ label: first, value: sum }, ...lines].map(({ label, value }) =>
      element("tr", {}, element("th", { textContent: label, scope: "row" }), element("td", { textContent: format(value) }))));
  }

  showProducts(window, input, theme) {
    const shares = Array.from({ length: window.channels }, (_, k) => contribution(window, k));
    const strongest = shares.reduce((best, share, k) => (Math.abs(share) > Math.abs(shares[best]) ? k : best), 0);
    const k = Math.min(input ?? strongest, window.channels - 1);
    this.tables.replaceChildren(
      windowTable("Input", window, (i, j) => window.value(i, j, k), theme), element("span", { textContent: "×" }),
      windowTable("Kernel", window, (i, j) => window.weight(i, j, k), theme), element("span", { textContent: "=" }),
      windowTable("Products", window, (i, j) => window.value(i, j, k) * window.weight(i, j, k), theme));
    this.slider.max = window.channels - 1;
    this.slider.value = k;
    const unit = window.rows * window.columns > 1 ? "Input map" : "Input";
    this.pickerLabel.textContent = `${unit} ${window.firstChannel + k + 1} of ${window.depth} adds ${format(shares[k])}`;
    paintContributions(this.contributions, shares, k, theme);
  }
}

function describePlace(stage, { y, x, channel }) {
  if (stage.node.shape.length !== 4) return `${stage.title}: unit ${channel + 1}`;
  return `${stage.title}: map ${channel + 1}, row ${y + 1}, column ${x + 1}`;
}

// Draws what each input map adds to the sum: a bar upwards if positive, downwards if negative.
function paintContributions(canvas, shares, chosen, theme) {
  const height = 48, width = 256;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const most = Math.max(...shares.map(Math.abs), 1e-9);
  const step = width / shares.length;
  shares.forEach((share, k) => {
    const bar = (Math.abs(share) / most) * (height / 2 - 1);
    context.fillStyle = cssColor(theme, share < 0 ? -1 : 1, 1).background;
    context.globalAlpha = k === chosen ? 1 : 0.45;
    context.fillRect(k * step, share < 0 ? height / 2 : height / 2 - bar, Math.max(step - 0.5, 0.75), Math.max(bar, 0.5));
  });
}
