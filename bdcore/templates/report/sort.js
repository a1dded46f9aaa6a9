"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const empty = (text) => text === "" || text === "-";
      const order = (one, other) => {
        const [a, b] = [key(one), key(other)];
        if (empty(a) || empty(b)) return empty(a) - empty(b);
        return way * (a - b || a.localeCompare(b, undefined, { numeric: true }));
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
