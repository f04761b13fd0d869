for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points), {left, right, last, epoch} = svg.dataset;
  const output = svg.closest("figure").querySelector("output"), cross = svg.querySelector(".cross");
  const hide = () => { output.textContent = ""; cross.style.visibility = "hidden"; };
  svg.addEventListener("pointermove", event => {
    if (!points.length) return;
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = (x - left) / (right - left) * last;
    let best = points[0];
    for (const point of points) if (Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
    cross.setAttribute("transform", `translate(${+left + best[0] / last * (right - left)} 0)`);
    cross.style.visibility = "visible";
    const epochs = +epoch ? ` (epoch ${+(best[0] / epoch).toPrecision(3)})` : "";
    output.textContent = `step ${best[0].toLocaleString("en")}${epochs}: ${best[1]}`;
  });
  svg.addEventListener("pointerleave", hide);
}
