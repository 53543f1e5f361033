"use strict";

/* The texts that are shown on the slide, each with its map, threshold, areas and colour. */

/** A text on the open slide; `facts` are those of the source, null until they have arrived. */
class Layer {
  constructor(text, negative, colour) {
    Object.assign(this, { text, negative, colour, shown: true, facts: null, threshold: null, areas: [], error: "" });
  }

  /** Discard the results for the previous slide. */
  reset() {
    Object.assign(this, { facts: null, threshold: null, areas: [], next: 0, error: "", canvas: null, path: null, boxes: null });
  }

  paint(patches, smooth, colours) {
    const { scores, low, high } = this.facts;
    if (this.rasterOf !== patches || this.smooth !== smooth || this.rasterFacts !== this.facts) {
      this.raster = patches.raster(scores, smooth);
      [this.rasterOf, this.smooth, this.rasterFacts] = [patches, smooth, this.facts];
    }
    const threshold = this.threshold / 100;
    this.canvas = paintRaster(patches, this.raster, { low, high, threshold, colours, colour: this.colour });
  }

  setAreas(areas) {
    this.areas = areas;
    this.next = 0;
    this.path = pathOf(areas);
    this.boxes = boxesOf(areas);
  }

  /** The score of a patch, and the percentage of patches with a lower score. */
  at(patch) {
    const { scores } = this.facts;
    const score = scores[patch];
    const below = scores.reduce((count, other) => count + (other < score), 0);
    return `${score.toFixed(3)}, above ${Math.floor((100 * below) / scores.length)}% of patches`;
  }

  summary() {
    if (this.error) return this.error;
    if (!this.facts) return "Computing…";
    const area = this.areas.reduce((sum, { properties }) => sum + (properties.measurements["area mm^2"] ?? 0), 0);
    const count = `${this.areas.length} ${this.areas.length === 1 ? "area" : "areas"}`;
    return area ? `${count}, ${area < 0.1 ? area.toPrecision(2) : area.toFixed(2)} mm²` : count;
  }
}

/** The row of a layer in the panel; `does` holds the handlers of its controls. */
function layerRow(layer, { steps, removable, colours, does }) {
  const row = make("li", { className: "layer" });
  const name = make("span", { className: "name", textContent: layer.text });
  const shown = make("input", { type: "checkbox", checked: layer.shown });
  shown.addEventListener("change", () => does.show(layer, shown.checked));
  const swatch = make("i", { className: "swatch" });
  swatch.style.background = `rgb(${layer.colour.join(" ")})`;
  const head = make("div", { className: "head" }, make("label", { className: "check" }, shown, swatch, name));
  row.append(head);
  if (removable) {
    const remove = make("button", { type: "button", className: "plain", textContent: "×", title: `Remove ${layer.text}` });
    remove.setAttribute("aria-label", `Remove ${layer.text}`);
    remove.addEventListener("click", () => does.remove(layer));
    head.append(remove);
  }
  if (layer.negative.length) row.append(make("p", { className: "quiet", textContent: `minus ${layer.negative.join("; ")}` }));
  if (layer.facts) {
    const bar = make("div", { className: "bar" });
    const ends = colours.map((colour, i) => `rgb(${colour.join(" ")}) ${(100 * i) / (colours.length - 1)}%`);
    bar.style.background = `linear-gradient(90deg, ${ends.join(", ")})`;
    const value = make("output", { textContent: shownThreshold(layer) });
    const label = make("label", { className: "quiet", textContent: "Threshold " }, value);
    const slider = make("input", { type: "range", min: 0, max: 100, step: steps, value: layer.threshold });
    if (steps > 1) [slider.min, slider.max] = [steps, 100 - steps];
    label.append(slider);
    slider.addEventListener("input", () => {
      layer.threshold = Number(slider.value);
      value.textContent = shownThreshold(layer);
      does.cut(layer);
    });
    const range = make("div", { className: "range quiet" });
    range.append(layer.facts.low.toFixed(2), make("span", { textContent: layer.facts.high.toFixed(2) }));
    row.append(label, bar, range);
  }
  const foot = make("div", { className: "foot" });
  foot.append(make("span", { className: layer.error ? "error" : "quiet", textContent: layer.summary() }));
  if (layer.areas.length) {
    const next = make("button", { type: "button", textContent: "Next area" });
    next.addEventListener("click", () => does.next(layer));
    foot.append(next);
  }
  row.append(foot);
  layer.summaryElement = foot.firstChild;
  return row;
}

function shownThreshold({ facts: { low, high }, threshold }) {
  return (low + ((high - low) * threshold) / 100).toFixed(3);
}

/** An element with properties and children. */
function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}
