// The explorer: what a method keeps of a picture at each generated token, and what the model then says.
// A trace, one laboratory's answers to one scene, is a script that calls `explorer.add` (analysis/study/explorer/stored.py says
// what it holds). It is loaded when a reader asks for it, which works from a folder too, where a page may fetch nothing.
"use strict";
const explorer = (() => {
  const SIDE = 12; // image tokens in a row of the picture, and rows
  const HEIGHT = 150; // of a chart, in pixels
  const SEGMENTS = ["system", "image", "instruction", "response"];
  const SLOTS = { thing: "object", colour: "colour", count: "count", place: "place" };
  const COUNTS = ["one", "two", "three"];
  const traces = new Map(), plots = [];
  let box, form, trace, answer;

  const add = (one) => traces.set(`${one.laboratory}/${one.scene}`, one);
  const part = (name) => box.querySelector(`[data-part="${name}"]`);
  const step = () => Number(form.step.value);

  // -- a trace ---------------------------------------------------------------------------------------------------------

  function load(name) {
    if (traces.has(name)) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${box.dataset.traces}/${name}.js`;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`The trace ${name} could not be loaded.`));
      document.head.append(script);
    });
  }

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const mask = (text) => [...bytes(text)].flatMap((byte) => [7, 6, 5, 4, 3, 2, 1, 0].map((bit) => (byte >> bit) & 1));
  const count = (patches) => patches.reduce((sum, patch) => sum + patch, 0);

  // What is kept at each step: the same array while nothing changes.
  function keptAt({ pieces, kept }) {
    const changes = new Map(kept.map(([from, bits]) => [from, mask(bits)]));
    let now;
    return pieces.map((_, i) => (now = changes.get(i) ?? now));
  }

  function sharesOf({ pieces, shares }) {
    const values = bytes(shares);
    return SEGMENTS.map((_, j) => pieces.map((_, i) => values[SEGMENTS.length * i + j] / 255));
  }

  // The slot that each token fills, if any.
  function markedTokens({ pieces, marks }) {
    const found = pieces.map(() => null);
    for (const [first, behind, slot, group, right] of marks)
      found.fill({ slot: Object.keys(SLOTS)[slot], group: trace.groups[group], right }, first, behind);
    return found;
  }

  const slotsRight = ({ marks }) => count(marks.map((mark) => mark[4]));
  const slotsShown = () => Object.keys(SLOTS).length * trace.groups.length;

  // -- what is chosen --------------------------------------------------------------------------------------------------

  async function choose() {
    const name = `${form.laboratory.value}/${form.scene.value}`;
    try {
      await load(name);
    } catch (error) {
      part("said").textContent = error.message;
      return;
    }
    if (name !== `${form.laboratory.value}/${form.scene.value}`) return; // meanwhile the reader chose another
    trace = traces.get(name);
    offer();
    answer = { ...trace.answers[form.condition.value], label: form.condition.value };
    answer.keptAt = keptAt(answer);
    answer.slots = markedTokens(answer);
    form.step.max = answer.pieces.length - 1;
    part("picture").setAttribute("aria-label", trace.groups.map((group) => `${group.text}, ${group.place}`).join("; "));
    write("unpruned", trace.answers.Full);
    write("pruned", answer);
    part("method").textContent = answer.label;
    plot();
    show();
  }

  // In each cell of the table how this laboratory describes this scene; what was not measured cannot be chosen.
  function offer() {
    for (const radio of form.condition) {
      const there = trace.answers[radio.value];
      const cell = radio.closest("td"), share = there ? slotsRight(there) / slotsShown() : 0;
      radio.disabled = !there;
      cell.style.setProperty("--share", share);
      cell.querySelector("span").textContent = there ? share.toFixed(2) : "–";
    }
    for (const row of box.querySelectorAll("tbody tr")) row.hidden = !row.querySelector("input:enabled");
    if (form.querySelector("[name=condition]:checked").disabled) form.querySelector("[name=condition]:enabled").checked = true;
  }

  // Up and down move between rows of the table; left and right, as the browser has it, through all of it.
  function move(event) {
    const rows = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!rows || event.target.name !== "condition") return;
    event.preventDefault();
    const cell = event.target.closest("td"), lines = [...box.querySelectorAll("tbody tr:not([hidden])")];
    const line = lines[(lines.indexOf(cell.parentNode) + rows + lines.length) % lines.length];
    const next = (line.cells[cell.cellIndex] ?? line.cells[1]).querySelector("input");
    next.focus();
    next.click();
  }

  // -- what is shown ---------------------------------------------------------------------------------------------------

  function write(name, one) {
    const line = part(name), slots = markedTokens(one);
    line.replaceChildren();
    one.pieces.forEach((piece, i) => {
      const word = document.createElement(slots[i] ? "mark" : "span");
      word.textContent = piece.trim();
      word.dataset.step = i;
      if (slots[i]) word.className = slots[i].right ? "right" : "wrong";
      line.append(piece.match(/^\s*/)[0], word);
    });
    part(`${name}-right`).textContent = `${slotsRight(one)} of ${slotsShown()} slots right`;
  }

  function show() {
    const t = step(), kept = answer.keptAt[t], slot = answer.slots[t], n = SIDE * SIDE;
    draw(kept, slot?.group);
    let said = `Token ${t + 1} of ${answer.pieces.length}, “${answer.pieces[t].trim()}”: ${count(kept)} of ${n} image tokens kept`;
    if (slot?.group) {
      const shown = mask(slot.group.patches);
      said += `, ${count(shown.map((patch, i) => patch & kept[i]))} of the ${count(shown)} that show ${slot.group.text} (outlined)`;
    }
    said += ".";
    if (slot) said += ` ${verdict(slot)}`;
    part("said").textContent = said;
    for (const word of part("pruned").children) word.classList.toggle("now", Number(word.dataset.step) === t);
    plots.forEach(point);
  }

  function verdict({ slot, group, right }) {
    const name = SLOTS[slot][0].toUpperCase() + SLOTS[slot].slice(1);
    if (right) return `${name} right.`;
    if (!group) return `${name} wrong: every group of the picture was named before.`;
    return `${name} wrong: the picture shows ${slot === "count" ? COUNTS[group.count - 1] : group[slot]}.`;
  }

  // Dropped patches fade into the page; the patches of what the token is about are outlined.
  function draw(kept, group) {
    const canvas = part("picture"), pen = canvas.getContext("2d"), size = canvas.width / SIDE;
    const image = form.querySelector("[name=scene]:checked + img");
    if (!image.complete) return image.addEventListener("load", show, { once: true });
    pen.globalAlpha = 1;
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    pen.globalAlpha = 0.8;
    pen.fillStyle = ink("--paper");
    kept.forEach((there, i) => there || pen.fillRect((i % SIDE) * size, Math.floor(i / SIDE) * size, size, size));
    canvas.dataset.kept = count(kept);
    if (group) outline(pen, mask(group.patches), size);
  }

  function outline(pen, patches, size) {
    const inside = (row, column) => row >= 0 && row < SIDE && column >= 0 && column < SIDE && patches[row * SIDE + column];
    const line = new Path2D();
    for (let row = 0; row < SIDE; row++)
      for (let column = 0; column < SIDE; column++) {
        if (!inside(row, column)) continue;
        const [top, left, bottom, right] = [row, column, row + 1, column + 1].map((edge) => edge * size);
        const edges = [[row - 1, column, left, top, right, top], [row + 1, column, left, bottom, right, bottom],
          [row, column - 1, left, top, left, bottom], [row, column + 1, right, top, right, bottom]];
        for (const [r, c, x0, y0, x1, y1] of edges) if (!inside(r, c)) (line.moveTo(x0, y0), line.lineTo(x1, y1));
      }
    pen.globalAlpha = 1;
    for (const [width, colour] of [[6, "black"], [3, "#F0E442"]]) {
      [pen.lineWidth, pen.strokeStyle, pen.lineCap] = [width, colour, "round"];
      pen.stroke(line);
    }
  }

  // -- the charts, by uPlot --------------------------------------------------------------------------------------------

  const ink = (name) => getComputedStyle(box).getPropertyValue(name).trim();

  function plot() {
    plots.splice(0).forEach((u) => u.destroy());
    const full = trace.answers.Full, steps = Math.max(answer.pieces.length, full.pieces.length);
    const lines = sharesOf(answer).map((values, i) => ({ label: SEGMENTS[i], values, colour: ink(`--${SEGMENTS[i]}`) }));
    lines.push({ label: "image, unpruned", values: sharesOf(full)[1], colour: ink("--image"), dash: [3, 4] });
    const ratios = answer.keptAt.map((kept) => count(kept) / SIDE ** 2);
    plots.push(chart(part("retention"), "retention ratio", steps, [{ values: ratios, colour: ink("--kept") }]));
    plots.push(chart(part("shares"), "share of attention", steps, lines));
  }

  function chart(host, label, steps, lines) {
    const font = "12px sans-serif", rule = { stroke: ink("--rule"), width: 1 };
    const axis = { stroke: ink("--ink"), grid: rule, ticks: rule, font, labelFont: font, labelSize: 18 };
    const value = (_, number) => (number == null ? "–" : number.toFixed(2));
    const style = { width: 2, points: { show: false }, value };
    const series = lines.map((line) => ({ ...style, label: line.label, stroke: line.colour, dash: line.dash }));
    const options = {
      width: host.clientWidth, height: HEIGHT, padding: [8, 8, 0, 0],
      scales: { x: { time: false }, y: { range: [0, 1] } },
      axes: [{ ...axis, label: "token", size: 26 }, { ...axis, label, size: 36 }],
      series: [{}, ...series],
      legend: { show: lines.length > 1 },
      hooks: { ready: [point], setSize: [point] },
      cursor: { y: false, drag: { x: false, y: false }, bind: { mousemove: () => null, mouseleave: () => null } },
    };
    const columns = lines.map(({ values }) => [...values, ...Array(steps - values.length).fill(null)]);
    const u = new uPlot(options, [columns[0].map((_, i) => i + 1), ...columns], host);
    const go = (event) => event.buttons && to(u.posToIdx(event.clientX - u.over.getBoundingClientRect().left));
    u.over.addEventListener("pointerdown", go);
    u.over.addEventListener("pointermove", go);
    return u;
  }

  function fit() {
    for (const u of plots) u.setSize({ width: u.root.parentNode.clientWidth, height: HEIGHT });
  }

  // The cursor stands at the step; a new or resized chart has a place for it only once it is drawn.
  function point(u) {
    u.setCursor({ left: u.valToPos(step() + 1, "x"), top: 0 });
  }

  function to(t) {
    form.step.value = t;
    show();
  }

  // -- start -----------------------------------------------------------------------------------------------------------

  function start() {
    box = document.querySelector(".explorer");
    form = box.querySelector("form");
    box.hidden = false;
    form.addEventListener("change", (event) => event.target.name !== "step" && choose());
    form.addEventListener("keydown", move);
    form.step.addEventListener("input", show);
    part("pruned").addEventListener("click", ({ target }) => target.dataset.step && to(target.dataset.step));
    new ResizeObserver(fit).observe(box);
    new MutationObserver(() => trace && (plot(), show())).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    choose();
  }

  document.addEventListener("DOMContentLoaded", start);
  return { add };
})();
