"use strict";

/* The page itself: the open slide, the texts that are shown on it, and the controls. */

const page = globalThis.PATHFLIP;
const source = page.live ? new LiveSource() : new StaticSource(page);
const $ = (id) => document.getElementById(id);

const state = {
  number: -1, // of the open slide
  opening: 0, // counts openings, so that late responses for another slide are dropped
  patches: null,
  layers: [],
  order: page.slides.map((_, number) => number), // of the list
  similarity: new Map(),
  rows: ROWS,
  talk: [], // [question, answer] about the open slide
};
const stage = new Stage($("stage"), tileFailed);

/* ---- messages ---- */

function showMessage(message, kind = "error") {
  const close = make("button", { type: "button", className: "plain", textContent: "×", ariaLabel: "Dismiss" });
  const note = make("p", { className: kind }, make("span", { textContent: message }), close);
  close.addEventListener("click", () => note.remove());
  if (![...$("messages").children].some((child) => child.firstChild.textContent === message)) $("messages").append(note);
}

function busy(text) {
  $("busy").textContent = text;
}

/** Report a tile that failed to load, with the reason from the server, which is asked once per slide. */
async function tileFailed(address) {
  if (state.tilesFailed === state.opening) return;
  state.tilesFailed = state.opening;
  const name = page.slides[state.number]?.id ?? "";
  let reason = "an image file of it is missing";
  if (page.live) {
    try {
      const response = await fetch(address);
      if (response.ok) return;
      reason = (await response.json()).error;
    } catch {
      reason = "the viewer does not respond; check that `pathflip serve` is still running";
    }
  }
  showMessage(`Part of slide ${name} cannot be shown: ${reason}`);
}

/* ---- the open slide ---- */

async function open(number) {
  const opening = ++state.opening;
  const here = () => opening === state.opening;
  Object.assign(state, { number, patches: null, talk: [] });
  state.layers.forEach((layer) => layer.reset());
  $("messages").replaceChildren();
  $("talk").replaceChildren();
  $("hover").hidden = true;
  const { id, features, encoding } = page.slides[number];
  history.replaceState(null, "", `#${encodeURIComponent(id.toWellFormed?.() ?? id)}`);
  document.title = `${id} · PathFLIP viewer`;
  $("slide-name").textContent = id;
  $("slide-facts").textContent = "";
  drawList();
  drawLayers();
  stage.close();
  try {
    busy("Opening…");
    const facts = await source.slide(number);
    if (!here()) return;
    facts.warnings.forEach((warning) => showMessage(warning, "warning"));
    if (facts.image) await stage.open(number, facts.image);
    if (!here()) return;
    if (facts.image) showFacts(facts.image);
    if (!features && !encoding) return busy("");
    busy("Encoding the slide (first time only)…");
    const patches = await source.patches(number, (progress) => {
      if (here()) busy(`Encoding the slide (first time only): ${stateOf(progress)}`);
      return here();
    });
    if (!here()) return;
    patches.warnings.forEach((warning) => showMessage(warning, "warning"));
    state.patches = new Patches(patches);
    if (!facts.image) await stage.open(number, null, boundsWithout(patches));
    if (!here()) return;
    state.patches.ground = backgroundOf(state.patches);
    stage.patches = state.patches;
    stage.mpp = patches.mpp;
    showFacts(facts.image ?? patches, patches);
    stage.draw();
    busy("");
    await Promise.all(state.layers.map(scoreText));
  } catch (error) {
    if (here()) showMessage(error.message);
  } finally {
    if (here()) busy("");
  }
}

/** Bounds of a slide without a slide file: the whole slide if its size is known, else those of its patches. */
function boundsWithout({ width, height }) {
  const [left, top, right, bottom] = state.patches.bounds;
  const margin = state.patches.size;
  return width && height ? [0, 0, width, height] : [left - margin, top - margin, right + margin, bottom + margin];
}

function backgroundOf(patches) {
  const covered = patches.covered.map((count) => (count ? 1 : NaN));
  return paintRaster(patches, covered, { low: 0, high: 1, threshold: 0, colour: [219, 224, 230], colours: null });
}

function showFacts({ width, height }, patches) {
  const facts = width ? [`${width.toLocaleString("en")} × ${height.toLocaleString("en")} pixels`] : [];
  if (stage.mpp) facts.push(`${Number(stage.mpp.toPrecision(3))} µm per pixel`);
  if (patches) facts.push(`${state.patches.count.toLocaleString("en")} patches of ${patches.patch_size} pixels`);
  $("slide-facts").textContent = facts.join(", ");
}

function step(by) {
  const at = state.listed.indexOf(state.number) + by;
  if (at >= 0 && at < state.listed.length) open(state.listed[at]);
}

/* ---- texts on it ---- */

function addText(text, negative) {
  if (state.layers.some((layer) => layer.text === text && layer.negative.join() === negative.join())) {
    return showMessage(`“${text}” is already shown`, "warning");
  }
  const used = state.layers.map((layer) => layer.colour);
  const colour = page.colours.find((one) => !used.includes(one)) ?? page.colours[state.layers.length % page.colours.length];
  const layer = new Layer(text, negative, colour);
  state.layers.push(layer);
  drawLayers();
  if (state.patches) scoreText(layer);
  else if (state.number >= 0 && !page.slides[state.number].features && !page.slides[state.number].encoding) {
    layer.error = "This slide has no features";
    drawLayers();
  }
}

async function scoreText(layer) {
  const opening = state.opening;
  try {
    const facts = await source.layer(state.number, layer.text, layer.negative);
    if (opening !== state.opening) return;
    layer.facts = facts;
    const [least, most] = source.steps > 1 ? [source.steps, 100 - source.steps] : [0, 100];
    layer.threshold = Math.min(Math.max(Math.round(facts.threshold / source.steps) * source.steps, least), most);
    paintLayers();
    await findAreas(layer);
  } catch (error) {
    if (opening === state.opening) layer.error = error.message;
  }
  if (opening === state.opening) drawLayers();
}

async function findAreas(layer) {
  const [opening, threshold] = [state.opening, layer.threshold];
  const areas = await source.areas(state.number, layer, threshold);
  if (opening !== state.opening || threshold !== layer.threshold) return;
  layer.setAreas(areas);
  drawLayers();
}

function shownLayers() {
  return state.layers.filter((layer) => layer.shown && layer.facts);
}

/** The colour map of a layer: by score if it is the only one shown, else null for shades of its own colour. */
function coloursOf(layer) {
  return shownLayers().length > 1 || !layer.shown ? null : page.heat;
}

function paintLayers() {
  if (!state.patches) return;
  const shown = shownLayers();
  shown.forEach((layer) => layer.paint(state.patches, $("smooth").checked, coloursOf(layer)));
  stage.layers = shown;
  stage.draw();
}

function drawLayers() {
  const does = {
    show: (layer, shown) => {
      layer.shown = shown;
      drawLayers();
    },
    remove: (layer) => {
      state.layers = state.layers.filter((other) => other !== layer);
      drawLayers();
      $("add-text").focus();
    },
    cut: (layer) => {
      paintLayers();
      clearTimeout(layer.timer);
      layer.timer = setTimeout(() => findAreas(layer).catch((error) => showMessage(error.message)), page.live ? 120 : 0);
    },
    next: goToNext,
  };
  paintLayers();
  const focused = focusedControl();
  const pale = (colour) => [colour.map((value) => Math.round(value + (255 - value) * 0.65)), colour];
  const rows = state.layers.map((layer) =>
    layerRow(layer, {
      steps: source.steps,
      removable: page.live,
      colours: coloursOf(layer)?.filter((_, i) => i % 15 === 0) ?? pale(layer.colour),
      does,
    }),
  );
  $("layers").replaceChildren(...rows);
  focused?.();
  $("download").disabled = !shownLayers().some((layer) => layer.areas.length);
}

/** A function that restores the focus to the same control of a row after the rows are redrawn; null if none has it. */
function focusedControl() {
  const rows = [...$("layers").children];
  const at = rows.findIndex((row) => row.contains(document.activeElement));
  if (at < 0) return null;
  const number = [...rows[at].querySelectorAll("input, button")].indexOf(document.activeElement);
  return () => $("layers").children[at]?.querySelectorAll("input, button")[number]?.focus();
}

function goToNext(layer) {
  if (!layer?.areas.length) return;
  stage.goTo(boundsOf(layer.areas[layer.next % layer.areas.length]));
  layer.next += 1;
}

/** The scores at a level-0 point, one for each text. */
function scoresAt(x, y) {
  const patch = state.patches ? state.patches.at(x, y) : -1;
  return patch < 0 ? [] : shownLayers().map((layer) => [layer, layer.at(patch)]);
}

function hover(event) {
  const box = $("stage").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const found = state.patches ? scoresAt(...stage.pointAt(x, y)) : [];
  $("hover").hidden = !found.length;
  $("hover").replaceChildren(
    ...found.map(([layer, score]) => {
      const swatch = make("i", { className: "swatch" });
      swatch.style.background = `rgb(${layer.colour.join(" ")})`;
      return make("p", {}, swatch, make("span", { textContent: `${layer.text}: ${score}` }));
    }),
  );
  const left = x + 16 + $("hover").offsetWidth > box.width ? x - 16 - $("hover").offsetWidth : x + 16;
  $("hover").style.transform = `translate(${left}px, ${Math.min(y + 16, box.height - $("hover").offsetHeight)}px)`;
}

function download() {
  const [x0, y0] = stage.bounds; // QuPath crops slides that state their bounds, and counts pixels from there
  const moved = (part) => (Array.isArray(part[0]) ? part.map(moved) : [part[0] - x0, part[1] - y0]);
  const features = shownLayers().flatMap((layer) =>
    layer.areas.map(({ properties, geometry, ...feature }) => ({
      ...feature,
      geometry: { ...geometry, coordinates: moved(geometry.coordinates) },
      properties: { ...properties, classification: { ...properties.classification, color: layer.colour } },
    })),
  );
  const content = JSON.stringify({ type: "FeatureCollection", features }, null, 1);
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type: "application/geo+json" })) });
  link.download = `${page.slides[state.number].id}.geojson`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

/* ---- report and questions ---- */

async function speak(question, write) {
  if (state.number < 0) return;
  const opening = state.opening;
  const answer = make("p", { textContent: "Writing…", className: "quiet" });
  $("talk").append(make("li", {}, make("p", { className: "question", textContent: question || "Report" }), answer));
  try {
    const text = await write((progress) => {
      if (opening === state.opening) answer.textContent = `Waiting for the slide: ${stateOf(progress)}`;
      return opening === state.opening;
    });
    if (opening !== state.opening) return;
    [answer.textContent, answer.className] = [text || "(empty)", ""];
    if (question) state.talk.push([question, text]);
  } catch (error) {
    [answer.textContent, answer.className] = [error.message, "error"];
  }
}

/* ---- controls ---- */

function toggle(id) {
  $(id).checked = !$(id).checked;
  $(id).dispatchEvent(new Event("change"));
}

const KEYS = {
  "/": () => (page.live ? $("add-text") : $("find-text")).focus(),
  f: () => $("find-text").focus(),
  j: () => step(1),
  k: () => step(-1),
  n: () => goToNext(shownLayers()[0]),
  h: () => toggle("show-maps"),
  a: () => toggle("show-areas"),
  b: () => toggle("show-boxes"),
  g: () => toggle("grey"),
  c: () => {
    const found = scoresAt(...stage.middle()).map(([layer, score]) => `${layer.text}: ${score}`);
    busy(found.join("; ") || "No patch at the centre of the view");
  },
  "+": () => stage.zoomBy(1.6),
  "=": () => stage.zoomBy(1.6),
  "-": () => stage.zoomBy(1 / 1.6),
  0: () => stage.home(),
  "?": () => $("help").showModal(),
};

function pressed(event) {
  const writing = event.target.matches("input:not([type=checkbox], [type=range]), textarea");
  if (event.key === "Escape" && writing) return event.target.blur();
  if (writing || event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if ($("stage").contains(event.target) && "+=-0".includes(event.key)) return; // handled by OpenSeadragon
  const does = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!does || state.number < 0) return;
  event.preventDefault();
  does();
}

function submitted(form, does) {
  $(form).addEventListener("submit", (event) => {
    event.preventDefault();
    does();
  });
}

function changed(id, does) {
  $(id).addEventListener("change", () => does($(id)));
  does($(id));
}

function start() {
  const facts = [["Run", page.run], ["Patch encoder", page.encoder || "not recorded"], ["Map", page.method]];
  $("model").replaceChildren(...facts.map(([term, what]) => make("div", {}, make("dt", { textContent: term }), make("dd", { textContent: what }))));
  $("notice").textContent = page.notice;
  $("about").textContent = `Slides are shown with OpenSeadragon ${OpenSeadragon.version.versionStr} (page/LICENSE.openseadragon.txt).`;
  $("language").hidden = !page.language;
  $("add").hidden = !page.live;
  if (!page.live) {
    $("texts").replaceChildren(...page.texts.map((text) => make("option", { value: text })));
    page.texts.forEach((text, i) => {
      state.layers.push(new Layer(text, [], page.colours[i % page.colours.length]));
      state.layers[i].shown = i === 0;
    });
  }
  submitted("find", findSlides);
  submitted("add", () => {
    const [text, negative] = [$("add-text").value.trim(), $("negative").value.trim()];
    if (text) addText(text, negative ? [negative] : []);
    $("add-text").value = "";
  });
  submitted("ask", () => {
    const [question, number, before] = [$("question").value.trim(), state.number, [...state.talk]];
    if (question) speak(question, (waits) => source.answer(number, question, before, waits));
    $("question").value = "";
  });
  $("report").addEventListener("click", () => speak("", (waits) => source.report(state.number, waits)));
  $("filter").addEventListener("input", drawList);
  $("find-text").addEventListener("search", () => $("find-text").value || findSlides());
  $("more").addEventListener("click", () => {
    state.rows += ROWS;
    drawList();
  });
  $("opacity").addEventListener("input", () => changedOpacity($("opacity")));
  changedOpacity($("opacity"));
  changed("show-maps", ({ checked }) => Object.assign(stage, { showMaps: checked }).draw());
  changed("show-areas", ({ checked }) => Object.assign(stage, { showAreas: checked }).draw());
  changed("show-boxes", ({ checked }) => Object.assign(stage, { showBoxes: checked }).draw());
  changed("smooth", ({ checked }) => {
    stage.smooth = checked;
    paintLayers();
  });
  changed("grey", ({ checked }) => $("stage").classList.toggle("grey", checked));
  $("download").addEventListener("click", download);
  $("help-open").addEventListener("click", () => $("help").showModal());
  $("stage").addEventListener("pointermove", hover);
  $("stage").addEventListener("pointerleave", () => ($("hover").hidden = true));
  document.addEventListener("keydown", pressed);
  drawList();
  if (page.grows) setInterval(refreshList, 2000);
  globalThis.addEventListener("hashchange", () => {
    const number = linkedSlide();
    if (number >= 0 && number !== state.number) open(number);
  });
  const [number, wanted] = [linkedSlide(), location.hash.slice(1)];
  if (page.slides.length) open(Math.max(number, 0));
  else busy("No slide is in the folder yet; those that are added appear here");
  if (number < 0 && wanted) showMessage(`No slide is named “${wanted}”`, "warning");
}

/** The number of the slide that the address names after #, -1 for none. A "%" that is not encoded is literal. */
function linkedSlide() {
  const written = location.hash.slice(1);
  const read = written.replace(/(%[0-9a-f]{2})+/gi, (part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  const find = (name) => page.slides.findIndex(({ id }) => id === name);
  return find(read) < 0 ? find(written) : find(read);
}

function changedOpacity({ value }) {
  $("opacity-value").textContent = `${value}%`;
  stage.opacity = value / 100;
  stage.draw();
}

start();
