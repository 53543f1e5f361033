"use strict";

/* The slide in OpenSeadragon, with a canvas over it for maps and areas. All coordinates are level-0 pixels. */

const BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAPj5+gAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==";
const SCALE_BAR = 140; // screen pixels at most
const UM_TIMES_MAGNIFICATION = 10; // nominal: 0.25 um per pixel is 40x

class Stage {
  /** The viewer fills `element`; `report(address)` is called for a tile that cannot be shown. */
  constructor(element, report) {
    this.element = element;
    this.report = report;
    this.layers = []; // {canvas, path, boxes, colour} of each layer that is drawn
    this.opacity = 0.6;
    this.showMaps = this.showAreas = this.showBoxes = this.smooth = true;
    this.viewer = OpenSeadragon({
      element,
      drawer: "canvas", // WebGL refuses the images of a page opened from file://
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "TOP_RIGHT",
      navigatorSizeRatio: 0.16,
      navigatorAutoFade: false,
      animationTime: 0.5,
      springStiffness: 9,
      minZoomImageRatio: 0.7,
      maxZoomPixelRatio: 4,
      visibilityRatio: 0.5,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      timeout: 90000,
    });
    this.viewer.canvas.setAttribute("role", "application");
    this.viewer.canvas.setAttribute("aria-label", "Slide: arrow keys pan, plus and minus zoom, 0 shows the whole slide");
    this.canvas = document.createElement("canvas");
    this.canvas.className = "overlay";
    this.viewer.canvas.append(this.canvas);
    this.viewer.addHandler("update-viewport", () => this.draw());
    this.viewer.addHandler("tile-load-failed", (event) => this.report(event.tile?.getUrl?.() ?? ""));
    this.viewer.addHandler("canvas-key", (event) => {
      // The page handles letters itself; OpenSeadragon would rotate and mirror the slide.
      if (/^[a-z]$/i.test(event.originalEvent.key)) event.preventDefaultAction = true;
    });
    new ResizeObserver(() => this.draw()).observe(element);
  }

  /** Show a slide by its tiles, or if `image` is null a blank slide of `bounds` [left, top, right, bottom]. */
  open(number, image, bounds) {
    this.layers = [];
    this.patches = null;
    this.blank = !image;
    this.mpp = image?.mpp ?? 0;
    this.bounds = image?.bounds ?? [0, 0];
    const [left, top, right, bottom] = image ? [0, 0, image.width, image.height] : bounds;
    [this.left, this.top, this.width, this.height] = [left, top, right - left, bottom - top];
    return new Promise((resolve, reject) => {
      this.viewer.addOnceHandler("open", resolve);
      this.viewer.addOnceHandler("open-failed", (event) => reject(new Error(event.message)));
      this.viewer.open(image ? this.#tiles(number, image) : this.#nothing());
    });
  }

  close() {
    this.layers = [];
    this.patches = null;
    this.width = 0;
    this.viewer.close();
    this.draw();
  }

  #tiles(number, { shown: [width, height], first, last, tile, overlap }) {
    return {
      width,
      height,
      tileSize: tile,
      tileOverlap: overlap,
      minLevel: first,
      maxLevel: last,
      getTileUrl: (level, column, row) => `slides/${number}/tiles/${level}/${column}_${row}.jpg`,
    };
  }

  #nothing() {
    const edge = Math.max(this.width, this.height);
    const level = Math.ceil(Math.log2(edge));
    return {
      width: this.width,
      height: this.height,
      tileSize: edge,
      tileOverlap: 0,
      minLevel: level,
      maxLevel: level,
      getTileUrl: () => BLANK,
    };
  }

  /** Screen pixels per level-0 pixel, and the position of the level-0 origin on the screen. */
  view() {
    const viewport = this.viewer.viewport;
    const corner = viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const scale = (viewport.getZoom(true) * viewport.getContainerSize().x) / this.width;
    return { scale, x: corner.x - this.left * scale, y: corner.y - this.top * scale };
  }

  /** The level-0 point under a position on the stage, given in pixels from its upper left corner. */
  pointAt(x, y) {
    const { scale, x: x0, y: y0 } = this.view();
    return [(x - x0) / scale, (y - y0) / scale];
  }

  middle() {
    return this.pointAt(this.element.clientWidth / 2, this.element.clientHeight / 2);
  }

  /** Bring a level-0 rectangle into view, with a margin. */
  goTo([left, top, right, bottom]) {
    const margin = 0.6 * Math.max(right - left, bottom - top);
    const place = [left - this.left - margin, top - this.top - margin, right - left + 2 * margin, bottom - top + 2 * margin];
    this.viewer.viewport.fitBounds(new OpenSeadragon.Rect(...place.map((value) => value / this.width)));
  }

  zoomBy(factor) {
    this.viewer.viewport.zoomBy(factor).applyConstraints();
  }

  home() {
    this.viewer.viewport.goHome();
  }

  draw() {
    const [width, height] = [this.element.clientWidth, this.element.clientHeight];
    const ratio = globalThis.devicePixelRatio || 1;
    const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== across || this.canvas.height !== down) {
      [this.canvas.width, this.canvas.height] = [across, down];
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, across, down);
    if (!this.width || !this.viewer.isOpen()) return;
    const { scale, x, y } = this.view();
    context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * x, ratio * y);
    if (this.blank && this.patches) this.#drawRaster(context, this.patches.ground, 1, false);
    if (this.showMaps) for (const { canvas } of this.layers) this.#drawRaster(context, canvas, this.opacity, this.smooth);
    for (const { path, boxes, colour } of this.layers) {
      if (this.showBoxes) this.#drawLines(context, boxes, { colour, width: 1.2, dash: [7, 5] }, scale);
      if (this.showAreas) this.#drawLines(context, path, { colour, width: 2.2, dash: [] }, scale);
    }
    this.#drawScale(scale);
  }

  #drawRaster(context, canvas, opacity, smooth) {
    const [left, top] = this.patches.bounds;
    context.globalAlpha = opacity;
    context.imageSmoothingEnabled = smooth;
    context.drawImage(canvas, left, top, canvas.width * this.patches.step, canvas.height * this.patches.step);
    context.globalAlpha = 1;
  }

  /** Lines in the colour of their layer with a white rim, to be visible on any stain; widths in screen pixels. */
  #drawLines(context, path, { colour, width, dash }, scale) {
    if (!path) return;
    context.lineJoin = "round";
    context.setLineDash(dash.map((length) => length / scale));
    for (const [wide, style] of [[width + 2.3, "rgb(255 255 255 / 0.85)"], [width, `rgb(${colour.join(" ")})`]]) {
      context.lineWidth = wide / scale;
      context.strokeStyle = style;
      context.stroke(path);
    }
    context.setLineDash([]);
  }

  #drawScale(scale) {
    const bar = document.getElementById("scale");
    bar.hidden = false;
    const unit = (this.mpp || 1) / scale; // of one screen pixel
    const wanted = unit * SCALE_BAR;
    const power = 10 ** Math.floor(Math.log10(wanted));
    const length = [5, 2, 1].find((step) => step * power <= wanted) * power;
    bar.querySelector("i").style.width = `${length / unit}px`;
    const shown = (value) => Number(value.toPrecision(3));
    const metric = length >= 1000 ? `${shown(length / 1000)} mm` : `${shown(length)} µm`;
    document.getElementById("scale-label").textContent = this.mpp ? metric : `${shown(length)} px`;
    document.getElementById("magnification").textContent = this.mpp ? `${shown(UM_TIMES_MAGNIFICATION / unit)}×` : "";
  }
}

/** The outlines of GeoJSON features as one path. */
function pathOf(features) {
  const path = new Path2D();
  for (const { geometry } of features) {
    const polygons = geometry.type === "MultiPolygon" ? geometry.coordinates : [geometry.coordinates];
    for (const ring of polygons.flat()) {
      ring.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
      path.closePath();
    }
  }
  return path;
}

/** The rectangles around GeoJSON features as one path. */
function boxesOf(features) {
  const path = new Path2D();
  for (const [left, top, right, bottom] of features.map(boundsOf)) path.rect(left, top, right - left, bottom - top);
  return path;
}

/** The rectangle [left, top, right, bottom] around a GeoJSON feature. */
function boundsOf({ geometry }) {
  const points = geometry.coordinates.flat(geometry.type === "MultiPolygon" ? 2 : 1);
  const [xs, ys] = [points.map((point) => point[0]), points.map((point) => point[1])];
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}
