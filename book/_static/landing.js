// The walk on the landing page: frames drawn beforehand, moved through by pointer, touch or keyboard.
// Without this script, or without its picture, the page shows the first frame.
(function () {
  "use strict";
  const SECONDS = 9;  // of one play
  const figure = document.querySelector("figure.walk");
  if (!figure) return;
  const sprite = new Image();
  sprite.onload = start;
  sprite.src = figure.dataset.frames;

  function element(tag, properties) {
    return Object.assign(document.createElement(tag), properties);
  }

  function start() {
    const still = figure.querySelector("img"), side = sprite.width;
    const last = sprite.height / side - 1, half = last / 2, steps = Number(figure.dataset.steps);
    const canvas = element("canvas", { width: 4 * side, height: 4 * side });
    const slider = element("input", { type: "range", min: 0, max: last, step: 1, value: 0 });
    const button = element("button", { type: "button", className: "btn btn-sm btn-outline-primary" });
    const words = element("output");
    const controls = element("div", { className: "walk-controls" });
    const pen = canvas.getContext("2d");
    let position = 0, playing = false, before = 0;

    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", still.alt);
    slider.setAttribute("aria-label", "step of the walk");
    still.replaceWith(canvas);
    controls.append(button, slider);
    canvas.after(controls, words);

    function told(p) {
      if (p <= 0) return "Nine digits that a network drew";
      if (p >= last) return "Nine others, drawn from the noise";
      const t = Math.round(steps * (1 - Math.abs(p - half) / half));
      return (p <= half ? "Dissolving" : "Coming back") + ": step " + t + " of " + steps;
    }

    function paint(frame, opacity) {
      pen.globalAlpha = opacity;
      pen.drawImage(sprite, 0, frame * side, side, side, 0, 0, canvas.width, canvas.height);
    }

    function show(p) {
      position = Math.min(last, Math.max(0, p));
      const frame = Math.floor(position);
      pen.imageSmoothingEnabled = false;
      paint(frame, 1);
      if (position > frame) paint(frame + 1, position - frame);
      slider.value = Math.round(position);
      words.textContent = told(position);
      slider.setAttribute("aria-valuetext", words.textContent);
    }

    function play(on) {
      playing = on;
      button.textContent = on ? "Pause" : "Play";
      if (!on) return;
      if (position >= last) position = 0;
      before = performance.now();
      requestAnimationFrame(advance);
    }

    function advance(now) {
      if (!playing) return;
      show(position + (now - before) / 1000 / SECONDS * last);
      before = now;
      if (position >= last) play(false);
      else requestAnimationFrame(advance);
    }

    function drag(event) {
      const box = canvas.getBoundingClientRect();
      play(false);
      show((event.clientX - box.left) / box.width * last);
    }

    button.addEventListener("click", () => play(!playing));
    slider.addEventListener("input", () => { play(false); show(Number(slider.value)); });
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      drag(event);
    });
    canvas.addEventListener("pointermove", event => { if (event.buttons) drag(event); });
    show(0);
    play(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  }
})();
