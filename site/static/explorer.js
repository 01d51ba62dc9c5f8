/* The explorer of the site: step through a completion and watch the answer sharpen.
 *
 * It has no kernel. `explorer_data.js` brings what a model was needed for (window.EXPLORER, written
 * by site/export_stories.py); the advantages are computed here, as iapo_mini/advantages.py does.
 * The first half is arithmetic and runs in node, too; the second half draws.
 */
"use strict";

const EPS = 1e-4;

/** norm(x) = (x - mean) / (sample standard deviation + EPS); zeros for a flat or lone value. */
function normalize(values) {
  const n = values.length;
  const mean = values.reduce((a, b) => a + b, 0) / Math.max(1, n);
  const centred = values.map((v) => v - mean);
  const std = Math.sqrt(centred.reduce((a, c) => a + c * c, 0) / Math.max(1, n - 1));
  if (n < 2 || std <= 1e-6 * (1 + Math.abs(mean))) return values.map(() => 0);
  return centred.map((c) => c / (std + EPS));
}

/** s_t = H_{t-1} - H_t in nats, one for each token; entropies has one value more. */
function informativeness(entropies) {
  return entropies.slice(1).map((h, t) => entropies[t] - h);
}

/** The advantage of GRPO: the same at every token. */
function grpo(scene, completion) {
  const a = normalize(scene.rewards)[completion.index];
  return completion.probabilities.map(() => a);
}

/** A_t = norm(r) + alpha norm(s_t) + beta norm(c_t), one for each token, end of sequence included. */
function iapo(scene, completion, alpha, beta) {
  const s = normalize(informativeness(completion.entropies));
  const c = normalize(completion.probabilities.map((p) => (completion.correct ? p : -p)));
  return grpo(scene, completion).map((a, t) => a + alpha * s[t] + beta * c[t]);
}

const COLORINGS = {
  information: { label: "Information", unit: "nats", limit: 2 },
  iapo: { label: "IAPO advantage", unit: "", limit: 3 },
  grpo: { label: "GRPO advantage", unit: "", limit: 3 },
};
/* The limits are fixed: full colour means the same whatever alpha, beta and the story are. */

/** One number for each shown token. */
function tokenValues(scene, completion, coloring, alpha, beta) {
  const all =
    coloring === "information"
      ? informativeness(completion.entropies)
      : coloring === "iapo"
        ? iapo(scene, completion, alpha, beta)
        : grpo(scene, completion);
  return all.slice(0, completion.tokens.length);
}

/** Colour of a value and of the text on it: blue above zero, red below, the page's ground at zero. */
function colors(value, limit, dark) {
  const ground = dark ? [20, 24, 30] : [255, 255, 255];
  const end = value > 0 ? (dark ? [67, 147, 235] : [33, 102, 172]) : dark ? [236, 98, 84] : [178, 24, 43];
  const x = Math.min(1, Math.abs(value) / limit);
  const rgb = ground.map((g, i) => Math.round(g + x * (end[i] - g)));
  const channel = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2]);
  // Whichever of black and white differs more; that is at least 4.5 to 1 on any ground.
  return { ground: `rgb(${rgb.join(", ")})`, text: light > 0.179 ? "#000" : "#fff" };
}

if (typeof module !== "undefined") {
  module.exports = { normalize, informativeness, grpo, iapo, tokenValues, colors };
}

/* ---- The page ---- */

/** An element with attributes and children; strings become text. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "text"].includes(tag);
  const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  e.append(...children);
  return e;
}

const signed = (x) => (Math.abs(x) < 0.005 ? "" : x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(2);
const visible = (text) => text.replace(/\n/g, "\u21b5").replace(/^ | $/g, "\u00a0") || "\u00a0";
const percent = (p) => (p < 0.005 ? "<1%" : `${Math.round(100 * p)}%`);

function explore(root, scenes) {
  const state = { scene: 0, shown: 0, at: 0, coloring: "information", alpha: 0.2, beta: 0.05 };
  let timer = null;

  const scene = () => scenes[state.scene];
  const completion = () => scene().completions[state.shown];
  const length = () => completion().tokens.length;
  const dark = () => {
    const theme = document.documentElement.dataset.theme;
    return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };

  /* Controls. */
  const story = make("select", { id: "ex-story", "aria-label": "Problem" });
  const groups = {};
  scenes.forEach((s, i) => {
    groups[s.model] ??= make("optgroup", { label: s.model });
    groups[s.model].append(make("option", { value: i }, s.question));
  });
  story.append(...Object.values(groups));
  const choice = make("div", { class: "ex-group", role: "group", "aria-label": "Completion" });
  const coloring = make("div", { class: "ex-group", role: "group", "aria-label": "Colour of the tokens" });
  for (const [name, { label }] of Object.entries(COLORINGS)) {
    const button = make("button", { type: "button", "data-coloring": name }, label);
    button.addEventListener("click", () => change({ coloring: name }));
    coloring.append(button);
  }
  const sliders = make("div", { class: "ex-sliders" });
  for (const [name, sign, told] of [
    ["alpha", "\u03b1", "information"],
    ["beta", "\u03b2", "confidence"],
  ]) {
    const input = make("input", {
      type: "range", id: `ex-${name}`, min: 0, max: 1, step: 0.01, value: state[name],
      "aria-label": `${name}, weight of ${told}`,
    });
    const shown = make("output", { for: `ex-${name}` }, state[name].toFixed(2));
    input.addEventListener("input", () => {
      shown.textContent = Number(input.value).toFixed(2);
      // The sliders weigh IAPO's terms, so that is what moving them shows.
      change({ [name]: Number(input.value), coloring: "iapo" });
    });
    sliders.append(make("label", {}, make("span", {}, `${sign} (${told})`), input, shown));
  }
  const button = (label, text, act) => {
    const b = make("button", { type: "button", "aria-label": label, title: label }, text);
    b.addEventListener("click", act);
    return b;
  };
  const play = button("Play", "\u25b6 Play", () => (timer === null ? start() : stop()));
  play.className = "ex-play";
  const position = make("input", { type: "range", id: "ex-position", min: 0, value: 0, "aria-label": "Tokens read" });
  position.addEventListener("input", () => move(Number(position.value)));
  const count = make("output", { for: "ex-position", class: "ex-count" });
  const player = make("div", { class: "ex-player" },
    play,
    button("To the beginning", "\u21e4", () => move(0)),
    button("Back by one token", "\u2190", () => move(state.at - 1)),
    button("On by one token", "\u2192", () => move(state.at + 1)),
    button("To the end", "\u21e5", () => move(length())),
    position, count);

  /* Pictures. */
  const question = make("p", { class: "ex-question" });
  const strip = make("div", { class: "ex-strip", tabindex: 0, role: "group" });
  strip.setAttribute("aria-label", "Completion, token by token. The arrow keys move.");
  const legend = make("div", { class: "ex-legend" });
  const told = make("p", { class: "ex-told", "aria-live": "polite" });
  const bars = make("div", { class: "ex-bars" });
  const curve = make("div", { class: "ex-curve" });
  root.replaceChildren(
    make("div", { class: "ex-row" }, story, choice), question,
    make("div", { class: "ex-row" }, coloring, sliders),
    player, strip, legend, told,
    make("div", { class: "ex-pictures" }, bars, curve));

  function start() {
    if (state.at >= length()) state.at = 0;
    timer = setInterval(() => {
      if (state.at + 1 >= length()) stop();
      change({ at: Math.min(length(), state.at + 1) });
    }, 450);
    change({ at: state.at + 1 });
    label();
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    label();
  }
  function label() {
    play.textContent = timer === null ? "\u25b6 Play" : "\u275a\u275a Pause";
    play.setAttribute("aria-label", timer === null ? "Play" : "Pause");
    play.title = play.getAttribute("aria-label");
  }
  function move(at) {
    stop();
    change({ at: Math.max(0, Math.min(length(), at)) });
  }
  function change(values) {
    Object.assign(state, values);
    draw();
  }

  function chooseScene(i, shown) {
    stop();
    Object.assign(state, { scene: i, shown, at: 0 });
    position.max = length();
    question.replaceChildren(
      make("span", {}, scene().question), " ",
      make("strong", {}, `The right answer is ${scene().answer}.`));
    choice.replaceChildren(
      ...scene().completions.map((c, j) => {
        const text = `${c.correct ? "right" : "wrong"}, ${c.tokens.length} tokens`;
        const b = make("button", { type: "button", "aria-pressed": j === shown }, text);
        b.addEventListener("click", () => chooseScene(i, j));
        return b;
      }));
    strip.replaceChildren(
      ...completion().tokens.flatMap((token, t) => {
        const span = make("span", { class: "ex-token", "data-token": t + 1 }, visible(token));
        return token.includes("\n") ? [span, make("br")] : [span, make("wbr")];
      }));
    draw();
  }

  function draw() {
    const values = tokenValues(scene(), completion(), state.coloring, state.alpha, state.beta);
    const { limit, unit, label: name } = COLORINGS[state.coloring];
    const roles = completion().roles;
    strip.querySelectorAll(".ex-token").forEach((span, t) => {
      const read = t < state.at;
      const c = colors(values[t], limit, dark());
      span.className = `ex-token ${read ? "ex-read" : "ex-unread"}${t === state.at - 1 ? " ex-last" : ""}`;
      span.style.background = read ? c.ground : "";
      span.style.color = read ? c.text : "";
      if (roles) span.dataset.role = roles[t];
      span.title = `${signed(values[t])} ${unit}${roles ? `, ${roles[t]}` : ""}`;
    });
    for (const b of coloring.children) b.setAttribute("aria-pressed", b.dataset.coloring === state.coloring);
    position.value = state.at;
    position.setAttribute("aria-valuetext", `${state.at} of ${length()} tokens`);
    count.textContent = `${state.at} / ${length()}`;
    drawLegend(limit, unit, roles);
    drawTold(values, unit, name, roles);
    drawBars();
    drawCurve();
  }

  function drawLegend(limit, unit, roles) {
    const steps = [-1, -0.5, 0, 0.5, 1].map((x) => {
      const c = colors(x * limit, limit, dark());
      const text = x === 0 ? "0" : signed(x * limit).replace(/\.?0+$/, "");
      return make("span", { class: "ex-step", style: `background:${c.ground};color:${c.text}` }, text);
    });
    const used = roles ? [...new Set(roles)] : [];
    legend.replaceChildren(
      make("span", {}, ...steps, ` ${unit}`),
      ...used.map((role) => make("span", { class: "ex-role", "data-role": role }, role)));
  }

  function drawTold(values, unit, name, roles) {
    const t = state.at - 1;
    if (t < 0) {
      told.textContent = "No token is read yet. Which one will settle the answer?";
      return;
    }
    const role = roles ? `, role: ${roles[t]}` : "";
    const token = make("code", {}, visible(completion().tokens[t]));
    told.replaceChildren(`Token ${state.at}: `, token, `${role}. ${name}: ${signed(values[t])} ${unit}`.trimEnd() + ".");
  }

  function drawBars() {
    const likely = completion().answers[state.at];
    const { answer } = scene();
    const rows = likely.map(([text, p]) => ({ text, p, right: text === answer }));
    if (!rows.some((r) => r.right)) rows.push({ text: answer, p: completion().right[state.at], right: true });
    bars.replaceChildren(
      make("h2", { class: "ex-heading" }, "If it had to answer now"),
      ...rows.map(({ text, p, right }) =>
        make("div", { class: `ex-bar${right ? " ex-right" : ""}` },
          make("span", { class: "ex-answer" }, visible(text)),
          make("span", { class: "ex-track" }, make("span", { class: "ex-fill", style: `width:${100 * p}%` })),
          make("span", { class: "ex-share" }, percent(p) + (right ? " \u2713 right" : "")))));
    if (!completion().roles) {
      bars.append(make("p", { class: "ex-note" }, "Only the first token of an answer is shown."));
    }
  }

  const W = 460, H = 190, LEFT = 34, BOTTOM = 30, TOP = 12, RIGHT = 10;
  function drawCurve() {
    const h = completion().entropies.slice(0, length() + 1);
    const most = Math.max(1, Math.ceil(Math.max(...h)));
    const x = (t) => LEFT + ((W - LEFT - RIGHT) * t) / length();
    const y = (v) => TOP + (H - TOP - BOTTOM) * (1 - v / most);
    const path = (list) => list.map((v, t) => `${t ? "L" : "M"}${x(t).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
    svg.setAttribute("aria-label", `Answer entropy after ${state.at} tokens: ${h[state.at].toFixed(2)} nats`);
    for (let v = 0; v <= most; v++) {
      svg.append(
        make("line", { x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v), class: "ex-grid" }),
        make("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, String(v)));
    }
    svg.append(
      make("text", { x: LEFT, y: H - 8 }, "0"),
      make("text", { x: W - RIGHT, y: H - 8, "text-anchor": "end" }, `${length()} tokens`),
      make("path", { d: path(h), class: "ex-line ex-ahead" }),
      make("path", { d: path(h.slice(0, state.at + 1)), class: "ex-line" }),
      make("line", { x1: x(state.at), x2: x(state.at), y1: TOP, y2: H - BOTTOM, class: "ex-cursor" }),
      make("circle", { cx: x(state.at), cy: y(h[state.at]), r: 5, class: "ex-dot" }));
    curve.replaceChildren(
      make("h2", { class: "ex-heading" }, `How unsure it is: H = ${h[state.at].toFixed(2)} nats`), svg);
  }

  /* Moving by pointer: a token or a place on the curve is tapped, or dragged over. */
  const drag = (area, find) => {
    area.addEventListener("pointerdown", (e) => {
      const at = find(e);
      if (at !== null) move(at);
    });
    area.addEventListener("pointermove", (e) => {
      const at = e.buttons & 1 ? find(e) : null;
      if (at !== null && at !== state.at) move(at);
    });
  };
  drag(strip, (e) => {
    const token = document.elementFromPoint(e.clientX, e.clientY)?.closest(".ex-token");
    return token && strip.contains(token) ? Number(token.dataset.token) : null;
  });
  drag(curve, (e) => {
    const box = curve.querySelector("svg").getBoundingClientRect();
    if (e.clientY < box.top) return null;
    const inner = ((e.clientX - box.left) / box.width) * W - LEFT;
    return Math.max(0, Math.min(length(), Math.round((inner / (W - LEFT - RIGHT)) * length())));
  });

  /* Moving by keys, wherever the focus is, but not in controls that have these keys themselves. */
  document.addEventListener("keydown", (e) => {
    const here = e.target === document.body || root.contains(e.target);
    if (!here || e.target.matches("input, select") || e.ctrlKey || e.metaKey || e.altKey) return;
    const to = { ArrowLeft: state.at - 1, ArrowRight: state.at + 1, Home: 0, End: length() }[e.key];
    const inStrip = e.target === strip || e.target === document.body;
    if (to !== undefined && (inStrip || e.key.startsWith("Arrow"))) {
      e.preventDefault();
      move(to);
    } else if (e.key === " " && e.target === strip) {
      e.preventDefault();
      play.click();
    }
  });
  story.addEventListener("change", () => chooseScene(Number(story.value), 0));

  /* The theme may change by the site's switch or by the system. */
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  chooseScene(0, 0);
}

if (typeof document !== "undefined") {
  const root = document.getElementById("token-explorer");
  if (root) explore(root, window.EXPLORER.scenes);
}
