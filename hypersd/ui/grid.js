// The grid of a sweep: the viewer's frames in a table whose row and column names stay in sight.
(() => {
  const { Viewer, el, plural, setSrc, fillWait, follow } = hypersd.parts;

  class Grid extends Viewer {
    update(state) {
      if (!this.ignoring && state?.columns) this.shape = { caption: state.caption, rows: state.rows, columns: state.columns };
      super.update(state);
    }

    empty() {
      this.stage.replaceChildren(
        el('div', { class: 'hs-empty' }, el('div', { class: 'hs-ghosts', 'aria-hidden': 'true' }, el('i'), el('i'), el('i')),
          el('p', {}, 'The grid appears here, row by row, a column for each number of steps.')),
      );
    }

    tell() {
      const words = this.ready ? `${this.ready} of ${plural(this.tiles.length, 'picture')} ready` : '';
      if (this.live.textContent !== words) this.live.textContent = words;
    }

    pickers() {
      return [];
    }

    render() {
      const plan = JSON.stringify([this.shape, this.ready > 0]);
      if (plan !== this.built) {
        this.built = plan;
        this.toolbar();
        this.bar.querySelector('[data-mode]')?.parentNode.remove(); // a grid is looked at in one way only
        this.stage.className = 'hs-stage hs-lattice';
        this.stage.style.setProperty('--columns', this.shape.columns.length);
        this.cards = this.tiles.map((_, i) => this.card(i));
        this.stage.replaceChildren(this.table());
        const scrolled = { tabindex: 0, role: 'region', 'aria-label': 'Grid' }; // by the arrow keys too
        for (const [name, value] of Object.entries(scrolled)) this.stage.setAttribute(name, value);
      }
      for (const card of this.cards) card.paint();
      this.place();
    }

    table() {
      const { caption, rows, columns } = this.shape;
      const head = el('tr', {}, el('td', {}), ...columns.map((n) => el('th', { scope: 'col' }, plural(n, 'step'))));
      const body = rows.map((row, y) =>
        el('tr', {}, el('th', { scope: 'row' }, row.title, row.detail ? el('small', {}, row.detail) : null),
          ...columns.map((_, x) => el('td', {}, this.cards[y * columns.length + x].node))));
      return el('table', { class: rows.length === 1 && !rows[0].title ? 'hs-bare' : '' }, el('caption', {}, caption), el('thead', {}, head), el('tbody', {}, ...body));
    }

    card(i) {
      const picture = el('img', { class: 'hs-pic', alt: '', draggable: 'false' });
      const wait = el('div', { class: 'hs-wait' });
      const frame = this.frame(picture, wait);
      const caption = el('figcaption');
      const node = el('figure', { class: 'hs-card hs-cell' }, frame, caption);
      const paint = () => {
        const tile = this.tiles[i];
        this.dress(node, frame, tile);
        setSrc(picture, tile.src ?? '');
        fillWait(wait, tile);
        this.caption(caption, tile);
      };
      return { node, paint };
    }

    caption(root, tile) {
      const stamp = tile.facts?.pixels_sha256 ?? tile.phase;
      if (root.dataset.stamp === stamp) return;
      root.dataset.stamp = stamp;
      if (!tile.facts) return root.replaceChildren();
      const save = el('button', { type: 'button', class: 'hs-icon', icon: 'save', title: 'Download PNG', 'aria-label': `Download ${tile.alt} as PNG`,
        onclick: () => hypersd.save(tile) });
      root.replaceChildren(el('span', { title: 'network forward passes' }, `${tile.facts.nfe} NFE`), el('span', {}, `${tile.facts.seconds.toFixed(2)} s`), save);
      if (tile.unread) root.append(el('p', { class: 'hs-unread' }, `ignored: “${tile.unread}”`));
    }

    setMode() {} // no pairs here
    hold() {}
  }

  hypersd.mountGrid = (root, read, watch, wants) => follow('sweep', new Grid(root, read, wants), read, watch);
})();
