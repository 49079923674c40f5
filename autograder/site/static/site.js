// A formula within a line that is wider than its place scrolls inside itself; see site.css.
const markWide = () => {
  for (const formula of document.querySelectorAll('.bd-article mjx-container:not([display="true"])')) {
    formula.classList.remove("wide");
    const place = formula.closest("p, li, dd, td, th, summary, h1, h2, h3");
    if (place && formula.getBoundingClientRect().width > place.clientWidth) formula.classList.add("wide");
  }
};
addEventListener("DOMContentLoaded", () => globalThis.MathJax?.startup?.promise?.then(markWide));
addEventListener("resize", markWide);
addEventListener("toggle", markWide, true);
