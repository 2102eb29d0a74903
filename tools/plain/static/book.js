// A page opened from a disk may not read its neighbours: the search then lists titles without extracts.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// A formula that is wider than its line gets a box of its own to scroll in.
function boxWideFormulas() {
  for (const span of document.querySelectorAll(".bd-content span.math")) {
    span.classList.remove("wide");
    const room = span.parentElement.getBoundingClientRect().right;
    span.classList.toggle("wide", span.getBoundingClientRect().right > room + 1);
  }
}

window.addEventListener("load", () => {
  const ready = window.MathJax?.startup?.promise ?? Promise.resolve();
  ready.then(() => {
    boxWideFormulas();
    window.addEventListener("resize", boxWideFormulas);
  });
});

// The sidebar holds more than its list of chapters: a landmark of its own, for those who jump from one to the next.
window.addEventListener("DOMContentLoaded", () => {
  const bar = document.querySelector(".bd-sidebar-primary");
  bar?.setAttribute("role", "complementary");
  bar?.setAttribute("aria-label", "Title, search and contents");
});
