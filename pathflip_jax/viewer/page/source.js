"use strict";

/* Data sources of the page. Both have the same methods, which return promises, and both have images at
   slides/N/thumbnail.jpg and slides/N/tiles/LEVEL/COLUMN_ROW.jpg. */

/** A running server (pathflip serve). */
class LiveSource {
  constructor() {
    this.steps = 1; // step between thresholds, in percent
  }

  slides() {
    return this.#ask("slides.json");
  }

  slide(number) {
    return this.#ask(`slides/${number}/slide.json`);
  }

  /** The patches of a slide; `waits` gets the progress of its encoding, and returns whether to go on waiting. */
  patches(number, waits) {
    return this.#ask(`slides/${number}/patches.json`, undefined, waits);
  }

  layer(number, text, negative) {
    return this.#ask(`slides/${number}/layer`, { text, negative });
  }

  async areas(number, layer, threshold) {
    const { text, negative } = layer;
    return (await this.#ask(`slides/${number}/areas`, { text, negative, threshold })).areas;
  }

  find(text) {
    return this.#ask("find", { text });
  }

  async report(number, waits) {
    return (await this.#ask(`slides/${number}/report`, {}, waits)).text;
  }

  async answer(number, question, before, waits) {
    return (await this.#ask(`slides/${number}/answer`, { question, before }, waits)).text;
  }

  async #ask(address, body, waits) {
    const asked = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    let response;
    try {
      response = await fetch(address, body === undefined ? {} : asked);
    } catch {
      throw new Error("The viewer does not respond; check that `pathflip serve` is still running");
    }
    if (response.status === 202) {
      const { encoding } = await response.json();
      if (!waits?.(encoding)) throw new Error("The slide is not encoded yet");
      await new Promise((resolve) => setTimeout(resolve, 1000));
      return this.#ask(address, body, waits);
    }
    if (response.ok) return response.json();
    const text = await response.text();
    let message = text || `${response.status} ${response.statusText}`;
    try {
      message = JSON.parse(text).error;
    } catch {} // not JSON
    throw new Error(message);
  }
}

/** Precomputed scripts (pathflip report), because a page that is opened from file:// cannot fetch JSON. */
class StaticSource {
  #slides = new Map();
  #waiting = new Map();

  constructor(page) {
    this.page = page;
    this.steps = 10;
    page.loaded = (number, content) => this.#waiting.get(number)(content);
  }

  slide(number) {
    if (!this.#slides.has(number)) {
      const loaded = new Promise((resolve, reject) => {
        this.#waiting.set(number, resolve);
        const script = document.createElement("script");
        script.src = `slides/${number}/slide.js`;
        script.onerror = () => reject(new Error(`slides/${number}/slide.js is missing; write the page again`));
        document.head.append(script);
      });
      loaded.catch(() => this.#slides.delete(number));
      this.#slides.set(number, loaded.then((content) => ({ ...content, warnings: [] })));
      this.#slides.set(`${number} whole`, loaded);
    }
    return this.#slides.get(number);
  }

  async patches(number) {
    await this.slide(number);
    return this.#slides.get(`${number} whole`);
  }

  async layer(number, text) {
    const found = (await this.slide(number)).layers.find((layer) => layer.text === text);
    if (!found) throw new Error(`This page has results only for these texts: ${this.page.texts.join("; ")}`);
    return found;
  }

  async areas(number, layer, threshold) {
    return layer.facts.areas[String(threshold)];
  }

  async find(text) {
    const column = this.page.texts.findIndex((known) => known.toLowerCase() === text.trim().toLowerCase());
    if (column < 0) throw new Error(`This page has results only for these texts: ${this.page.texts.join("; ")}`);
    const found = this.page.slides.flatMap((slide, number) =>
      slide.similarities ? [[number, slide.similarities[column]]] : [],
    );
    found.sort((a, b) => b[1] - a[1]);
    return { slides: found, ready: found.length, busy: false };
  }
}
