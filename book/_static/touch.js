// Pictures that one can touch. A page holds <div class="touch" data-picture="bells"> with a still picture and its numbers as JSON;
// this script puts a canvas and controls in their place. Without it, in print and in a notebook, the still picture shows.
// `formulas` repeats Python of the book; tests/test_touch.py compares the two.
(function () {
  "use strict";

  // ---------------------------------------------------------------- what is computed

  const sum = values => values.reduce((total, value) => total + value, 0);
  const linspace = (a, b, n) => Array.from({ length: n }, (_, i) => a + (b - a) * i / (n - 1));
  const bell = (x, mean, std) => Math.exp(-(((x - mean) / std) ** 2) / 2);
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // alpha-bar and 1 - alpha-bar after each step of a chain
  function chain(betas) {
    let log = 0;
    const alphaBars = [], noise = [];
    for (const beta of betas) {
      log += Math.log1p(-beta);
      alphaBars.push(Math.exp(log));
      noise.push(-Math.expm1(log));
    }
    return { alphaBars, noise };
  }

  // what x_0 says of x_{t-1}, what x_t says of it, and both; t counts from 2
  function bells({ betas }, { t, clean, noisy }) {
    const { alphaBars, noise } = chain(betas), beta = betas[t - 1], alpha = 1 - beta;
    const before = noise[t - 2], after = noise[t - 1];
    const mean = (Math.sqrt(alphaBars[t - 2]) * beta * clean + Math.sqrt(alpha) * before * noisy) / after;
    return {
      fromClean: { mean: Math.sqrt(alphaBars[t - 2]) * clean, std: Math.sqrt(before) },
      fromNoisy: { mean: noisy / Math.sqrt(alpha), std: Math.sqrt(beta / alpha) },
      posterior: { mean, std: Math.sqrt(beta * before / after) },
    };
  }

  // the variances of the four schedules
  function betasOf(name, { steps, s, tau }) {
    if (name === "linear" || name === "rescaled") {
      const scale = name === "rescaled" ? 1000 / steps : 1;
      return linspace(1e-4 * scale, 0.02 * scale, steps);
    }
    const curve = linspace(0, 1, steps + 1).map(u =>
      name === "cosine" ? Math.cos((u + s) / (1 + s) * Math.PI / 2) ** 2 : 1 / (1 + Math.exp((6 * u - 3) / tau)));
    const last = name === "cosine" ? 0 : curve[steps];
    return linspace(1, steps, steps).map(t => Math.min(0.999, (curve[t - 1] - curve[t]) / (curve[t - 1] - last)));
  }

  function schedule(name, options) {
    const { alphaBars, noise } = chain(betasOf(name, options));
    return { alphaBars, noise, logSnr: alphaBars.map((a, i) => Math.log(a / noise[i])) };
  }

  const noisy = (image, eps, alphaBar, noise) =>
    image.map((x, i) => Math.sqrt(alphaBar) * x + Math.sqrt(noise) * eps[i]);

  // draws of the two estimators of the derivative of E[z^2] by the mean, and their variances
  function estimators({ eps }, { mean, std }) {
    return {
      pathwise: eps.map(e => 2 * (mean + std * e)),
      score: eps.map(e => (mean + std * e) ** 2 * e / std),
      pathwiseVariance: 4 * std ** 2,
      scoreVariance: mean ** 4 / std ** 2 + 14 * mean ** 2 + 15 * std ** 2,
    };
  }

  // log p(x), the bound for the proposal N(mean, std^2), and the divergence between them; z ~ N(0, 1), x ~ N(slope z, variance)
  function bound({ x, slope, variance }, { mean, std }) {
    const square = (x - slope * mean) ** 2 + (slope * std) ** 2;
    const likelihood = -0.5 * (Math.log(2 * Math.PI * variance) + square / variance);
    const evidence = slope ** 2 + variance, posterior = { mean: slope * x / evidence, variance: variance / evidence };
    const divergence = (m, v) => 0.5 * (Math.log(v) - 2 * Math.log(std) - 1 + std ** 2 / v + (mean - m) ** 2 / v);
    return {
      truth: -0.5 * (Math.log(2 * Math.PI * evidence) + x ** 2 / evidence),
      bound: likelihood - divergence(0, 1),
      gap: divergence(posterior.mean, posterior.variance),
      posterior,
    };
  }

  // a point of the plane in a diffused mixture of Gaussians: responsibilities, best guess of the noise, of the clean point
  function denoise({ weights, means, covariances }, point, alphaBar) {
    const signal = Math.sqrt(alphaBar), noise = Math.sqrt(1 - alphaBar);
    const parts = weights.map((weight, k) => {
      const [[a, b], [, d]] = covariances[k].map((row, i) => row.map((c, j) => alphaBar * c + (i === j) * noise ** 2));
      const [x, y] = point.map((value, i) => value - signal * means[k][i]), area = a * d - b * b;
      const pull = [(d * x - b * y) / area, (a * y - b * x) / area];
      return { pull, log: Math.log(weight) - 0.5 * (Math.log(area) + x * pull[0] + y * pull[1]) };
    });
    const top = Math.max(...parts.map(part => part.log)), shares = parts.map(part => Math.exp(part.log - top));
    const responsibilities = shares.map(share => share / sum(shares));
    const eps = [0, 1].map(i => noise * sum(parts.map((part, k) => responsibilities[k] * part.pull[i])));
    return { responsibilities, eps, clean: point.map((value, i) => (value - noise * eps[i]) / signal) };
  }

  // where points are after each step of DDIM through falling noise levels; `predict` names the noise
  function steps(points, alphaBars, predict) {
    const path = [points];
    for (let i = 0; i + 1 < alphaBars.length; i++) {
      const now = alphaBars[i], next = alphaBars[i + 1];
      path.push(path[i].map(point => predict(point, now).map((eps, j) =>
        Math.sqrt(next) * (point[j] - Math.sqrt(1 - now) * eps) / Math.sqrt(now) + Math.sqrt(1 - next) * eps)));
    }
    return path;
  }

  const walk = (data, points, alphaBars) => steps(points, alphaBars, (point, level) => denoise(data, point, level).eps);

  // the same with guidance: away from what is likely, towards what is asked for
  const guidedWalk = ({ all, given }, points, alphaBars, scale) => steps(points, alphaBars, (point, level) => {
    const without = denoise(all, point, level).eps, asked = denoise(given, point, level).eps;
    return without.map((eps, j) => eps + scale * (asked[j] - eps));
  }).at(-1);

  // how much one position of an image attends to each: queries and keys are patches without their mean, of one length
  function attention({ side, image, patch, sharpness }, { row, column }) {
    const reach = (patch - 1) / 2;
    const at = (r, c) => (r < 0 || c < 0 || r >= side || c >= side ? 0 : image[r * side + c]);
    const patchOf = (r, c) => {
      const values = [];
      for (let i = -reach; i <= reach; i++) for (let j = -reach; j <= reach; j++) values.push(at(r + i, c + j));
      const mean = sum(values) / values.length, centred = values.map(value => value - mean);
      const size = Math.sqrt(sum(centred.map(value => value * value)));
      return centred.map(value => (size > 1e-9 ? value / size : 0));
    };
    const query = patchOf(row, column);
    const scores = image.map((_, i) => {
      const key = patchOf(Math.floor(i / side), i % side);
      return sharpness * sum(query.map((value, j) => value * key[j])) / patch;
    });
    const top = Math.max(...scores), shares = scores.map(score => Math.exp(score - top)), total = sum(shares);
    return shares.map(share => share / total);
  }

  // the factors of clean image and noise at one position, and the density of the pixels there
  function dissolve({ alpha_bars: alphaBars, counts, ends }, { position }) {
    const found = counts[position], area = sum(found) * (ends[1] - ends[0]) / found.length;
    return { signal: Math.sqrt(alphaBars[position]), noise: Math.sqrt(1 - alphaBars[position]), density: found.map(count => count / area) };
  }

  // the side of the square that a stack of 3 x 3 convolutions sees
  const receptiveField = layers => ({ side: 2 * layers + 1 });

  const formulas = {
    chain, bells, betasOf, schedule, noisy, estimators, bound, denoise, walk, guidedWalk, attention, dissolve, receptiveField,
  };
  if (typeof module !== "undefined") {
    module.exports = formulas;
    return;
  }

  // ---------------------------------------------------------------- drawing

  const INK = { ink: "--pst-color-text-base", muted: "--pst-color-text-muted", edge: "--pst-color-border" };
  const PAPER = { a: "#0072B2", b: "#D55E00", c: "#009E73", d: "#CC79A7", ink: "#222", muted: "#555", edge: "#bbb" };

  function readColours(box) {
    const style = getComputedStyle(box);
    const read = name => style.getPropertyValue(INK[name] || `--touch-${name}`).trim() || PAPER[name];
    return Object.fromEntries(Object.keys(PAPER).map(name => [name, read(name)]));
  }

  const rgb = colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));

  function ticks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find(factor => factor * power >= rough) * power, found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
    return found.map(value => Number(value.toPrecision(8)));
  }

  // A pair of axes: `box` in pixels, `x` and `y` the ends of the axes.
  class Panel {
    constructor(pen, colours, box, x, y) {
      Object.assign(this, { pen, colours, box, xEnds: x, yEnds: y });
    }
    x(value) { return this.box.left + this.box.width * (value - this.xEnds[0]) / (this.xEnds[1] - this.xEnds[0]); }
    y(value) { return this.box.top + this.box.height * (1 - (value - this.yEnds[0]) / (this.yEnds[1] - this.yEnds[0])); }
    at(pixelX, pixelY) {
      const { left, top, width, height } = this.box, [x0, x1] = this.xEnds, [y0, y1] = this.yEnds;
      return [x0 + (pixelX - left) / width * (x1 - x0), y1 - (pixelY - top) / height * (y1 - y0)];
    }
    holds(pixelX, pixelY) {
      const { left, top, width, height } = this.box;
      return pixelX >= left && pixelX <= left + width && pixelY >= top && pixelY <= top + height;
    }
    clipped(draw) {
      const { left, top, width, height } = this.box;
      this.pen.save();
      this.pen.beginPath();
      this.pen.rect(left, top, width, height);
      this.pen.clip();
      draw();
      this.pen.restore();
    }
    trace(xs, ys) {
      this.pen.beginPath();
      xs.forEach((x, i) => this.pen.lineTo(this.x(x), this.y(ys[i])));
    }
    line(xs, ys, colour, { width = 2, dash = [], opacity = 1 } = {}) {
      this.clipped(() => {
        Object.assign(this.pen, { strokeStyle: this.colours[colour] || colour, lineWidth: width, globalAlpha: opacity });
        this.pen.setLineDash(dash);
        this.trace(xs, ys);
        this.pen.stroke();
      });
    }
    fill(xs, ys, colour, opacity = 0.2) {
      this.clipped(() => {
        Object.assign(this.pen, { fillStyle: this.colours[colour] || colour, globalAlpha: opacity });
        this.trace([xs[0], ...xs, xs.at(-1)], [this.yEnds[0], ...ys, this.yEnds[0]]);
        this.pen.fill();
      });
    }
    dot(x, y, colour, radius = 5) {
      this.pen.fillStyle = this.colours[colour] || colour;
      this.pen.beginPath();
      this.pen.arc(this.x(x), this.y(y), radius, 0, 2 * Math.PI);
      this.pen.fill();
    }
    arrow(from, to, colour, width = 2) {
      const { pen } = this, [x0, y0, x1, y1] = [this.x(from[0]), this.y(from[1]), this.x(to[0]), this.y(to[1])];
      const turn = Math.atan2(y1 - y0, x1 - x0), head = Math.min(4 + 2 * width, Math.hypot(x1 - x0, y1 - y0));
      Object.assign(pen, { strokeStyle: this.colours[colour] || colour, lineWidth: width });
      pen.setLineDash([]);
      pen.beginPath();
      pen.moveTo(x0, y0);
      pen.lineTo(x1, y1);
      for (const side of [-0.5, 0.5]) {
        pen.moveTo(x1, y1);
        pen.lineTo(x1 - head * Math.cos(turn + side), y1 - head * Math.sin(turn + side));
      }
      pen.stroke();
    }
    text(words, x, y, { colour = "ink", align = "left", pixels = false } = {}) {
      Object.assign(this.pen, { fillStyle: this.colours[colour] || colour, textAlign: align, textBaseline: "middle" });
      this.pen.fillText(words, pixels ? x : this.x(x), pixels ? y : this.y(y));
    }
    axes({ xLabel = "", title = "", yTicks = true, most = 5 }) {
      const { pen, box } = this, bottom = box.top + box.height, middle = box.left + box.width / 2;
      Object.assign(pen, { strokeStyle: this.colours.edge, lineWidth: 1 });
      pen.setLineDash([]);
      pen.beginPath();
      for (const value of ticks(...this.xEnds, Math.max(2, Math.min(7, box.width / 55)))) {
        pen.moveTo(this.x(value), box.top);
        pen.lineTo(this.x(value), bottom);
        this.text(String(value).replace("-", "\u2212"), this.x(value), bottom + 11, { colour: "muted", align: "center", pixels: true });
      }
      for (const value of yTicks ? ticks(...this.yEnds, most) : []) {
        pen.moveTo(box.left, this.y(value));
        pen.lineTo(box.left + box.width, this.y(value));
        this.text(String(value).replace("-", "\u2212"), box.left - 6, this.y(value), { colour: "muted", align: "right", pixels: true });
      }
      pen.stroke();
      this.text(xLabel, middle, bottom + 27, { align: "center", pixels: true });
      this.text(title, middle, box.top - 12, { align: "center", pixels: true });
    }
  }

  // Names of curves in their colours, in a row from (left, top).
  function legend(panel, names, left, top) {
    const { pen } = panel;
    for (const [name, colour, dash] of names) {
      Object.assign(pen, { strokeStyle: panel.colours[colour], lineWidth: 2.5 });
      pen.setLineDash(dash || []);
      pen.beginPath();
      pen.moveTo(left, top);
      pen.lineTo(left + 18, top);
      pen.stroke();
      panel.text(name, left + 23, top, { pixels: true });
      left += 23 + pen.measureText(name).width + 16;
    }
  }

  // A grey image, value -1 black and 1 white.
  function paintImage(pen, values, side, left, top, size) {
    const small = document.createElement("canvas"), area = small.getContext("2d");
    small.width = small.height = side;
    const pixels = area.createImageData(side, side);
    values.forEach((value, i) => pixels.data.set([0, 0, 0].fill(clamp((value + 1) * 127.5, 0, 255)).concat(255), 4 * i));
    area.putImageData(pixels, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, left, top, size, size);
  }

  async function loadSheet(data) {
    data.sheet = new Image();
    data.sheet.src = data.png;
    await data.sheet.decode();
  }

  const number = (value, digits = 2) => value.toFixed(digits).replace("-", "\u2212");
  const isNarrow = width => width < 480;

  // ---------------------------------------------------------------- the pictures
  // controls: sliders ({key, label, min, max, step, value, say}) and choices ({key, label, options: names, value: "0"});
  // draw: paints and returns its panels; tell: the state in words; grab (optional): what a finger on the canvas changes.

  const pictures = {
    bells: {
      height: width => (isNarrow(width) ? 280 : 330),
      controls: data => [
        { key: "t", label: "step t", min: 2, max: data.betas.length, step: 1, value: 3, say: t => `${t} of ${data.betas.length}` },
        { key: "clean", label: "clean value x\u2080", min: -2.5, max: 2.5, step: 0.1, value: 1, say: number },
        { key: "noisy", label: "noisy value x\u209c", min: -2.5, max: 2.5, step: 0.1, value: -1, say: number },
      ],
      draw(pen, colours, width, height, state, data) {
        const panel = new Panel(pen, colours, { left: 14, top: 34, width: width - 28, height: height - 104 }, [-5, 5], [0, 1.06]);
        const found = bells(data, state), xs = linspace(-5, 5, 401);
        panel.axes({ xLabel: "", yTicks: false });
        const draw = ({ mean, std }, colour, options) => panel.line(xs, xs.map(x => bell(x, mean, std)), colour, options);
        draw(found.fromClean, "a");
        draw(found.fromNoisy, "b");
        panel.fill(xs, xs.map(x => bell(x, found.posterior.mean, found.posterior.std)), "c", 0.25);
        draw(found.posterior, "c", { width: 2.5 });
        legend(panel, [["from x\u2080", "a"], ["from x\u209c", "b"], ["posterior of x\u209c\u208b\u2081", "c"]], 16, 14);
        const row = height - 30;
        for (const [value, colour, name] of [[state.clean, "a", "x\u2080"], [state.noisy, "b", "x\u209c"]]) {
          panel.pen.fillStyle = colours[colour];
          panel.pen.beginPath();
          panel.pen.arc(panel.x(value), row, 8, 0, 2 * Math.PI);
          panel.pen.fill();
          panel.text(name, panel.x(value), row + 19, { align: "center", pixels: true });
        }
        return { panel };
      },
      tell(state, data) {
        const found = bells(data, state), words = ({ mean, std }) => `${number(mean)} \u00b1 ${number(std)}`;
        return `From x\u2080: ${words(found.fromClean)}; from x\u209c: ${words(found.fromNoisy)}; posterior: ${words(found.posterior)}.`;
      },
      grab({ panel }, x, y, state, start) {
        const value = panel.at(x, y)[0];
        if (start) this.held = Math.abs(value - state.clean) < Math.abs(value - state.noisy) ? "clean" : "noisy";
        return { [this.held]: value };
      },
    },

    schedules: {
      names: ["linear", "rescaled", "cosine", "sigmoid"],
      height: width => (isNarrow(width) ? 520 : 370),
      controls() {
        return [
          { key: "name", label: "schedule", options: this.names, value: "0" },
          { key: "steps", label: "steps T", min: 25, max: 1000, step: 25, value: 100, say: String },
          { key: "s", label: "cosine: offset s", min: 0, max: 0.2, step: 0.008, value: 0.008, say: s => number(s, 3) },
          { key: "tau", label: "sigmoid: temperature \u03c4", min: 0.3, max: 2, step: 0.1, value: 1, say: tau => number(tau, 1) },
        ];
      },
      draw(pen, colours, width, height, state, data) {
        const narrow = isNarrow(width), part = narrow ? width - 50 : width / 2 - 50, tall = narrow ? 140 : 185;
        const left = new Panel(pen, colours, { left: 36, top: 48, width: part, height: tall }, [0, 1], [0, 1.02]);
        const box = narrow ? { left: 36, top: 258, width: part, height: tall } : { left: width / 2 + 36, top: 48, width: part, height: tall };
        const right = new Panel(pen, colours, box, [0, 1], [-14, 10]);
        left.axes({ title: "\u1fb1", xLabel: narrow ? "" : "t / T" });
        right.axes({ title: "log-SNR", xLabel: narrow ? "" : "t / T" });
        for (const [i, name] of this.names.entries()) {
          const { alphaBars, logSnr } = schedule(name, state), us = alphaBars.map((_, t) => (t + 1) / state.steps);
          const style = i === Number(state.name) ? { width: 3.5 } : { width: 1.5, opacity: 0.75 };
          left.line(us, alphaBars, "abcd"[i], style);
          right.line(us, logSnr, "abcd"[i], style);
        }
        legend(left, this.names.map((name, i) => [name, "abcd"[i]]), 36, 12);
        const found = schedule(this.names[state.name], state), n = narrow ? 6 : 11, size = Math.min((width - 20) / n - 3, 56), top = height - size - 4;
        for (let i = 0; i < n; i++) {
          const step = Math.round(i / (n - 1) * state.steps) - 1;
          const image = step < 0 ? data.image : noisy(data.image, data.eps, found.alphaBars[step], found.noise[step]);
          paintImage(pen, image, data.side, 10 + i * (width - 20) / n, top, size);
        }
        return {};
      },
      tell(state) {
        const { alphaBars, logSnr } = schedule(this.names[state.name], state), half = alphaBars.findIndex(a => a < 0.5) + 1;
        const share = half ? `at ${Math.round(100 * half / state.steps)} % of the way` : "never";
        return `${this.names[state.name]}, ${state.steps} steps: half of the variance is noise ${share}; `
          + `${(100 * Math.sqrt(alphaBars.at(-1))).toPrecision(2)} % of the amplitude are left at the end, log-SNR ${number(logSnr.at(-1), 1)}.`;
      },
    },

    estimators: {
      height: width => (isNarrow(width) ? 340 : 360),
      controls: () => [
        { key: "std", label: "spread \u03c3", min: -1.3, max: 0.3, step: 0.02, value: 0, say: log => number(10 ** log, 2), map: log => 10 ** log },
        { key: "mean", label: "mean \u03bc", min: 0, max: 2, step: 0.1, value: 1.5, say: mean => number(mean, 1) },
      ],
      draw(pen, colours, width, height, state, data) {
        const found = estimators(data, state), ends = [-22, 28], bins = 100, each = (height - 110) / 2;
        const rows = [["pathwise", "b", "pathwise estimator"], ["score", "a", "score-function estimator"]];
        rows.forEach(([key, colour, title], row) => {
          const counts = new Array(bins).fill(0), wide = (ends[1] - ends[0]) / bins;
          for (const value of found[key]) {
            const bin = Math.floor((value - ends[0]) / wide);
            if (bin >= 0 && bin < bins) counts[bin] += 1;
          }
          const top = Math.max(...counts, 1), xs = [], ys = [];
          counts.forEach((count, i) => { xs.push(ends[0] + i * wide, ends[0] + (i + 1) * wide); ys.push(count, count); });
          const panel = new Panel(pen, colours, { left: 14, top: 28 + row * (each + 46), width: width - 28, height: each }, ends, [0, 1.08 * top]);
          panel.axes({ title, yTicks: false, xLabel: row ? "one estimate" : "" });
          panel.fill(xs, ys, colour, 0.75);
          panel.line([2 * state.mean, 2 * state.mean], [0, 2 * top], "ink", { width: 1.5, dash: [5, 4] });
        });
        return {};
      },
      tell(state, data) {
        const { pathwiseVariance, scoreVariance } = estimators(data, state), ratio = scoreVariance / pathwiseVariance;
        const many = ratio < 10 ? ratio.toFixed(1) : Math.round(ratio).toLocaleString("en");
        return `Both have the mean ${number(2 * state.mean, 1)}. Standard deviation: pathwise ${number(Math.sqrt(pathwiseVariance))}, `
          + `score function ${number(Math.sqrt(scoreVariance))}. The latter needs ${many} draws for each pathwise one.`;
      },
    },

    bound: {
      height: width => (isNarrow(width) ? 470 : 320),
      controls: () => [
        { key: "mean", label: "mean of the proposal", min: -0.5, max: 2.5, step: 0.05, value: 0.5, say: number },
        { key: "std", label: "its standard deviation", min: 0.15, max: 1.5, step: 0.05, value: 0.3, say: number },
      ],
      draw(pen, colours, width, height, state, data) {
        const narrow = isNarrow(width), part = narrow ? width - 50 : width / 2 - 50, tall = narrow ? 150 : height - 100;
        const left = new Panel(pen, colours, { left: 36, top: 48, width: part, height: tall }, [-1.5, 3.5], [0, 1.4]);
        const box = narrow ? { left: 36, top: 276, width: part, height: tall } : { left: width / 2 + 36, top: 48, width: part, height: tall };
        const right = new Panel(pen, colours, box, [-0.5, 2.5], [-7, -1.5]);
        const found = bound(data, state), xs = linspace(-1.5, 3.5, 301), means = linspace(-0.5, 2.5, 151);
        const density = (z, mean, std) => bell(z, mean, std) / (std * Math.sqrt(2 * Math.PI));
        const posterior = xs.map(z => density(z, found.posterior.mean, Math.sqrt(found.posterior.variance)));
        const proposal = xs.map(z => density(z, state.mean, state.std));
        left.yEnds = [0, 1.1 * Math.max(...posterior, ...proposal)];
        left.axes({ xLabel: "z", title: "densities", most: 4 });
        left.fill(xs, proposal, "a");
        left.line(xs, proposal, "a");
        left.line(xs, posterior, "c", { width: 2.5 });
        right.axes({ xLabel: "mean of the proposal", title: "nats" });
        right.line(means, means.map(mean => bound(data, { mean, std: state.std }).bound), "a");
        right.line(right.xEnds, [found.truth, found.truth], "ink", { dash: [6, 4], width: 1.5 });
        right.line([state.mean, state.mean], [found.bound, found.truth], "b", { width: 7, opacity: 0.75 });
        if (found.bound > right.yEnds[0]) right.dot(state.mean, found.bound, "a", 6);
        legend(left, [["proposal q, bound", "a"], ["posterior", "c"], ["gap", "b"]], 36, 12);
        return { left, right };
      },
      tell(state, data) {
        const found = bound(data, state);
        return `log p(x) ${number(found.truth)} = bound ${number(found.bound)} + gap ${number(found.gap)} nats.`;
      },
      grab({ left, right }, x, y) {
        const panel = [left, right].find(one => one.holds(x, y));
        return panel ? { mean: panel.at(x, y)[0] } : {};
      },
    },

    mixture: {
      height: width => Math.min(width, 440),
      play: "level",
      controls: data => [
        {
          key: "level", label: "step of the walk", min: 0, max: data.alpha_bars.length - 1, step: 1, value: 30, seconds: 5,
          say: i => `t = ${data.steps[i]}`,
        },
        { key: "x", label: "point, across", min: -3, max: 3, step: 0.1, value: -0.6, say: x => number(x, 1) },
        { key: "y", label: "point, up", min: -3, max: 3, step: 0.1, value: 0.5, say: y => number(y, 1) },
      ],
      prepare(data) { data.path = walk(data, data.starts, data.alpha_bars); },
      draw(pen, colours, width, height, state, data) {
        const size = height - 50, box = { left: (width - size) / 2, top: 14, width: size, height: size };
        const panel = new Panel(pen, colours, box, [-3.2, 3.2], [-3.2, 3.2]), alphaBar = data.alpha_bars[state.level];
        const base = ["a", "b", "c"].map(name => rgb(colours[name]));
        const mixed = shares => `rgb(${[0, 1, 2].map(i => Math.round(sum(shares.map((share, k) => share * base[k][i]))))})`;
        panel.axes({});
        panel.clipped(() => {
          for (let i = 0; i < 169; i++) { // the score: the longer, the more shortened
            const from = [-3 + i % 13 / 2, -3 + Math.floor(i / 13) / 2];
            const score = denoise(data, from, alphaBar).eps.map(eps => -eps / Math.sqrt(1 - alphaBar));
            const scale = Math.min(0.16, 0.5 / Math.sqrt(Math.hypot(...score))) / Math.sqrt(Math.hypot(...score));
            panel.arrow(from, from.map((value, j) => value + scale * score[j]), "muted", 1);
          }
          for (const point of data.path[state.level]) panel.dot(...point, mixed(denoise(data, point, alphaBar).responsibilities), 2.5);
          const found = denoise(data, [state.x, state.y], alphaBar);
          for (const [k, mean] of data.means.entries()) {
            const place = mean.map(value => Math.sqrt(alphaBar) * value);
            panel.text("+", ...place, { align: "center" });
            panel.line([state.x, place[0]], [state.y, place[1]], ["a", "b", "c"][k], { width: 7 * found.responsibilities[k], opacity: 0.35 });
          }
          panel.arrow([state.x, state.y], found.clean, "ink", 2.5);
          panel.dot(state.x, state.y, mixed(found.responsibilities), 8);
        });
        return { panel };
      },
      tell(state, data) {
        const { responsibilities, clean } = denoise(data, [state.x, state.y], data.alpha_bars[state.level]);
        const shares = responsibilities.map(share => `${Math.round(100 * share)} %`).join(", ");
        return `Best guess of the clean point: (${number(clean[0], 1)}, ${number(clean[1], 1)}). It came from left, upper, lower group: ${shares}.`;
      },
      grab({ panel }, x, y) {
        const [across, up] = panel.at(x, y);
        return { x: across, y: up };
      },
    },

    guidance: {
      height: width => Math.round(isNarrow(width) ? 1.75 * width : width / 2),
      play: "frame",
      controls: data => [{
        key: "frame", label: "guidance scale s", min: 0, max: data.scales.length - 1, step: 1, value: 2, seconds: 6,
        say: i => number(data.scales[i], 1),
      }],
      async prepare(data) {
        data.clouds = new Map();
        await loadSheet(data);
      },
      cloud(data, i) {
        if (!data.clouds.has(i)) data.clouds.set(i, guidedWalk(data, data.starts, data.alpha_bars, data.scales[i]));
        return data.clouds.get(i);
      },
      draw(pen, colours, width, height, state, data) {
        const size = isNarrow(width) ? width : width / 2;
        const panel = new Panel(pen, colours, { left: 10, top: 26, width: size - 30, height: size - 56 }, [-2.2, 2.2], [-1.7, 2.4]);
        panel.axes({ title: "asked for: the upper heap", yTicks: false });
        const turns = linspace(0, 2 * Math.PI, 60);
        data.all.means.forEach(([x, y], i) => panel.line(
          turns.map(a => x + data.radius * Math.cos(a)), turns.map(a => y + data.radius * Math.sin(a)), i ? "edge" : "b"));
        panel.clipped(() => this.cloud(data, state.frame).forEach(([x, y]) => panel.dot(x, y, "a", 2)));
        const left = isNarrow(width) ? 0 : size, top = isNarrow(width) ? size : 0, scale = Math.min((size - 46) / data.width, (size - 60) / data.height);
        panel.text(data.sentence, left + size / 2, top + 14, { align: "center", pixels: true });
        pen.imageSmoothingEnabled = false;
        pen.drawImage(data.sheet, state.frame * data.width, 0, data.width, data.height,
          left + (size - scale * data.width) / 2, top + 26, scale * data.width, scale * data.height);
        return {};
      },
      tell(state, data) {
        const points = this.cloud(data, state.frame), middle = [0, 1].map(j => sum(points.map(point => point[j])) / points.length);
        const square = sum(points.map(([x, y]) => (x - middle[0]) ** 2 + (y - middle[1]) ** 2)) / (2 * points.length);
        const inside = points.filter(([x, y]) => Math.hypot(x - data.all.means[0][0], y - data.all.means[0][1]) < data.radius).length;
        return `s = ${number(data.scales[state.frame], 1)}: ${Math.round(100 * inside / points.length)} % of the points are in the upper ring, `
          + `their spread is ${number(Math.sqrt(square))}.`;
      },
    },

    attention: {
      height: width => Math.round(width / 2) + 10,
      controls: data => [
        { key: "row", label: "row", min: 0, max: data.side - 1, step: 1, value: 9, say: String },
        { key: "column", label: "column", min: 0, max: data.side - 1, step: 1, value: 28, say: String },
        { key: "layers", label: "3 \u00d7 3 convolutions", min: 1, max: 12, step: 1, value: 4, say: String },
      ],
      draw(pen, colours, width, height, state, data) {
        const size = width / 2, side = data.side, ends = [[-0.5, side - 0.5], [side - 0.5, -0.5]];
        const weights = attention(data, state), most = Math.max(...weights);
        const [left, right] = [8, size + 8].map(start =>
          new Panel(pen, colours, { left: start, top: 24, width: size - 16, height: size - 16 }, ...ends));
        paintImage(pen, data.image, side, left.box.left, left.box.top, left.box.width);
        paintImage(pen, weights.map(weight => 2 * weight / most - 1), side, right.box.left, right.box.top, right.box.width);
        const far = receptiveField(state.layers).side / 2, x = [state.column - far, state.column + far], y = [state.row - far, state.row + far];
        left.line([x[0], x[1], x[1], x[0], x[0]], [y[0], y[0], y[1], y[1], y[0]], "#ff8f4d", { width: 2.5 });
        for (const panel of [left, right]) {
          panel.line([state.column - 1, state.column + 1], [state.row - 1, state.row + 1], "#ff8f4d", { width: 3 });
          panel.line([state.column - 1, state.column + 1], [state.row + 1, state.row - 1], "#ff8f4d", { width: 3 });
        }
        left.text("what the convolutions see", left.box.left + left.box.width / 2, left.box.top - 12, { align: "center", pixels: true });
        right.text("where attention looks", right.box.left + right.box.width / 2, right.box.top - 12, { align: "center", pixels: true });
        return { left, right };
      },
      tell(state, data) {
        const weights = attention(data, state).map((weight, i) => [weight, i]).sort((a, b) => b[0] - a[0]);
        let total = 0, count = 0, farthest = 0;
        while (total < 0.5) {
          const [weight, i] = weights[count++], row = Math.floor(i / data.side), column = i % data.side;
          total += weight;
          farthest = Math.max(farthest, Math.abs(row - state.row), Math.abs(column - state.column));
        }
        const reach = receptiveField(state.layers).side;
        return `The convolutions see ${reach} by ${reach} pixels. Half of the attention goes to ${count} of ${weights.length} pixels, `
          + `the farthest of them ${farthest} away.`;
      },
      grab({ left, right }, x, y) {
        const panel = [left, right].find(one => one.holds(x, y));
        if (!panel) return {};
        const [column, row] = panel.at(x, y);
        return { row, column };
      },
    },

    // Frames drawn beforehand: one sheet, a column for each position and a row for each choice.
    frames: {
      height: (width, data) => Math.round(Math.min(width, data.width * data.scale) * data.height / data.width),
      play: "position",
      controls(data) {
        const slider = {
          key: "position", label: data.label, min: 0, max: data.positions.length - 1, step: 1, value: 0,
          say: i => data.positions[i], seconds: 5,
        };
        return data.choices ? [{ key: "choice", label: data.choice, options: data.choices, value: "0" }, slider] : [slider];
      },
      prepare: loadSheet,
      draw(pen, colours, width, height, state, data) {
        const wide = Math.min(width, data.width * data.scale);
        pen.imageSmoothingEnabled = false;
        pen.drawImage(data.sheet, state.position * data.width, Number(state.choice || 0) * data.height, data.width, data.height,
          (width - wide) / 2, 0, wide, height);
        return {};
      },
      tell: (state, data) => (data.choices ? `${data.choices[state.choice]}, ` : "") + data.positions[state.position],
      grab(panels, x, y, state, start, width, data) {
        return { position: x / width * (data.positions.length - 1) };
      },
    },

    // Frames of images that turn into noise, the two factors as bars, and a histogram of the pixels.
    dissolve: {
      height: (width, data) => pictures.frames.height(width, data) + (isNarrow(width) ? 310 : 200),
      play: "position",
      controls: data => pictures.frames.controls(data),
      prepare: loadSheet,
      draw(pen, colours, width, height, state, data) {
        pictures.frames.draw(pen, colours, width, pictures.frames.height(width, data), state, data);
        const { signal, noise, density } = dissolve(data, state), narrow = isNarrow(width), low = height - 46;
        const bars = narrow ? { left: 14, top: low - 234, width: width - 28, height: 60 } : { left: 14, top: low - 120, width: width * 0.38, height: 120 };
        const left = new Panel(pen, colours, bars, [0, 1], [0, 2]);
        left.axes({ title: "factors of image and noise", yTicks: false });
        [["\u221a\u1fb1", signal, "a"], ["\u221a(1 \u2212 \u1fb1)", noise, "b"]].forEach(([name, value, colour], i) => {
          left.line([0, value], [1.5 - i, 1.5 - i], colour, { width: 0.4 * left.box.height, opacity: 0.5 });
          left.text(`${name} = ${number(value)}`, 0.03, 1.5 - i);
        });
        const right = new Panel(pen, colours, narrow
          ? { left: 14, top: low - 114, width: width - 28, height: 114 } : { left: width * 0.45, top: low - 120, width: width * 0.55 - 14, height: 120 }, data.ends, [0, 0.9]);
        const wide = (data.ends[1] - data.ends[0]) / density.length, xs = [], ys = [];
        density.forEach((value, i) => { xs.push(data.ends[0] + i * wide, data.ends[0] + (i + 1) * wide); ys.push(value, value); });
        right.axes({ title: "values of the pixels", yTicks: false });
        right.fill(xs, ys, "a", 0.6);
        const line = linspace(...data.ends, 121);
        right.line(line, line.map(x => bell(x, 0, 1) / Math.sqrt(2 * Math.PI)), "b", { dash: [6, 4] });
        return {};
      },
      tell(state, data) {
        const { signal, noise } = dissolve(data, state);
        return `${data.positions[state.position]}: ${number(signal)} times the image and ${number(noise)} times the noise.`;
      },
      grab: (...all) => pictures.frames.grab(...all),
    },
  };

  // ---------------------------------------------------------------- controls

  let count = 0;
  const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  async function build(box) {
    const picture = pictures[box.dataset.picture], photo = box.querySelector("img");
    if (!picture) return;
    const data = JSON.parse(box.querySelector("script").textContent);
    if (picture.prepare) await picture.prepare(data);
    const controls = picture.controls(data), state = {}, shown = {}, group = `touch-${++count}`;
    const canvas = element("canvas"), words = element("output", { className: "touch-words" });
    const pen = canvas.getContext("2d");
    let panels = {}, width = 0, colours = readColours(box), playing = null;

    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", photo.alt);
    canvas.style.touchAction = "pan-y"; // a finger that moves up or down scrolls the page
    box.setAttribute("role", "group");
    const rows = controls.map(control => (control.options ? choice(control) : slider(control)));
    box.append(canvas, ...rows, words);
    box.classList.add("live");

    function slider(control) {
      const id = `${group}-${control.key}`, row = element("div", { className: "touch-row" });
      const { min, max, step, value } = control;
      const input = element("input", { type: "range", id, min, max, step });
      const spoken = element("span", { className: "touch-value" });
      input.value = value;
      input.addEventListener("input", () => { play(false); set({ [control.key]: Number(input.value) }); });
      row.append(element("label", { htmlFor: id, textContent: control.label }), input, spoken);
      if (picture.play === control.key) {
        control.button = element("button", { type: "button", className: "btn btn-sm btn-outline-primary", textContent: "Play" });
        control.button.addEventListener("click", () => play(!playing));
        row.prepend(control.button);
      }
      shown[control.key] = value;
      Object.assign(control, { input, spoken });
      return row;
    }

    function choice(control) {
      const row = element("fieldset", { className: "touch-row" });
      row.append(element("legend", { textContent: control.label }));
      for (const [value, name] of Object.entries(control.options)) { // value is a number as text
        const input = element("input", { type: "radio", name: `${group}-${control.key}`, value, checked: value === control.value });
        const label = element("label");
        label.append(input, name);
        input.addEventListener("change", () => set({ [control.key]: value }, true));
        row.append(label);
      }
      shown[control.key] = control.value;
      return row;
    }

    function set(changes, spoken = false) {
      for (const control of controls) {
        if (!(control.key in changes)) continue;
        let value = changes[control.key];
        if (control.input) {
          value = clamp(Math.round((value - control.min) / control.step) * control.step + control.min, control.min, control.max);
          value = Number(value.toFixed(6));
          control.input.value = value;
        }
        shown[control.key] = value;
      }
      words.setAttribute("aria-live", spoken ? "polite" : "off"); // a slider speaks for itself
      show();
    }

    function show() {
      for (const { key, map } of controls) state[key] = map ? map(shown[key]) : shown[key];
      words.textContent = picture.tell(state, data);
      for (const { key, input, spoken, say } of controls.filter(control => control.input)) {
        spoken.textContent = say(shown[key]);
        words.hidden = words.textContent === spoken.textContent;
        input.setAttribute("aria-valuetext", words.hidden ? spoken.textContent : `${spoken.textContent}. ${words.textContent}`);
      }
      if (!width) return;
      pen.clearRect(0, 0, width, picture.height(width, data));
      panels = picture.draw(pen, colours, width, picture.height(width, data), state, data);
    }

    function resize() {
      const ratio = window.devicePixelRatio || 1;
      width = box.clientWidth;
      if (!width) return;
      const height = picture.height(width, data);
      Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
      Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.font = `${isNarrow(width) ? 12 : 13}px ${getComputedStyle(box).fontFamily}`;
      show();
    }

    // Play moves a slider to its end; one picture a second where less motion is wished.
    function play(on) {
      const control = controls.find(({ key }) => key === picture.play);
      if (!control) return;
      playing = on ? {} : null;
      control.button.textContent = on ? "Pause" : "Play";
      if (!on) return;
      if (shown[control.key] >= control.max) set({ [control.key]: control.min });
      const mine = playing, from = shown[control.key], began = performance.now();
      const speed = still.matches ? control.step : (control.max - control.min) / control.seconds;
      requestAnimationFrame(function advance(now) {
        if (playing !== mine) return;
        const value = Math.min(control.max, from + Math.floor(Math.max(0, now - began) / 1000 * speed / control.step) * control.step);
        if (value !== shown[control.key]) set({ [control.key]: value });
        if (value >= control.max) play(false);
        else requestAnimationFrame(advance);
      });
    }

    function drag(event, start) {
      const place = canvas.getBoundingClientRect(), x = event.clientX - place.left, y = event.clientY - place.top;
      play(false);
      set(picture.grab(panels, x, y, state, start, width, data));
    }

    if (picture.grab) {
      canvas.classList.add("held");
      let tap = null; // a finger that is down and may still scroll
      canvas.addEventListener("pointerdown", event => {
        canvas.setPointerCapture(event.pointerId);
        if (event.pointerType === "touch") tap = event;
        else drag(event, true);
      });
      canvas.addEventListener("pointermove", event => {
        if (!event.buttons) return;
        if (tap && Math.abs(event.clientY - tap.clientY) > Math.abs(event.clientX - tap.clientX)) return;
        if (tap) drag(tap, true);
        tap = null;
        drag(event, false);
      });
      canvas.addEventListener("pointerup", () => {
        if (tap) drag(tap, true);
        tap = null;
      });
      canvas.addEventListener("pointercancel", () => { tap = null; });
    }
    new ResizeObserver(() => { if (box.clientWidth !== width) resize(); }).observe(box);
    new MutationObserver(() => { colours = readColours(box); show(); })
      .observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    resize();
    document.fonts.ready.then(resize); // letters again, in the face of the page
  }

  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("div.touch").forEach(build));
})();
