"use strict";
const { names } = JSON.parse(document.getElementById("data").textContent), by = id => document.getElementById(id);
const percent = v => (Math.round(1000 * v) / 10 || 0).toFixed(1), count = n => n.toLocaleString("en");
const make = (tag, properties = {}, ...children) => { const e = Object.assign(document.createElement(tag), properties); e.append(...children); return e; };
const ranges = names.map((_, i) => by(`a${i}`)), numbers = names.map((_, i) => by(`n${i}`)), blobs = new Map();
async function ask(path, body, headers) {
  const answer = await fetch(path, body === undefined ? {} : { method: "POST", body, headers }), value = await answer.json();
  if (value.error && !answer.ok) throw new Error(value.error);
  return value;
}
const fail = error => { by("status").textContent = `${error.message}`; };
// at most one request for a move is under way; the last position is the next one
let moving = false, again = false;
const alpha = () => numbers.map(n => Number(n.value) || 0);
async function move() {
  if (moving) { again = true; return; }
  moving = true;
  do { again = false; await ask("move", JSON.stringify(alpha())).catch(fail); } while (again);
  moving = false;
}
names.forEach((name, i) => {
  const say = () => ranges[i].setAttribute("aria-valuetext", `alpha ${Number(ranges[i].value)} of ${name}`);
  ranges[i].addEventListener("input", () => { numbers[i].value = Number(ranges[i].value); say(); move(); });
  numbers[i].addEventListener("input", () => { ranges[i].value = numbers[i].value; say(); move(); });
  say();
});
by("sliders").addEventListener("submit", event => event.preventDefault());
by("reset").addEventListener("click", () => { names.forEach((_, i) => { ranges[i].value = numbers[i].value = 0; }); move(); });
by("write").addEventListener("click", async () => {
  try {
    await ask("move", JSON.stringify(alpha()));
    const { text, command } = await ask("recipe", "");
    by("written").replaceChildren(make("pre", { textContent: `${text}\n# ${command}` }));
  } catch (error) { by("written").textContent = error.message; }
});
async function add(files) {
  for (const file of files) {
    try {
      const { id } = await ask("picture", file, { "X-Name": encodeURIComponent(file.name) });
      blobs.set(id, URL.createObjectURL(file));
    } catch (error) { fail(error); }
  }
}
by("files").addEventListener("change", async () => { await add(by("files").files); by("files").value = ""; });
for (const kind of ["dragover", "dragleave", "drop"]) by("drop").addEventListener(kind, event => {
  event.preventDefault(); by("drop").classList.toggle("over", kind === "dragover");
  if (kind === "drop") add(event.dataTransfer.files);
});
addEventListener("dragover", event => event.preventDefault()); addEventListener("drop", event => event.preventDefault());
const bar = task => make("div", { className: "bar" }, make("span", { textContent: task.name }),
  make("div", { className: "track" }, Object.assign(make("i"), { style: `width: ${100 * task.accuracy}%` }), Object.assign(make("u"), { style: `left: ${100 * task.base}%` })),
  make("b", { textContent: percent(task.accuracy) }));
const picture = (index, p, word) => make("figure", {},
  make("img", { src: `picture/${index}/${p.index}`, alt: `${p.truth}, ` + (word === "fixed" ? `taken for ${p.before} before` : `taken for ${p.after}`) }),
  make("figcaption", {}, p.truth, make("br"), make("span", { className: word === "fixed" ? "wrong" : "right", textContent: p.before }), " → ",
    make("span", { className: word === "fixed" ? "right" : "wrong", textContent: p.after })));
function show(state) {
  if (state.error) { by("status").textContent = state.error; by("bars").replaceChildren(); by("changed").replaceChildren(); return; }
  if (!state.tasks.length) return;
  const seen = state.tasks.map(task => `${task.name} ${percent(task.accuracy)} % of ${count(task.images)} images, ${count(task.fixed)} fixed, ${count(task.broken)} broken`).join("; ");
  const where = names.map((name, i) => `${name} ${state.alpha[i]}`).join(", ");
  // the status is read aloud: only when a measurement is complete
  by("status").textContent = state.done ? `${where}: ${seen}.` : `${where}: ${count(state.tasks[0].images)} of ${count(state.tasks[0].of)} images …`;
  by("bars").replaceChildren(...state.tasks.map(bar));
  by("changed").replaceChildren(...state.tasks.flatMap((task, index) => [make("h3", { textContent: `${task.name}: ${count(task.fixed)} fixed, ${count(task.broken)} broken` }),
    make("div", { className: "pictures" }, ...["fixed", "broken"].flatMap(word => task[`${word}_pictures`].map(p => picture(index, p, word))))]));
  by("own").replaceChildren(...state.own.map(p => make("figure", {},
    ...(blobs.has(p.id) ? [make("img", { src: blobs.get(p.id), alt: p.name })] : []),
    make("figcaption", {}, p.name, ...p.guesses.flatMap(g => [make("br"), `${g.task}: `, make("b", { textContent: g.guess })])))));
}
(async () => {
  for (let version = -1; ;) {
    try { const state = await ask(`state?seen=${version}`); if (state.version !== version) { version = state.version; show(state); } }
    catch (error) { by("status").textContent = "weightops has ended, or can't be reached."; await new Promise(done => setTimeout(done, 2000)); }
  }
})();
