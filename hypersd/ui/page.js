// Everything around the viewer: keys, theme, downloads, history. No dependency, nothing is fetched.
(() => {
  const RUNNING = { compare: 'hs-running', sweep: 'hs-sweeping' };
  const GO = { compare: 'hs-go', sweep: 'hs-sweep-go' };
  const STOP = { compare: 'hs-stop', sweep: 'hs-sweep-stop' };
  const FIRST = { compare: '#hs-prompt textarea', sweep: '#hs-sweep-prompts textarea' };
  const asked = new URLSearchParams(location.search); // of the page when it was opened; drawing changes the address
  const find = (selector) => document.querySelector(selector);
  const press = (id) => {
    const target = find(`#${id}`);
    (target?.matches('button') ? target : target?.querySelector('button'))?.click();
  };
  const typing = (target) =>
    target.closest?.('textarea, select, [contenteditable]') ||
    (target.matches?.('input') && !['checkbox', 'radio', 'range'].includes(target.type));

  const page = {
    viewers: {}, // of each screen, by its name
    allowed: [],
    get screen() {
      return find('#hs-sweep-form')?.offsetParent ? 'sweep' : 'compare';
    },
    get viewer() {
      return page.viewers[page.screen];
    },
    begin(screen) {
      document.body.classList.add(RUNNING[screen]);
      page.viewers[screen]?.begin();
    },
    settle(screen) {
      document.body.classList.remove(RUNNING[screen]);
      page.viewers[screen]?.settle();
    },
    // A permalink draws its pictures at once; the bare address waits for the visitor.
    opened(screen) {
      if (asked.has(screen === 'sweep' ? 'prompts' : 'prompt')) page.again(screen);
    },
    // The history tells where it sends the visitor before the form is filled.
    chosen() {
      page.again(page.link?.includes('prompts=') ? 'sweep' : 'compare');
    },
    // Methods that were not made for so many steps are dimmed; `allowed` are spans such as 2-8, in the order of rows.
    able(steps = Number(find('#hs-steps input')?.value)) {
      document.querySelectorAll('#hs-methods label').forEach((label, i) => {
        const spans = page.allowed[i].split(', ').map((span) => span.split('-').map(Number));
        const can = spans.some(([low, high = low]) => steps >= low && steps <= high);
        label.classList.toggle('hs-unable', !can);
        label.dataset.allowed = page.allowed[i].replaceAll('-', '–');
        label.title = can ? '' : `made for ${label.dataset.allowed} steps`;
      });
    },
    // The sweep begins with the prompt of the comparison until it has prompts of its own.
    carry(prompt, prompts, example) {
      page.carried ??= asked.has('prompts') ? '' : prompts;
      if (!prompt?.trim() || prompt === example || prompts !== page.carried) return prompts;
      return (page.carried = prompt);
    },
    again(screen = 'compare') {
      setTimeout(() => press(GO[screen]), 50);
    },
    theme(dark = !document.body.classList.contains('dark')) {
      document.body.classList.toggle('dark', dark);
      try {
        localStorage.setItem('hypersd-theme', dark ? 'dark' : 'light');
      } catch { /* private windows may forbid it; the choice then lasts until the page is closed */ }
    },
    // A data address goes to the browser's downloads.
    save({ name, src } = {}) {
      if (!src) return;
      const [head, body] = src.split(',');
      let bytes = Uint8Array.from(atob(body), (c) => c.charCodeAt(0));
      if (page.viewer?.strip) bytes = withoutText(bytes);
      const link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob([bytes], { type: head.slice(5).split(';')[0] }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    },
    async copy(text) {
      try {
        await navigator.clipboard.writeText(text);
      } catch { // no clipboard outside https and localhost
        const area = document.createElement('textarea');
        area.value = text;
        document.body.append(area);
        area.select();
        document.execCommand('copy');
        area.remove();
      }
    },
    past(root, items, choose) {
      root.replaceChildren(
        ...(items?.length ? items.map((item) => pastItem(item, choose)) : [text('p', 'What you draw appears here. It stays in this browser.')]),
      );
    },
  };

  function text(tag, words, more = {}) {
    return Object.assign(document.createElement(tag), { textContent: words, ...more });
  }

  function pastItem(item, choose) {
    const button = text('button', '', { type: 'button', className: 'hs-past-item' });
    const picture = Object.assign(new Image(), { alt: '', width: 44, height: 44 });
    if (String(item.picture).startsWith('data:image/')) picture.src = item.picture;
    const words = text('span', '');
    words.append(text('b', item.title), text('small', item.detail));
    button.append(picture, words);
    button.addEventListener('click', () => choose({ link: (page.link = item.link) }));
    return button;
  }

  // A PNG is an 8-byte signature and chunks of [length, type, data, checksum]; pixels are in none of these four.
  function withoutText(png) {
    if (png[0] !== 0x89) return png;
    const view = new DataView(png.buffer);
    const kept = [png.subarray(0, 8)];
    for (let at = 8; at < png.length; ) {
      const size = 12 + view.getUint32(at);
      const type = String.fromCharCode(...png.subarray(at + 4, at + 8));
      if (!['tEXt', 'zTXt', 'iTXt', 'eXIf'].includes(type)) kept.push(png.subarray(at, at + size));
      at += size;
    }
    return new Uint8Array(kept.reduce((all, part) => [...all, ...part], []));
  }

  const keys = {
    '/': () => find(FIRST[page.screen])?.focus(),
    '?': () => find('.hs-keys')?.showModal(),
    c: () => press(GO[page.screen]),
    r: () => page.screen === 'compare' && press('hs-dice'),
    n: () => page.screen === 'compare' && press('hs-new-seed'),
    t: () => page.theme(),
  };

  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || find('dialog[open]')) return;
    if (event.key === 'Escape') {
      if (typing(event.target)) event.target.blur();
      else if (document.body.classList.contains(RUNNING[page.screen])) press(STOP[page.screen]);
      return;
    }
    if (typing(event.target)) return;
    const action = keys[event.key.toLowerCase()];
    if (action && !event.repeat) {
      event.preventDefault();
      action();
    } else page.viewer?.keydown(event);
  });
  document.addEventListener('keyup', (event) => page.viewer?.keyup(event));
  document.addEventListener('click', (event) => {
    const tool = event.target.closest?.('[data-hs]')?.dataset.hs;
    if (tool === 'keys') keys['?']();
    if (tool === 'theme') page.theme();
    for (const screen in STOP) if (event.target.closest?.(`#${STOP[screen]}`)) page.settle(screen);
  });
  document.addEventListener('DOMContentLoaded', () => {
    let chosen = null;
    try {
      chosen = localStorage.getItem('hypersd-theme');
    } catch { /* as above */ }
    if (chosen && !location.search.includes('__theme')) setTimeout(() => page.theme(chosen === 'dark'), 0);
  });
  window.hypersd = page;
})();
