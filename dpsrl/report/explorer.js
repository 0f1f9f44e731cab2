"use strict";
// The prompt explorer: unpacks what explorer.py packed, and shows it. Text from a run only ever becomes textContent.

const byId = (id) => document.getElementById(id);
const STATES = ["unsolved", "partial", "solved"];
const SHOWN = 60; // prompts listed at a time
const NO_CHANCE = 65535;

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "circle", "path", "text", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const binary = atob(base64), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function unpack(id) {
  const bytes = bytesOf(byId(id).textContent);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}
const unpackJson = async (id) => JSON.parse(new TextDecoder().decode(await unpack(id)));

// --- one run's data -----------------------------------------------------------------------------------

async function load(run) {
  const [buffer, prompts] = await Promise.all([unpack(`${run}-groups`), unpackJson(`${run}-prompts`)]);
  const count = Number(byId(`${run}-groups`).dataset.count);
  const groups = {};
  let at = 0;
  const column = (Type) => { const array = new Type(buffer, at, count); at += array.byteLength; return array; };
  for (const name of ["prompt", "step", "version"]) groups[name] = column(Uint32Array);
  for (const name of ["solved", "rollouts", "predicted"]) groups[name] = column(Uint16Array);
  groups.admitted = column(Uint8Array);
  const all = prompts.ids.map((id) => ({ id, rows: [], kept: [], text: "", answer: "", find: id.toLowerCase() }));
  for (let row = 0; row < count; row++) all[groups.prompt[row]].rows.push(row);
  for (const [place, text, answer] of prompts.texts) {
    Object.assign(all[place], { text, answer, find: `${all[place].find} ${text.toLowerCase()}` });
  }
  for (const [place, step, block, index] of prompts.kept) all[place].kept.push({ step, block, index });
  const stateOf = (row) => (!groups.rollouts[row] ? -1 : !groups.solved[row] ? 0
    : groups.solved[row] === groups.rollouts[row] ? 2 : 1);
  for (const prompt of all) measure(prompt, groups, stateOf);
  return { run, groups, all, stateOf, blocks: {} };
}

function measure(prompt, groups, stateOf) {
  prompt.states = prompt.rows.map(stateOf);
  const scored = prompt.states.filter((state) => state >= 0);
  prompt.last = scored.length ? scored[scored.length - 1] : -1;
  prompt.changes = scored.filter((state, i) => i && state !== scored[i - 1]).length;
  prompt.visits = prompt.rows.length;
  prompt.recent = prompt.rows.length ? groups.step[prompt.rows[prompt.rows.length - 1]] : 0;
  let gap = 0, known = 0;
  prompt.rows.forEach((row, i) => {
    if (prompt.states[i] < 0 || groups.predicted[row] === NO_CHANCE) return;
    gap += ((prompt.states[i] === 1) - groups.predicted[row] / 10000) ** 2;
    known += 1;
  });
  prompt.surprise = known ? gap / known : -1;
}

async function responsesOf(data, kept) {
  data.blocks[kept.block] ??= unpackJson(`${data.run}-block${kept.block}`);
  return (await data.blocks[kept.block])[kept.index];
}

// --- the list -----------------------------------------------------------------------------------------

const loaded = {};
let data = null, matches = [], limit = SHOWN;

function search() {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const only = byId("only").value, order = byId("order").value;
  matches = data.all.filter((prompt) => words.every((word) => prompt.find.includes(word))
    && (only === "" || (only === "kept" ? prompt.kept.length > 0 : prompt.last === Number(only))));
  matches.sort((a, b) => b[order] - a[order] || b.kept.length - a.kept.length || (a.id < b.id ? -1 : 1));
  limit = SHOWN;
  list();
}

function list() {
  const found = byId("found"), shown = matches.slice(0, limit);
  found.replaceChildren(...shown.map(item));
  if (matches.length > limit) {
    const more = make("button", { type: "button", class: "more" }, `Show more of ${matches.length.toLocaleString("en")}`);
    more.addEventListener("click", () => { limit += SHOWN; list(); found.querySelectorAll("button")[limit - SHOWN]?.focus(); });
    found.append(make("li", {}, more));
  }
  const total = data.all.length.toLocaleString("en");
  byId("count").textContent = `${matches.length.toLocaleString("en")} of ${total} prompts rolled out`;
}

function item(prompt) {
  const strip = make("span", { class: "strip", "aria-hidden": "true" },
    ...prompt.states.slice(-12).map((state) => make("i", { class: `s${state}` })));
  const last = prompt.last < 0 ? "never scored" : STATES[prompt.last];
  const groups = `${prompt.visits} group${prompt.visits === 1 ? "" : "s"}, last ${last}`;
  const kept = prompt.kept.length ? `, ${prompt.kept.length} with texts` : "";
  const button = make("button", { type: "button", "data-id": prompt.id },
    make("span", { class: "words" }, prompt.text.slice(0, 160) || prompt.id),
    make("span", { class: "sub" }, strip, groups + kept));
  if (prompt.id === chosenId()) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => choose(prompt));
  return make("li", {}, button);
}

function chosenId() {
  const match = location.hash.match(/^#prompt=([^&]*)/);
  try { return match ? decodeURIComponent(match[1]) : null; } catch { return null; }
}

function choose(prompt) {
  const run = data.run === "r0" ? "" : `&run=${data.run}`;
  try { history.replaceState(null, "", `#prompt=${encodeURIComponent(prompt.id)}${run}`); } catch { /* an id of half characters */ }
  for (const button of byId("found").querySelectorAll("[aria-current]")) button.removeAttribute("aria-current");
  const buttons = [...byId("found").querySelectorAll("button")];
  buttons.find((button) => button.dataset.id === prompt.id)?.setAttribute("aria-current", "true");
  show(prompt).then(() => byId("prompt").focus());
}

// --- one prompt ---------------------------------------------------------------------------------------

async function show(prompt) {
  const article = byId("prompt"), of = data;
  const parts = [make("h3", {}, `Prompt ${prompt.id}`)];
  if (prompt.text) parts.push(make("div", { class: "asked", tabindex: "0" }, prompt.text));
  else parts.push(make("p", { class: "caption" }, "This page has no text of this prompt."));
  if (prompt.answer) parts.push(make("p", { class: "caption" }, `Answer: ${prompt.answer}`));
  parts.push(chart(prompt), legend(), table(prompt));
  const kept = [...prompt.kept].sort((a, b) => a.step - b.step);
  const opened = new Set([kept[0], kept[kept.length - 1]]);
  for (const group of kept) parts.push(await answers(of, prompt, group, opened.has(group)));
  if (data === of) article.replaceChildren(...parts);
  article.setAttribute("aria-label", `Prompt ${prompt.id}`);
}

function chart(prompt) {
  const width = Math.max(280, Math.min(800, byId("prompt").clientWidth - 34)); // so that its text is the page's size
  const [height, left, bottom, top] = [190, 40, 34, 10];
  const { step, solved, rollouts, predicted } = data.groups;
  const steps = prompt.rows.map((row) => step[row]);
  const first = Math.min(...steps), last = Math.max(...steps, first + 1);
  const x = (value) => left + 10 + ((value - first) / (last - first)) * (width - left - 24);
  const y = (share) => height - bottom - share * (height - bottom - top);
  const svg = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Share solved and predicted chance of a mixed group of ${prompt.visits} groups; the table below has the numbers` });
  for (const share of [0, 0.5, 1]) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - 4, y1: y(share), y2: y(share) }),
      make("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, `${share * 100}%`));
  }
  const middle = Math.round((first + last) / 2);
  for (const value of new Set(steps.length > 1 ? [first, middle, last] : [first])) {
    svg.append(make("text", { x: x(value), y: height - 18, "text-anchor": "middle" }, String(value)));
  }
  svg.append(make("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, "step"));
  const known = prompt.rows.filter((row) => predicted[row] !== NO_CHANCE);
  const points = known.map((row) => [x(step[row]), y(predicted[row] / 10000)]);
  if (points.length > 1) svg.append(make("path", { class: "chance", d: `M${points.map((p) => p.join(",")).join("L")}` }));
  for (const [px, py] of points) svg.append(make("path", { class: "diamond", d: `M${px},${py - 4}l4,4l-4,4l-4,-4z` }));
  prompt.rows.forEach((row, i) => {
    if (prompt.states[i] < 0) return;
    const words = `step ${step[row]}: ${solved[row]} of ${rollouts[row]} solved`;
    svg.append(make("circle", { class: `dot s${prompt.states[i]}`, cx: x(step[row]), cy: y(solved[row] / rollouts[row]), r: 5 },
      make("title", {}, words)));
  });
  return svg;
}

function legend() {
  return make("p", { class: "key" }, ...STATES.map((name, i) => make("span", { class: `s${i}` }, `share solved, ${name}`)),
    make("span", { class: "chance" }, "predicted chance of mixed"));
}

function table(prompt) {
  const { step, version, solved, rollouts, predicted, admitted } = data.groups;
  const head = ["step", "weights", "solved", "predicted mixed", "state", "trained on"];
  const rows = prompt.rows.map((row, i) => {
    const state = prompt.states[i];
    return make("tr", {}, make("th", { scope: "row" }, String(step[row])), make("td", {}, String(version[row])),
      make("td", {}, `${solved[row]} of ${rollouts[row]}`),
      make("td", {}, predicted[row] === NO_CHANCE ? "-" : (predicted[row] / 10000).toFixed(2)),
      make("td", {}, make("span", { class: `tag s${state}` }, state < 0 ? "no reward" : STATES[state])),
      make("td", {}, admitted[row] ? "yes" : "no"));
  });
  return make("div", { class: "history", tabindex: "0", role: "group", "aria-label": "Groups of this prompt" },
    make("table", { class: "wide" },
      make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows)));
}

async function answers(of, prompt, kept, open) {
  const row = prompt.rows.find((candidate) => of.groups.step[candidate] === kept.step);
  const { solved, rollouts } = of.groups;
  const how = row === undefined ? "" : `: ${solved[row]} of ${rollouts[row]} solved`;
  const details = make("details", {}, make("summary", {}, `Responses at step ${kept.step}${how}`));
  const fill = async () => {
    if (details.childElementCount > 1) return;
    const shown = (await responsesOf(of, kept)).map(answer);
    const label = `Responses at step ${kept.step}, side by side`;
    details.append(make("div", { class: "answers", tabindex: "0", role: "group", "aria-label": label }, ...shown));
  };
  details.addEventListener("toggle", () => { if (details.open) fill(); });
  if (open) { await fill(); details.open = true; }
  return details;
}

function answer([text, reward, correct, numTokens, finish, numLeftOut]) {
  const kind = correct === null ? "none" : correct ? "right" : "wrong";
  const verdict = { none: "no reward", right: "✓ right", wrong: "✗ wrong" }[kind];
  const facts = [reward === null ? null : `reward ${Number(reward.toFixed(3))}`, numTokens === null ? null : `${numTokens} tokens`,
    finish === "length" ? "cut at the limit" : finish, numLeftOut ? `${numLeftOut.toLocaleString("en")} characters left out` : null];
  return make("div", { class: kind }, make("div", { class: "verdict" }, make("b", {}, verdict), " ", facts.filter(Boolean).join(", ")),
    make("pre", { tabindex: "0" }, text.replaceAll("\0", "\u2400") || "(empty)"));
}

// --- starting and keys --------------------------------------------------------------------------------

async function open(run) {
  loaded[run] ??= load(run);
  data = await loaded[run];
  for (const sentence of document.querySelectorAll("[data-run]")) sentence.hidden = sentence.dataset.run !== run;
  byId("of-run").value = run;
  search();
}

async function openFromHash() {
  const match = location.hash.match(/&run=(r\d+)$/);
  const run = match && byId(`${match[1]}-groups`) ? match[1] : byId("of-run").value;
  if (data === null || (match && run !== data.run)) await open(run);
  const prompt = data.all.find((candidate) => candidate.id === chosenId());
  if (prompt) await show(prompt);
  return prompt;
}

function move(event) {
  const buttons = [...byId("found").querySelectorAll("button")];
  const here = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (event.key === "Escape" || to === -1) byId("find").focus();
  else if (to !== undefined) buttons[Math.min(to, buttons.length - 1)]?.focus();
  else return;
  event.preventDefault();
}

function start() {
  if (typeof DecompressionStream === "undefined") {
    byId("count").textContent = "This browser is too old to show prompts: it has no DecompressionStream.";
    return;
  }
  let waiting = 0; // a list drawn again later would lose the focus
  const searchNow = () => { clearTimeout(waiting); search(); };
  byId("find").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 60); });
  byId("find").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") { event.preventDefault(); searchNow(); byId("found").querySelector("button")?.focus(); }
  });
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); searchNow(); if (matches.length) choose(matches[0]); });
  byId("only").addEventListener("change", search);
  byId("order").addEventListener("change", search);
  byId("of-run").addEventListener("change", () => open(byId("of-run").value));
  byId("found").addEventListener("keydown", move);
  byId("prompt").addEventListener("keydown", (event) => { if (event.key === "Escape") byId("find").focus(); });
  window.addEventListener("hashchange", openFromHash);
  openFromHash().then((prompt) => { document.documentElement.dataset.ready = prompt ? prompt.id : "yes"; });
}

if (byId("explorer")) requestAnimationFrame(() => setTimeout(start));
else document.documentElement.dataset.ready = "yes";
