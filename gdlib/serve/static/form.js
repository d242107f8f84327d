// The try-it form of a model, the request that it makes, and that request for other programs.

import { $, h, number } from "./dom.js";

const MAX_FIELDS = 64;
const MAX_EXAMPLE = 4096; // values in a prepared request

let read = () => [];

// Whether one number input per feature can make the request.
function isPlain({ inputs }) {
  const [{ datatype, shape }] = inputs;
  return inputs.length === 1 && /^U?INT|^FP(32|64)$/.test(datatype) && shape.length === 2 && shape[0] === -1 && shape[1] >= 1 && shape[1] <= MAX_FIELDS;
}

// The middle of the observed range; whole where both ends are.
function middle([low, high]) {
  const value = low / 2 + high / 2;
  if (Number.isInteger(low) && Number.isInteger(high)) return Math.round(value);
  return Number(value.toPrecision(3)) >= low && Number(value.toPrecision(3)) <= high ? Number(value.toPrecision(3)) : value;
}

function field(name, unit, range, whole, i) {
  const hint = h("span", { class: "hint", id: `hint-${i}` });
  const input = h("input", {
    id: `feature-${i}`, type: "number", step: whole ? 1 : "any", required: true, autocomplete: "off", inputmode: range && range[0] >= 0 ? "decimal" : null,
    value: range ? middle(range) : 0, "aria-describedby": `unit-${i} hint-${i}`,
  });
  const show = () => {
    const outside = range && input.value !== "" && (Number(input.value) < range[0] || Number(input.value) > range[1]);
    hint.textContent = range ? `${outside ? "outside " : ""}${number(range[0])} to ${number(range[1])}` : "";
    hint.classList.toggle("outside", Boolean(outside));
  };
  input.addEventListener("input", show);
  show();
  return h("div", { class: "field" },
    h("label", { for: `feature-${i}` }, name),
    h("span", { class: "with-unit" }, input, h("span", { class: "unit", id: `unit-${i}` }, unit)),
    hint);
}

function fieldsOf({ inputs, parameters = {} }) {
  const [{ name, datatype, shape }] = inputs;
  const { feature_names: names, feature_units: units, feature_ranges: ranges } = parameters;
  const features = Array.from({ length: shape[1] }, (_, i) =>
    field(names?.[i] ?? `x${i}`, units?.[i] ?? "", ranges?.[i] ?? null, datatype.includes("INT"), i));
  const boxes = features.map((feature) => feature.querySelector("input"));
  read = () => [{ name, shape: [1, shape[1]], datatype, data: boxes.map((box) => Number(box.value)) }];
  $("form-note").textContent = ranges ? "Below each field: the values that the model has learnt from." : "";
  return features;
}

function textOf({ inputs, parameters = {} }) {
  const example = inputs.map(({ name, datatype, shape }) => {
    const sizes = shape.map((size) => Math.max(1, size));
    const size = sizes.reduce((product, next) => product * next, 1);
    const ranges = inputs.length === 1 && parameters.feature_ranges?.length === size ? parameters.feature_ranges.map(middle) : null;
    const zero = datatype === "BOOL" ? false : datatype === "BYTES" ? "" : 0;
    return { name, shape: sizes, datatype, data: ranges ?? Array(size <= MAX_EXAMPLE ? size : 0).fill(zero) };
  });
  const lines = example.map((input) => JSON.stringify(input));
  const box = h("textarea", { id: "inputs", rows: Math.min(14, 4 + 2 * lines.length), spellcheck: "false", "aria-describedby": "inputs-hint" });
  box.value = `[\n${lines.join(",\n")}\n]`;
  read = () => JSON.parse(box.value);
  $("form-note").textContent = "";
  return [h("div", { class: "field wide" },
    h("label", { for: "inputs" }, "Inputs, as JSON"), box,
    h("span", { class: "hint", id: "inputs-hint" }, "A list of tensors, each with name, shape, datatype and data." +
      (example.some(({ data }) => data.length === 0) ? " There are too many values for an example: fill in data." : "")))];
}

export function build(metadata) {
  $("fields").replaceChildren(...(isPlain(metadata) ? fieldsOf(metadata) : textOf(metadata)));
}

// The body of the request, or null while the text is no JSON.
export function request() {
  try {
    return { inputs: read() };
  } catch {
    return null;
  }
}

export const values = (body) => body.inputs[0].data;

const KEY = "Authorization: Bearer";

export function curl(url, body, withKey) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const header = withKey ? ` \\\n  -H "${KEY} $GDLIB_KEY"` : "";
  return `curl -s ${quote(url)}${header} \\\n  -d ${quote(JSON.stringify(body))}`;
}

function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item)}`).join(", ")}}`;
  return JSON.stringify(value);
}

export function python(url, body, withKey) {
  const headers = withKey ? `, headers={"Authorization": f"Bearer {os.environ['GDLIB_KEY']}"}` : "";
  return [
    "import json",
    ...(withKey ? ["import os"] : []),
    "from urllib.request import Request, urlopen",
    "",
    `url = ${JSON.stringify(url)}`,
    `body = ${literal(body)}`,
    `request = Request(url, data=json.dumps(body).encode()${headers})`,
    "with urlopen(request) as answer:",
    '    for output in json.load(answer)["outputs"]:',
    '        print(output["name"], output["data"])',
  ].join("\n");
}
