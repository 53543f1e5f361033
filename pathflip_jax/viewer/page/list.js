"use strict";

/* The list of slides, ordered by name or by similarity to a text. It uses the state of app.js. */

const ROWS = 100; // slides that the list shows at first, and adds at "Show more"

function drawList() {
  const wanted = $("filter").value.trim().toLowerCase();
  const found = state.order.filter((number) => page.slides[number].id.toLowerCase().includes(wanted));
  const best = Math.max(...state.similarity.values(), 1e-9);
  $("slide-list").replaceChildren(...found.slice(0, state.rows).map((number) => slideRow(number, best)));
  $("more").hidden = found.length <= state.rows;
  state.listed = found;
}

function slideRow(number, best) {
  const slide = page.slides[number];
  const button = make("button", { type: "button", className: "slide" });
  button.setAttribute("aria-current", number === state.number ? "true" : "false");
  const picture = make("span", { className: "thumbnail" });
  if (slide.image) {
    const image = make("img", { src: `slides/${number}/thumbnail.jpg`, alt: "", loading: "lazy" });
    image.addEventListener("error", () => picture.replaceChildren("unreadable"));
    picture.append(image);
  } else picture.append("no slide file");
  const words = make("span", { className: "words" }, make("span", { className: "name", textContent: slide.id }));
  const similarity = state.similarity.get(number);
  if (similarity !== undefined) {
    const bar = make("i", { className: "similarity" });
    bar.style.width = `${(100 * Math.max(similarity, 0)) / Math.max(best, 1e-9)}%`;
    words.append(make("span", { className: "quiet", textContent: `similarity ${similarity.toFixed(3)}` }), bar);
  } else if (!slide.features) words.append(make("span", { className: "quiet", textContent: stateOf(slide.encoding) }));
  button.append(picture, words);
  button.addEventListener("click", () => open(number));
  return make("li", {}, button);
}

/** The state of a slide without features in words. */
function stateOf(encoding) {
  if (!encoding) return "no features";
  const { state, done, of, ahead } = encoding;
  if (state === "failed") return "cannot be encoded";
  if (state === "waiting") return ahead ? `waiting, ${ahead} before it` : "waiting to be encoded";
  return of ? `encoding, ${done.toLocaleString("en")} of ${of.toLocaleString("en")} patches` : "finding tissue";
}

/** Take new slides and the progress of the encoder into the list. */
async function refreshList() {
  let slides;
  try {
    ({ slides } = await source.slides());
  } catch {
    return; // the next request of the visitor says so
  }
  if (JSON.stringify(slides) === JSON.stringify(page.slides)) return;
  const first = page.slides.length;
  page.slides = slides;
  state.order.push(...slides.slice(first).map((_, i) => first + i));
  const focused = document.activeElement?.closest("#slide-list li");
  const at = focused ? [...$("slide-list").children].indexOf(focused) : -1;
  drawList();
  if (at >= 0) $("slide-list").children[at]?.querySelector("button").focus();
  if (state.number < 0) open(0);
}

async function findSlides() {
  const text = $("find-text").value.trim();
  state.rows = ROWS;
  if (!text) {
    state.order = page.slides.map((_, number) => number);
    state.similarity.clear();
    $("find-state").textContent = "";
    return drawList();
  }
  try {
    const { slides, ready, busy: more } = await source.find(text);
    state.order = slides.map(([number]) => number);
    state.similarity = new Map(slides);
    const of = `${ready} of ${page.slides.length} slides`;
    $("find-state").textContent = more ? `Ranked ${of}; the others are still being embedded` : `Ranked ${of}`;
    if (!ready) $("find-state").textContent = "No slide is embedded yet: wait, or start the viewer with --embeddings";
  } catch (error) {
    showMessage(error.message);
  }
  drawList();
}
