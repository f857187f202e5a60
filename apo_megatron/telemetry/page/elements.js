"use strict";
// Elements, numbers as text, and the note that follows the pointer. Everything of the data becomes a text node.

// A failure must not look like an empty report.
function recordFailure(message) {
  document.documentElement.dataset.failure = message;
  const box = document.getElementById("page");
  if (box) box.prepend(html("p", { class: "warnings" }, "This page could not be drawn completely: " + message));
}
window.addEventListener("error", (event) => recordFailure(event.message));
document.addEventListener("securitypolicyviolation", (event) => recordFailure("refused " + event.violatedDirective));

// Control characters and those that turn the direction of text are shown, not obeyed.
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
function visible(text) {
  return text.replace(CONTROL, (character) => {
    const code = character.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return code === 0x7f ? "\u2421" : `\u2039U+${code.toString(16).toUpperCase().padStart(4, "0")}\u203a`;
  });
}

function element(space, tag, attributes, children) {
  const made = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined) continue;
    made.append(child instanceof Node ? child : document.createTextNode(visible(String(child))));
  }
  return made;
}
// A function among the attributes listens to the event of that name.
const html = (tag, attributes = {}, ...children) => element("http://www.w3.org/1999/xhtml", tag, attributes, children);
const svg = (tag, attributes = {}, ...children) => element("http://www.w3.org/2000/svg", tag, attributes, children);

// Grey is the reference alone; the others start again after seven, with dashes.
const colour = (checkpoint) => (checkpoint ? `c${1 + ((checkpoint - 1) % 7)}` : "c0");
const chip = (checkpoint, ...children) => html("span", { class: `chip ${colour(checkpoint)}` }, html("bdi", { class: "data" }, ...children));

const percent = (share) => (100 * share).toFixed(1);
const interval = ([, low, high]) => `${percent(low)} \u2013 ${percent(high)}`;
const signed = (share) => {
  const text = (100 * Math.abs(share)).toFixed(1);
  return (text === "0.0" ? "" : share < 0 ? "\u2212" : "+") + text;
};
const chance = (p) => (p < 0.001 ? "< 0.001" : p.toFixed(3));
const grouped = (number) => number.toLocaleString("en-US");
const short = (text, length) => (text.length > length ? text.slice(0, length - 1) + "\u2026" : text);

const tip = html("div", { class: "tip", role: "status" });
function showTip(event, ...children) {
  tip.replaceChildren(...children);
  tip.classList.add("on");
  const left = event.pageX + 16 + tip.offsetWidth > document.documentElement.clientWidth ? event.pageX - 14 - tip.offsetWidth : event.pageX + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${event.pageY + 14}px`;
}
const hideTip = () => tip.classList.remove("on");

// A chart is drawn for the width of its box, and again when that changes: its text keeps its size.
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.clientWidth !== target.drawnWidth) redraw(target);
});
function redraw(box) {
  box.drawnWidth = box.clientWidth;
  if (box.drawnWidth > 0) box.replaceChildren(box.draw(box.drawnWidth));
}
function chart(draw) {
  const box = html("div", { class: "chart" });
  box.draw = draw;
  resized.observe(box);
  return box;
}

const card = (span, title, note, ...children) =>
  html("section", { class: `card ${span}` }, html("h2", {}, title), html("p", { class: "note" }, note), ...children);
