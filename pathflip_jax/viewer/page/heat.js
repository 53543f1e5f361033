"use strict";

/* Heatmaps of patch scores. Rasterisation and smoothing are those of pathflip_jax/grounding/surface.py, so that maps
   and areas agree: overlapping patches are averaged, the Gaussian is weighted by coverage, and pixels without a patch are
   NaN. */

const PIXELS_PER_PATCH = 4;
const LONGEST = 2048; // pixels of a raster's longer side
const SMOOTH = 0.5; // standard deviation of the Gaussian, in patch edges
const TRUNCATE = 3; // standard deviations at which the Gaussian is truncated

/** The patches of a slide: their coordinates (level-0 pixels), and the raster of their scores. */
class Patches {
  constructor({ coords, patch_size }) {
    this.coords = coords;
    this.size = patch_size;
    this.count = coords.length / 2;
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < coords.length; i += 2) {
      left = Math.min(left, coords[i]);
      right = Math.max(right, coords[i]);
      top = Math.min(top, coords[i + 1]);
      bottom = Math.max(bottom, coords[i + 1]);
    }
    this.bounds = [left, top, right + patch_size, bottom + patch_size];
    const longest = Math.max(right - left, bottom - top) + patch_size;
    const fitting = Math.trunc((LONGEST * patch_size) / longest);
    this.step = Math.max(patch_size / Math.min(Math.max(fitting, 1), PIXELS_PER_PATCH), longest / LONGEST);
    this.columns = Math.ceil((right - left + patch_size) / this.step - 1e-9);
    this.rows = Math.ceil((bottom - top + patch_size) / this.step - 1e-9);
    this.covered = new Float32Array(this.columns * this.rows); // patches over each pixel
    this.#spread(this.covered, () => 1);
    this.weight = this.#blur(this.covered.map((n) => (n ? 1 : 0)));
    this.#index();
  }

  /** The scores on the raster, smoothed or not; NaN in pixels without a patch. */
  raster(scores, smooth) {
    const values = new Float32Array(this.covered.length);
    this.#spread(values, (i) => scores[i]);
    for (let p = 0; p < values.length; p++) if (this.covered[p]) values[p] /= this.covered[p];
    const found = smooth ? this.#blur(values) : values;
    for (let p = 0; p < found.length; p++) {
      if (!this.covered[p]) found[p] = NaN;
      else if (smooth) found[p] /= this.weight[p];
    }
    return found;
  }

  /** The patch at a level-0 point, the one with the nearest centre if patches overlap; -1 for none. */
  at(x, y) {
    let [best, nearest] = [-1, Infinity];
    for (const column of [-1, 0]) {
      for (const row of [-1, 0]) {
        for (const i of this.cells.get(this.#cell(x, y, column, row)) ?? []) {
          const [dx, dy] = [x - this.coords[2 * i], y - this.coords[2 * i + 1]];
          if (dx < 0 || dy < 0 || dx >= this.size || dy >= this.size) continue;
          const distance = Math.hypot(dx - this.size / 2, dy - this.size / 2);
          if (distance < nearest) [best, nearest] = [i, distance];
        }
      }
    }
    return best;
  }

  #index() {
    this.cells = new Map(); // patches by the grid cell (of one patch edge) that contains their corner
    for (let i = 0; i < this.count; i++) {
      const cell = this.#cell(this.coords[2 * i], this.coords[2 * i + 1], 0, 0);
      if (this.cells.has(cell)) this.cells.get(cell).push(i);
      else this.cells.set(cell, [i]);
    }
  }

  #cell(x, y, column, row) {
    const [left, top] = this.bounds;
    return (Math.floor((y - top) / this.size) + row) * 2 ** 26 + Math.floor((x - left) / this.size) + column;
  }

  #spread(raster, value) {
    const [left, top] = this.bounds;
    const edge = this.size / this.step;
    for (let i = 0; i < this.count; i++) {
      const [x, y] = [(this.coords[2 * i] - left) / this.step, (this.coords[2 * i + 1] - top) / this.step];
      const [x0, y0] = [Math.round(x), Math.round(y)];
      const [x1, y1] = [Math.max(Math.round(x + edge), x0 + 1), Math.max(Math.round(y + edge), y0 + 1)];
      const score = value(i);
      for (let row = y0; row < Math.min(y1, this.rows); row++) {
        for (let column = x0; column < Math.min(x1, this.columns); column++) {
          raster[row * this.columns + column] += score;
        }
      }
    }
  }

  /** A Gaussian over rows, then columns; zero outside the raster. */
  #blur(raster) {
    const sigma = (SMOOTH * this.size) / this.step;
    const radius = Math.floor(TRUNCATE * sigma + 0.5);
    const kernel = Array.from({ length: 2 * radius + 1 }, (_, i) => Math.exp(-((i - radius) ** 2) / (2 * sigma ** 2)));
    const sum = kernel.reduce((a, b) => a + b);
    const pass = (from, count, length, along, across) => {
      const to = new Float32Array(from.length);
      for (let line = 0; line < count; line++) {
        for (let i = 0; i < length; i++) {
          let total = 0;
          for (let k = Math.max(-radius, -i); k <= Math.min(radius, length - 1 - i); k++) {
            total += kernel[k + radius] * from[line * across + (i + k) * along];
          }
          to[line * across + i * along] = total / sum;
        }
      }
      return to;
    };
    const rows = pass(raster, this.rows, this.columns, 1, this.columns);
    return pass(rows, this.columns, this.rows, this.columns, 1);
  }
}

/** Paint the pixels of a raster whose score is at least `threshold` (0 to 1 between low and high).
 *
 * `colours` [256] of red, green, blue colour a map that is shown alone by score; one of several maps is painted in its
 * `colour`, more opaque for higher scores.
 */
function paintRaster(patches, raster, { low, high, threshold, colours, colour }) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [patches.columns, patches.rows];
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let p = 0; p < raster.length; p++) {
    const share = Math.min(Math.max((raster[p] - low) / (high - low), 0), 1);
    if (!(share >= threshold)) continue; // NaN too
    const [red, green, blue] = colours ? colours[Math.round(255 * share)] : colour;
    image.data[4 * p] = red;
    image.data[4 * p + 1] = green;
    image.data[4 * p + 2] = blue;
    image.data[4 * p + 3] = colours ? 255 : 40 + 150 * share;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
