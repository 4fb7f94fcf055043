// The reward at every token of a completion, as a heat map over its text and a curve above it.
let traceMode = "level";
// One scale for all completions of a reply, so that a colour means the same everywhere.
const traces = [];

function tracePanel(trace) {
  const values = trace.rewards;
  const changes = values.map((value, index) => (index ? value - values[index - 1] : 0));
  const heat = el("div", { class: "heat", tabindex: "0", role: "group", "aria-label": "Reward after every token; arrow keys move" });
  const spans = trace.tokens.map((token) => el("span", {}, token === "" ? el("i", { class: "gap" }, "∅") : visible(token)));
  heat.append(...spans);
  const readout = el("span", { "aria-live": "polite" });
  const toggle = el("button", { type: "button", class: "quiet", title: "m" });
  const ramp = [el("span", {}), el("i", { class: "ramp" }), el("span", {})];
  const { line, mark } = curve(values);
  let at = null;

  function show(index) {
    if (at !== null) spans[at].classList.remove("on");
    at = index;
    if (index === null) {
      readout.textContent = `${values.length} tokens`;
      mark.setAttribute("visibility", "hidden");
      return;
    }
    spans[index].classList.add("on");
    readout.textContent = `token ${index + 1} · reward ${decimal(values[index])} · change ${index ? signed(changes[index], 3) : "none yet"}`;
    const x = values.length > 1 ? (100 * index) / (values.length - 1) : 0;
    fill(mark, { x1: x, x2: x, visibility: "visible" });
  }

  function paint(middle, reach) {
    const series = traceMode === "level" ? values : changes;
    spans.forEach((span, index) => span.style.setProperty("background", tint((series[index] - middle) / reach)));
    toggle.textContent = traceMode === "level" ? "Show change" : "Show reward";
    ramp[0].textContent = traceMode === "level" ? decimal(middle - reach) : signed(-reach, 3);
    ramp[2].textContent = traceMode === "level" ? decimal(middle + reach) : signed(reach, 3);
  }

  heat.addEventListener("pointerover", (event) => {
    const index = spans.indexOf(event.target.closest("span"));
    if (index >= 0) show(index);
  });
  heat.addEventListener("pointerleave", () => show(null));
  heat.addEventListener("blur", () => show(null));
  heat.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (step === undefined || !spans.length) return;
    event.preventDefault();
    show(Math.max(0, Math.min(spans.length - 1, at === null ? 0 : at + step)));
    spans[at].scrollIntoView({ block: "nearest" });
  });
  toggle.addEventListener("click", switchTraces);
  const panel = el("div", {}, line, heat, el("div", { class: "legend" }, toggle, ramp, el("span", { class: "grow" }), readout));
  traces.push({ values, changes, paint });
  show(null);
  return panel;
}

function switchTraces() {
  traceMode = traceMode === "level" ? "change" : "level";
  paintTraces();
}

function paintTraces() {
  const series = traces.flatMap((trace) => (traceMode === "level" ? trace.values : trace.changes));
  const middle = traceMode === "level" ? median(series) : 0;
  // A single outlier must not make all others pale.
  const reach = quantileOf(series.map((value) => Math.abs(value - middle)), 0.98) || 1;
  for (const trace of traces) trace.paint(middle, reach);
}

// White space that would be lost is shown; the text itself stays as it is.
const visible = (token) => token.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");

function curve(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const span = high - low || 1;
  const xOf = (index) => (values.length > 1 ? (100 * index) / (values.length - 1) : 50);
  const path = values.map((value, index) => `${index ? "L" : "M"}${xOf(index).toFixed(2)} ${(36 - (34 * (value - low)) / span).toFixed(2)}`).join("");
  const mark = svg("line", { y1: 0, y2: 38, visibility: "hidden" });
  const line = svg("svg", { class: "curve", viewBox: "0 0 100 38", preserveAspectRatio: "none", role: "img", "aria-label": `Reward from ${decimal(values[0])} to ${decimal(values[values.length - 1])}` });
  line.append(svg("line", { x1: 0, x2: 100, y1: 37.5, y2: 37.5 }), mark, svg("path", { d: path }));
  return { line, mark };
}

function quantileOf(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

const median = (values) => quantileOf(values, 0.5);
