// N panels under one magnifying glass. All panels share zoom and position; state comes from the server as JSON.
(() => {
  const MODES = [
    ['grid', 'Side by side', 'g'],
    ['slider', 'Slider', 's'],
    ['flip', 'Flip', 'f'],
    ['difference', 'Difference', 'd'],
  ];
  const ZOOM_MAX = 24;
  const GAIN = 4; // differences are shown four times as strong, or nobody would see them
  const ICON = {
    save: '<path d="M8 2v8m0 0 3-3m-3 3L5 7M3 13h10"/>',
    link: '<path d="M6.5 9.5a3 3 0 0 0 4.2 0l2.2-2.2a3 3 0 0 0-4.2-4.2l-1 1M9.5 6.5a3 3 0 0 0-4.2 0L3.1 8.7a3 3 0 0 0 4.2 4.2l1-1"/>',
    sheet: '<path d="M2.5 2.5h4.5v4.5H2.5zM9 2.5h4.5v4.5H9zM2.5 9h4.5v4.5H2.5zM9 9h4.5v4.5H9z"/>',
  };

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
      else if (name === 'icon') node.innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true">${ICON[value]}</svg>`;
      else if (value === true) node.setAttribute(name, '');
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child != null));
    return node;
  }
  const plural = (n, word) => `${n} ${word}${n === 1 ? '' : 's'}`;
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const unread = (tile) => `The prompt is longer than the model reads; it ignored “${tile.unread}”.`;
  const label = (tile) => `${tile.title}, ${plural(tile.asked, 'step')}`;

  class Viewer {
    constructor(root, read, wants) {
      Object.assign(this, { root, read, wants, tiles: [], numbers: {}, link: '', mode: 'grid', a: 0, b: 0, ref: 0 });
      Object.assign(this, { z: 1, x: 0, y: 0, cut: 0.5, held: false, strip: false, peek: {}, built: '', pixels: new Map() });
      this.fingers = new Map();
      this.bar = el('div', { class: 'hs-bar', role: 'toolbar', 'aria-label': 'View' });
      this.stage = el('div', { class: 'hs-stage' });
      this.live = el('p', { class: 'hs-sr', 'aria-live': 'polite' });
      root.append(this.bar, this.stage, this.live);
      new ResizeObserver(() => this.crisp()).observe(this.stage);
      this.wheel = this.wheel.bind(this);
      this.empty();
    }

    // ---- what the server says

    begin() {
      this.ignoring = false;
      this.shown = false;
      this.root.classList.add('hs-busy');
    }

    update(state) {
      if (this.ignoring || !state?.status) return;
      if (this.root.matches('.hs-busy')) this.root.classList.remove('hs-busy'); // to remove nothing is a change too
      if (state.status === 'refused') return;
      this.tell(state.tiles);
      if (!this.shown && this.stage.getBoundingClientRect().top > innerHeight * 0.6) {
        this.root.scrollIntoView({ behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth' });
      }
      this.shown = true;
      const fresh = state.tiles.length !== this.tiles.length || state.tiles.some((t, i) => label(t) !== label(this.tiles[i]));
      this.tiles = state.tiles;
      this.numbers = state.numbers;
      if (fresh) this.choose();
      if (state.link !== this.link) this.address(state.link);
      this.render();
    }

    settle() {
      this.root.classList.remove('hs-busy');
      this.ignoring = true;
      this.tiles = this.tiles.map((t) => (['waiting', 'loading', 'drawing'].includes(t.phase) ? { ...t, phase: 'stopped' } : t));
      if (this.tiles.length) this.render();
    }

    tell(tiles) {
      const done = tiles.filter((t, i) => t.phase === 'done' && this.tiles[i]?.phase !== 'done');
      if (done.length) this.live.textContent = done.map((t) => `${label(t)}: ready after ${t.facts.seconds.toFixed(2)} seconds`).join('. ');
    }

    address(link) {
      this.link = link;
      const theme = new URLSearchParams(location.search).get('__theme');
      history.replaceState(null, '', link + (theme ? `&__theme=${encodeURIComponent(theme)}` : ''));
    }

    choose() {
      const found = this.tiles.findIndex((t) => t.reference);
      this.ref = found < 0 ? this.tiles.length - 1 : found;
      this.b = this.ref;
      this.a = this.tiles.length > 1 && this.ref === 0 ? 1 : 0;
      this.peek = {};
    }

    // ---- drawing the page

    empty() {
      this.stage.replaceChildren(
        el('div', { class: 'hs-empty' }, el('div', { class: 'hs-ghosts', 'aria-hidden': 'true' }, el('i'), el('i'), el('i')),
          el('p', {}, 'Pictures appear here, side by side, as they finish.')),
      );
    }

    get ready() {
      return this.tiles.filter((t) => t.phase === 'done').length;
    }

    render() {
      const pair = this.mode === 'slider' || this.mode === 'flip';
      const plan = JSON.stringify([this.mode, this.tiles.map(label), pair && [this.a, this.b], this.ref, this.ready > 0]);
      if (plan !== this.built) {
        this.built = plan;
        this.toolbar();
        this.cards = pair ? [this.pairCard()] : this.tiles.map((_, i) => this.card(i));
        this.stage.className = `hs-stage hs-${this.mode}`;
        const n = this.cards.length; // seven and more go into even rows
        this.stage.style.setProperty('--columns', Math.ceil(n / Math.ceil(n / 6)));
        this.stage.replaceChildren(...this.cards.map((card) => card.node));
      }
      for (const card of this.cards) card.paint();
      this.place();
    }

    toolbar() {
      if (!this.ready) return this.bar.replaceChildren();
      const modes = el('div', { class: 'hs-segments', role: 'group', 'aria-label': 'How to compare' },
        ...MODES.filter(([mode]) => mode === 'grid' || this.tiles.length > 1).map(([mode, words, key]) =>
          el('button', { type: 'button', 'data-mode': mode, 'aria-pressed': String(mode === this.mode), title: `${words} (${key.toUpperCase()})`,
            onclick: () => this.setMode(mode) }, words)));
      const zoom = el('div', { class: 'hs-segments hs-zoom', role: 'group', 'aria-label': 'Zoom' },
        el('button', { type: 'button', 'aria-label': 'Zoom out', title: 'Zoom out (-)', onclick: () => this.zoomBy(1 / 1.5) }, '−'),
        (this.percent = el('button', { type: 'button', 'aria-label': 'Fit', title: 'Fit (0)', onclick: () => this.fit() })),
        el('button', { type: 'button', 'aria-label': 'Zoom in', title: 'Zoom in (+)', onclick: () => this.zoomBy(1.5) }, '+'));
      const metadata = el('label', { class: 'hs-check', title: 'Downloads carry prompt, seed, method and hashes in a text chunk' },
        el('input', { type: 'checkbox', checked: !this.strip, onchange: (e) => (this.strip = !e.target.checked) }), 'metadata in files');
      this.copyButton = el('button', { type: 'button', class: 'hs-quiet', onclick: () => this.copyLink() }, el('i', { icon: 'link' }), el('span', {}, 'Copy link'));
      const sheet = el('button', { type: 'button', class: 'hs-quiet', onclick: () => this.wants.sheet() }, el('i', { icon: 'sheet' }), el('span', {}, 'Contact sheet'));
      const facts = el('button', { type: 'button', class: 'hs-quiet', title: 'Everything that is known of these panels', onclick: () => this.wants.facts() }, 'JSON');
      this.bar.dataset.mode = this.mode;
      this.bar.replaceChildren(modes, ...this.pickers(), zoom, el('div', { class: 'hs-take' }, this.copyButton, sheet, facts, metadata));
    }

    pickers() {
      const select = (name, words) =>
        el('label', {}, el('span', {}, words),
          el('select', { 'aria-label': words, onchange: (e) => { this[name] = Number(e.target.value); this.render(); } },
            ...this.tiles.map((t, i) => el('option', { value: i, selected: i === this[name] }, label(t)))));
      if (this.tiles.length < 2) return [];
      const chosen = {
        grid: () => [select('ref', 'Reference')],
        difference: () => [select('ref', 'Against')],
        slider: () => [select('a', 'Left'), select('b', 'Right')],
        flip: () => [select('a', 'Show'), select('b', 'Hold for')],
      }[this.mode]();
      return [el('div', { class: 'hs-pick' }, ...chosen)];
    }

    card(i) {
      const picture = el('img', { class: 'hs-pic', alt: '', draggable: 'false' });
      const other = el('img', { class: 'hs-pic hs-other', alt: '', draggable: 'false' });
      const map = this.mode === 'difference' && i !== this.ref ? el('canvas', { class: 'hs-pic' }) : null;
      const wait = el('div', { class: 'hs-wait' });
      const frame = this.frame(map ?? picture, map ? null : other, wait);
      const caption = el('figcaption');
      const trail = el('div', { class: 'hs-trail' });
      const node = el('figure', { class: 'hs-card' }, frame, trail, caption);
      const paint = () => {
        const tile = this.tiles[i];
        const shown = tile.phase === 'done' ? (tile.trail[this.peek[i]] ?? tile.src) : '';
        this.dress(node, frame, tile, i === this.ref);
        setSrc(picture, shown);
        setSrc(other, this.tiles[this.ref]?.src ?? '');
        if (map) this.heat(map, i);
        fillWait(wait, tile, () => this.wants.retry(tile.nearest));
        this.caption(caption, tile, i);
        this.strips(trail, tile, i);
      };
      return { node, paint };
    }

    dress(node, frame, tile, reference = false) {
      mark(node, 'data-phase', tile.nearest && tile.phase === 'problem' ? 'unable' : tile.phase);
      mark(node, 'data-reference', reference && this.tiles.length > 1);
      mark(frame, 'aria-label', tile.alt ?? `${label(tile)}: ${tile.text || tile.phase}`);
      mark(frame, 'style', tile.facts && tile.facts.width !== tile.facts.height ? `aspect-ratio: ${tile.facts.width} / ${tile.facts.height}` : null);
    }

    pairCard() {
      const under = el('img', { class: 'hs-pic', alt: '', draggable: 'false' });
      const over = el('img', { class: `hs-pic ${this.mode === 'slider' ? 'hs-right' : 'hs-other'}`, alt: '', draggable: 'false' });
      const wait = el('div', { class: 'hs-wait' });
      const tags = [el('span', { class: 'hs-corner' }), el('span', { class: 'hs-corner hs-far' })];
      const frame = this.frame(under, el('div', { class: 'hs-cut' }, over), wait, ...tags);
      const handle = el('input', { type: 'range', min: 0, max: 100, value: this.cut * 100, class: 'hs-handle', 'aria-label': 'Where the two pictures meet',
        oninput: (e) => { this.cut = e.target.value / 100; this.place(); } });
      const hold = el('button', { type: 'button', class: 'hs-hold', onpointerdown: () => this.hold(true), onpointerup: () => this.hold(false), onpointerleave: () => this.hold(false) }, 'Hold to flip');
      const numbers = el('p', { class: 'hs-numbers' });
      const node = el('figure', { class: 'hs-card hs-pair' }, frame, this.mode === 'slider' ? handle : hold, el('figcaption', {}, numbers));
      const paint = () => {
        const [a, b] = [this.tiles[this.a], this.tiles[this.b]];
        const unready = [a, b].find((t) => t.phase !== 'done');
        this.dress(node, frame, { ...(unready ?? a), alt: `${label(a)} against ${label(b)}` });
        setSrc(under, a.src ?? '');
        setSrc(over, b.src ?? '');
        fillWait(wait, unready ?? a, () => this.wants.retry(unready.nearest));
        tags[0].textContent = this.mode === 'flip' && this.held ? label(b) : label(a);
        tags[1].textContent = this.mode === 'slider' ? label(b) : '';
        numbers.replaceChildren(...this.numbersBetween(this.a, this.b));
      };
      this.handle = handle;
      return { node, paint };
    }

    caption(root, tile, i) {
      const stamp = JSON.stringify([tile.phase, tile.facts?.pixels_sha256, this.mode, this.ref, this.peek[i], Object.keys(this.numbers).length]);
      if (root.dataset.stamp === stamp) return;
      root.dataset.stamp = stamp;
      const title = el('div', { class: 'hs-title' }, el('b', {}, tile.title));
      const f = tile.facts;
      if (tile.phase === 'problem') return root.replaceChildren(title);
      if (tile.phase !== 'done') return root.replaceChildren(title, el('p', { class: 'hs-cost' }, plural(tile.asked, 'step')));
      title.append(el('button', { type: 'button', class: 'hs-icon', icon: 'save', title: 'Download PNG', 'aria-label': `Download ${label(tile)} as PNG`,
        onclick: () => hypersd.save(tile) }));
      const cost = el('p', { class: 'hs-cost' }, el('span', {}, plural(f.steps, 'step')), el('span', { title: 'network forward passes' }, `${f.nfe} NFE`),
        el('span', { title: tile.kept ? 'measured when these pixels were first drawn' : 'from request to pixels' }, `${f.seconds.toFixed(2)} s`));
      const noise = el('button', { type: 'button', class: 'hs-hash', title: `initial noise, sha256 ${f.noise_sha256}; click to copy`,
        onclick: () => hypersd.copy(f.noise_sha256) }, `noise ${f.noise_sha256.slice(0, 8)}`);
      const fine = el('p', { class: 'hs-fine' }, `guidance ${+f.guidance.toFixed(2)}${f.nag ? `, NAG ${+f.nag.toFixed(2)}` : ''}`, el('span', {}, f.sampler + (f.eta ? ` η ${+f.eta.toFixed(2)}` : '')), noise);
      const parts = [title, cost, fine];
      if (tile.unread) parts.push(el('p', { class: 'hs-unread' }, unread(tile)));
      if (this.tiles.length > 1 && i !== this.ref) parts.push(el('p', { class: 'hs-numbers' }, ...this.numbersBetween(i, this.ref)));
      if (this.tiles.length > 1 && i === this.ref) parts.push(el('p', { class: 'hs-numbers' }, 'Reference: the others are held against it'));
      root.replaceChildren(...parts);
    }

    numbersBetween(i, j) {
      if (i === j) return ['the same panel twice'];
      const found = this.numbers[`${Math.min(i, j)}-${Math.max(i, j)}`];
      if (!found) return [''];
      return [
        el('span', { title: 'mean absolute difference, of 255' }, `MAE ${found.mae.toFixed(1)}`),
        el('span', { title: 'peak signal-to-noise ratio' }, `PSNR ${found.psnr == null ? '∞' : found.psnr.toFixed(1)} dB`),
        found.ssim == null ? '' : el('span', { title: 'structural similarity, 1 is equal' }, `SSIM ${found.ssim.toFixed(3)}`),
      ];
    }

    // The picture the network had in mind after each step; pointing at one puts it into the panel.
    strips(root, tile, i) {
      const count = tile.phase === 'done' ? tile.trail.length : 0;
      if (root.childElementCount !== count) {
        root.replaceChildren(...Array.from({ length: count }, (_, k) => {
          const show = (value) => () => { this.peek[i] = value; this.cards[i]?.paint(); };
          return el('button', { type: 'button', 'aria-label': `Step ${k + 1} of ${count}`, title: `after step ${k + 1} of ${count}`,
            onpointerenter: show(k), onpointerleave: show(undefined), onfocus: show(k), onblur: show(undefined) }, el('img', { alt: '' }));
        }));
      }
      [...root.children].forEach((button, k) => setSrc(button.firstChild, tile.trail[k]));
    }

    async heat(canvas, i) {
      const [mine, theirs] = [this.tiles[i], this.tiles[this.ref]];
      if (mine?.phase !== 'done' || theirs?.phase !== 'done') return;
      const key = `${mine.facts.pixels_sha256} ${theirs.facts.pixels_sha256}`;
      if (canvas.dataset.key === key) return;
      canvas.dataset.key = key;
      let [p, q] = await Promise.all([this.decoded(mine), this.decoded(theirs)]);
      [p, q] = [enlarged(p, q), enlarged(q, p)];
      canvas.width = p.width;
      canvas.height = p.height;
      const out = new ImageData(p.width, p.height);
      for (let at = 0; at < p.data.length; at += 4) {
        const mean = (Math.abs(p.data[at] - q.data[at]) + Math.abs(p.data[at + 1] - q.data[at + 1]) + Math.abs(p.data[at + 2] - q.data[at + 2])) / 765;
        out.data.set(heatColour(Math.min(1, mean * GAIN)), at);
      }
      canvas.getContext('2d').putImageData(out, 0, 0);
    }

    async decoded(tile) {
      const key = tile.facts.pixels_sha256;
      if (!this.pixels.has(key)) {
        if (this.pixels.size > 16) this.pixels.clear();
        const image = new Image();
        image.src = tile.src;
        await image.decode();
        const canvas = el('canvas', { width: image.width, height: image.height });
        const pen = canvas.getContext('2d');
        pen.drawImage(image, 0, 0);
        this.pixels.set(key, pen.getImageData(0, 0, image.width, image.height));
      }
      return this.pixels.get(key);
    }

    // ---- zoom and position, shared by every frame

    frame(...children) {
      const node = el('div', { class: 'hs-frame', role: 'img', tabindex: '0', ondblclick: (e) => this.double(e),
        onpointerdown: (e) => this.down(e), onpointermove: (e) => this.move(e), onpointerup: (e) => this.up(e), onpointercancel: (e) => this.up(e) }, ...children);
      node.addEventListener('wheel', this.wheel, { passive: false });
      return node;
    }

    place() {
      const room = this.z - 1;
      this.x = clamp(this.x, -room, 0);
      this.y = clamp(this.y, -room, 0);
      const where = JSON.stringify([this.z, this.x, this.y, this.cut, this.held, this.built]);
      if (where === this.where) return; // a page whose styles are touched is laid out anew
      this.where = where;
      const style = this.stage.style;
      style.setProperty('--z', this.z);
      style.setProperty('--x', `${this.x * 100}%`);
      style.setProperty('--y', `${this.y * 100}%`);
      style.setProperty('--cut', this.cut);
      this.stage.classList.toggle('hs-zoomed', this.z > 1);
      this.root.classList.toggle('hs-held', this.held);
      if (this.percent) this.percent.textContent = this.z === 1 ? 'Fit' : `${this.z.toFixed(this.z < 10 ? 1 : 0)}×`;
      if (this.handle) this.handle.value = this.cut * 100;
      this.crisp();
    }

    // Smooth while a picture is shown whole, single pixels once somebody looks closely.
    crisp() {
      const frame = this.stage.querySelector('.hs-frame');
      const width = this.tiles.find((t) => t.facts)?.facts.width;
      this.stage.classList.toggle('hs-crisp', Boolean(frame && width && this.z > 1 && (frame.clientWidth * this.z) / width > 3));
    }

    zoomBy(factor, fx = 0.5, fy = 0.5) {
      const z = clamp(this.z * factor, 1, ZOOM_MAX);
      this.x = fx - ((fx - this.x) * z) / this.z;
      this.y = fy - ((fy - this.y) * z) / this.z;
      this.z = Math.abs(z - 1) < 0.02 ? 1 : z;
      this.place();
    }

    fit() {
      Object.assign(this, { z: 1, x: 0, y: 0 });
      this.place();
    }

    spot(event) {
      const box = event.currentTarget.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, box];
    }

    // Over an untouched panel the wheel scrolls the page; with Ctrl, or once zoomed or focused, it zooms.
    wheel(event) {
      if (!event.ctrlKey && !event.metaKey && this.z === 1 && event.currentTarget !== document.activeElement) return;
      if (this.z === 1 && event.deltaY > 0 && !event.ctrlKey) return;
      event.preventDefault();
      const [fx, fy] = this.spot(event);
      this.zoomBy(Math.exp(-clamp(event.deltaY, -100, 100) * (event.ctrlKey ? 0.01 : 0.004)), fx, fy);
    }

    double(event) {
      if (this.z > 1) return this.fit();
      const [fx, fy] = this.spot(event);
      this.zoomBy(4, fx, fy);
    }

    down(event) {
      if (event.target.closest('button')) return; // a captured pointer clicks nothing
      event.currentTarget.setPointerCapture(event.pointerId);
      this.fingers.set(event.pointerId, [event.clientX, event.clientY]);
      if (this.mode === 'slider' && this.z === 1 && this.fingers.size === 1) this.slide(event);
      if (this.mode === 'flip' && this.z === 1 && this.fingers.size === 1) this.hold(true);
    }

    move(event) {
      const before = this.fingers.get(event.pointerId);
      if (!before) return;
      const box = event.currentTarget.getBoundingClientRect();
      const now = [event.clientX, event.clientY];
      if (this.fingers.size === 2) {
        const other = [...this.fingers.entries()].find(([id]) => id !== event.pointerId)[1];
        const reach = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
        const middle = [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2];
        this.zoomBy(reach(now) / reach(before), (middle[0] - box.left) / box.width, (middle[1] - box.top) / box.height);
      } else if (this.z > 1) {
        this.x += (now[0] - before[0]) / box.width;
        this.y += (now[1] - before[1]) / box.height;
        this.place();
      } else if (this.mode === 'slider') this.slide(event);
      this.fingers.set(event.pointerId, now);
    }

    up(event) {
      this.fingers.delete(event.pointerId);
      if (this.held && this.mode === 'flip') this.hold(false);
    }

    slide(event) {
      this.cut = clamp(this.spot(event)[0], 0, 1);
      this.place();
    }

    hold(held) {
      if (held === this.held) return;
      this.held = held;
      for (const card of this.cards ?? []) card.paint();
      this.place();
    }

    setMode(mode) {
      if (!this.ready || (mode !== 'grid' && this.tiles.length < 2)) return;
      const focused = this.bar.contains(document.activeElement);
      this.mode = mode;
      this.held = false;
      this.handle = null;
      this.render();
      if (focused) this.bar.querySelector(`[data-mode=${mode}]`)?.focus();
      this.stage.querySelector('.hs-frame')?.scrollIntoView({ block: 'nearest' });
    }

    async copyLink() {
      await hypersd.copy(location.origin + location.pathname + this.link);
      const words = this.copyButton?.querySelector('span');
      if (!words) return;
      words.textContent = 'Copied';
      setTimeout(() => (words.textContent = 'Copy link'), 1500);
    }

    // ---- keys

    keydown(event) {
      if (!this.ready) return;
      const mode = MODES.find(([, , key]) => key === event.key.toLowerCase());
      const step = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
      const onControl = event.target.closest?.('button, summary, a, label, input, [role=tab]');
      if (mode) this.setMode(mode[0]);
      else if (event.key === '+' || event.key === '=') this.zoomBy(1.5);
      else if (event.key === '-') this.zoomBy(1 / 1.5);
      else if (event.key === '0') this.fit();
      else if (event.key.toLowerCase() === 'l') this.copyLink();
      else if (event.key === ' ' && !onControl) this.hold(true);
      else if (step && this.z > 1 && !event.target.matches?.('input')) {
        this.x += step[0];
        this.y += step[1];
        this.place();
      } else return;
      event.preventDefault();
    }

    keyup(event) {
      if (event.key === ' ') this.hold(false);
    }
  }

  function setSrc(image, src) {
    if (image.dataset.src === src) return;
    image.dataset.src = src;
    image.hidden = !src;
    if (src) image.src = src;
  }

  function mark(node, name, value) {
    const text = value === true ? '' : value === false || value == null ? null : String(value);
    if (node.getAttribute(name) === text) return;
    if (text == null) node.removeAttribute(name);
    else node.setAttribute(name, text);
  }

  // Words in the place of a picture. While it is drawn, one text and one length change, and nothing else.
  function fillWait(root, tile, retry) {
    const words = {
      waiting: 'waiting',
      loading: tile.coming || 'loading the model',
      drawing: `step ${tile.step} of ${tile.steps}`,
      stopped: 'stopped',
      problem: tile.nearest ? `made for ${tile.allowed.replaceAll('-', '–')} step${tile.allowed === '1' ? '' : 's'}` : tile.text,
      done: '',
    }[tile.phase];
    if (root.dataset.phase !== tile.phase) {
      root.dataset.phase = tile.phase;
      const meter = tile.phase === 'drawing' ? el('div', { class: 'hs-meter' }, el('i')) : null;
      const other = tile.phase === 'problem' && tile.nearest && retry
        ? el('button', { type: 'button', class: 'hs-retry', onclick: retry }, `Compare at ${tile.nearest}`) : null;
      root.replaceChildren(el('span', { title: tile.text || null }), ...[meter, other].filter(Boolean));
    }
    const [span, meter] = root.children;
    if (span.firstChild?.data !== words) span.textContent = words;
    if (tile.phase === 'drawing') meter.firstChild.style.transform = `scaleX(${tile.step / tile.steps})`;
  }

  // Black, violet, orange, pale yellow: lightness rises evenly, so the map also reads without colour.
  const RAMP = [[8, 8, 16], [76, 20, 104], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
  // Pixels as wide and tall as the larger of two pictures, since one method draws smaller ones than the others.
  function enlarged(pixels, other) {
    const [width, height] = [Math.max(pixels.width, other.width), Math.max(pixels.height, other.height)];
    if (width === pixels.width && height === pixels.height) return pixels;
    const small = el('canvas', { width: pixels.width, height: pixels.height });
    small.getContext('2d').putImageData(pixels, 0, 0);
    const pen = el('canvas', { width, height }).getContext('2d');
    pen.drawImage(small, 0, 0, width, height);
    return pen.getImageData(0, 0, width, height);
  }

  function heatColour(value) {
    const at = value * (RAMP.length - 1);
    const low = Math.min(Math.floor(at), RAMP.length - 2);
    return [0, 1, 2].map((c) => RAMP[low][c] + (at - low) * (RAMP[low + 1][c] - RAMP[low][c])).concat(255);
  }

  // Called by the component once its element is there; `read` gives the newest state, `watch` tells of changes.
  const follow = (screen, viewer, read, watch) => {
    hypersd.viewers[screen] = viewer;
    watch('value', () => viewer.update(read()));
    viewer.update(read());
  };
  hypersd.mount = (root, read, watch, wants) => follow('compare', new Viewer(root, read, wants), read, watch);
  hypersd.parts = { Viewer, el, plural, setSrc, fillWait, follow };
})();
