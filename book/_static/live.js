/* The figures of the book that can be moved: no library, no kernel.

   A chapter holds <div class="live" data-live="NAME">fallback</div>; this file
   replaces the fallback. The arithmetic stands apart from the drawing, in
   window.live, where tests compare it with the package. */
"use strict";

// --- Arithmetic --------------------------------------------------------------

const mxfp4 = {
  values: [0, 0.5, 1, 1.5, 2, 3, 4, 6],
  // a block of 32 weights, in units of 2^-12
  block: [41, -83, 12, 66, -30, 118, -7, -152, 25, 94, -58, 3, -109, 71, 36,
          -21, 140, -64, 9, 52, -97, 17, -44, 310, -13, 80, -126, 29, -3, 61,
          -75, 105].map((n) => n / 4096),

  /* gptoss.mxfp4.encode, one value at a given scale byte: code 0 to 15 */
  code(weight, byte) {
    const size = Math.abs(weight) * 2 ** (127 - byte);
    let code = 0;
    for (let n = 0; n < 7; n++) {
      const middle = (this.values[n] + this.values[n + 1]) / 2;
      if (n % 2 ? size >= middle : size > middle) code += 1;
    }
    return code + (weight < 0 || Object.is(weight, -0) ? 8 : 0);
  },
  decode(code, byte) {
    const value = this.values[code & 7] * 2 ** (byte - 127);
    return code & 8 ? -value : value;
  },
  /* the OCP rule: floor(log2(largest)) - 2, biased by 127 */
  rule(weights) {
    const largest = Math.max(...weights.map(Math.abs));
    if (largest === 0) return 0;
    let power = Math.floor(Math.log2(largest));
    while (2 ** power > largest) power -= 1;
    while (2 ** (power + 1) <= largest) power += 1;
    return Math.min(254, Math.max(0, power - 2 + 127));
  },
  stored(weights, byte) {
    return weights.map((w) => this.decode(this.code(w, byte), byte));
  },
};

const masks = {
  /* gptoss.masks.visible for one query and one key */
  visible(query, key, window) {
    return key >= 0 && key <= query && (window === null
                                        || key > query - window);
  },
  keys(query, window) {
    let count = 0;
    for (let k = 0; k <= query; k++) count += this.visible(query, k, window);
    return count;
  },
  /* positions that the output of `layers` sliding layers rests on */
  reach(layers, window) { return 1 + layers * (window - 1); },
};

const rope = {
  pairs: 32, theta: 150000, original: 4096, fast: 32, slow: 1,

  /* gptoss.rope.correction_range */
  range(truncate) {
    const pair = (turns) => 2 * this.pairs * Math.log(
      this.original / (turns * 2 * Math.PI)) / (2 * Math.log(this.theta));
    let [low, high] = [pair(this.fast), pair(this.slow)];
    if (truncate) [low, high] = [Math.floor(low), Math.ceil(high)];
    return [Math.max(low, 0), Math.min(high, 2 * this.pairs - 1)];
  },
  /* gptoss.rope.inverse_frequencies, in double precision */
  frequencies(factor, truncate) {
    const [low, high] = this.range(truncate), out = [];
    for (let i = 0; i < this.pairs; i++) {
      const plain = this.theta ** (-i / this.pairs);
      const keep = 1 - Math.min(1, Math.max(0, (i - low) / (high - low)));
      out.push(factor === 1 ? plain
                            : plain * (keep + (1 - keep) / factor));
    }
    return out;
  },
  concentration(factor) {
    return factor <= 1 ? 1 : 0.1 * Math.log(factor) + 1;
  },
};

const sinks = {
  scores: [-1, 0, -2, 3, 1, 2], // of six keys, for one query

  /* gptoss.sinks.softmax_with_sink for one row, and the share of the sink */
  softmax(scores, sink) {
    const top = Math.max(sink, ...scores);
    const powers = scores.map((score) => Math.exp(score - top));
    const own = Math.exp(sink - top);
    const total = powers.reduce((sum, power) => sum + power, own);
    return { weights: powers.map((power) => power / total),
             share: own / total };
  },
};

window.live = { mxfp4, masks, rope, sinks };

// --- Drawing -----------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
let counter = 0;

function svg(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function html(name, attributes, parent, text) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

/* An empty drawing of width x height units, described by `label`. */
function canvas(root, width, height, label) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
                      "aria-label": label }, root);
}

/* A labelled slider; calls `moved` with its number. */
function slider(root, text, name, [min, max, step, value], moved) {
  const id = `live-${name}-${counter++}`;
  const row = html("div", { class: "live-row" }, root);
  html("label", { for: id }, row, text);
  const input = html("input", { type: "range", id, min, max, step, value,
                                "data-name": name }, row);
  input.addEventListener("input", () => moved(Number(input.value)));
  return input;
}

function button(root, text, pressed) {
  const node = html("button", { type: "button", class: "live-button" }, root,
                    text);
  node.addEventListener("click", pressed);
  return node;
}

const raised = (number) => String(number).replace(/[-0-9]/g, (sign) =>
  "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
const figure3 = (number) => Number(number.toPrecision(3)).toString();

// --- weights/mxfp4: a block under its scale ----------------------------------

function drawMxfp4(root) {
  const WIDTH = 640, HEIGHT = 200, LEFT = 20, SPAN = WIDTH - 2 * LEFT;
  const limit = 0.09, x = (w) => LEFT + SPAN * (w + limit) / (2 * limit);
  const weights = mxfp4.block, rule = mxfp4.rule(weights);
  let byte = rule;

  const input = slider(root, "scale byte", "byte", [113, 124, 1, byte],
                       (value) => { byte = value; draw(); });
  button(input.parentNode, "the rule’s choice", () => {
    byte = rule; input.value = byte; draw(); });
  const said = html("p", { class: "live-said", "aria-live": "polite" }, root);
  const box = canvas(root, WIDTH, HEIGHT,
    "32 weights above, the values that a block may store below, and a line " +
    "from each weight to the value it is stored as");

  function draw() {
    box.replaceChildren();
    const stored = mxfp4.stored(weights, byte), scale = 2 ** (byte - 127);
    let clipped = 0, zero = 0, error = 0;
    svg("text", { x: LEFT, y: 16 }, box, "the weights");
    svg("text", { x: LEFT, y: HEIGHT - 6 }, box, "what can be stored");
    for (const sign of [-1, 1]) {
      for (const value of mxfp4.values) {
        const w = sign * value * scale;
        if (Math.abs(w) > limit) continue;
        svg("line", { x1: x(w), x2: x(w), y1: 140, y2: 168,
                      class: "live-grid" }, box);
      }
    }
    weights.forEach((weight, n) => {
      const big = Math.abs(weight) > 6 * scale;
      const lost = stored[n] === 0 && weight !== 0;
      clipped += big; zero += lost; error += (weight - stored[n]) ** 2;
      svg("line", { x1: x(weight), y1: 50, x2: x(stored[n]), y2: 136,
                    class: big || lost ? "live-link live-bad"
                                       : "live-link" }, box);
      svg("circle", { cx: x(weight), cy: 46, r: 4,
                      class: big || lost ? "live-dot live-bad"
                                         : "live-dot" }, box);
    });
    const spread = Math.sqrt(error / weights.reduce((s, w) => s + w * w, 0));
    said.textContent = `s = ${byte}, so the grid is 0, ½, 1, 1½, 2, 3, 4, 6 ` +
      `times 2${raised(byte - 127)} = ${figure3(scale)}. Clipped: ${clipped}. ` +
      `Rounded to zero: ${zero}. Error: ${figure3(100 * spread)} % of the ` +
      "block." + (byte === rule ? " This is the rule’s scale." : "");
    Object.assign(root.dataset, { byte, clipped, zero, error: spread });
  }
  draw();
}

// --- attention/masks: a window that can be dragged ---------------------------

function drawMasks(root) {
  const TOKENS = 24, CELL = 13, LEFT = 40, TOP = 24, SIDE = TOKENS * CELL;
  let window_ = 6, query = TOKENS - 1, layers = 2;

  const input = slider(root, "window W", "window", [1, TOKENS, 1, window_],
                       (value) => { window_ = value; draw(); });
  slider(root, "sliding layers", "layers", [1, 12, 1, layers],
         (value) => { layers = value; draw(); });
  const said = html("p", { class: "live-said", "aria-live": "polite" }, root);
  const box = canvas(root, LEFT + SIDE + 6, TOP + SIDE + 62,
    "A mask of 24 queries by 24 keys; the band of visible keys is as wide as " +
    "the window. Below it, how far the last query’s output reaches back");
  box.classList.add("live-drag");

  function cell(key, row, name) {
    svg("rect", { x: LEFT + key * CELL, y: TOP + row * CELL,
                  width: CELL - 1, height: CELL - 1, class: name }, box);
  }
  function draw() {
    box.replaceChildren();
    svg("text", { x: LEFT, y: 15 }, box, "key →  (drag the band’s edge)");
    svg("text", { x: LEFT - 6, y: TOP + SIDE / 2, "text-anchor": "end" }, box,
        "query");
    for (let q = 0; q < TOKENS; q++) {
      for (let k = 0; k < TOKENS; k++) {
        const seen = masks.visible(q, k, window_);
        cell(k, q, seen ? (q === query ? "live-seen live-row-on"
                                       : "live-seen") : "live-unseen");
      }
    }
    const last = TOKENS - 1, reach = masks.reach(layers, window_);
    for (let k = 0; k < TOKENS; k++) {
      cell(k, TOKENS + 0.8, last - k < reach ? "live-seen live-row-on"
                                             : "live-unseen");
    }
    svg("text", { x: LEFT, y: TOP + SIDE + 44 }, box,
        `what query ${last} rests on after ${layers} layers`);
    const keys = masks.keys(query, window_);
    said.textContent = `W = ${window_}: query ${query} sees ${keys} ` +
      `key${keys === 1 ? "" : "s"}, its own included. ${layers} sliding ` +
      `layer${layers === 1 ? "" : "s"} reach 1 + ${layers} × (${window_} − ` +
      `1) = ${reach} positions. gpt-oss: W = 128, 12 sliding layers, ` +
      `${masks.reach(12, 128).toLocaleString("en")}.`;
    Object.assign(root.dataset, { window: window_, query, keys, reach });
  }
  function drag(event) {
    const place = box.getBoundingClientRect();
    const unit = (LEFT + SIDE + 6) / place.width;
    const key = Math.floor(((event.clientX - place.left) * unit - LEFT)
                           / CELL);
    const row = Math.floor(((event.clientY - place.top) * unit - TOP) / CELL);
    query = Math.min(TOKENS - 1, Math.max(0, row));
    window_ = Math.min(TOKENS, Math.max(1, query - key + 1));
    input.value = window_;
    draw();
  }
  let held = false;
  box.addEventListener("pointerdown", (event) => {
    held = true; box.setPointerCapture(event.pointerId); drag(event); });
  box.addEventListener("pointermove", (event) => { if (held) drag(event); });
  box.addEventListener("pointerup", () => { held = false; });
  box.addEventListener("pointercancel", () => { held = false; });
  draw();
}

// --- attention/rope: YaRN's factor -------------------------------------------

function drawRope(root) {
  const WIDTH = 640, HEIGHT = 312, LEFT = 52, BOTTOM = 48, TOP = 14;
  const x = (pair) => LEFT + (WIDTH - LEFT - 14) * (pair + 0.5) / 32;
  const y = (turn) => HEIGHT - BOTTOM
    - (HEIGHT - BOTTOM - TOP) * Math.log10(turn) / 8;
  let factor = 32, truncate = false;

  slider(root, "factor s", "factor", [0, 6, 0.25, 5], (value) => {
    factor = 2 ** value; draw(); });
  const row = html("div", { class: "live-row" }, root);
  const id = `live-truncate-${counter++}`;
  const check = html("input", { type: "checkbox", id, "data-name": "truncate" },
                     row);
  html("label", { for: id }, row, "round the ends of the ramp (truncate)");
  check.addEventListener("change", () => { truncate = check.checked; draw(); });
  const said = html("p", { class: "live-said", "aria-live": "polite" }, root);
  const box = canvas(root, WIDTH, HEIGHT,
    "Tokens for one turn of each of the 32 pairs, with and without YaRN");

  function line(numbers, name) {
    svg("polyline", { points: numbers.map((f, i) =>
      `${x(i)},${y(2 * Math.PI / f)}`).join(" "), class: name }, box);
    numbers.forEach((f, i) => svg("circle", {
      cx: x(i), cy: y(2 * Math.PI / f), r: 2.5, class: name }, box));
  }
  function draw() {
    box.replaceChildren();
    const [low, high] = rope.range(truncate);
    svg("rect", { x: x(low), y: TOP, width: x(high) - x(low),
                  height: HEIGHT - BOTTOM - TOP, class: "live-ramp" }, box);
    for (const power of [0, 2, 4, 6, 8]) {
      svg("line", { x1: LEFT, x2: WIDTH - 14, y1: y(10 ** power),
                    y2: y(10 ** power), class: "live-rule" }, box);
      svg("text", { x: LEFT - 6, y: y(10 ** power) + 5,
                    "text-anchor": "end" }, box,
          ["1", "100", "10⁴", "10⁶", "10⁸"][power / 2]);
    }
    const reach = rope.original * factor;
    for (const [tokens, name] of [[rope.original, "4,096"], [reach,
      Math.round(reach).toLocaleString("en")]]) {
      svg("line", { x1: LEFT, x2: WIDTH - 14, y1: y(tokens), y2: y(tokens),
                    class: "live-mark" }, box);
      if (tokens !== rope.original || factor === 1) {
        svg("text", { x: LEFT + 4, y: y(tokens) - 5 }, box, name);
      } else if (factor > 2) {
        svg("text", { x: LEFT + 4, y: y(tokens) + 15 }, box, name);
      }
    }
    for (const pair of [0, 8, 16, 24, 31]) {
      svg("text", { x: x(pair), y: HEIGHT - 28, "text-anchor": "middle" },
          box, String(pair));
    }
    svg("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4,
                  "text-anchor": "middle" }, box,
        "pair i; up: tokens for one turn");
    const plain = rope.frequencies(1, false);
    const yarn = rope.frequencies(factor, truncate);
    line(plain, "live-plain");
    line(yarn, "live-yarn");
    const c = rope.concentration(factor);
    const slowed = plain[17] / yarn[17];
    said.textContent = `s = ${figure3(factor)}: ` +
      `${Math.round(reach).toLocaleString("en")} positions. The ramp goes ` +
      `from pair ${low.toFixed(2)} to ${high.toFixed(2)}; pair 17 is slowed ` +
      `by ${figure3(slowed)}, pair 31 by ${figure3(plain[31] / yarn[31])}. ` +
      `A score is multiplied by ${figure3(c * c)}.`;
    Object.assign(root.dataset, { factor, truncate, low, high, slowed,
                                  concentration: c });
  }
  draw();
}

// --- attention/sinks: a head that declines ------------------------------------

function drawSinks(root) {
  const WIDTH = 640, HEIGHT = 270, BOTTOM = 52, TOP = 26, STEP = WIDTH / 7;
  const full = HEIGHT - BOTTOM - TOP;
  let sink = 0, shift = 0;

  slider(root, "sink s", "sink", [-8, 12, 0.5, sink], (value) => {
    sink = value; draw(); });
  slider(root, "add to all scores", "shift", [-10, 10, 0.5, shift],
         (value) => { shift = value; draw(); });
  const said = html("p", { class: "live-said", "aria-live": "polite" }, root);
  const box = canvas(root, WIDTH, HEIGHT,
    "Six bars, the weights of six keys, and a seventh, what the sink takes; " +
    "outlines show the weights without a sink");

  function bar(place, height, name) {
    svg("rect", { x: place * STEP + 14, y: TOP + full * (1 - height),
                  width: STEP - 28, height: full * height, class: name }, box);
  }
  function under(place, y, text) {
    svg("text", { x: (place + 0.5) * STEP, y, "text-anchor": "middle" }, box,
        text);
  }
  function draw() {
    box.replaceChildren();
    const scores = sinks.scores.map((score) => score + shift);
    const { weights, share } = sinks.softmax(scores, sink);
    const alone = sinks.softmax(scores, -Infinity).weights;
    svg("line", { x1: 0, x2: WIDTH, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM,
                  class: "live-rule" }, box);
    weights.forEach((weight, n) => {
      bar(n, weight, "live-seen live-row-on");
      bar(n, alone[n], "live-outline");
      under(n, HEIGHT - 30, figure3(scores[n]).replace("-", "−"));
    });
    bar(6, share, "live-share");
    under(6, HEIGHT - 30, figure3(sink).replace("-", "−"));
    under(6, HEIGHT - 8, "sink");
    svg("text", { x: 14, y: HEIGHT - 8 }, box, "scores of six keys");
    const kept = weights.reduce((sum, weight) => sum + weight, 0);
    said.textContent = `The keys get ${figure3(100 * kept)} % of the weight, ` +
      `the sink ${figure3(100 * share)} %. Without a sink (outlines) the ` +
      "keys get all of it, whatever is added to their scores.";
    Object.assign(root.dataset, { sink, shift, kept, share });
  }
  draw();
}

// --- moe/routing: two logits that nearly tie ---------------------------------

const routing = {
  // of eight experts, four chosen; the sixth is moved, the third stays
  logits: [0.41, 2.31, 1.86, -0.37, 2.05, 1.8555, 2.62, 0.9], k: 4, moved: 5,

  /* the nearest bf16, ties to the even one */
  bf16(number) {
    const bits = new Uint32Array(new Float32Array([number]).buffer);
    bits[0] += 0x7fff + ((bits[0] >>> 16) & 1);
    bits[0] &= 0xffff0000;
    return new Float32Array(bits.buffer)[0];
  },
  softmax(logits) {
    const most = Math.max(...logits);
    const powers = logits.map((l) => Math.exp(l - most));
    const sum = powers.reduce((s, p) => s + p, 0);
    return powers.map((p) => p / sum);
  },
  /* gptoss.moe.routing.route for one token; the sort is stable */
  route(logits, k) {
    const ids = logits.map((_, e) => e).sort((a, b) => logits[b] - logits[a])
      .slice(0, k);
    return { ids, weights: this.softmax(ids.map((e) => logits[e])) };
  },
};

function drawRouting(root) {
  const WIDTH = 640, HEIGHT = 330, LEFT = 50, MIDDLE = 200;
  const logits = [...routing.logits], { k, moved } = routing;

  slider(root, "logit of expert 5", "logit", [1.845, 1.875, 0.0005, 1.8555],
         (value) => { logits[moved] = value; draw(); });
  const said = html("p", { class: "live-said", "aria-live": "polite" }, root);
  const box = canvas(root, WIDTH, HEIGHT,
    "Above, the logits of experts 2 and 5 over the numbers that bf16 can " +
    "hold, each joined to the one it rounds to; below, eight experts and " +
    "their weights, by choosing first and by a softmax over all");

  function draw() {
    box.replaceChildren();
    const rounded = logits.map((l) => routing.bf16(l));
    const exact = routing.route(logits, k), found = routing.route(rounded, k);
    const tie = rounded[2] === rounded[moved];
    const x = (l) => LEFT + (WIDTH - 2 * LEFT) * (l - 1.843) / 0.034;
    svg("text", { x: LEFT, y: 16 }, box, "the logits of experts 2 and 5");
    svg("text", { x: LEFT, y: 128 }, box, "what bf16 can hold");
    for (let n = 236; n <= 240; n++) {
      svg("line", { x1: x(n / 128), x2: x(n / 128), y1: 88, y2: 108,
                    class: "live-grid" }, box);
    }
    for (const e of [2, moved]) {
      const bad = e === moved ? " live-bad" : "";
      svg("line", { x1: x(logits[e]), y1: 44, x2: x(rounded[e]), y2: 88,
                    class: "live-link" + bad }, box);
      svg("circle", { cx: x(logits[e]), cy: 40, r: 5,
                      class: "live-dot" + bad }, box);
      svg("text", { x: x(logits[e]), y: e === 2 ? 32 : 62,
                    "text-anchor": "middle" }, box, String(e));
    }
    const all = routing.softmax(rounded), wide = (WIDTH - 2 * LEFT) / 8;
    const y = (w) => HEIGHT - 44 - MIDDLE * 0.5 * w / 0.5;
    svg("text", { x: LEFT, y: 176 }, box,
        "weights: ● choose, then softmax   | softmax over all");
    for (let e = 0; e < 8; e++) {
      const at = LEFT + wide * (e + 0.5), place = found.ids.indexOf(e);
      svg("line", { x1: at + 9, x2: at + 9, y1: y(0), y2: y(all[e]),
                    class: "live-grid" }, box);
      svg("circle", { cx: at - 4, cy: y(place < 0 ? 0 : found.weights[place]),
                      r: 5, class: "live-dot" + (e === moved ? " live-bad"
                                                             : "") }, box);
      svg("text", { x: at, y: HEIGHT - 20, "text-anchor": "middle" }, box,
          String(e));
    }
    svg("text", { x: WIDTH / 2, y: HEIGHT - 2, "text-anchor": "middle" }, box,
        "expert");
    const kept = found.ids.reduce((s, e) => s + all[e], 0);
    const flipped = [...exact.ids].sort().join() !== [...found.ids].sort()
      .join();
    said.textContent = `Exact: expert ${exact.ids[3]} is the fourth. ` +
      (tie ? `In bf16 both are ${rounded[2]}, a tie: the lower index, 2, ` +
             (flipped ? "which is the wrong one." : "which is right.")
           : `In bf16 they stay apart: expert ${found.ids[3]}.`) +
      ` A softmax over all would give the four ${kept.toFixed(2)} together.`;
    Object.assign(root.dataset, { logit: logits[moved], tie, flipped, kept,
                                  exact: exact.ids, found: found.ids });
  }
  draw();
}

// --- model/remembering: how far can we go back? ------------------------------

const cache = {
  tokens: 24,

  /* gptoss.model.rows.roll_back for one row that was never replayed */
  rollBack(length, window, slack, layers) {
    const to = Math.min(length, this.tokens);
    const oldest = Math.max(0, this.tokens - window - slack);
    const replays = oldest > Math.max(0, to - window + 1) && to > 0;
    return { replays, start: replays ? Math.max(0, to - layers * (window - 1))
                                     : to };
  },
  /* whether sliding layer j is right at a position fed again from start */
  right(position, j, start, window) {
    return start === 0 || position >= start + j * (window - 1);
  },
};

function drawRollback(root) {
  const CELL = 22, LEFT = 96, TOP = 26, HIGH = 34, LAYERS = 3, WINDOW = 4;
  let slack = 1, length = 20;

  slider(root, "go back to length", "length", [0, cache.tokens, 1, length],
         (value) => { length = value; draw(); });
  slider(root, "slack of the rings", "slack", [0, 6, 1, slack],
         (value) => { slack = value; draw(); });
  const said = html("p", { class: "live-said", "aria-live": "polite" }, root);
  const box = canvas(root, LEFT + CELL * cache.tokens + 6,
                     TOP + HIGH * (LAYERS + 1) + 30,
    "Keys by position: of a full layer, and of three sliding layers, after " +
    "24 tokens were read and some taken back");

  function draw() {
    box.replaceChildren();
    const { replays, start } = cache.rollBack(length, WINDOW, slack, LAYERS);
    svg("text", { x: LEFT, y: 15 }, box, "position 0 to 23; framed: what " +
        "the next query needs");
    for (let row = 0; row <= LAYERS; row++) {
      const y = TOP + row * HIGH, full = row === LAYERS;
      svg("text", { x: LEFT - 6, y: y + 17, "text-anchor": "end" }, box,
          full ? "full" : `sliding ${row}`);
      for (let p = 0; p < cache.tokens; p++) {
        const held = full ? p < length : replays ? p >= start && p < length
          : p < length && p >= cache.tokens - WINDOW - slack;
        const wrong = !full && replays && held
          && !cache.right(p, row, start, WINDOW);
        svg("rect", { x: LEFT + p * CELL, y, width: CELL - 2, height: 22,
                      class: wrong ? "live-wrong" : held
                        ? "live-seen live-row-on" : "live-unseen" }, box);
        if (!full && p < length && p > length - WINDOW) {
          svg("rect", { x: LEFT + p * CELL + 1, y: y + 1, width: CELL - 4,
                        height: 20, class: "live-need" }, box);
        }
      }
    }
    const back = cache.tokens - length;
    said.textContent = (replays
      ? `${back} tokens taken back, more than slack + 1 = ${slack + 1}: the ` +
        `rings are emptied and positions ${start} to ${length - 1} fed ` +
        "again. Orange keys come out wrong, and no later query looks at them."
      : back === 0 ? "Nothing taken back."
      : `${back} token${back === 1 ? "" : "s"} taken back: all that the next ` +
        "query needs is there. Nothing is fed again.");
    Object.assign(root.dataset, { length, slack, start, replays });
  }
  draw();
}

Object.assign(window.live, { routing, cache });

// --- Start -------------------------------------------------------------------

const TITLES = {
  routing: ["Move a logit", drawRouting],
  rollback: ["Take tokens back", drawRollback],
  mxfp4: ["Move the scale", drawMxfp4],
  masks: ["Drag the window", drawMasks],
  rope: ["Slide the factor", drawRope],
  sinks: ["Move the sink", drawSinks],
};

for (const root of document.querySelectorAll("div.live[data-live]")) {
  const [title, draw] = TITLES[root.dataset.live];
  root.replaceChildren();
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", title);
  html("p", { class: "live-title" }, root, title);
  draw(root);
}
