// A hit whose anchor holds no text has no summary; Sphinx's search page would stop at it with an error.
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const make = Search.makeSearchSummary;
  Search.makeSearchSummary = (...given) => make(...given) || document.createElement("p");
});
