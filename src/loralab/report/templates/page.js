"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Dark or light: the system's choice until the button is pressed.
document.querySelector(".theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// Methods shown: a chip takes everything of its method out of tables and figures.
for (const chip of all(".chip")) {
  chip.addEventListener("click", () => {
    const shown = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", shown);
    for (const element of all("[data-method]")) {
      if (element.dataset.method === chip.dataset.filter) element.classList.toggle("off", !shown);
    }
  });
}

// Sorting: numbers by data-sort, largest first; what was not measured stays last.
for (const button of all(".sortable thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = button.closest("table").tBodies[0], column = Number(button.dataset.column);
    const first = column ? "descending" : "ascending", second = column ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    for (const other of all("th[aria-sort]", head.parentElement)) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => column ? parseFloat(row.cells[column].dataset.sort ?? "NaN") : row.cells[0].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (typeof x === "string") return sign * x.localeCompare(y, "en", { numeric: true });
      return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || 0;
    };
    body.append(...[...body.rows].sort(compare));
  });
}

// Pointing at a mark, or reaching it by keyboard, shows its values and picks out its run everywhere in the comparison.
const tip = document.getElementById("tip");
const REACH = 22;

const show = (mark, x, y) => {
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(6, y - box.height - 12) : y + 18}px`;
};
const hide = () => { tip.hidden = true; };

let lit = null;
const light = (run, place) => {
  const article = place?.closest("article") ?? null;
  if (lit?.run === run && lit?.article === article) return;
  for (const element of all(".lit")) element.classList.remove("lit");
  for (const figure of all(".has-lit")) figure.classList.remove("has-lit");
  lit = run && article ? { run, article } : null;
  if (!lit) return;
  for (const element of all("[data-run]", article)) {
    if (element.dataset.run === run && !element.matches(".answers tr, td, th")) element.classList.add("lit");
  }
  for (const figure of all(".figure", article)) {
    if (figure.querySelector(".lit:not(.off)")) figure.classList.add("has-lit");
  }
};

const distance = (box, x, y) =>
  Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));

const nearest = (figure, x, y) => {
  let best = null, least = REACH;
  for (const mark of all(".mark:not(.off)", figure)) {
    const found = distance(mark.getBoundingClientRect(), x, y);
    if (found < least) [best, least] = [mark, found];
  }
  return best;
};

const point = (event) => {
  const figure = event.target.closest?.(".figure");
  const mark = figure ? nearest(figure, event.clientX, event.clientY) : event.target.closest?.("[data-tip]");
  if (mark) show(mark, event.clientX, event.clientY); else hide();
  const owner = mark ?? event.target.closest?.("tbody tr[data-run], .bars li");
  light(owner?.dataset.run ?? null, owner);
};
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
document.addEventListener("focusin", (event) => {
  if (!event.target.matches(".mark")) return;
  const box = event.target.getBoundingClientRect();
  show(event.target, box.right, box.bottom);
  light(event.target.dataset.run, event.target);
});
document.addEventListener("focusout", () => { hide(); light(null); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { hide(); light(null); } });
addEventListener("scroll", hide, { passive: true });
