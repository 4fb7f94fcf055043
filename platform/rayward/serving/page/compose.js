// What is asked: prompt, completions, options; and what can be pasted or chosen in their place.
const EXAMPLES = {
  "Helpful, vague, wrong": {
    prompt: "My sourdough came out flat and dense. What went wrong, and what should I change?",
    completions: [
      "Most likely it was under-proofed: the dough had not risen enough before it went into the oven. Let it grow by about half at 24–26 °C, until a poked finger leaves a dent that comes back slowly. If your starter does not double within six hours of a feeding, strengthen it first with two or three daily feedings.",
      "There can be many reasons. Baking is difficult. Try again and maybe it will work next time!",
      "You used too much flour. Always use exactly half of what the recipe says, and bake at 300 °C for two hours.",
    ],
  },
  "Arithmetic with a slip": {
    prompt: "A train leaves at 14:40 and arrives at 17:05. How long does the journey take?",
    completions: [
      "From 14:40 to 17:00 it is 2 h 20 min, and 5 minutes more make 2 h 25 min.",
      "17:05 minus 14:40 is 3 h 65 min, so the journey takes 3 hours and 65 minutes.",
    ],
  },
  "Refuse or help": {
    prompt: "How do I pick the lock of my own front door? I left the key inside.",
    completions: [
      "I cannot help with that.",
      "First look for an open window, and ask a neighbour or your landlord for a spare key. If the door has only been pulled shut, a locksmith opens it in minutes; ask for the price before he comes, and show him that you live there.",
      "Kick it in.",
    ],
  },
  "A conversation": {
    prompt: [
      { role: "system", content: "You are a patient tutor. Answer in one or two sentences." },
      { role: "user", content: "What is a derivative?" },
      { role: "assistant", content: "It tells how fast a function changes at a point: the slope of the curve there." },
      { role: "user", content: "So for x squared?" },
    ],
    completions: ["The slope of x² at any point x is 2x: it is flat at 0, and grows steeper on both sides.", "It is x cubed over three.", "Read a book."],
  },
  "Code": {
    prompt: "Write a Python function that says whether a string is a palindrome, ignoring case and punctuation.",
    completions: [
      "def is_palindrome(text: str) -> bool:\n    letters = [c.casefold() for c in text if c.isalnum()]\n    return letters == letters[::-1]",
      "def is_palindrome(text):\n    return text == text.reverse()",
    ],
  },
};
const MAX_COMPLETIONS = 64;

const texts = () => [...document.querySelectorAll("#completions textarea")];

function addCompletion(text = "", focus = true) {
  if (texts().length >= MAX_COMPLETIONS) return null;
  const area = el("textarea", { rows: 1, spellcheck: "false", placeholder: "An answer to be judged" });
  area.value = text;
  const row = el(
    "div",
    { class: "completion" },
    el("span", { class: "letter", "aria-hidden": "true" }),
    area,
    el("button", { type: "button", class: "bare", title: "Remove", onclick: () => removeCompletion(row) }, "×"),
  );
  area.addEventListener("paste", pasted);
  $("completions").append(row);
  relabel();
  if (focus) area.focus();
  return area;
}

function removeCompletion(row) {
  const next = (row.nextElementSibling || row.previousElementSibling)?.querySelector("textarea");
  row.remove();
  if (!texts().length) addCompletion();
  relabel();
  next?.focus();
}

function relabel() {
  document.querySelectorAll("#completions .completion").forEach((row, index) => {
    const letter = letterOf(index);
    row.querySelector(".letter").textContent = letter;
    row.querySelector("textarea").setAttribute("aria-label", `Completion ${letter}`);
    row.querySelector("button").setAttribute("aria-label", `Remove completion ${letter}`);
  });
  $("add").disabled = texts().length >= MAX_COMPLETIONS;
}

const isText = (value) => typeof value === "string" || (Array.isArray(value) && value.length > 0 && value.every((turn) => turn && typeof turn === "object" && "role" in turn));
const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1));

// A field that holds a list of messages as JSON stands for these; anything else is a text, whatever it looks like.
function read(text) {
  const begin = text.trimStart();
  if (!begin.startsWith("[")) return text;
  try {
    const value = JSON.parse(begin);
    return isText(value) ? value : text;
  } catch {
    return text;
  }
}

// {prompt, completions}, {prompt, chosen, rejected}, or a whole request with one item; null: no such thing.
function itemIn(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    return null;
  }
  if (value && Array.isArray(value.items) && value.items.length === 1) value = value.items[0];
  if (!value || typeof value !== "object" || !isText(value.prompt)) return null;
  const completions = value.completions ?? (value.chosen !== undefined && value.rejected !== undefined ? [value.chosen, value.rejected] : null);
  return Array.isArray(completions) && completions.length && completions.length <= MAX_COMPLETIONS && completions.every(isText) ? { prompt: value.prompt, completions } : null;
}

function setItem(item) {
  $("prompt").value = shown(item.prompt);
  $("completions").replaceChildren();
  for (const completion of item.completions) addCompletion(shown(completion), false);
  sayKind();
}

function pasted(event) {
  const item = itemIn(event.clipboardData.getData("text/plain").trim());
  if (item === null) return;
  event.preventDefault();
  setItem(item);
}

function sayKind() {
  const value = read($("prompt").value);
  $("kind").hidden = typeof value === "string";
  if (typeof value !== "string") $("kind").textContent = `${value.length} ${value.length === 1 ? "message" : "messages"}`;
}

// Items of one completion each: one that cannot be scored leaves the others their rewards, and the prompt is computed once all the same.
function request(options) {
  const prompt = read($("prompt").value);
  const given = texts().map((area) => area.value);
  const kept = given.map((text, index) => [text, index]).filter(([text]) => text.trim() !== "");
  return {
    indices: kept.map(([, index]) => index),
    texts: kept.map(([text]) => text),
    body: { items: kept.map(([text]) => ({ prompt, completions: [read(text)] })), ...options },
  };
}

function composer() {
  const chooser = $("example");
  for (const name of Object.keys(EXAMPLES)) chooser.append(el("option", { value: name }, name));
  const take = (name) => (setItem(EXAMPLES[name]), $("prompt").focus());
  chooser.addEventListener("change", () => {
    if (chooser.value) take(chooser.value);
    chooser.value = "";
  });
  const cards = Object.entries(EXAMPLES).map(([name, { prompt }]) => el("button", { type: "button", onclick: () => take(name) }, el("b", {}, name), el("span", {}, isText(prompt) && typeof prompt !== "string" ? prompt[prompt.length - 1].content : prompt)));
  $("results").replaceChildren(el("section", { class: "panel" }, el("h2", {}, "Try one"), el("div", { class: "examples" }, cards)));
  $("prompt").addEventListener("input", sayKind);
  $("prompt").addEventListener("paste", pasted);
  $("add").addEventListener("click", () => addCompletion());
  addCompletion("", false);
  addCompletion("", false);
}
