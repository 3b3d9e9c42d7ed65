(async () => {
  const packed = document.getElementById("plans").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = await new Response(stream).json();
  const place = (id) => document.getElementById("whatif-" + id);
  const number = (value) => value === 0 ? "0" : value >= 100
    ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(3)));

  // Where the sliders stand: as the page's address says, else as the plan was asked for
  const asked = new URLSearchParams(location.hash.slice(1));
  const away = (a, b) => Math.abs(Math.log((a + 1e-9) / (b + 1e-9)));
  const nearest = (values, text) => {
    const wanted = text === "none" ? null : Number(text);
    if (wanted === null || !(wanted >= 0)) return values.indexOf(null);
    return values.reduce((best, value, i) => value !== null &&
      (best < 0 || away(value, wanted) < away(values[best], wanted)) ? i : best, -1);
  };
  for (const slider of data.sliders) {
    const input = place(slider.key);
    const found = asked.has(slider.key) ? nearest(slider.values, asked.get(slider.key)) : -1;
    input.max = slider.values.length - 1;
    input.value = found < 0 ? slider.start : found;
    input.addEventListener("input", () => { show(); address(); });
  }
  const stop = (slider) => Number(place(slider.key).value);
  const address = () => history.replaceState(null, "", "#" + data.sliders.map((slider) =>
    slider.key + "=" + (slider.values[stop(slider)] ?? "none")).join("&"));

  const make = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const ticks = (low, high) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const times of [1, 2, 5]) {
        const value = times * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    return found.filter((_, i) => i % Math.ceil(found.length / 6) === 0);
  };
  // Curves over logarithmic axes: [{name, points: [[x, y], ...], strong, colour}]
  const draw = (svg, curves, across, up, caption) => {
    svg.replaceChildren(make("title", {}, caption));
    const all = curves.flatMap((curve) => curve.points).filter(([x, y]) => x > 0 && y > 0);
    svg.closest("figure").hidden = all.length === 0;
    if (all.length === 0) return;
    const [left, right, top, bottom] = [56, 470, 10, 270];
    const span = (i) => {
      const of = all.map((point) => point[i]);
      const [low, high] = [Math.min(...of), Math.max(...of)];
      return low < high ? [low, high] : [low / 2, high * 2];
    };
    const [xs, ys] = [span(0), span(1)];
    const at = (value, [low, high], from, to) =>
      from + (to - from) * Math.log(value / low) / Math.log(high / low);
    for (const value of ticks(...xs)) {
      const x = at(value, xs, left, right);
      svg.append(make("line", { x1: x, x2: x, y1: top, y2: bottom, class: "grid" }),
        make("text", { x, y: bottom + 16, "text-anchor": "middle" }, number(value)));
    }
    for (const value of ticks(...ys)) {
      const y = at(value, ys, bottom, top);
      svg.append(make("line", { x1: left, x2: right, y1: y, y2: y, class: "grid" }),
        make("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, number(value)));
    }
    svg.append(make("text", { x: (left + right) / 2, y: bottom + 34, "text-anchor": "middle" },
      across), make("text", { x: 12, y: (top + bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 12 ${(top + bottom) / 2})` }, up));
    curves.forEach((curve, i) => {
      const path = curve.points.filter(([x, y]) => x > 0 && y > 0).map(([x, y]) =>
        at(x, xs, left, right).toFixed(1) + "," + at(y, ys, bottom, top).toFixed(1)).join(" ");
      const [column, row] = [i % 3, Math.floor(i / 3)];
      const dash = ["none", "6 3", "2 3"][Math.floor(curve.number / 6) % 3];
      const look = { stroke: curve.colour, "stroke-width": curve.strong ? 3.5 : 1.5,
        "stroke-dasharray": dash, fill: "none" };
      const [x, y] = [left + column * 140, bottom + 58 + row * 18];
      svg.append(make("polyline", { points: path, ...look }),
        make("line", { x1: x, x2: x + 22, y1: y - 4, y2: y - 4, ...look }),
        make("text", { x: x + 28, y, "font-weight": curve.strong ? 700 : 400 }, curve.name));
    });
    svg.setAttribute("viewBox", `0 0 480 ${bottom + 66 + 18 * Math.floor(curves.length / 3)}`);
  };

  const show = () => {
    let entry = 0;
    for (const slider of data.sliders) {
      entry = entry * slider.values.length + stop(slider);
      const label = slider.labels[stop(slider)];
      place(slider.key + "-is").textContent = label;
      place(slider.key).setAttribute("aria-valuetext", label);
    }
    const [chosen, reason, split, which, frontier] = data.plans[entry];
    const rows = data.rows[which], domains = data.sliders[1].values[stop(data.sliders[1])];
    place("recommended").textContent = data.methods[chosen];
    place("reason").textContent = data.texts[reason];
    const feasible = rows.map((row, i) => [row, i]).filter(([row]) => row[0]);
    const curve = (i) => ({ name: data.methods[i], number: i, colour: data.colours[i],
      strong: i === chosen });
    const most = Math.max(100, 2 * domains);
    const some = Array.from({ length: 41 }, (_, i) => most ** (i / 40));
    draw(place("cost"), feasible.map(([[, , before, each], i]) => ({ ...curve(i),
      points: some.map((n) => [n, before + n * each]) })), "domains", "device-hours",
    "device-hours over the number of domains");
    const lines = data.frontiers[frontier];
    draw(place("frontier"), lines.map(([name, points]) => ({
      ...curve(data.methods.indexOf(name)), points })), "device-hours for all domains",
    "expected perplexity", "expected perplexity over the total cost");
    place("unknown").hidden = lines.length > 0;
    place("rows").replaceChildren(...rows.map(([can, why, before, each, perplexity], i) => {
      const line = document.createElement("tr");
      line.title = data.texts[why];
      if (i === chosen) line.className = "best";
      const cells = [data.methods[i], can ? "yes" : "no", number(before), number(each),
        number(before + domains * each), perplexity === null ? "unknown" : number(perplexity)];
      cells.forEach((text, j) => {
        const cell = document.createElement("td");
        cell.textContent = text;
        if (j === 0) cell.className = "text";
        line.append(cell);
      });
      return line;
    }));
  };
  show();
  addEventListener("hashchange", () => location.reload());
  document.getElementById("whatif").hidden = false;
})();
