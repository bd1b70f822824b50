"use strict";
// Theme: as the system has it, until asked otherwise.
const root = document.documentElement, button = document.querySelector("#theme");
const remember = (value) => { try { localStorage.setItem("maxpretrain-theme", value); } catch { /* file:// may have no storage */ } };
try { root.dataset.theme = localStorage.getItem("maxpretrain-theme") || ""; } catch { /* the same */ }
const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; remember(root.dataset.theme); label(); });
button.hidden = false;
label();

// Values under the pointer.
const make = (svg, name) => { const e = document.createElementNS(svg.namespaceURI, name); e.style.display = "none"; svg.append(e); return e; };
for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.dataset.reader), svg = plot.querySelector("svg"), [x0, y0, x1, y1] = data.box;
  const tip = document.createElement("div");
  tip.className = "tip"; tip.hidden = true; plot.append(tip);
  const cross = make(svg, "line"), dots = data.series.map((s) => {
    const dot = make(svg, "circle");
    dot.setAttribute("r", 3.5); dot.style.fill = `var(--${s.color})`;
    return dot;
  });
  cross.setAttribute("class", "cross"); cross.setAttribute("y1", y0); cross.setAttribute("y2", y1);
  const px = (v) => x0 + (v - data.x[0]) / (data.x[1] - data.x[0]) * (x1 - x0);
  const py = (v) => y1 - (v - data.y[0]) / (data.y[1] - data.y[0]) * (y1 - y0);
  const hide = () => { tip.hidden = true; cross.style.display = "none"; dots.forEach((d) => { d.style.display = "none"; }); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
    const at = (event.clientX - frame.left) / scale, step = data.x[0] + (at - x0) / (x1 - x0) * (data.x[1] - data.x[0]);
    if (at < x0 - 4 || at > x1 + 8 || !data.series.length) return hide();
    const nearest = data.series.map((s) => s.x.reduce((best, v, i) => Math.abs(v - step) < Math.abs(s.x[best] - step) ? i : best, 0));
    const lead = data.series.reduce((best, s, k) => s.x.length > data.series[best].x.length ? k : best, 0);
    const here = data.series[lead].x[nearest[lead]];
    tip.replaceChildren(document.createTextNode(`step ${here.toLocaleString("en")}`));
    cross.setAttribute("x1", px(here)); cross.setAttribute("x2", px(here)); cross.style.display = "";
    data.series.forEach((s, k) => {
      const x = s.x[nearest[k]], y = s.y[nearest[k]], row = document.createElement("div"), key = document.createElement("span");
      key.className = "swatch"; key.style.setProperty("--key", `var(--${s.color})`);
      row.append(key, `${s.label}${x === here ? "" : ` (step ${x.toLocaleString("en")})`} ${y.toLocaleString("en", { maximumSignificantDigits: 4 })}`);
      tip.append(row);
      dots[k].setAttribute("cx", px(x)); dots[k].setAttribute("cy", Math.max(y0, Math.min(y1, py(y)))); dots[k].style.display = "";
    });
    tip.hidden = false;
    const left = px(here) * scale;
    tip.style.left = left > frame.width / 2 ? `${left - tip.offsetWidth - 12}px` : `${left + 12}px`;
  });
}
