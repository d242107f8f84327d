// The server, as any client of the Open Inference Protocol sees it. URLs are relative to the page.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: no answer at all
  }
}

let key = ""; // in memory only

export const setKey = (text) => { key = text.trim(); };
export const hasKey = () => key !== "";
export const url = (path) => new URL(path, document.baseURI.split("#")[0]).href;
export const modelPath = ({ name, version }) => `v2/models/${encodeURIComponent(name)}/versions/${encodeURIComponent(version)}`;

async function send(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer;
  let text;
  try {
    answer = await fetch(url(path), { ...options, headers, cache: "no-store", credentials: "same-origin" });
    text = await answer.text();
  } catch {
    throw new ApiError(0, "The server does not answer. This page goes on trying.");
  }
  if (!answer.ok) throw new ApiError(answer.status, words(answer.status, text));
  return text;
}

function words(status, text) {
  let message = "";
  try {
    message = JSON.parse(text).error ?? "";
  } catch {
    // A proxy in between answers with a page of its own.
  }
  if (status === 401) return key ? "The server does not know this key." : "This server wants an access key: enter one beside the models.";
  return message || `The server answers with status ${status}.`;
}

const get = async (path) => JSON.parse(await send(path));
const post = async (path, body) => JSON.parse(await send(path, { method: "POST", body }));

export const index = () => post("v2/repository/index", "");
export const metadata = (model) => get(modelPath(model));
export const infer = (model, body) => post(`${modelPath(model)}/infer`, JSON.stringify(body));

export async function statistics({ name, version }) {
  const all = await get(`v2/models/${name}/stats`);
  return all.model_stats.find((entry) => entry.version === version) ?? null;
}

// [[upper bound in seconds, requests in this bucket], ...], the last bound Infinity.
export async function latency({ name, version }) {
  const prefix = `gdlib_inference_seconds_bucket{model="${name}",version="${version}",le="`;
  let before = 0;
  return (await send("metrics")).split("\n").filter((line) => line.startsWith(prefix)).map((line) => {
    const [bound, running] = line.slice(prefix.length).split('"} ');
    const here = Number(running) - before;
    before = Number(running);
    return [bound === "+Inf" ? Infinity : Number(bound), here];
  });
}
