// What came back: rewards as bars, who would win, and what else the model says of each completion.
function showProblem(problem) {
  const box = $("problem");
  box.hidden = problem === null;
  // What stands below is of another request.
  $("results").classList.toggle("stale", problem !== null);
  if (problem === null) return;
  const { code, message, remedy } = problem.detail || {};
  const said = [remedy, code, problem.status ? `HTTP ${problem.status}` : ""].filter(Boolean).join(" · ");
  box.replaceChildren(message || problem.message, said ? el("small", {}, said) : "");
}

function showResults(asked, reply, model) {
  const rows = asked.indices.map((index, place) => ({ index, text: asked.texts[place], ...outcome(reply.results[place]) }));
  const scored = rows.filter((row) => row.reward !== undefined).sort((a, b) => b.reward - a.reward);
  const failed = rows.filter((row) => row.reward === undefined);
  const scale = scaleOf(scored.map((row) => row.reward), asked.body.weights ? null : model?.normaliser);
  // Probabilities of steps are no rewards of a Bradley–Terry model.
  const compared = scored.length > 1 && !scored.some((row) => row.steps);
  const shares = softmax(scored.map((row) => row.reward));
  traces.length = 0;
  const panel = el("section", { class: "panel", "aria-label": "Rewards" }, el("h2", {}, "Rewards"));
  if (scale && scored.length) panel.append(el("p", { class: "axis" }, scale.said));
  scored.forEach((row, place) => panel.append(resultRow(row, scale, compared ? shares[place] : null, place === 0 && scored.length > 1, model)));
  failed.forEach((row) => panel.append(failedRow(row)));
  paintTraces();
  const parts = [panel];
  const wins = compared && scored.length <= 10 ? winsPanel(scored) : null;
  parts.push(wins && scored.length <= 4 ? el("div", { class: "pair" }, wins, replyPanel(asked, reply)) : [wins, replyPanel(asked, reply)]);
  $("results").replaceChildren(...parts.flat().filter(Boolean));
}

const outcome = (result) =>
  result.error
    ? { error: result.error }
    : {
        reward: result.rewards[0],
        outputs: result.outputs?.[0],
        steps: result.steps?.[0],
        critiques: result.critiques?.[0],
        std: result.reward_std?.[0],
        trace: result.traces?.[0],
        tokens: result.num_tokens?.[0],
      };

// Where bars begin: at the mean of the reference set, or at 0. Rewards far from there that lie close together would all be one bar: then at their own mean.
function scaleOf(rewards, normaliser) {
  if (!rewards.length) return null;
  const low = Math.min(...rewards);
  const high = Math.max(...rewards);
  const mean = rewards.reduce((sum, value) => sum + value, 0) / rewards.length;
  let origin = normaliser ? normaliser.mean : 0;
  let said = normaliser ? `Bars begin at ${decimal(origin)}, the mean of the reference set; σ is its standard deviation.` : "Bars begin at 0.";
  if (rewards.length > 1 && high > low && Math.abs(mean - origin) > 6 * (high - low)) {
    origin = mean;
    said = `Bars begin at ${decimal(mean)}, the mean of these completions.`;
  }
  const reach = Math.max(Math.abs(low - origin), Math.abs(high - origin)) || 1;
  const from = low < origin ? origin - reach * 1.04 : origin;
  const to = high > origin || low >= origin ? origin + reach * 1.04 : origin;
  return { origin, from, span: to - from || 1, normaliser, said };
}

function bar(value, origin, from, span, label) {
  const share = (at) => Math.max(0, Math.min(100, (100 * (at - from)) / span));
  const left = share(Math.min(value, origin));
  const inner = el("i", { class: value < origin ? "below" : "", style: { left: `${left}%`, width: `${Math.max(0.4, share(Math.max(value, origin)) - left)}%` } });
  return el("div", { class: "bar", role: "img", "aria-label": label }, inner, el("b", { style: { left: `calc(${share(origin)}% - .75px)` } }));
}

function resultRow(row, scale, share, isBest, model) {
  const letter = letterOf(row.index);
  const facts = [];
  if (share !== null) facts.push(el("span", { class: "tag", title: "Chance to be the best of these, if rewards are Bradley–Terry's (softmax)" }, `best ${percent(share)}`));
  if (scale.normaliser && scale.normaliser.std > 0) facts.push(el("span", { class: "tag plain", title: "Standard deviations from the mean of the reference set" }, `${signed((row.reward - scale.normaliser.mean) / scale.normaliser.std, 1)} σ`));
  if (row.std !== undefined) facts.push(el("span", { class: "tag plain", title: "Standard deviation over its critiques" }, `± ${decimal(row.std)}`));
  if (row.tokens !== undefined) facts.push(el("span", { class: "tag plain", title: "Tokens of the whole conversation" }, `${compact(row.tokens)} tokens`));
  const node = el(
    "article",
    { class: isBest ? "result best" : "result", tabindex: "-1", "aria-label": `Completion ${letter}: reward ${decimal(row.reward)}` },
    el("div", { class: "head" }, el("span", { class: "letter" }, letter), el("span", { class: "reward" }, decimal(row.reward)), bar(row.reward, scale.origin, scale.from, scale.span, `reward ${decimal(row.reward)}`), el("span", { class: "facts" }, facts)),
    row.trace ? null : el("p", { class: "said" }, row.text),
  );
  const more = el("div", { class: "more" });
  if (row.trace) more.append(tracePanel(row.trace));
  if (row.steps?.length) more.append(stepsOf(row.steps));
  if (row.outputs?.length > 1) more.append(section("Attributes", attributesOf(row.outputs, model?.outputs)));
  if (row.critiques?.length) more.append(section(row.critiques.length > 1 ? `${row.critiques.length} critiques` : "Critique", el("div", {}, row.critiques.map((text) => el("p", { class: "critique" }, text)))));
  if (more.childNodes.length) node.append(more);
  return node;
}

function failedRow(row) {
  const { code, message, retryable } = row.error;
  return el(
    "article",
    { class: "result", tabindex: "-1", "aria-label": `Completion ${letterOf(row.index)}: no reward` },
    el("div", { class: "head failed" }, el("span", { class: "letter" }, letterOf(row.index)), el("p", { class: "error" }, el("b", {}, "No reward: "), message), el("span", { class: "facts" }, el("span", { class: "tag warm" }, code), retryable ? el("span", { class: "tag plain" }, "another try may help") : null)),
    el("p", { class: "said" }, row.text),
  );
}

const section = (title, content) => el("details", { open: true }, el("summary", {}, title), content);

function attributesOf(values, names) {
  const low = Math.min(0, ...values);
  const high = Math.max(0, ...values);
  const rows = values.map((value, place) => {
    const name = names?.[place] ?? `output ${place}`;
    return [el("span", {}, name), bar(value, 0, low, (high - low || 1) * 1.02, `${name} ${decimal(value)}`), el("span", { class: "num" }, decimal(value))];
  });
  return el("div", { class: "attributes" }, rows.flat());
}

function stepsOf(steps) {
  return el("div", { class: "steps", "aria-label": "Probability that each step is right" }, steps.map((value, place) => el("span", { style: { background: tint(2 * value - 1) }, title: `step ${place + 1}` }, `${place + 1}: ${value.toFixed(2)}`)));
}

function winsPanel(rows) {
  const head = el("tr", {}, el("th", {}), rows.map((row) => el("th", { scope: "col" }, `over ${letterOf(row.index)}`)));
  const body = rows.map((row) =>
    el("tr", {}, el("th", { scope: "row" }, letterOf(row.index)), rows.map((other) => (other === row ? el("td", {}, "") : winCell(row.reward - other.reward)))),
  );
  return el("section", { class: "panel", "aria-label": "Win probabilities" }, el("h2", {}, "Who would win"), el("div", { class: "scroll" }, el("table", { class: "wins" }, el("thead", {}, head), el("tbody", {}, body))), el("p", { class: "note" }, "σ(difference of the rewards): the probability that the row is preferred to the column, for rewards of a Bradley–Terry model."));
}

function winCell(difference) {
  const chance = 1 / (1 + Math.exp(-difference));
  return el("td", { style: { background: tint(2 * chance - 1) }, title: `difference ${signed(difference, 3)}` }, percent(chance));
}

function softmax(rewards) {
  const top = Math.max(...rewards);
  const weights = rewards.map((value) => Math.exp(value - top));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

function replyPanel(asked, reply) {
  const { tokens, tokens_computed: computed } = reply.usage;
  const saved = tokens > computed ? ` (${percent(1 - computed / tokens)} saved by the shared prompt)` : "";
  const pairs = [
    ["Model", reply.model],
    ["Version", el("code", {}, reply.version)],
    ["Request", el("code", {}, reply.id)],
    ["Tokens", `${compact(tokens)} asked for, ${compact(computed)} computed${saved}`],
  ];
  const panel = el("section", { class: "panel", "aria-label": "The reply" }, el("h2", {}, "The reply"), el("dl", { class: "kv" }, pairs.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]).flat()));
  if (reply.timings) panel.append(...timesOf(reply.timings));
  panel.append(el("div", { class: "line" }, el("span", { class: "grow" }), copyButton("Copy as curl", () => curlOf(asked.body)), copyButton("Copy reply", () => JSON.stringify(reply, null, 2))));
  return panel;
}

function timesOf(timings) {
  const parts = [
    ["encode", timings.encode_s],
    ["queue", timings.queue_s],
    ["compute", timings.compute_s],
    ["rest", Math.max(0, timings.total_s - timings.encode_s - timings.queue_s - timings.compute_s)],
  ];
  const sum = parts.reduce((all, [, seconds]) => all + seconds, 0) || 1;
  return [
    el("div", { class: "where", role: "img", "aria-label": "Where the time went" }, parts.map(([name, seconds]) => el("i", { class: name, style: { width: `${(100 * seconds) / sum}%` } }))),
    el("p", { class: "legend times" }, el("span", {}, `${duration(timings.total_s)} in all`), parts.map(([name, seconds]) => el("span", {}, el("i", { class: `dot ${name}` }), `${name} ${duration(seconds)}`))),
  ];
}

function copyButton(title, take) {
  const button = el("button", { type: "button", class: "quiet" }, title);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(take());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here";
    }
    setTimeout(() => (button.textContent = title), 1500);
  });
  return button;
}

function curlOf(body) {
  const quoted = `'${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
  const key = secret ? ' -H "Authorization: Bearer $RAYWARD_API_KEY"' : "";
  return `curl -s ${new URL("v1/score", location.href)} -H 'Content-Type: application/json'${key} -d ${quoted}`;
}
