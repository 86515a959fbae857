// Values under the pointer, a run lit wherever it is, tables sorted by their heads and filtered by what is typed.
// The page says all that it has to say without.
"use strict";
(() => {
  const all = (what, where = document) => [...where.querySelectorAll(what)];
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  tip.hidden = true;
  const marked = new Map();
  for (const each of all("[data-run]")) {
    if (!marked.has(each.dataset.run)) marked.set(each.dataset.run, []);
    marked.get(each.dataset.run).push(each);
  }
  let lit = null;
  const light = (run) => {
    if (run === lit) return;
    for (const each of marked.get(lit) ?? []) each.classList.remove("on");
    for (const each of marked.get((lit = run)) ?? []) each.classList.add("on");
  };
  const leave = () => { tip.hidden = true; light(null); };
  const short = (value) => (Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4)));
  const value = (axis, place) => {
    const [low, high, log] = axis.split(" ").map(Number);
    return log ? low * (high / low) ** place : low + place * (high - low);
  };
  const nearest = (marks, at, along) => {
    let best = 1600, found = null;
    for (const { mark, points } of marks) {
      if (mark.classList.contains("off")) continue;
      points.forEach(([x, y], i) => {
        const [right, high] = points[i + 1] ?? [x, y];
        if (along && at.x >= x && at.x < right) [x, y] = [at.x, y + ((at.x - x) / (right - x)) * (high - y)];
        const far = (x - at.x) ** 2 + (y - at.y) ** 2;
        if (far < best) { best = far; found = { mark, x, y }; }
      });
    }
    return found;
  };
  for (const svg of all("svg[data-y], svg.parallel")) {
    let marks;
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      marks ??= all(".line, .dot", svg).map((mark) => ({
        mark, points: (mark.getAttribute("d").match(/-?[\d.]+ -?[\d.]+/g) ?? []).map((pair) => pair.split(" ").map(Number)),
      }));
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const found = nearest(marks, at, svg.matches(".parallel"));
      if (!found) return leave();
      const { x: xs, y: ys, box } = svg.dataset;
      const [left, right, top, bottom] = (box ?? "").split(" ").map(Number);
      const parts = [];
      const x = xs ? value(xs, (found.x - left) / (right - left)) : null;
      if (xs) parts.push(`${svg.dataset.at} ${/epoch|step|px/.test(svg.dataset.at) ? Math.round(x) : short(x)}`);
      if (ys) parts.push(short(value(ys, (bottom - found.y) / (bottom - top))));
      tip.textContent = found.mark.dataset.name + (parts.length ? ": " + parts.join(", ") : "");
      tip.hidden = false;
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
      tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 10) + "px";
      light(found.mark.dataset.run ?? null);
    });
  }
  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    all("thead th", table).forEach((head, column) => {
      head.style.cursor = "pointer";
      head.tabIndex = 0;
      const sort = () => {
        const down = head.ariaSort === "ascending" ? -1 : 1;
        all("thead th", table).forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
        const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
        const none = (text) => text === "–";
        const order = new Intl.Collator("en", { numeric: true }).compare;
        const compare = (a, b) =>
          none(a) || none(b) ? none(a) - none(b) : down * (isNaN(a) || isNaN(b) ? order(a, b) : a - b);
        body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  }
  for (const table of all("table.runs")) {
    const box = document.createElement("input");
    box.type = "search";
    box.placeholder = "show runs with …";
    box.setAttribute("aria-label", box.placeholder);
    table.closest(".scroll").before(box);
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/);
      for (const row of table.tBodies[0].rows) {
        const off = !words.every((word) => row.textContent.toLowerCase().includes(word));
        for (const each of marked.get(row.dataset.run) ?? [row]) each.classList.toggle("off", off);
      }
    });
    for (const row of table.tBodies[0].rows) {
      row.addEventListener("pointerenter", () => light(row.dataset.run));
      row.addEventListener("pointerleave", leave);
    }
  }
})();
