"use strict";
/* What moves on the page: the slider over w, enlarged images, values under the pointer, and buttons that save or copy.
   All that it shows is in the page already. */
{
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  const save = (blob, name) => {
    const address = URL.createObjectURL(blob);
    make("a", {href: address, download: name}).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  };

  /* Samples. A picture is a grid of images with a gap between them; it may be smaller than it says. */
  const drawer = (picture, [, height, width], columns, gap) => (canvas, i) => {
    const scale = picture.naturalWidth / (columns * (width + gap) - gap);
    canvas.width = Math.max(Math.round(width * scale), 1);
    canvas.height = Math.max(Math.round(height * scale), 1);
    const left = (i % columns) * (width + gap) * scale, top = Math.floor(i / columns) * (height + gap) * scale;
    canvas.getContext("2d").drawImage(
      picture, left, top, width * scale, height * scale, 0, 0, canvas.width, canvas.height);
  };

  const samples = () => {
    const data = JSON.parse(one("#data").textContent), count = data.size[0], slider = one("#w"), flip = one("#flip");
    const drawers = all("#grids figure[data-w] img").map(img => drawer(img, data.size, data.columns, data.gap));
    const canvas = () => make(
      "canvas", {className: data.fine ? "" : "pixels", height: data.size[1], width: data.size[2]});
    const near = data.neighbours
      && drawer(one("#neighbours"), data.neighbours.size, data.neighbours.columns, data.gap);
    const cells = all("#cells canvas"), caption = i => cells[i].parentElement.title;
    cells.forEach((cell, i) => { cell.parentElement.onclick = () => open(i); });

    let flipped = false, enlarged = 0;
    const at = () => Number(slider.value);
    const other = () => at() === data.base ? data.other : data.base;
    const show = () => {
      const w = flipped ? other() : at();
      if (document.readyState === "complete") cells.forEach((cell, i) => drawers[w](cell, i));
      one("#title").textContent = data.names[w];
      if (one("#score")) one("#score").textContent = data.scores[w];
      one("#cells").dataset.shown = w;
      slider.setAttribute("aria-valuetext", data.names[at()]);
      flip.textContent = `Hold: ${data.names[other()]}`;
      flip.setAttribute("aria-pressed", flipped);
      if (one("#enlarged").open) fill();
    };
    const hold = is => () => { if (flipped !== is) { flipped = is; show(); } };
    flip.addEventListener("pointerdown", hold(true));
    for (const end of ["pointerup", "pointercancel", "pointerleave", "blur"]) flip.addEventListener(end, hold(false));
    flip.addEventListener("keydown", event => { if (" Enter".includes(event.key)) hold(true)(); });
    flip.addEventListener("keyup", hold(false));
    slider.addEventListener("input", show);

    const dialog = one("#enlarged");
    const fill = () => {
      one("#which").textContent = `${caption(enlarged)}: ${data.names[at()]}`;
      one("#large").className = data.fine ? "" : "pixels";
      one("#large").setAttribute("aria-label", one("#which").textContent);
      drawers[at()](one("#large"), enlarged);
      one("#every").replaceChildren(...drawers.map((draw, w) => {
        const small = canvas(), choose = make("button", {type: "button", onclick: () => { slider.value = w; show(); }});
        draw(small, enlarged);
        choose.append(small, data.names[w]);
        choose.classList.toggle("on", w === at());
        return choose;
      }));
      const nearest = data.nearest[at()];
      one("#beside").hidden = !Object.keys(data.nearest).length;
      one("#nearest").replaceChildren(...(nearest ? nearest[enlarged].map((place, n) => {
        const small = canvas();
        near(small, place);
        return make("div", {}, small, `${n + 1}.`);
      }) : [`Of ${Object.keys(data.nearest).map(w => data.names[w]).join(" and ")} only.`]));
    };
    const move = step => () => { enlarged = (enlarged + step + count) % count; fill(); };
    const open = i => { enlarged = i; fill(); dialog.showModal(); };
    one("#before").onclick = move(-1);
    one("#after").onclick = move(1);
    one("#close").onclick = () => dialog.close();
    dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("keydown", event => {
      if (event.key === "ArrowLeft") move(-1)();
      if (event.key === "ArrowRight") move(1)();
    });
    show();
    addEventListener("load", show);  /* before, pictures may not be decoded */
  };

  /* Plots: the value nearest to the pointer, and the plot as a file. */
  const REACH = 22;
  const plot = figure => {
    const svg = one("svg", figure), tip = make("div", {className: "tip", hidden: true});
    const marks = all(".mark", svg).map(mark => {
      const title = one("title", mark), text = title.textContent;
      title.remove();  /* it would be shown, too */
      return {mark, text, x: mark.cx.baseVal.value, y: mark.cy.baseVal.value};
    });
    const file = alone(svg), name = figure.dataset.name;
    figure.append(tip);
    const hide = () => {
      tip.hidden = true;
      marks.forEach(({mark}) => mark.classList.remove("on"));
    };
    const point = event => {
      hide();
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const away = ({x, y}) => Math.hypot(x - at.x, y - at.y);
      const nearest = marks.reduce((best, each) => !best || away(each) < away(best) ? each : best, null);
      if (!nearest || away(nearest) > REACH) return;
      nearest.mark.classList.add("on");
      tip.textContent = nearest.text;
      tip.hidden = false;
      const box = svg.getBoundingClientRect(), {width, height} = svg.viewBox.baseVal;
      const left = nearest.x / width * box.width, top = nearest.y / height * box.height;
      tip.style.left = `${Math.max(0, Math.min(left - tip.offsetWidth / 2, box.width - tip.offsetWidth))}px`;
      tip.style.top = `${top > tip.offsetHeight + 14 ? top - tip.offsetHeight - 12 : top + 14}px`;
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", hide);
    const [asSvg, asPng] = all("button", figure);
    asSvg.onclick = () => save(new Blob([file], {type: "image/svg+xml"}), `${name}.svg`);
    asPng.onclick = () => png(file, svg, name);
  };

  /* The plot as a file of its own: in the colours of a light page, and without what shows values. */
  const alone = svg => {
    const copy = svg.cloneNode(true), {width, height} = svg.viewBox.baseVal;
    all(".mark", copy).forEach(mark => mark.remove());
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    const ground = document.createElementNS(svg.namespaceURI, "rect");
    for (const [name, value] of [["width", "100%"], ["height", "100%"], ["fill", "white"]])
      ground.setAttribute(name, value);
    copy.prepend(ground);
    const light = Object.fromEntries([...document.styleSheets[0].cssRules[0].style]
      .map(name => [name, document.styleSheets[0].cssRules[0].style.getPropertyValue(name)]));
    return new XMLSerializer().serializeToString(copy).replace(/var\((--\w+)\)/g, (_, name) => light[name]);
  };

  const png = (file, svg, name) => {
    const picture = new Image(), {width, height} = svg.viewBox.baseVal, scale = 4;
    picture.onload = () => {
      const canvas = make("canvas", {width: width * scale, height: height * scale});
      canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
      canvas.toBlob(blob => save(blob, `${name}.png`));
    };
    picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(file)}`;
  };

  const copyable = command => {
    const text = one("pre", command), copy = one("button", command);
    copy.onclick = async () => {
      getSelection().selectAllChildren(text);  /* to be copied by hand where a page may not */
      if (!navigator.clipboard) return;
      await navigator.clipboard.writeText(text.textContent);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    };
  };

  if (one("#data")) samples();
  all(".plot").forEach(plot);
  all(".command").forEach(copyable);
}
