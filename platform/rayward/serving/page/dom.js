// Elements are made of text nodes alone: nothing that a user or a model wrote is ever read as markup.
const $ = (id) => document.getElementById(id);

function el(name, given = {}, ...children) {
  const node = document.createElement(name);
  fill(node, given);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function fill(node, given) {
  for (const [key, value] of Object.entries(given)) {
    if (key === "style") for (const [property, set] of Object.entries(value)) node.style.setProperty(property, set);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
}

function svg(name, given = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  fill(node, given);
  node.append(...children);
  return node;
}

const MINUS = "\u2212";
const NBSP = "\u00a0";
const letterOf = (index) => (index < 26 ? String.fromCharCode(65 + index) : String(index + 1));

function signed(value, digits = 2) {
  const text = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(text) !== 0 ? MINUS : "+") + text;
}

// Rewards: four significant digits or two decimals, whichever says more, so that -1003.25 and 0.00042 both can be read.
function decimal(value) {
  const size = Math.abs(value);
  const text = size !== 0 && size < 0.005 ? size.toExponential(2) : size >= 1e6 ? size.toExponential(3) : size.toFixed(size >= 1000 ? 1 : size < 0.1 ? 4 : 3);
  return (value < 0 ? MINUS : "") + text;
}

function compact(value) {
  if (value >= 999500) return (value / 1e6).toFixed(value >= 9.95e6 ? 0 : 1) + "M";
  if (value >= 9995) return (value / 1e3).toFixed(value >= 99950 ? 0 : 1) + "k";
  return value >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}

const percent = (share) => (share > 0 && share < 0.005 ? "<1" : share < 1 && share > 0.995 ? ">99" : Math.round(100 * share)) + NBSP + "%";

function duration(seconds) {
  if (seconds < 0.9995) return (1000 * seconds).toFixed(seconds < 0.00995 ? 1 : 0) + NBSP + "ms";
  if (seconds < 100) return seconds.toFixed(seconds < 10 ? 1 : 0) + NBSP + "s";
  if (seconds < 5400) return Math.round(seconds / 60) + NBSP + "min";
  return seconds < 172800 ? Math.round(seconds / 3600) + NBSP + "h" : Math.round(seconds / 86400) + NBSP + "days";
}

// Towards blue above the middle, towards orange below it; share is -1 to 1.
function tint(share) {
  const strength = Math.min(1, Math.abs(share)).toFixed(2);
  return `color-mix(in srgb, var(${share >= 0 ? "--blue" : "--warm"}) calc(${strength} * var(--heat)), transparent)`;
}
