// Brings every <div data-widget="name"></div> of a page to life. A plain script: works from a file too.
(function () {
  "use strict";
  const widgets = {};

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim() || "#888";
  }

  // A curve y(x) with x on a logarithmic axis of steps and y from 0 to 1; `mark` draws a dashed line.
  function plot(canvas, curve, decades, mark) {
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const c = canvas.getContext("2d");
    c.scale(scale, scale);
    c.clearRect(0, 0, width, height);
    const left = 34, bottom = 34, top = 8, right = 12;
    const x = t => left + (width - left - right) * Math.log10(t) / decades;
    const y = v => top + (height - top - bottom) * (1 - v);
    c.font = "12px sans-serif";
    c.fillStyle = c.strokeStyle = color("--pst-color-text-muted");
    c.lineWidth = 0.5;
    c.textAlign = "center";
    for (let d = 0; d <= decades; d++) {
      c.beginPath(); c.moveTo(x(10 ** d), y(0)); c.lineTo(x(10 ** d), y(1)); c.stroke();
      c.fillText((10 ** d).toLocaleString("en"), Math.min(x(10 ** d), width - 24), height - 19);
    }
    c.fillText("age of the gradient (steps)", (left + width) / 2, height - 4);
    c.textAlign = "right";
    for (const v of [0, 0.5, 1]) {
      c.beginPath(); c.moveTo(x(1), y(v)); c.lineTo(x(10 ** decades), y(v)); c.stroke();
      c.fillText(v, left - 6, y(v) + 4);
    }
    c.strokeStyle = color("--pst-color-primary");
    c.lineWidth = 2;
    c.beginPath();
    for (let i = 0; i <= 300; i++) {
      const t = 10 ** (decades * i / 300);
      c.lineTo(x(t), y(curve(t)));
    }
    c.stroke();
    c.setLineDash([5, 4]);
    c.lineWidth = 1;
    c.beginPath(); c.moveTo(x(Math.max(mark, 1)), y(0)); c.lineTo(x(Math.max(mark, 1)), y(1)); c.stroke();
    c.setLineDash([]);
  }

  // How much of an average's weight lies on gradients younger than a given age.
  widgets["half-life"] = function (root) {
    root.innerHTML =
      '<label>half-life of the average <input type="range" min="0" max="4" step="0.01" value="3.84"></label>' +
      '<output></output><canvas role="img" aria-label="Share of the weight that gradients younger than a given age hold"></canvas>';
    const [input, output, canvas] = ["input", "output", "canvas"].map(s => root.querySelector(s));
    function draw() {
      const steps = 10 ** Number(input.value);
      const beta = Math.exp(Math.log(0.5) / (steps + 1));
      output.textContent = `half-life ${steps.toFixed(steps < 100 ? 1 : 0)} steps, decay β = ${beta.toPrecision(6)}. `
        + "The curve: share of the weight on gradients younger than the age.";
      plot(canvas, t => 1 - beta ** t, 5, steps + 1);
    }
    input.addEventListener("input", draw);
    new ResizeObserver(draw).observe(canvas);
    new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    draw();
  };

  function start() {
    for (const root of document.querySelectorAll("[data-widget]")) {
      const make = widgets[root.dataset.widget];
      if (make) make(root);
      else console.error("no widget named " + root.dataset.widget);
    }
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
