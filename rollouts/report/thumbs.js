// The thumbs of a page that is served live: a column of the list, buttons at an episode, keys u and d. The server keeps them.
const thumbs = { of: {}, problem: "" };

const mayHave = (row) => S[row[KIND]] === "train" && !row[MARKS].includes("f") && !row[MARKS].includes("k");

function thumb(row) {
  const made = el("span", "thumbs"), name = key(row), known = thumbs.of[name] || 0;
  if (!mayHave(row)) return made;
  for (const [value, label, sign] of [[1, "thumb up (u)", "▲"], [-1, "thumb down (d)", "▼"]]) {
    const button = el("button", "", sign);
    button.type = "button";
    button.title = label;
    button.setAttribute("aria-label", label);
    button.setAttribute("aria-pressed", known === value);
    button.addEventListener("click", () => give(name, value));
    made.append(button);
  }
  return made;
}

async function give(name, value) {
  // the same thumb again takes it back
  const wanted = thumbs.of[name] === value ? 0 : value;
  try {
    const reply = await fetch("thumb", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ name, thumb: wanted }),
    });
    if (!reply.ok) throw new Error(await reply.text());
    thumbs.of = await reply.json();
    thumbs.problem = "";
  } catch (error) {
    thumbs.problem = "the thumb was not kept: " + error.message;
  }
  told();
}

function told() {
  const counted = Object.values(thumbs.of), up = counted.filter((value) => value > 0).length;
  const note = `${up} up, ${counted.length - up} down; marlora.recipes.sysdpo --episodes RUN --thumbs true learns from them`;
  $("thumbs").textContent = thumbs.problem || (counted.length ? "Thumbs: " + note : "");
  $("thumbs").className = thumbs.problem ? "note" : "soft";
  list();
  const open = ROWS.find((row) => key(row) === state.open), old = document.querySelector("#episode .thumbs");
  if (open && old) old.replaceWith(thumb(open));
}

EXTRA.push({ head: "thumbs", cell: thumb });
addEventListener("DOMContentLoaded", async () => {
  $("pager").after(el("p", "soft"));
  $("pager").nextElementSibling.id = "thumbs";
  addEventListener("keydown", (event) => {
    const value = { u: 1, d: -1 }[event.key], row = ROWS.find((r) => key(r) === state.open);
    if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
    if (value && row && mayHave(row)) give(key(row), value);
  });
  thumbs.of = await (await fetch("thumbs")).json();
  told();
});
