// The service as it stands: throughput, versions, replicas, the card of the model; asked for every two seconds while the page is seen.
const PERIOD_MS = 2000;

function health(state, text) {
  $("health").className = `health ${state}`;
  $("health").lastElementChild.textContent = text;
}

function showHealth(status, problem) {
  if (problem) return health("down", problem.status === 401 || problem.status === 403 ? "a key is needed" : problem.message);
  const versions = status.models.flatMap((model) => model.versions);
  const replicas = versions.reduce((sum, version) => sum + version.replicas.length, 0);
  const served = status.models.filter((model) => model.versions.some((version) => "current" in version.parts && version.replicas.length));
  if (!status.models.length) return health("down", "no model is published");
  const failed = versions.filter((version) => version.state === "failed").length;
  const said = [`${served.length} of ${status.models.length} ${status.models.length === 1 ? "model" : "models"} up`, `${replicas} ${replicas === 1 ? "replica" : "replicas"}`];
  if (failed) said.push(`${failed} failed`);
  health(served.length === status.models.length ? "up" : "down", said.join(" · "));
}

function livePanel(status) {
  const past = status.past;
  const minutes = Math.round((past.step_s * past.tokens_per_s.length) / 60);
  const numbers = [
    [compact(status.tokens_per_s), "tokens computed / s"],
    [compact(status.completions_per_s), "completions / s"],
    [compact(status.queued_tokens), "tokens waiting"],
    [compact(status.requests_per_s), "requests / s"],
  ];
  const panel = el("section", { class: "panel", "aria-label": "Live" }, el("div", { class: "big" }, numbers.map(([value, meaning]) => el("div", {}, el("b", {}, value), el("span", {}, meaning)))), sparkline(past), el("p", { class: "note" }, `Last ${minutes} minutes: tokens/s in blue`, past.queued_tokens.some((value) => value > 0) ? ", waiting tokens in orange." : "."));
  const trouble = [...Object.entries(status.refusals), ...Object.entries(status.item_errors)].filter(([, count]) => count > 0);
  if (status.latencies.length) panel.append(latencyTable(status.latencies));
  if (trouble.length) panel.append(el("h2", {}, "Last minute, not answered"), el("dl", { class: "kv" }, trouble.map(([why, count]) => [el("dt", {}, why.replaceAll("_", " ")), el("dd", {}, compact(count))]).flat()));
  return panel;
}

function sparkline(past) {
  const values = past.tokens_per_s;
  const waiting = past.queued_tokens;
  const peak = Math.max(...values, 1e-9);
  const queue = Math.max(...waiting, 1e-9);
  const x = (index) => ((100 * index) / Math.max(1, values.length - 1)).toFixed(2);
  const path = (series, top) => series.map((value, index) => `${index ? "L" : "M"}${x(index)} ${(52 - (48 * value) / top).toFixed(2)}`).join("");
  const chart = svg("svg", { class: "spark", viewBox: "0 0 100 54", preserveAspectRatio: "none", role: "img", "aria-label": `Tokens per second, at most ${compact(peak)}` });
  chart.append(svg("path", { class: "area", d: `${path(values, peak)}L100 54L0 54Z` }), svg("path", { class: "edge", d: path(values, peak) }));
  if (waiting.some((value) => value > 0)) chart.append(svg("path", { class: "queue", d: path(waiting, queue) }));
  return chart;
}

function latencyTable(latencies) {
  const rows = latencies.map((each) => el("tr", {}, el("td", {}, each.stage), el("td", {}, duration(each.p50_s)), el("td", {}, duration(each.p99_s))));
  return el("table", { class: "small" }, el("thead", {}, el("tr", {}, el("th", {}, "Time"), el("th", {}, "median"), el("th", {}, "p99"))), el("tbody", {}, rows));
}

function modelPanel(name, status, info) {
  const model = status?.models.find((each) => each.model === name);
  const panel = el("section", { class: "panel", "aria-label": `Model ${name}` }, el("h2", {}, name, model?.is_default ? el("span", { class: "note" }, "default") : null));
  if (info) panel.append(card(info));
  if (model) panel.append(...model.versions.map(versionRow));
  return panel;
}

function othersPanel(models) {
  const rows = models.map((model) => {
    const replicas = model.versions.reduce((sum, version) => sum + version.replicas.length, 0);
    const rate = model.versions.reduce((sum, version) => sum + version.tokens_per_s, 0);
    const current = model.versions.find((version) => "current" in version.parts);
    const failed = model.versions.some((version) => version.state === "failed");
    return el("div", { class: "other" }, el("div", { class: "line" }, el("button", { type: "button", onclick: () => chooseModel(model.model) }, model.model), el("span", { class: "grow" }), failed ? el("span", { class: "tag warm" }, "failed") : null, el("code", {}, current?.version ?? "none")), el("p", {}, `${replicas} ${replicas === 1 ? "replica" : "replicas"} · ${compact(rate)} tokens/s`));
  });
  return el("section", { class: "panel", "aria-label": "Other models" }, el("h2", {}, "Other models"), rows);
}

function versionRow(version) {
  const parts = Object.entries(version.parts).map(([part, share]) => el("span", { class: part === "current" ? "tag" : "tag plain" }, part === "canary" || (part === "current" && share < 1) ? `${part} ${percent(share)}` : part));
  const state = version.state === "ready" ? null : el("span", { class: version.state === "failed" ? "tag warm" : "tag plain" }, version.state);
  const row = el("div", { class: "version" }, el("div", { class: "line" }, el("code", {}, version.version), el("span", { class: "grow" }), parts, state));
  const facts = [];
  if (version.replicas.length) facts.push(`${version.replicas.length} ${version.replicas.length === 1 ? "replica" : "replicas"}`, `${compact(version.tokens_per_s)} tokens/s`);
  if (version.prefix_saving > 0) facts.push(`${percent(version.prefix_saving)} saved by prefixes`);
  if (version.batch_fill !== null) facts.push(`batches ${percent(version.batch_fill)} full`);
  if (facts.length) row.append(el("p", {}, facts.join(" · ")));
  if (version.replicas.length) row.append(el("div", { class: "replicas", "aria-hidden": "true" }, version.replicas.map(replicaMark)));
  if (version.rewards) row.append(rewardLine(version.rewards));
  if (version.compared) row.append(el("p", {}, comparedLine(version.compared)));
  if (version.error) row.append(el("p", { class: "problem" }, version.error));
  return row;
}

// Full at ten seconds of its own work.
function replicaMark(replica) {
  const queue_s = replica.tokens_per_s > 0 ? replica.queued_tokens / replica.tokens_per_s : 0;
  const said = `${replica.replica}: ${compact(replica.queued_tokens)} tokens waiting${queue_s ? `, ${duration(queue_s)} of work` : ""}; up for ${duration(replica.up_s)}`;
  return el("i", { class: queue_s >= 10 ? "full" : "", title: said, style: { "--full": `${Math.min(100, 10 * queue_s)}%` } });
}

function rewardLine(rewards) {
  const said = [`rewards ${decimal(rewards.mean)} ± ${decimal(rewards.std)}`];
  if (rewards.drift !== null) said.push(`${signed(rewards.drift, 1)} σ from the reference`);
  if (rewards.length_correlation !== null) said.push(`length ρ ${signed(rewards.length_correlation)}`);
  return el("p", { title: `${rewards.num} rewards of the last ten minutes` }, said.join(" · "), rewards.drifted ? [" ", el("span", { class: "tag warm" }, "drifted")] : null);
}

function comparedLine(drift) {
  const said = [`${compact(drift.num_completions)} rewards beside the current version's`, `mean |difference| ${decimal(drift.mean_abs_difference)}`, `at most ${decimal(drift.max_abs_difference)}`];
  if (drift.rank_agreement !== null) said.push(`${percent(drift.rank_agreement)} of pairs in the same order`);
  return said.join(" · ");
}

function card(info) {
  const pairs = [
    ["Tokens at most", compact(info.max_tokens)],
    ["Outputs", info.outputs.length ? info.outputs.join(", ") : "reward"],
  ];
  if (info.weight_sets?.length) pairs.push(["Weight sets", info.weight_sets.join(", ")]);
  if (info.writes_critiques) pairs.push(["Critiques", "written before the score"]);
  if (info.normaliser) pairs.push(["Reference", `${decimal(info.normaliser.mean)} ± ${decimal(info.normaliser.std)}`], ["", `${compact(info.normaliser.num_rewards)} rewards of ${info.normaliser.reference}`]);
  return el("dl", { class: "kv card" }, pairs.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]).flat());
}
