// Everything around the viewer: keys, theme, downloads, history. No dependency, nothing is fetched.
(() => {
  const find = (selector) => document.querySelector(selector);
  const press = (id) => {
    const target = find(`#${id}`);
    (target?.matches('button') ? target : target?.querySelector('button'))?.click();
  };
  const typing = (target) =>
    target.closest?.('textarea, select, [contenteditable]') ||
    (target.matches?.('input') && !['checkbox', 'radio', 'range'].includes(target.type));

  const page = {
    viewer: null,
    begin() {
      document.body.classList.add('hs-running');
      page.viewer?.begin();
    },
    settle() {
      document.body.classList.remove('hs-running');
      page.viewer?.settle();
    },
    // A permalink draws its comparison at once; the bare address waits for the visitor.
    opened() {
      if (new URLSearchParams(location.search).has('prompt')) page.again();
    },
    again() {
      setTimeout(() => press('hs-go'), 50);
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
        ...(items?.length ? items.map((item) => pastItem(item, choose)) : [text('p', 'Comparisons you make appear here. They stay in this browser.')]),
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
    words.append(text('b', item.prompt), text('small', `seed ${item.seed}, ${item.steps} step${item.steps === 1 ? '' : 's'}`));
    button.append(picture, words);
    button.addEventListener('click', () => choose({ link: item.link }));
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
    '/': () => find('#hs-prompt textarea')?.focus(),
    '?': () => find('.hs-keys')?.showModal(),
    c: () => press('hs-go'),
    r: () => press('hs-dice'),
    n: () => press('hs-new-seed'),
    t: () => page.theme(),
  };

  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || find('dialog[open]')) return;
    if (event.key === 'Escape') {
      if (typing(event.target)) event.target.blur();
      else if (document.body.classList.contains('hs-running')) press('hs-stop');
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
    if (event.target.closest?.('#hs-stop')) page.settle();
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
