// The page: which models there are, one of them to try, its answer and why, and what the server has done so far.

import * as api from "./api.js";
import { bar, curve, histogram } from "./charts.js";
import { $, column, count, describe, duration, h, number, signed, table } from "./dom.js";
import * as form from "./form.js";

const EVERY = 2000; // milliseconds between two looks at the server
const MAX_SHOWN = 20; // values of an output

let models = [];
let chosen = null; // {name, version} of the model on the page
let metadata = null;
let last = null; // {x, outputs} of the last answer
let known = ""; // what the list of models was made from
let counted = ""; // what the counts were drawn from
let refusals = {}; // why the server tells no counts or times, under this key

const same = (a, b) => a !== null && b !== null && a.name === b.name && a.version === b.version;
const isLinear = () => Array.isArray(metadata?.parameters?.weight);

function tell(text) {
  const notice = $("notice");
  if (notice.textContent !== text) notice.textContent = text; // what is the same is not read out again
  notice.hidden = text === "";
}

// ---- the models

function modelEntry(entry) {
  const ready = entry.state === "READY";
  const place = h("span", { class: "place" }, h("strong", {}, entry.name), h("span", { class: "muted" }, entry.version ? `version ${entry.version}` : "no version"));
  const badge = h("span", { class: `badge ${ready ? "good" : "bad"}` }, ready ? "ready" : "unavailable");
  const reason = entry.reason ? h("p", { class: "reason" }, entry.reason) : null;
  if (!ready) return h("li", { class: "entry" }, h("span", { class: "row" }, place, badge), reason);
  const button = h("button", { type: "button", class: "row", "aria-pressed": String(same(entry, chosen)) }, place, badge);
  button.addEventListener("click", () => choose(entry).catch(fail));
  return h("li", { class: "entry" }, button, reason);
}

function showModels() {
  const now = JSON.stringify([models, chosen]);
  if (now === known) return;
  known = now;
  const focused = [...$("models").querySelectorAll("button")].findIndex((button) => button === document.activeElement);
  $("models").replaceChildren(...models.map(modelEntry));
  if (focused >= 0) $("models").querySelectorAll("button")[focused]?.focus();
  $("no-models").hidden = models.length > 0;
  const ready = models.filter((entry) => entry.state === "READY").length;
  const health = `${ready} of ${models.length} ready`;
  if ($("health").textContent !== health) $("health").textContent = health;
  $("health").className = `badge ${ready === models.length && ready ? "good" : "bad"}`;
}

// The model that the address names, else the newest version of the first.
function firstChoice() {
  const ready = models.filter((entry) => entry.state === "READY");
  const named = ready.find((entry) => location.hash === `#${entry.name}/${entry.version}`);
  return named ?? ready.filter((entry) => entry.name === ready[0].name).at(-1) ?? null;
}

async function choose(entry) {
  chosen = { name: entry.name, version: entry.version };
  showModels();
  let found;
  try {
    found = await api.metadata(entry);
  } catch (error) {
    if (same(entry, chosen)) chosen = null; // the next look tries again
    throw error;
  }
  if (!same(entry, chosen)) return;
  history.replaceState(null, "", `#${entry.name}/${entry.version}`);
  metadata = found;
  last = null;
  counted = "";
  showModel();
  await showCounts();
}

function showModel() {
  const { inputs, outputs, platform, parameters = {} } = metadata;
  const shape = (tensor) => `${tensor.name} ${tensor.datatype} [${tensor.shape.map((size) => (size === -1 ? "any" : size)).join(", ")}]`;
  $("model-name").replaceChildren(chosen.name, " ", h("span", { class: "muted" }, `version ${chosen.version}`));
  $("model-facts").textContent = `${platform === "gdlib" ? "gdlib" : "ONNX"} · takes ${inputs.map(shape).join(", ")} · gives ${outputs.map(shape).join(", ")}`;
  document.title = `${chosen.name} · gdlib predictor`;
  form.build(metadata);
  $("answer").replaceChildren();
  $("why").hidden = true;
  $("target").replaceChildren(...(isLinear() ? parameters.weight.map((_, k) => h("option", { value: k }, targetName(k))) : []));
  $("which").hidden = $("target").options.length < 2;
  showTraining(parameters.training);
  showRequest();
  $("model").hidden = false;
}

const targetName = (k) => metadata.parameters?.target_names?.[k] ?? (metadata.outputs[0].shape.at(-1) > 1 ? `${metadata.outputs[0].name} ${k}` : metadata.outputs[0].name);
const targetUnit = (k) => metadata.parameters?.target_units?.[k] ?? "";

// ---- the answer

async function predict(event) {
  event.preventDefault();
  const body = form.request();
  if (body === null) return sayError("The inputs are no JSON: mend the text above.");
  const model = chosen;
  $("answer").setAttribute("aria-busy", "true");
  const begin = performance.now();
  try {
    const answer = await api.infer(model, body);
    if (!same(model, chosen)) return undefined;
    const elapsed = (performance.now() - begin) / 1000;
    last = { x: form.values(body), outputs: answer.outputs };
    if (isLinear() && !addsUp(0)) metadata = await api.metadata(model); // the file was replaced
    showAnswer(elapsed);
    showContributions();
  } catch (error) {
    if (error.status === undefined) throw error; // the page's own mistake
    sayError(error.message);
  } finally {
    $("answer").removeAttribute("aria-busy");
  }
  return showCounts().catch(fail);
}

function sayError(text) {
  $("answer").replaceChildren(h("p", { class: "error" }, text));
  $("why").hidden = true;
}

function showAnswer(elapsed) {
  const native = metadata.platform === "gdlib";
  const shown = last.outputs.flatMap(({ name, data, shape }) => {
    const values = data.slice(0, MAX_SHOWN).map((value, i) => {
      const term = native && i < shape.at(-1) ? targetName(i) : data.length > 1 ? `${name} ${i}` : name;
      const unit = native && i < shape.at(-1) ? targetUnit(i) : "";
      return h("div", {}, h("dt", {}, term), h("dd", {}, h("span", { class: "value" }, number(value)), unit && " ", h("span", { class: "unit" }, unit)));
    });
    return data.length > MAX_SHOWN ? [...values, h("div", {}, h("dt", {}, name), h("dd", {}, `and ${count(data.length - MAX_SHOWN)} more values`))] : values;
  });
  $("answer").replaceChildren(h("dl", { class: shown.length > 1 ? "many" : "one" }, ...shown), h("p", { class: "hint" }, `answered in ${duration(elapsed)}`));
}

// ---- why

function contributionsOf(k) {
  const { weight, bias, feature_names: names } = metadata.parameters;
  return { constant: bias[k], parts: weight[k].map((w, j) => ({ name: names?.[j] ?? `x${j}`, j, x: last.x[j], part: w * last.x[j] })) };
}

function addsUp(k) {
  const { constant, parts } = contributionsOf(k);
  const total = parts.reduce((sum, { part }) => sum + part, constant);
  const size = parts.reduce((sum, { part }) => sum + Math.abs(part), Math.abs(constant));
  return Math.abs(total - last.outputs[0].data[k]) <= 1e-4 * size + 1e-30;
}

function showContributions() {
  // The form of a model with many features may send several rows, or nested ones.
  const flat = isLinear() && last.x.length === metadata.parameters.weight[0].length && last.x.every((value) => typeof value === "number");
  $("why").hidden = !flat;
  if (!flat) return;
  const k = Number($("target").value || 0);
  const { constant, parts } = contributionsOf(k);
  const { feature_units: units } = metadata.parameters;
  const unit = targetUnit(k);
  parts.sort((a, b) => Math.abs(b.part) - Math.abs(a.part));
  const most = Math.max(Math.abs(constant), ...parts.map(({ part }) => Math.abs(part))) || 1;
  const format = column(most);
  const rows = parts.map(({ name, j, x, part }) => [name, `${number(x)} ${units?.[j] ?? ""}`.trim(), bar(part / most), signed(part, format)]);
  rows.push(["constant", "", bar(constant / most), signed(constant, format)]);
  rows.push([h("strong", {}, "answer"), "", "", h("strong", {}, format(last.outputs[0].data[k]))]);
  const made = table(`What each feature adds to ${targetName(k)}`, ["feature", "value", "takes away · adds", unit || "amount"], rows);
  made.className = "contributions";
  $("contributions").replaceChildren(made);
}

// ---- the request, elsewhere

function showRequest() {
  const body = form.request();
  const at = api.url(`${api.modelPath(chosen)}/infer`);
  const broken = "The inputs are no JSON yet.";
  $("curl").textContent = body ? form.curl(at, body, api.hasKey()) : broken;
  $("python").textContent = body ? form.python(at, body, api.hasKey()) : broken;
}

async function copy(id, what) {
  try {
    await navigator.clipboard.writeText($(id).textContent);
    $("copied").textContent = `The ${what} is copied.`;
  } catch {
    getSelection().selectAllChildren($(id));
    $("copied").textContent = `The ${what} is selected: copy it with the keyboard.`;
  }
}

// ---- what the server has done, and how the model learnt

// What the server tells, or null where it refuses to: then it is not asked again, since it would say the same every time.
async function unlessRefused(what, question) {
  if (refusals[what]) return null;
  try {
    return await question(chosen);
  } catch (error) {
    if (error.status !== 403 && error.status !== 501) throw error;
    refusals[what] = error.message;
    return null;
  }
}

async function showCounts() {
  const model = chosen;
  const statistics = await unlessRefused("counts", api.statistics);
  const buckets = await unlessRefused("times", api.latency);
  if (!same(model, chosen)) return;
  const now = JSON.stringify([statistics, buckets]);
  if (now !== counted) drawCounts(statistics, buckets ?? []);
  counted = now;
}

function drawCounts(statistics, buckets) {
  const { success = { count: 0, ns: 0 }, fail: failed = { count: 0 } } = statistics?.inference_stats ?? {};
  describe($("counts"), refusals.counts ? [] : [
    ["answered", count(success.count)], ["failed", count(failed.count)], ["rows", count(statistics?.inference_count ?? 0)],
    ["mean time", success.count ? duration(success.ns / success.count / 1e9) : "–"],
  ]);
  const total = buckets.reduce((sum, [, n]) => sum + n, 0);
  $("latency").hidden = $("latency-details").hidden = total === 0;
  if (total === 0) {
    $("latency-note").textContent = refusals.counts ?? refusals.times ?? "No requests yet. Their times appear here as they come.";
    return;
  }
  const within = (share) => {
    let sum = 0;
    const bound = buckets.find(([, n]) => (sum += n) >= share * total)[0];
    return bound === Infinity ? "more than 10 s" : `at most ${duration(bound)}`;
  };
  const note = `Half took ${within(0.5)}, 99 of 100 ${within(0.99)}, from the body to the answer.`;
  $("latency-note").textContent = note;
  const filled = buckets.map(([, n], i) => (n ? i : -1)).filter((i) => i >= 0);
  const begin = Math.max(0, Math.min(filled[0] - 1, buckets.length - 7));
  histogram($("latency"), buckets.slice(begin, Math.max(filled.at(-1) + 2, begin + 7)), `Histogram of the times of ${count(total)} requests. ${note}`);
  const rows = buckets.map(([bound, n]) => [bound === Infinity ? "more" : `at most ${duration(bound)}`, count(n)]);
  $("latency-table").replaceChildren(table("Requests by time", ["time", "requests"], rows));
}

function showTraining(training) {
  const losses = training?.loss ?? [];
  $("curve-card").hidden = losses.length === 0;
  if (losses.length === 0) return;
  const { epochs = losses.length, final_loss: final = losses.at(-1) } = training;
  const step = Math.ceil(epochs / losses.length); // a long run keeps the loss of every so many epochs
  const points = losses.map((loss, i) => [1 + i * step, loss]).filter(([epoch, loss]) => epoch < epochs && loss !== null);
  points.push([epochs, final]);
  const first = points[0][1];
  const facts = { optimizer: training.optimizer, "learning rate": training.lr, epochs, "batch size": training.batch_size, rows: training.rows };
  describe($("training"), Object.entries(facts).filter(([, value]) => value !== undefined && value !== null).map(([term, value]) =>
    [term, typeof value === "number" && Number.isInteger(value) ? count(value) : number(value, 4)]));
  const note = `Loss ${number(first, 4)} in epoch 1, ${number(final, 4)} in epoch ${count(epochs)}.`;
  $("curve-note").textContent = note;
  curve($("curve"), points, `Learning curve. ${note}`);
  const every = Math.ceil(points.length / 12);
  const few = points.filter((_, i) => i % every === 0 || i === points.length - 1);
  $("curve-table").replaceChildren(table("Loss by epoch", ["epoch", "loss"], few.map(([epoch, loss]) => [count(epoch), number(loss, 5)])));
}

// ---- the loop

function fail(error) {
  if (error.status === undefined) throw error; // the page's own mistake
  tell(error.message);
  if (error.status !== 401) return;
  api.setKey("");
  $("key-form").hidden = false;
  $("model").hidden = true;
  models = [];
  chosen = metadata = null;
  known = "";
  $("models").replaceChildren();
  $("health").textContent = "";
}

let waiting = 0;

async function look() {
  clearTimeout(waiting);
  try {
    models = await api.index();
    showModels();
    if (chosen === null && models.some((entry) => entry.state === "READY")) await choose(firstChoice());
    else if (metadata !== null) await showCounts();
    const gone = chosen !== null && !models.some((entry) => same(entry, chosen) && entry.state === "READY");
    tell(gone ? `${chosen.name} version ${chosen.version} is not available any more.` : "");
  } catch (error) {
    fail(error);
  } finally {
    clearTimeout(waiting);
    const lacksKey = !$("key-form").hidden && !api.hasKey(); // asking on would only fill the server's log
    if (!document.hidden && !lacksKey) waiting = setTimeout(look, EVERY);
  }
}

$("form").addEventListener("submit", predict);
$("form").addEventListener("input", showRequest);
$("reset").addEventListener("click", showModel);
$("target").addEventListener("change", showContributions);
$("copy-curl").addEventListener("click", () => copy("curl", "command"));
$("copy-python").addEventListener("click", () => copy("python", "program"));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey($("key").value);
  refusals = {};
  counted = "";
  look();
});
document.addEventListener("visibilitychange", () => document.hidden || look());
look();
