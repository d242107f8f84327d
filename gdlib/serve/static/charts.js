// Charts as SVG, drawn at the width that they have, and again when it changes.

import { count, duration, number, svg } from "./dom.js";

const HEIGHT = 220;
const draws = new WeakMap();
const observer = new ResizeObserver((entries) => entries.forEach(({ target }) => redraw(target)));

function redraw(container) {
  const width = Math.floor(container.clientWidth);
  if (width > 0) container.replaceChildren(draws.get(container)(width));
}

function mount(container, draw) {
  draws.set(container, draw);
  observer.observe(container);
  redraw(container);
}

const text = (x, y, anchor, content) => svg("text", { x, y, "text-anchor": anchor }, content);
const line = (name, x1, y1, x2, y2) => svg("line", { class: name, x1, y1, x2, y2 });

// Round values from low to high, about `wanted` of them.
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// buckets: [[upper bound in seconds, requests], ...]
export function histogram(container, buckets, label) {
  mount(container, (width) => {
    const left = 44, right = 8, top = 18, bottom = 42;
    const most = Math.max(1, ...buckets.map(([, n]) => n));
    const slot = (width - left - right) / buckets.length;
    const y = (n) => top + (HEIGHT - top - bottom) * (1 - n / most);
    const every = Math.ceil(50 / slot);
    const parts = ticks(0, most, 3).filter(Number.isInteger).flatMap((n) => [
      line("grid", left, y(n), width - right, y(n)), text(left - 6, y(n) + 4, "end", count(n))]);
    buckets.forEach(([bound, n], i) => {
      const x = left + i * slot;
      parts.push(svg("rect", { class: "bar", x: x + 2, y: y(n), width: Math.max(1, slot - 4), height: y(0) - y(n), rx: 2 }));
      if (i % every === 0) {
        parts.push(text(x + slot / 2, HEIGHT - bottom + 16, "middle", bound === Infinity ? "more" : duration(bound).replace(" ", "\u202f")));
      }
    });
    parts.push(line("axis", left, y(0), width - right, y(0)));
    parts.push(text((left + width - right) / 2, HEIGHT - 6, "middle", "time, at most"));
    return svg("svg", { width, height: HEIGHT, role: "img", "aria-label": label }, ...parts);
  });
}

// points: [[epoch, loss], ...]
export function curve(container, points, label) {
  const losses = points.map(([, loss]) => loss);
  const low = Math.min(...losses), high = Math.max(...losses);
  const log = low > 0 && high / low > 100;
  mount(container, (width) => {
    const left = 58, right = 14, top = 12, bottom = 42;
    const scale = log ? Math.log10 : (loss) => loss;
    const pad = (scale(high) - scale(low)) * 0.06 || Math.abs(scale(high)) * 0.1 || 1;
    const bounds = [scale(low) - pad, scale(high) + pad];
    const last = points.at(-1)[0], first = points[0][0];
    const x = (epoch) => left + (width - left - right) * (last === first ? 0.5 : (epoch - first) / (last - first));
    const y = (loss) => top + (HEIGHT - top - bottom) * (1 - (scale(loss) - bounds[0]) / (bounds[1] - bounds[0]));
    const marks = log
      ? ticks(Math.ceil(bounds[0]), Math.floor(bounds[1]), 4).filter(Number.isInteger).map((power) => 10 ** power)
      : ticks(...bounds, 4);
    const path = points.map(([epoch, loss], i) => `${i ? "L" : "M"}${x(epoch).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
    return svg("svg", { width, height: HEIGHT, role: "img", "aria-label": label },
      ...marks.flatMap((loss) => [line("grid", left, y(loss), width - right, y(loss)), text(left - 6, y(loss) + 4, "end", number(loss, 4))]),
      ...ticks(first, last, width > 420 ? 6 : 3).filter(Number.isInteger).map((epoch) => text(x(epoch), HEIGHT - bottom + 16, "middle", count(epoch))),
      line("axis", left, HEIGHT - bottom, width - right, HEIGHT - bottom),
      text((left + width - right) / 2, HEIGHT - 6, "middle", "epoch"),
      svg("path", { class: "curve", d: path }),
      svg("circle", { class: "dot", cx: x(last), cy: y(points.at(-1)[1]), r: 4 }));
  });
}

// One bar from a middle line: solid to the right for what adds, hollow to the left for what takes away.
export function bar(share) {
  const size = Math.min(1, Math.abs(share)) * 98;
  return svg("svg", { class: "contribution", viewBox: "0 0 200 16", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: share < 0 ? "minus" : "plus", x: share < 0 ? 100 - size : 100, y: 2, width: size, height: 12 }),
    line("axis", 100, 0, 100, 16));
}
