"use strict";
// Shows the cases of this page with NiiVue. Names of files only ever become text, never HTML.
(() => {
const at = (id) => document.getElementById(id);
const organs = JSON.parse(at("organ-data").textContent); // {name, colour}, of the classes 1…N
const parts = [...document.querySelectorAll("script.case")];
const { names, left_out: leftOut } = JSON.parse(at("index").textContent);
const PLANES = ["axial", "coronal", "sagittal", "all planes", "3-D"]; // NiiVue's slice types 0…4
const SIDES = ["RL", "AP", "SI"]; // of the patient, along NiiVue's axes: right, front, head
const TOO_MUCH = 1, MISSED = 2, OTHER = 3;
const ERRORS = [[TOO_MUCH, "predicted, not in truth", [255, 80, 60]],
  [MISSED, "in truth, not predicted", [70, 150, 255]], [OTHER, "another organ", [255, 220, 40]]];
const state = { index: 0, plane: 0, mode: 0, on: organs.map(() => true), lit: true };
let current = null; // the case with its voxels
let shown = []; // NiiVue's instances: one, or two side by side
let loading = 0;

function element(tag, content, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (content !== undefined) made.textContent = content;
  return made;
}

function trouble(text) {
  at("trouble").hidden = !text;
  at("trouble").textContent = text || "";
}

async function unpacked(text) { // gzip in base64 -> Uint8Array
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// ---- volumes ----

function nifti(shape, affine, voxels, code, slope = 1, inter = 0) {
  const buffer = new ArrayBuffer(352 + voxels.byteLength), header = new DataView(buffer);
  const length = (axis) => Math.hypot(affine[0][axis], affine[1][axis], affine[2][axis]);
  header.setInt32(0, 348, true);
  [3, ...shape, 1, 1, 1, 1].forEach((size, i) => header.setInt16(40 + 2 * i, size, true));
  header.setInt16(70, code, true);
  header.setInt16(72, { 2: 8, 4: 16, 128: 24 }[code], true);
  [1, length(0), length(1), length(2)].forEach((size, i) => header.setFloat32(76 + 4 * i, size, true));
  header.setFloat32(108, 352, true);
  header.setFloat32(112, slope, true);
  header.setFloat32(116, inter, true);
  header.setUint8(123, 2); // mm
  header.setInt16(254, 1, true); // the matrix below holds
  affine.flat().forEach((value, i) => header.setFloat32(280 + 4 * i, value, true));
  [..."n+1\0"].forEach((letter, i) => header.setUint8(344 + i, letter.charCodeAt(0)));
  new Uint8Array(buffer, 352).set(new Uint8Array(voxels.buffer, voxels.byteOffset, voxels.byteLength));
  return buffer;
}

function imageFile(found) {
  const { levels, shape, affine, grey } = found;
  if (levels.colour) return nifti(shape, affine, grey, 128);
  if (levels.table) return nifti(shape, affine, Int16Array.from(grey, (code) => levels.table[code]), 4);
  return nifti(shape, affine, grey, 2, levels.step, levels.low);
}

function inside(labels, truth) { // labels with the organs that are switched on; else 0
  const found = new Uint8Array(256);
  if (state.lit) state.on.forEach((on, i) => { found[i + 1] = on ? i + 1 : 0; });
  return labels.map((value) => found[value]);
}

function outline(labels) { // labels without the voxels whose neighbours in the plane are equal
  const [w, h, d] = current.shape, strides = [1, w, w * h], sizes = [w, h, d];
  const normal = state.plane < 3 ? axisOf(state.plane) : -1;
  const axes = [0, 1, 2].filter((axis) => axis !== normal && sizes[axis] > 1);
  const result = new Uint8Array(labels.length);
  for (let i = 0; i < labels.length; i++) {
    const value = labels[i];
    if (!value) continue;
    const place = [i % w, Math.floor(i / w) % h, Math.floor(i / (w * h))];
    for (const axis of axes) {
      const before = place[axis] > 0 ? labels[i - strides[axis]] : 0;
      const after = place[axis] + 1 < sizes[axis] ? labels[i + strides[axis]] : 0;
      if (before !== value || after !== value) { result[i] = value; break; }
    }
  }
  return result;
}

function errors(labels, truth) {
  const result = new Uint8Array(labels.length);
  for (let i = 0; i < labels.length; i++) {
    if (labels[i] !== truth[i]) result[i] = !truth[i] ? TOO_MUCH : !labels[i] ? MISSED : OTHER;
  }
  return result;
}

// How labels are shown: a list of [filled, outlined, caption] for each canvas; errors: true.
const MODES = {
  false: [
    { name: "filled", draw: (labels) => [[labels, null, ""]] },
    { name: "outlines", draw: (labels) => [[null, labels, ""]] },
  ],
  true: [
    { name: "prediction + outline of truth", draw: (p, t) => [[p, t, "filled: prediction; lines: truth"]] },
    { name: "side by side", draw: (p, t) => [[t, null, "truth"], [p, null, "prediction"]] },
    { name: "errors", errors: true, draw: (p, t) => [[errors(p, t), null, "errors of the prediction"]] },
    { name: "prediction", draw: (p) => [[p, null, "prediction"]] },
    { name: "truth", draw: (p, t) => [[t, null, "truth"]] },
  ],
};
const mode = () => MODES[Boolean(current.truthVoxels)][state.mode];

// ---- places: index of an axis of the arrays <-> NiiVue's fraction along right, front, head ----

const axisOf = (plane) => { // of the arrays, across a plane
  const letters = SIDES[{ 0: 2, 1: 1, 2: 0 }[plane]];
  return [...current.letters].findIndex((letter) => letters.includes(letter));
};
const directionOf = (axis) => SIDES.findIndex((pair) => pair.includes(current.letters[axis]));
const falls = (axis) => "LPI".includes(current.letters[axis]); // NiiVue's grow to right, front, head

function voxel() { // indices of the shown voxel under the crosshair, x y z of the arrays
  const place = shown[0].scene.crosshairPos;
  return current.shape.map((size, axis) => {
    const part = place[directionOf(axis)];
    const index = Math.min(size - 1, Math.max(0, Math.floor(part * size)));
    return falls(axis) ? size - 1 - index : index;
  });
}

function goTo(indices) { // null: leave this axis as it is
  const place = [...shown[0].scene.crosshairPos];
  indices.forEach((index, axis) => {
    if (index === null) return;
    const size = current.shape[axis], bounded = Math.min(size - 1, Math.max(0, index));
    place[directionOf(axis)] = ((falls(axis) ? size - 1 - bounded : bounded) + 0.5) / size;
  });
  moveAll(place);
}

function moveAll(place) {
  for (const nv of shown) {
    nv.scene.crosshairPos = Float32Array.from(place);
    nv.drawScene();
  }
  tell();
}

// ---- what is drawn ----

const NOTHING = [0, 0, 0], table = (rows) => ({ R: rows.map((c) => c[0]), G: rows.map((c) => c[1]),
  B: rows.map((c) => c[2]), A: rows.map((_, i) => (i ? 255 : 0)), I: rows.map((_, i) => i) });

function instance(canvas) {
  const nv = new globalThis.Niivue({
    isRadiologicalConvention: true, isNearestInterpolation: true, backColor: [0, 0, 0, 1],
    crosshairColor: [0.3, 0.9, 0.4, 0.6], crosshairWidth: 0.25, crosshairWidthUnit: "percent",
    crosshairGap: 8, showAllOrientationMarkers: true, show3Dcrosshair: false, dragMode: 3,
    dragAndDropEnabled: false, viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
    isCornerOrientationText: false, fontColor: [1, 1, 1, 1], multiplanarShowRender: 0, loadingText: "",
    logLevel: "error",
  });
  nv.attachToCanvas(canvas);
  // NiiVue adds the margin around a slice a second time, so that letters would stand inside or beyond it.
  const letters = nv.drawSliceOrientationText.bind(nv);
  nv.drawSliceOrientationText = (place, plane) => letters(place, plane);
  nv.keyDownListener = nv.keyUpListener = () => {};
  nv.onLocationChange = () => {
    if (current && !loading && shown.includes(nv)) moveAll([...nv.scene.crosshairPos]);
  };
  return nv;
}

async function fill(nv) {
  while (nv.volumes.length) nv.removeVolume(nv.volumes[nv.volumes.length - 1]);
  await nv.loadFromArrayBuffer(imageFile(current), "image.nii");
  const { shape, affine, labels } = current;
  for (const name of ["filled.nii", "lines.nii"]) {
    await nv.loadFromArrayBuffer(nifti(shape, affine, labels, 2), name);
  }
  nv.setIsOrientationTextVisible(current.known);
}

async function arrange() { // one canvas or two, as the mode has it
  const count = mode().draw(current.labels, current.truthVoxels || current.labels).length;
  at("right-figure").hidden = count < 2;
  if (count < shown.length) shown.pop();
  if (count > shown.length) {
    arrange.second ??= instance(at("right"));
    shown.push(arrange.second);
  }
  for (const nv of shown) {
    if (nv.case !== current) { await fill(nv); nv.case = current; }
    nv.resizeListener();
  }
  moveAll([...shown[0].scene.crosshairPos]);
  paint();
}

function paint() { // labels, opacity, window and plane, as the controls say
  const rows = [NOTHING, ...organs.map((organ) => organ.colour)];
  const drawn = mode().draw(inside(current.labels), current.truthVoxels && inside(current.truthVoxels));
  const solid = state.plane === 4;
  drawn.forEach(([filled, lines, caption], i) => {
    const nv = shown[i], [image, first, second] = nv.volumes;
    if (solid && !filled) [filled, lines] = [lines, null];
    first.img = filled || new Uint8Array(current.labels.length);
    second.img = lines && !solid ? outline(lines) : new Uint8Array(current.labels.length);
    const colours = mode().errors ? [NOTHING, ...ERRORS.map((row) => row[2])] : rows;
    first.setColormapLabel(table(colours));
    second.setColormapLabel(table(rows));
    image.opacity = solid ? 0 : 1;
    first.opacity = solid ? 1 : at("opacity").value / 100;
    second.opacity = 1;
    if (!current.levels.colour) [image.cal_min, image.cal_max] = [+at("low").value, +at("high").value];
    nv.opts.sliceType = state.plane;
    nv.updateGLVolume();
    at(i ? "right-caption" : "left-caption").textContent = caption;
  });
  at("error-legend").hidden = !mode().errors;
  tell();
}

const letterOf = (direction, mm) => SIDES[direction][mm[direction] >= 0 ? 0 : 1]; // mm in RAS

function tell() { // slider, place, value and organ under the crosshair
  const place = voxel(), axis = state.plane < 3 ? axisOf(state.plane) : 2;
  const real = place.map((index, i) => current.start[i] + index * current.step[i]);
  at("slice-row").hidden = state.plane > 2 || current.shape[axis] === 1;
  Object.assign(at("slice"), { max: current.shape[axis] - 1, value: place[axis] });
  const mm = current.affine.map((row) => row[3] + place.reduce((sum, v, i) => sum + v * row[i], 0));
  const where = current.known
    ? mm.map((value, i) => `${letterOf(i, mm)} ${Math.abs(value).toFixed(1)}`).join(", ") + " mm"
    : `column ${real[0] + 1}, row ${real[1] + 1}`;
  const slice = state.plane < 3 && current.full[axis] > 1
    ? `${PLANES[state.plane]} slice ${real[axis] + 1} of ${current.full[axis]} · ` : "";
  at("place").textContent = slice + where;
  at("slice").setAttribute("aria-valuetext", at("place").textContent);
  const i = place[0] + current.shape[0] * (place[1] + current.shape[1] * place[2]);
  const { levels, grey } = current;
  const value = levels.colour ? `RGB ${[...grey.subarray(3 * i, 3 * i + 3)].join(" ")}`
    : levels.table ? levels.table[grey[i]] : +(levels.low + levels.step * grey[i]).toPrecision(3);
  const name = (code) => (code ? organs[code - 1]?.name ?? `class ${code}` : "no organ");
  const organ = current.truthVoxels
    ? `prediction: ${name(current.labels[i])}, truth: ${name(current.truthVoxels[i])}`
    : name(current.labels[i]);
  at("under").textContent = `value ${String(value).replace("-", "−")} ${levels.unit} · ${organ}`;
}

// ---- controls ----

function choices(id, names, chosen, act) {
  at(id).replaceChildren(...names.map((name, i) => {
    const button = element("button", name, { type: "button" });
    button.setAttribute("aria-pressed", String(i === chosen));
    button.addEventListener("click", () => act(i));
    return button;
  }));
}

function pressed(id, chosen) {
  [...at(id).children].forEach((b, i) => b.setAttribute("aria-pressed", String(i === chosen)));
}

function setPlane(plane) {
  if (plane !== 0 && at("planes").hidden) return;
  state.plane = plane;
  pressed("planes", plane);
  paint();
}

async function setMode(index) {
  state.mode = index;
  pressed("modes", index);
  await arrange();
}

function setWindow(index) {
  const found = current.levels.windows[index];
  if (!found) return;
  at("window").selectedIndex = index;
  Object.assign(at("low"), { value: +found.low.toPrecision(5) });
  Object.assign(at("high"), { value: +found.high.toPrecision(5) });
}

function step(count) {
  if (state.plane > 2) return;
  const axis = axisOf(state.plane), place = [null, null, null];
  place[axis] = voxel()[axis] + count;
  goTo(place);
}

function amount(voxels) {
  if (!current.voxel_ml) return voxels.toLocaleString("en");
  const ml = voxels * current.voxel_ml;
  return ml >= 100 ? ml.toFixed(0) : ml >= 1 ? ml.toFixed(1) : String(+ml.toPrecision(2));
}

function listOrgans() {
  at("amount").textContent = current.voxel_ml ? "ml" : "voxels";
  at("true-amount").hidden = !current.truthVoxels;
  at("organs").tBodies[0].replaceChildren(...organs.map((organ, i) => {
    const box = element("input", undefined, { type: "checkbox", checked: state.on[i] });
    box.addEventListener("change", () => { state.on[i] = box.checked; paint(); });
    const swatch = element("span", undefined, { className: "swatch" });
    swatch.style.background = `rgb(${organ.colour.join(",")})`;
    const label = element("label"), row = element("tr");
    box.id = `organ-${i + 1}`;
    label.htmlFor = box.id;
    label.append(swatch, element("span", organ.name));
    const cells = [element("td"), element("td"), element("td", amount(current.voxels[i + 1]))];
    if (current.truthVoxels) cells.push(element("td", amount(current.truth_voxels[i + 1])));
    cells[0].append(box);
    cells[1].append(label);
    row.append(...cells);
    row.className = current.voxels[i + 1] || current.truth_voxels?.[i + 1] ? "" : "absent";
    return row;
  }));
}

function listWorst() {
  at("worst-part").hidden = !current.worst.length;
  at("worst").replaceChildren(...current.worst.map((one) => {
    const share = one.organ ? `${one.organ} ${(100 * one.error).toFixed(0)} % wrong, ` : "";
    const button = element("button", `slice ${one.index + 1}: ${share}${one.wrong.toLocaleString("en")} wrong voxels`, { type: "button" });
    button.addEventListener("click", () => {
      setPlane(directionOf(2) === 2 ? 0 : directionOf(2) === 1 ? 1 : 2); // the plane of the slices
      goTo([null, null, Math.round((one.index - current.start[2]) / current.step[2])]);
    });
    return button;
  }));
}

function listNotes() {
  const { shape, full, step: steps, levels } = current, said = [];
  if (steps.some((count) => count > 1)) {
    said.push(`This case is large: the page shows every ${steps.join(" · ")}-th voxel along x · y · z. Volumes are those of all voxels.`);
  }
  at("notes").replaceChildren(...[...current.notes, ...said].map((text) => element("p", text)));
  const cut = shape.some((size, i) => size * steps[i] < full[i]) ? "; air around the body is cut off" : "";
  at("made").textContent = `Labels as the program wrote them. Image: ${levels.said}; ${shape.join(" × ")} of ${full.join(" × ")} voxels${cut}.`;
}

async function open(index) {
  if (loading || !parts[index]) return;
  loading = 1;
  delete document.body.dataset.ready; // the index of the case that is shown completely
  try {
    state.index = at("case").selectedIndex = index;
    const found = JSON.parse(parts[index].textContent);
    [found.grey, found.labels, found.truthVoxels] = await Promise.all(
      [found.image, found.labels, found.truth].map((text) => text && unpacked(text)));
    const before = current;
    current = found;
    if (Boolean(before?.truthVoxels) !== Boolean(found.truthVoxels) || !before) state.mode = 0;
    const flat = found.shape[2] === 1 && !found.known;
    at("planes").hidden = flat;
    if (flat) state.plane = 0;
    choices("modes", MODES[Boolean(found.truthVoxels)].map((one) => one.name), state.mode, setMode);
    at("window-row").hidden = found.levels.colour || !found.levels.windows.length;
    at("window").replaceChildren(...found.levels.windows.map((one) => element("option", one.name)));
    setWindow(0);
    listOrgans();
    listWorst();
    listNotes();
    if (!shown.length) shown.push(instance(at("left")));
    await fill(shown[0]);
    shown[0].case = current;
    shown[0].scene.crosshairPos = Float32Array.from([0.5, 0.5, 0.5]);
    await arrange();
    goTo(found.worst.length ? [null, null, Math.round((found.worst[0].index - found.start[2]) / found.step[2])] : middle());
    trouble("");
  } catch (error) {
    trouble(`The case cannot be shown: ${error.message}. It may be too large for this browser's memory.`);
  } finally {
    loading = 0;
    document.body.dataset.ready = String(state.index);
  }
}

function middle() { // the slice with most labelled voxels, for a first look
  const area = current.shape[0] * current.shape[1], counts = new Array(current.shape[2]).fill(0);
  current.labels.forEach((value, i) => { if (value) counts[Math.floor(i / area)]++; });
  const most = Math.max(...counts);
  return [null, null, most ? counts.indexOf(most) : current.shape[2] >> 1];
}

function listen() {
  at("slice").addEventListener("input", () => step(at("slice").value - voxel()[axisOf(state.plane)]));
  at("back").addEventListener("click", () => step(-1));
  at("forth").addEventListener("click", () => step(1));
  at("case").addEventListener("change", () => open(at("case").selectedIndex));
  at("previous").addEventListener("click", () => open(state.index - 1));
  at("next").addEventListener("click", () => open(state.index + 1));
  at("opacity").addEventListener("input", paint);
  at("window").addEventListener("change", () => { setWindow(at("window").selectedIndex); paint(); });
  for (const id of ["low", "high"]) at(id).addEventListener("change", paint);
  at("all").addEventListener("change", () => {
    state.on.fill(at("all").checked);
    listOrgans();
    paint();
  });
  addEventListener("keydown", key);
}

function key(event) {
  const typing = event.target.matches?.("select, input[type=number]");
  if (typing || event.ctrlKey || event.altKey || event.metaKey || !current || loading) return;
  const onSlider = event.target.matches?.("input[type=range]");
  const count = MODES[Boolean(current.truthVoxels)].length;
  const acts = {
    ArrowUp: () => step(1), ArrowDown: () => step(-1), PageUp: () => step(10), PageDown: () => step(-10),
    o: () => { state.lit = !state.lit; paint(); }, m: () => setMode((state.mode + 1) % count),
    w: () => { setWindow((at("window").selectedIndex + 1) % current.levels.windows.length); paint(); },
  };
  if (event.shiftKey) Object.assign(acts, { ArrowLeft: () => open(state.index - 1), ArrowRight: () => open(state.index + 1) });
  for (let plane = 0; plane < 5; plane++) acts[plane + 1] = () => setPlane(plane);
  const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || (onSlider && event.key.startsWith("Arrow") && !event.shiftKey)) return;
  event.preventDefault();
  act();
}

async function start() {
  at("case").replaceChildren(...names.map((name) => element("option", name)));
  at("left-out-part").hidden = !leftOut.length;
  at("left-out-part").firstElementChild.textContent = `${leftOut.length} ${leftOut.length > 1 ? "cases are" : "case is"} not on this page`;
  at("left-out-list").replaceChildren(...leftOut.map((one) => element("li", `${one.name}: ${one.reason}`)));
  if (!parts.length) return trouble("No case can be shown; the list beside this says why.");
  if (typeof DecompressionStream === "undefined" || !document.createElement("canvas").getContext("webgl2")) {
    return trouble("This browser cannot draw the volumes, because it has no WebGL 2. Use a current Firefox, Chrome, Edge or Safari, and switch on hardware acceleration in its settings. The pictures in the folder overlays show some slices without it.");
  }
  choices("planes", PLANES, state.plane, setPlane);
  at("error-legend").replaceChildren(...ERRORS.map(([, name, rgb]) => {
    const one = element("span"), swatch = element("i", undefined, { className: "swatch" });
    swatch.style.background = `rgb(${rgb.join(",")})`;
    one.append(swatch, name);
    return one;
  }));
  const script = element("script", new TextDecoder().decode(await unpacked(at("niivue").textContent)), { type: "module" });
  document.head.append(script);
  for (let tries = 0; !globalThis.Niivue && tries < 600; tries++) {
    await new Promise((resume) => setTimeout(resume, 25));
  }
  if (!globalThis.Niivue) return trouble("NiiVue, which draws the volumes, did not start in this browser; use a current one.");
  listen();
  await open(0);
}

start();
})();
