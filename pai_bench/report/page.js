"use strict";
// Hover, keyboard, legends and sorting. The page is complete without it.
const tip = document.getElementById("tip");

function hide(svg) {
  tip.hidden = true;
  svg.querySelector(".here").style.visibility = "hidden";
}

function show(svg, point, say) {
  const [x, y, , text] = point;
  const here = svg.querySelector(".here");
  here.setAttribute("cx", x);
  here.setAttribute("cy", y);
  here.style.visibility = "visible";
  const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  tip.hidden = false;
  tip.textContent = text;
  tip.setAttribute("aria-live", say ? "polite" : "off");
  const box = tip.getBoundingClientRect();
  const left = at.x + 14 + box.width > innerWidth ? at.x - box.width - 14 : at.x + 14;
  const top = at.y - box.height - 12 < 0 ? at.y + 14 : at.y - box.height - 12;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.min(top, innerHeight - box.height - 4)}px`;
}

for (const panels of document.querySelectorAll(".panels")) {
  const svg = panels.querySelector("svg");
  const points = JSON.parse(panels.querySelector("script").textContent);
  const off = (point) => {
    const group = point[2] && svg.querySelector(`[data-method="${CSS.escape(point[2])}"]`);
    return group && group.hasAttribute("hidden");
  };
  const reach = panels.closest("figure").matches(".collapse, .overlap") ? 20 : 30;
  let current = -1;
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = reach;
    current = -1;
    points.forEach((point, index) => {
      const distance = Math.hypot(point[0] - at.x, point[1] - at.y);
      if (distance < best && !off(point)) {
        best = distance;
        current = index;
      }
    });
    if (current < 0) hide(svg);
    else show(svg, points[current], false);
  });
  svg.addEventListener("pointerleave", () => hide(svg));
  svg.addEventListener("blur", () => hide(svg));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide(svg);
    if (!step || points.every(off)) return;
    event.preventDefault();
    do {
      current = (Math.max(current, step > 0 ? -1 : 0) + step + points.length) % points.length;
    } while (off(points[current]));
    show(svg, points[current], true);
  });
}

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    const chosen = `.panels [data-method="${CSS.escape(button.dataset.method)}"]`;
    for (const group of button.closest("figure").querySelectorAll(chosen)) group.toggleAttribute("hidden", !on);
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("n");
      const before = head.getAttribute("aria-sort");
      // Numbers start with the largest, words with A.
      const descending = before ? before === "ascending" : numeric;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column];
        if (!cell) return "";
        return cell.dataset.value ?? cell.textContent.trim();
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [left, right] = [value(a), value(b)];
        if (left === "" || right === "") return (left === "") - (right === ""); // what is missing stays last
        const order = numeric ? Number(left) - Number(right) : left.localeCompare(right);
        return descending ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
