let models = [];
let running = null;

const chosenModel = () => models.find((model) => model.id === $("model")?.value) || models[0];

function showOptions() {
  const kept = Object.fromEntries([...document.querySelectorAll("#options [id]")].map((node) => [node.id, node.type === "checkbox" ? node.checked : node.value]));
  const model = models.find((each) => each.id === kept.model) || models[0];
  const choice = (id, title, values) => el("label", {}, title, el("select", { id }, values.map(([value, text]) => el("option", { value }, text))));
  const parts = [];
  if (models.length > 1) parts.push(choice("model", "Model", models.map((each) => [each.id, each.id])));
  const ready = (model?.releases || []).filter((release) => release.state === "ready");
  if (ready.length > 1) parts.push(choice("version", "Version", [["", "as routed"], ...ready.map((release) => [release.version, `${release.version} ${release.role === "idle" ? "" : release.role}`])]));
  if (model?.weight_sets?.length) parts.push(choice("weights", "Weights", [["", "own"], ...model.weight_sets.map((name) => [name, name])]));
  if (model?.writes_critiques) parts.push(el("label", {}, "Critiques", el("input", { id: "critiques", type: "number", min: 1, max: 16, value: 1 })));
  parts.push(el("label", { title: "The reward after every token of each completion" }, el("input", { id: "trace", type: "checkbox", checked: true }), "Trace"));
  $("options").replaceChildren(...parts);
  for (const [id, value] of Object.entries(kept)) {
    const node = $(id);
    if (node?.type === "checkbox") node.checked = value;
    else if (node && (node.tagName !== "SELECT" || [...node.options].some((option) => option.value === value))) node.value = value;
  }
  $("model")?.addEventListener("change", () => (showOptions(), showAside()));
}

function chooseModel(name) {
  if (!$("model")) return;
  $("model").value = name;
  $("model").dispatchEvent(new Event("change"));
}

function asked() {
  const options = {};
  for (const name of ["model", "version", "weights"]) if ($(name)?.value) options[name] = $(name).value;
  const critiques = Number($("critiques")?.value || 1);
  // Several critiques that are all the likeliest one would be the same.
  if (critiques > 1) Object.assign(options, { n_critiques: critiques, temperature: 0.7 });
  if ($("trace")?.checked) options.trace = true;
  return request(options);
}

async function score(event) {
  event?.preventDefault();
  const what = asked();
  if (typeof what.body.items[0]?.prompt === "string" && !what.body.items[0].prompt.trim()) return $("prompt").focus();
  if (!what.body.items.length) return texts()[0].focus();
  running?.abort();
  const controller = (running = new AbortController());
  $("score").disabled = true;
  $("form").setAttribute("aria-busy", "true");
  try {
    const reply = await scored(what, controller.signal);
    showProblem(null);
    showResults(what, reply, models.find((model) => model.id === reply.model));
  } catch (problem) {
    if (problem.name === "AbortError") return;
    if (!(problem instanceof ServiceError)) throw problem;
    showProblem(problem);
    if (problem.status === 401) askForKey();
  } finally {
    if (running === controller) {
      $("score").disabled = false;
      $("form").removeAttribute("aria-busy");
    }
  }
}

// A model that cannot trace says so of every item; the rewards are worth having without.
async function scored(what, signal) {
  const reply = await call("v1/score", what.body, signal);
  if (!what.body.trace || !reply.results.some((result) => result.error?.code === "no_trace")) return reply;
  const { trace, ...body } = what.body;
  return call("v1/score", body, signal);
}

let status = null;

function showAside() {
  const info = chosenModel();
  const parts = [];
  const name = info?.id ?? status?.models[0]?.model;
  if (status) parts.push(livePanel(status));
  if (name) parts.push(modelPanel(name, status, info));
  const others = status?.models.filter((model) => model.model !== name) ?? [];
  if (others.length) parts.push(othersPanel(others));
  const live = $("live");
  // Who is about to copy something, or has walked to a button, is not disturbed.
  const selection = getSelection();
  if (!selection.isCollapsed && live.contains(selection.anchorNode)) return;
  const at = [...live.querySelectorAll("button")].indexOf(document.activeElement);
  live.replaceChildren(...parts);
  if (at >= 0) live.querySelectorAll("button")[at]?.focus();
}

async function refresh() {
  try {
    const before = JSON.stringify(models);
    [status, { data: models }] = await Promise.all([call("v1/status"), call("v1/models")]);
    if (JSON.stringify(models) !== before) showOptions();
    showHealth(status, null);
    showAside();
    $("live").classList.remove("stale");
    return true;
  } catch (problem) {
    if (!(problem instanceof ServiceError)) throw problem;
    showHealth(null, problem);
    $("live").classList.add("stale");
    if (problem.status === 401 && !secret) askForKey();
    return false;
  }
}

async function watch() {
  let pause = PERIOD_MS;
  for (;;) {
    if (document.visibilityState === "visible") pause = (await refresh()) ? PERIOD_MS : Math.min(2 * pause, 30000);
    await new Promise((done) => {
      const timer = setTimeout(done, pause);
      wake = () => (clearTimeout(timer), (pause = PERIOD_MS), done());
    });
  }
}

let wake = () => {};

const THEME = "rayward-theme";

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "☀" : "☾";
}

function theme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const now = () => localStorage.getItem(THEME) || (system.matches ? "dark" : "light");
  setTheme(now());
  system.addEventListener("change", () => setTheme(now()));
  $("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem(THEME, next);
    setTheme(next);
  });
}

function keyboard() {
  const plain = {
    "/": () => $("prompt").focus(),
    n: () => addCompletion(),
    r: () => document.querySelector(".result")?.focus(),
    m: switchTraces,
    t: () => $("theme").click(),
    "?": () => $("shortcuts").showModal(),
  };
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") return event.preventDefault(), score();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inField = event.target.matches("textarea, input, select");
    if (event.key === "Escape" && inField) return event.target.blur();
    if (inField) return;
    const action = plain[event.key] || (/^[1-9]$/.test(event.key) ? () => texts()[Number(event.key) - 1]?.focus() : null);
    if (action) event.preventDefault(), action();
  });
  $("help").addEventListener("click", plain["?"]);
}

if (/Mac|iPhone|iPad/.test(navigator.platform)) for (const key of document.querySelectorAll("kbd")) key.textContent = key.textContent.replace("Ctrl", "⌘");
theme();
composer();
showOptions();
keyDialog(() => wake());
keyboard();
$("form").addEventListener("submit", score);
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && wake());
watch();
