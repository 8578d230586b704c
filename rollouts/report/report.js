// The report's episode browser: list, filters, deep links, one episode with a lane per agent. Text is only ever set as text.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const S = data.strings || [], ROWS = data.rows || [], PAGE = 100;
const [RUN, ID, LABELS, TASK, PROMPT, STEP, WORTH, AGENTS, TOKENS, MARKS, KIND, ABOUT] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
const $ = (id) => document.getElementById(id);
const MARK = { f: "failed", u: "unscorable", c: "truncated", m: "siblings", g: "saw the answer", k: "follows" };
const FILTERS = ["q", "run", "kind", "label", "agent", "outcome", "low", "high"];
const state = { found: [], page: 0, open: "", colour: "advantage", sort: null };

function el(tag, kind, text, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== null && text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function anchor(text, href, kind = "") {
  const made = el("a", kind, text);
  made.href = href;
  return made;
}

const num = (v) => (v === null || v === undefined ? "–" : Number.isInteger(v) ? String(v) : v.toPrecision(3));
const key = (row) => row[RUN] + ":" + row[ID];

// the list

function options(select, values, all) {
  select.replaceChildren(new Option(all, ""), ...values.map(([value, label]) => new Option(label, value)));
}

const best = ROWS.reduce((top, row) => Math.max(top, row[WORTH] ?? -Infinity), -Infinity);
const isRight = (row) => row[WORTH] > 0 && row[WORTH] >= Math.min(1, best); // an unscorable one is not: null > 0 is false

function keep(row, f) {
  return (
    (f.run === "" || row[RUN] === Number(f.run)) &&
    (f.kind === "" || S[row[KIND]] === f.kind) &&
    (f.label === "" || row[LABELS].includes(Number(f.label))) &&
    (f.agent === "" || row[AGENTS].includes(Number(f.agent))) &&
    (f.low === "" || (row[WORTH] !== null && row[WORTH] >= Number(f.low))) &&
    (f.high === "" || (row[WORTH] !== null && row[WORTH] <= Number(f.high))) &&
    (f.outcome === "" || (f.outcome === "right" ? isRight(row) : f.outcome === "wrong" ? !isRight(row)
      : f.outcome === "t" ? key(row) in data.episodes : row[MARKS].includes(f.outcome))) &&
    (f.q === "" || [row[ID], S[row[ABOUT]], S[row[TASK]], S[row[PROMPT]]].some((text) => text.toLowerCase().includes(f.q)))
  );
}

function filter() {
  const f = Object.fromEntries(FILTERS.map((name) => [name, $(name).value.trim()]));
  f.q = f.q.toLowerCase();
  state.found = ROWS.filter((row) => keep(row, f));
  if (state.sort !== null) {
    const [column, sign] = state.sort, value = (row) => (row[column] === null ? -Infinity : row[column]);
    state.found.sort((a, b) => sign * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
  }
  state.page = 0;
  list();
}

const EXTRA = []; // more columns of the list: {head, cell: (row) => element}
const HEADS = [["episode", ID], ["when", STEP], ["task", null], ["reward", WORTH], ["tokens", TOKENS], ["", null]];

function list() {
  const from = state.page * PAGE, shown = state.found.slice(from, from + PAGE);
  $("rows").replaceChildren(...shown.map(line));
  $("count").textContent = state.found.length + " of " + ROWS.length + " episodes";
  $("where").textContent = state.found.length ? `${from + 1} to ${from + shown.length} of ${state.found.length}` : "none";
  $("back").disabled = state.page === 0;
  $("next").disabled = from + PAGE >= state.found.length;
}

function line(row) {
  const link = anchor(row[ID], "#e=" + encodeURIComponent(key(row)));
  const marks = [...row[MARKS]].map((m) => el("span", "mark " + m, MARK[m]));
  const whole = key(row) in data.episodes ? [] : [el("span", "mark", "row only")];
  const when = (data.runs.length > 1 ? data.runs[row[RUN]].name + " " : "") + row[LABELS].map((n) => S[n]).join(", ");
  const made = el("tr", key(row) === state.open ? "open" : "", null,
    el("td", "id", null, link), el("td", "", when), el("td", "task", S[row[PROMPT]]),
    el("td", "n " + (row[WORTH] === null ? "bad" : isRight(row) ? "good" : ""), num(row[WORTH])),
    ...EXTRA.map((column) => el("td", "", null, column.cell(row))),
    el("td", "n", num(row[TOKENS])), el("td", "", null, ...marks, ...whole));
  made.addEventListener("click", (event) => { if (!event.target.closest("a, button")) go(key(row)); });
  return made;
}

function heads() {
  const extra = EXTRA.map((column) => [column.head, null]), at = HEADS.findIndex(([name]) => name === "tokens");
  $("heads").replaceChildren(...HEADS.toSpliced(at, 0, ...extra).map(([name, column]) => {
    const head = el("th", column === WORTH || column === TOKENS ? "n" : "");
    head.scope = "col";
    if (column === null) { head.textContent = name; return head; }
    const button = el("button", "sort", name);
    button.addEventListener("click", () => {
      state.sort = [column, state.sort && state.sort[0] === column ? -state.sort[1] : -1];
      head.parentNode.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", state.sort[1] > 0 ? "ascending" : "descending");
      filter();
    });
    head.append(button);
    return head;
  }));
}

// one episode

function reward([name, value, why]) {
  const made = el("span", "reward", `${S[name]} ${value === null ? "unscorable" : num(value)}`);
  return [made, ...(why === null ? [] : [el("span", "why", S[why])])];
}

function field(name, text, kind) {
  return text === null ? [] : [el("h4", "", name), el("pre", kind, S[text])];
}

function levels(turn, how) {
  // numbers per token on a scale from -1 to 1, and how to say them
  const each = (values) => (Array.isArray(values) ? values : turn.tokens.map(() => values));
  if (how === "advantage" && turn.advantage !== undefined) return [each(turn.advantage), (a) => a / 2, "advantage"];
  if (how === "ratio" && turn.ratio) return [turn.ratio, (r) => (r === null ? 0 : Math.log(r) / Math.log(1.5)), "ratio"];
  if (how === "logp" && turn.logp) return [turn.logp, (p) => (p === null ? 0 : p / 3), "log-prob"];
  return null;
}

function said(turn, how) {
  const found = turn.tokens && levels(turn, how);
  if (!found) return el("pre", "said", S[turn.text]);
  const [values, scale, name] = found, made = el("pre", "said");
  turn.tokens.forEach((piece, n) => {
    const level = Math.max(-4, Math.min(4, Math.round(scale(values[n]) * 4)));
    const token = el("span", level ? "t " + (level < 0 ? "m" : "p") + Math.abs(level) : "t", S[piece]);
    const numbers = [`${name} ${num(values[n])}`];
    if (name !== "ratio" && turn.ratio) numbers.push("ratio " + num(turn.ratio[n]));
    if (name !== "log-prob" && turn.logp) numbers.push("log-prob " + num(turn.logp[n]));
    token.title = numbers.join(", ");
    made.append(token);
  });
  return made;
}

function readers(reads, speakers) {
  // the agents of the turns, and the names of the operations, that were read
  const read = reads.map((i) => speakers.get(i) || `turn ${i}`);
  return reads.length ? [el("p", "reads", "read " + read.join(", "))] : [];
}

function step([index, reads, name, text, error], speakers) {
  // plain Python between turns that the system put on record
  const made = el("div", "turn operation", null, el("h3", "", null, S[name] + " ", el("small", "", `operation ${index}`)));
  made.dataset.turn = index;
  made.dataset.reads = reads.join(" ");
  made.append(...readers(reads, speakers));
  for (const [said, kind] of [[S[text], ""], [S[error], "bad"]]) if (said) made.append(el("pre", kind, said));
  return made;
}

function card(turn, speakers, how, colour) {
  const made = el("div", "turn" + (turn.marks && turn.marks.includes("not taken") ? " untaken" : ""));
  made.dataset.turn = turn.i;
  made.dataset.reads = turn.reads.join(" ");
  const facts = [`turn ${turn.i}`, `${turn.n} tokens`, turn.version, ...(turn.marks || [])];
  if (turn.k) facts.push("sibling " + turn.k);
  if (turn.advantage !== undefined && !Array.isArray(turn.advantage)) facts.push("advantage " + num(turn.advantage));
  made.append(el("h3", "", null, el("span", colour, S[turn.agent]), " ", el("small", "", facts.join(" · "))));
  made.append(...readers(turn.reads, speakers));
  made.append(said(turn, how), ...turn.rewards.flatMap(reward));
  const sent = el("details", "", null, el("summary", "", "what it was sent"));
  sent.addEventListener("toggle", () => {
    if (sent.childElementCount === 1) turn.told.forEach(([role, text]) => sent.append(...field(role, text)));
  });
  made.append(sent);
  return made;
}

function lanes({ turns, operations }, how) {
  const agents = [...new Set(turns.map((t) => t.agent))], grid = el("div", "lanes n" + Math.min(agents.length, 6));
  agents.slice(0, 6).forEach((a, n) => grid.append(el("div", "lane c" + (n % 6), S[a])));
  const speakers = new Map([...turns.map((t) => [t.i, `${S[t.agent]} (turn ${t.i})`]), ...operations.map((o) => [o[0], `${S[o[2]]} (operation ${o[0]})`])]);
  const calls = [...new Set([...turns.map((t) => t.i), ...operations.map((o) => o[0])])].sort((a, b) => a - b);
  const rows = new Map(), ends = new Map(); // a turn stands below what it read and below its agent's last one
  let above = 1, last = 1; // the row of the last operation, which has all of its row, and of anything
  const place = (cell, i, row) => {
    rows.set(i, row);
    last = Math.max(last, row);
    cell.style.gridRow = row;
    grid.append(cell);
  };
  calls.forEach((i) => {
    const done = operations.find((o) => o[0] === i);
    if (done) return place(el("div", "cell all", null, step(done, speakers)), i, above = last + 1);
    const own = turns.filter((t) => t.i === i), taken = own.find((t) => !(t.marks || []).includes("not taken")) || own[0];
    const at = agents.indexOf(taken.agent), colour = "c" + (at % 6);
    const cell = el("div", "cell l" + (Math.min(at, 5) + 1), null, card(taken, speakers, how, colour));
    const others = own.filter((t) => t !== taken);
    if (others.length) {
      cell.append(el("details", "siblings", null, el("summary", "", others.length === 1 ? "1 sibling not taken" : `${others.length} siblings not taken`), ...others.map((t) => card(t, speakers, how, colour))));
    }
    const row = 1 + Math.max(above, ends.get(taken.agent) || 0, ...taken.reads.map((r) => rows.get(r) || 0));
    ends.set(taken.agent, row);
    place(cell, i, row);
  });
  return grid;
}

function arrows(grid) {
  // a line from each turn that was read to the one that read it
  const old = grid.querySelector("svg");
  if (old) old.remove();
  const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg"), box = grid.getBoundingClientRect();
  svg.setAttribute("class", "arrows");
  svg.setAttribute("width", box.width);
  svg.setAttribute("height", box.height);
  for (const to of grid.querySelectorAll(".cell > .turn")) {
    for (const i of to.dataset.reads.split(" ").filter(Boolean)) {
      const from = grid.querySelector(`.cell > .turn[data-turn="${i}"]`);
      if (!from) continue;
      const a = from.getBoundingClientRect(), b = to.getBoundingClientRect();
      const x = a.left - box.left + a.width / 2, y = a.bottom - box.top, u = b.left - box.left + 24, v = b.top - box.top;
      const path = document.createElementNS(ns, "path");
      path.setAttribute("d", `M${x} ${y}C${x} ${(y + v) / 2} ${u} ${(y + v) / 2} ${u} ${v}m-4 -7l4 7l4 -7`);
      svg.append(path);
    }
  }
  grid.append(svg);
}

function family(episode, row) {
  // links to the episode that this one was played for or is about, and to those that name this one
  const links = [], other = episode.parent || episode.follows;
  if (other) links.push(["the episode it follows from", "#e=" + encodeURIComponent(`${row ? row[RUN] : 0}:${other}`)]);
  if (row && ROWS.some((r) => r[RUN] === row[RUN] && S[r[ABOUT]] === row[ID])) {
    links.push(["what followed from it", "#outcome=k&q=" + encodeURIComponent(row[ID])]);
  }
  return links.flatMap(([label, where]) => [" · ", anchor(label, where)]);
}

function decisions(taken) {
  // choices that are not tokens, each with its probability and what it earned
  if (!taken.length) return [];
  const said = taken.map(([name, choice, chance, rewards]) => el("span", "decision", null, S[name] + ": ",
    el("b", "", S[choice]), chance === null ? "" : ` (${num(chance)})`, ...rewards.flatMap(reward)));
  return [el("h4", "", "decisions, with their probability"), el("p", "decisions", null, ...said)];
}

const HOW = { advantage: "advantage", ratio: "ratio", logp: "log-prob", none: "none" };
const MEANS = {
  advantage: "green: trained towards, red: away from.", ratio: "green: likelier after the step, red: less likely.",
  logp: "red: unlikely when it was sampled.", none: "",
};

async function show(name) {
  const box = $("episode");
  state.open = name;
  const at = state.found.findIndex((row) => key(row) === name);
  if (at >= 0) state.page = Math.floor(at / PAGE);
  list();
  const mine = document.querySelector("#rows tr.open"), view = $("list"), top = mine ? mine.offsetTop - view.scrollTop : 100;
  if (top < 40 || top > view.clientHeight - 40) view.scrollTop += top - view.clientHeight / 2;
  box.hidden = name === "";
  if (name === "") return;
  const episode = data.episodes[name] || (data.follow ? await ask(name) : null), row = ROWS.find((r) => key(r) === name);
  box.replaceChildren(anchor("close", "#episodes", "close"), el("h2", "", row ? row[ID] : name));
  if (!episode) {
    const why = row ? "Only the row of this episode is in this page, which holds a sample. " : "There is no such episode here. ";
    box.append(el("p", "note", why + "marlora report --max_episodes holds more; --follow holds all."));
    return;
  }
  const values = episode.rewards.flatMap(reward);
  const others = anchor("all episodes of this task", "#q=" + encodeURIComponent(S[episode.task]));
  const extra = row ? EXTRA.map((column) => column.cell(row)) : [];
  box.append(el("p", "", null, ...values, " ", ...extra, " ", others, ...family(episode, row)));
  box.append(el("p", "soft", `${episode.kind} episode; the team's state is ${episode.state}`));
  box.append(...field("task", episode.prompt), ...field("expected", episode.answer));
  const made = episode.from.length ? `, from ${episode.from.map((i) => "turn " + i).join(", ")}` : "";
  box.append(...field(`${episode.kind === "aside" ? "" : "the team's "}output (${episode.stop}${made})`, episode.output), ...field("error", episode.error, "bad"));
  box.append(...decisions(episode.decisions));
  const can = (how) => how !== "none" && episode.turns.some((t) => t.tokens && levels(t, how));
  const used = state.colour === "none" || can(state.colour) ? state.colour : "logp";
  const pick = el("p", "colours", "tokens coloured by ");
  for (const [how, label] of Object.entries(HOW)) {
    const button = el("button", how === used ? "on" : "", label);
    button.setAttribute("aria-pressed", how === used);
    button.addEventListener("click", () => { state.colour = how; show(state.open); });
    pick.append(button, " ");
  }
  if (can(used)) pick.append(el("span", "soft", MEANS[used] + " "));
  if (!episode.turns.some((t) => t.tokens)) pick.append(el("span", "soft", "The texts of single tokens are not here: no tokenizer was at hand."));
  else if (used !== state.colour) pick.append(el("span", "soft", `No ${HOW[state.colour]} is known here: the episode was not trained on.`));
  const grid = lanes(episode, used);
  box.append(pick, grid);
  requestAnimationFrame(() => arrows(grid));
  grid.addEventListener("toggle", () => arrows(grid), true);
}

const go = (name) => { location.hash = "e=" + encodeURIComponent(name); };

function move(by) {
  const at = state.found.findIndex((row) => key(row) === state.open), next = at < 0 ? 0 : at + by;
  if (next < 0 || next >= state.found.length) return;
  go(key(state.found[next]));
}

// the address: #e=RUN:ID opens an episode, #q=...&outcome=... sets filters

function arrive() {
  const hash = location.hash.slice(1);
  if (!hash.includes("=")) {
    if (hash === "episodes") show("");
    if ($(hash)?.tagName === "DETAILS") $(hash).open = true; // a candidate of the tree
    return;
  }
  const asked = new URLSearchParams(hash.replaceAll("+", "%2B"));
  if (!asked.has("e")) {
    FILTERS.forEach((name) => { $(name).value = asked.get(name) || ""; });
    show("");
    filter();
    $("episodes").scrollIntoView();
    return;
  }
  show(asked.get("e")).then(() => { $("episode").scrollIntoView({ block: "nearest" }); $("episode").focus({ preventScroll: true }); });
}

function tell() {
  const asked = FILTERS.filter((name) => $(name).value).map((name) => name + "=" + encodeURIComponent($(name).value));
  history.replaceState(null, "", "#" + (asked.join("&") || "episodes"));
  state.open = "";
  $("episode").hidden = true;
}

// a page that is served live asks for what is new, and for episodes it does not hold

async function ask(name) {
  const reply = await fetch("episode?name=" + encodeURIComponent(name));
  if (!reply.ok) return null;
  const found = await reply.json(), start = S.length;
  S.push(...found.strings);
  const shift = (v, k) => (typeof v === "number" && REFS.has(k) ? v + start : v);
  return renumber(found.episode, shift);
}

const REFS = new Set(["task", "prompt", "answer", "output", "error", "agent", "text"]);

function renumber(episode, shift) {
  const one = (o) => Object.fromEntries(Object.entries(o).map(([k, v]) => [k, shift(v, k)]));
  const pair = (list, ...at) => list.map((entry) => entry.map((v, n) => (at.includes(n) && v !== null ? shift(v, "text") : v)));
  const turns = episode.turns.map((t) => ({
    ...one(t), told: pair(t.told, 1), rewards: pair(t.rewards, 0, 2), ...(t.tokens ? { tokens: t.tokens.map((v) => shift(v, "text")) } : {}),
  }));
  return { ...one(episode), rewards: pair(episode.rewards, 0, 2),
    decisions: pair(episode.decisions, 0, 1).map(([name, choice, chance, rewards]) => [name, choice, chance, pair(rewards, 0, 2)]),
    operations: pair(episode.operations, 2, 3, 4), turns };
}

function follow() {
  let known = null;
  setInterval(async () => {
    try {
      const now = await (await fetch("version")).text();
      if (known !== null && now !== known) location.reload();
      known = now;
      $("live").textContent = "live";
    } catch { $("live").textContent = "the run's page is no longer served"; }
  }, 2000);
}

function start() {
  const several = (values) => [...new Set(values)];
  options($("run"), data.runs.map((r, n) => [n, r.name]), "all runs");
  $("run").parentNode.hidden = data.runs.length < 2;
  const kinds = several(ROWS.map((r) => S[r[KIND]]));
  options($("kind"), kinds.map((name) => [name, name]), "all kinds");
  $("kind").parentNode.hidden = kinds.length < 2;
  options($("label"), several(ROWS.flatMap((r) => r[LABELS])).map((n) => [n, S[n]]), "any time");
  options($("agent"), several(ROWS.flatMap((r) => r[AGENTS])).map((n) => [n, S[n]]), "any agent");
  const told = data.runs.filter((r) => r.whole < r.episodes).map((r) =>
    `${r.name}: ${r.episodes} episodes, ${r.listed < r.episodes ? r.listed + " of them listed, " : ""}the whole text of ${r.whole} is in this page`);
  $("sampled").textContent = told.length ? "A sample: " + told.join("; ") + ". All are in the run's episodes/." : "";
  heads();
  filter();
  $("filters").addEventListener("input", () => { filter(); tell(); });
  $("filters").addEventListener("reset", () => setTimeout(() => { filter(); tell(); }));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("back").addEventListener("click", () => { state.page -= 1; list(); });
  $("next").addEventListener("click", () => { state.page += 1; list(); });
  addEventListener("hashchange", arrive);
  addEventListener("resize", () => { const grid = document.querySelector(".lanes"); if (grid) arrows(grid); });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") { location.hash = "episodes"; document.activeElement.blur(); return; }
    if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
    const how = { a: "advantage", r: "ratio", l: "logp", n: "none" }[event.key];
    if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (event.key === "/") { event.preventDefault(); $("q").focus(); }
    else if (how && state.open) { state.colour = how; show(state.open); }
  });
  arrive();
  if (data.follow) follow();
  document.documentElement.dataset.ready = "yes";
}

addEventListener("DOMContentLoaded", start); // after all of the page's script
