// Elements made by calls, never from text: the page's policy refuses markup and inline styles. And numbers as people read them.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const $ = (id) => document.getElementById(id);

// A number to `digits` significant digits, with a real minus sign.
export function number(value, digits = 6) {
  if (value === null || value === undefined) return "not a number";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  const small = size !== 0 && (size >= 1e9 || size < 1e-4);
  const text = small ? value.toExponential(Math.min(digits, 4) - 1) : value.toLocaleString("en", { maximumSignificantDigits: digits, useGrouping: size >= 1e4 });
  return text.replaceAll("-", "−");
}

// Formats numbers of which the largest is `most` with equally many decimals, so that they stand one below the other.
export function column(most) {
  const decimals = 3 - Math.floor(Math.log10(most));
  if (!(decimals >= -5 && decimals <= 7)) return (value) => number(value, 4);
  const digits = Math.max(0, decimals);
  const style = { minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: most >= 1e4, signDisplay: "negative" };
  return (value) => value.toLocaleString("en", style).replace("-", "−");
}

export const signed = (value, format) => (value > 0 ? "+" : "") + format(value);
export const count = (value) => value.toLocaleString("en");

// Seconds in the unit that suits them.
export function duration(seconds) {
  if (seconds >= 1) return `${number(seconds, 3)} s`;
  return seconds >= 1e-3 ? `${number(seconds * 1e3, 3)} ms` : `${number(seconds * 1e6, 3)} µs`;
}

export function table(caption, heads, rows) {
  return h("table", {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, ...rows.map(([first, ...rest]) =>
      h("tr", {}, h("th", { scope: "row" }, first), ...rest.map((cell) => h("td", {}, cell))))));
}

// The terms and values of a description list.
export function describe(list, pairs) {
  list.replaceChildren(...pairs.map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value))));
}
