// The study's pages: consent, instructions, practice, votes, the end. The server decides what comes next.
(() => {
  const { el, plural } = hypersd.parts;
  const STORED = 'hypersd-study';
  const NOT_SAVED = 'Not saved, try again';
  const CHOICES = {
    left: { key: '1', words: 'Left is better' },
    right: { key: '2', words: 'Right is better' },
    tie: { key: '0', words: 'Equally good' },
    both_bad: { key: '9', words: 'Both bad' },
  };
  const ASPECTS = { alignment: 'Fits the words', aesthetics: 'Looks nicer', artefacts: 'Has fewer flaws' };
  const SAID = { left: 'left', right: 'right', tie: 'equally good', both_bad: 'both bad' };
  const kbd = (key) => el('kbd', { 'aria-hidden': 'true' }, key);
  const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

  // What this browser remembers: the annotator's token, and whether the practice is over. Private windows forget.
  const memory = {
    kept: {},
    get() {
      try {
        return JSON.parse(localStorage.getItem(STORED)) ?? this.kept;
      } catch {
        return this.kept;
      }
    },
    set(more) {
      this.kept = more && { ...this.get(), ...more };
      try {
        if (more) localStorage.setItem(STORED, JSON.stringify(this.kept));
        else localStorage.removeItem(STORED);
      } catch { /* the study then lasts as long as the page */ }
      this.kept ??= {};
    },
  };

  // `keepalive`: a click counts although the tab is closed right after it.
  async function call(given) {
    const { root, api_prefix: prefix = '', components } = window.gradio_config;
    const { id } = components.find((part) => part.props.elem_id === 'hs-study');
    const body = { component_id: id, fn_name: 'study', session_hash: 'study', data: { token: memory.get().token, ...given } };
    const stop = new AbortController();
    const patience = setTimeout(() => stop.abort(), 35000);
    try {
      const answer = await fetch(`${root}${prefix}/component_server/`, {
        method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body), keepalive: true, signal: stop.signal,
      });
      return answer.ok ? await answer.json() : { kind: 'failed', said: '' };
    } catch {
      return { kind: 'failed', said: '' };
    } finally {
      clearTimeout(patience);
    }
  }

  class Study {
    constructor(root) {
      this.root = root;
      this.page = el('div', { class: 'hs-study-page' });
      this.own = el('div');
      root.replaceChildren(this.page, this.own);
    }

    get visible() {
      return this.root.isConnected && this.root.offsetParent !== null;
    }

    show(...children) {
      clearTimeout(this.opening);
      this.pair = null;
      this.undoable = false;
      this.page.replaceChildren(...children.filter(Boolean));
    }

    card(title, ...children) {
      const heading = el('h2', { tabindex: -1 }, title);
      this.show(el('section', { class: 'hs-study-card' }, heading, ...children));
      if (this.visible && this.root.contains(document.activeElement)) heading.focus();
    }

    button(words, action, more = {}) {
      return el('button', { type: 'button', class: 'hs-study-button', onclick: action, ...more }, words);
    }

    // Before the votes

    async begin() {
      const told = await call({ do: 'begin' });
      if (told.kind === 'ready') return this.ready(told);
      if (told.kind === 'drawing') {
        this.card('The study opens soon', el('p', {}, `Its pictures are being drawn while nobody else needs this machine: ${told.ready} of ${told.of} are there.`),
          el('progress', { value: told.ready, max: told.of, 'aria-label': 'Pictures drawn' }));
        return this.later(4000);
      }
      if (told.kind === 'refused' && memory.get().token) {
        memory.set(null);
        return this.begin();
      }
      if (told.kind === 'none') return this.card('No study', el('p', {}, told.said));
      this.card('The study cannot be reached', el('p', { role: 'alert' }, told.said || 'The app does not answer.'), this.button('Try again', () => this.begin(), { 'data-main': true }));
    }

    later(ms) {
      this.opening = setTimeout(() => (this.visible ? this.begin() : this.later(ms)), ms);
    }

    ready(told) {
      this.study = told;
      this.receipt = told.receipt;
      this.data();
      if (!told.known) {
        memory.set(null);
        this.consent();
      } else if (told.votes || memory.get().practised) this.ask();
      else this.instructions();
    }

    consent() {
      const { consent, licence, name, ballots, notice } = this.study;
      const agree = async () => {
        const told = await call({ do: 'agree' });
        if (told.kind !== 'agreed') return this.complain(told);
        memory.set({ token: told.token });
        this.receipt = told.receipt;
        this.data();
        this.instructions();
      };
      this.card(`Which picture is better?`,
        el('p', { class: 'hs-study-name' }, `The study “${name}”: ${plural(ballots, 'pair')} of pictures, a few seconds each. You may stop at any time and go on later in this browser.`),
        ...consent.split(/\n\s*\n/).map((text) => el('p', {}, text)),
        notice && el('p', { class: 'hs-study-notice', role: 'note' }, notice),
        el('p', { class: 'hs-study-soft' }, `Licence of the published votes: ${licence}`),
        this.button('I agree, begin', this.once(agree), { 'data-main': true }), this.status());
    }

    instructions() {
      const { practice, attributes } = this.study;
      const go = () => (practice ? this.practise() : this.ask());
      const keys = [['1', 'left is better'], ['2', 'right is better'], ['0', 'equally good'], ['9', 'both bad'], ['S', 'skip'], ['U', 'undo'], ['Z', 'zoom']];
      this.card('How it goes',
        el('p', {}, 'Both pictures were drawn from the same words. Say which one is better: does it show what the words say, and does it look right?'),
        el('p', {}, 'Look at both before you choose. Zoom in when unsure. If you see no difference, say so; if neither is any good, say that.'),
        attributes.length ? el('p', {}, 'Below the buttons you may say more, before you choose. It is optional.') : null,
        el('ul', { class: 'hs-study-keys', 'aria-label': 'Keys' }, ...keys.map(([key, words]) => el('li', {}, el('kbd', {}, key), ` ${words}`))),
        this.button(practice ? `Practise with ${plural(practice, 'pair')}` : 'Begin', this.once(go), { 'data-main': true }), this.status());
    }

    async practise() {
      const told = await call({ do: 'practice' });
      if (told.kind !== 'practice') return this.complain(told);
      const pairs = told.pairs;
      const next = (n) => {
        if (n === pairs.length) return this.practised();
        this.pairPage({ ...pairs[n], practice: n + 1, of: pairs.length }, (choice) => {
          const right = choice === pairs[n].better;
          const words = right ? 'Yes, that is the better one.'
            : `We find the ${pairs[n].better} one better. Look once more.`;
          this.answered = true;
          this.page.querySelectorAll('.hs-study-frame')[pairs[n].better === 'left' ? 0 : 1].classList.add('hs-better');
          this.vote.replaceChildren(el('p', { class: 'hs-study-feedback', role: 'status' }, words), this.button(n + 1 === pairs.length ? 'Go on' : 'Next pair', () => next(n + 1), { 'data-main': true }));
          this.vote.querySelector('button').focus();
        });
      };
      next(0);
    }

    practised() {
      memory.set({ practised: true });
      this.card('Now it counts', el('p', {}, `The next ${plural(this.study.ballots, 'pair')} are saved, one by one, as you choose. There is no right answer: what counts is what you see.`),
        this.button('Start', this.once(() => this.ask()), { 'data-main': true }), this.status());
    }

    // Votes

    async ask() {
      this.follow(await call({ do: 'ask' }));
    }

    follow(told, said = '') {
      if (told.kind === 'pair') return this.pairPage(told, (choice) => this.send({ do: 'vote', choice }), said);
      if (told.kind === 'end') return this.end(told);
      if (told.kind === 'wait') return this.wait(told);
      if (['none', 'drawing', 'refused'].includes(told.kind)) return this.begin();
      this.card('The next pair did not come', el('p', { role: 'alert' }, told.said || 'The app does not answer. Nothing that was saved is lost.'),
        this.button('Try again', this.once(() => this.ask()), { 'data-main': true }));
    }

    async wait({ said, seconds }) {
      const words = el('p', { role: 'status' }, said);
      this.card('A moment', words);
      await sleep(seconds * 1000);
      if (this.page.contains(words)) this.ask();
    }

    pairPage(pair, chosen, said = '') {
      const images = ['left', 'right'].map((side) => el('img', { class: 'hs-study-picture', alt: `${side} picture`, src: pair[side], draggable: 'false' }));
      const place = pair.practice ? `Practice ${pair.practice} of ${pair.of}` : `${pair.votes + 1} of ${pair.of}`;
      const done = pair.practice ? pair.practice - 1 : pair.votes;
      this.note = el('p', { class: 'hs-study-note', role: 'status' });
      this.vote = el('div', { class: 'hs-study-vote' }, ...Object.entries(CHOICES).map(([name, { key, words }]) =>
        this.button(words, () => this.choose(name), { 'data-choice': name, 'aria-keyshortcuts': key, 'aria-disabled': 'true' })));
      for (const button of this.vote.children) button.append(kbd(CHOICES[button.dataset.choice].key));
      const quiet = (key, words, action) => el('button', { type: 'button', class: 'hs-study-quiet', 'data-do': words.toLowerCase(), 'aria-keyshortcuts': key, onclick: action }, words, kbd(key));
      const more = pair.practice ? [] : [quiet('S', 'Skip', () => this.skip()), quiet('U', 'Undo', () => this.undo())];
      this.show(
        el('header', { class: 'hs-study-head' }, el('span', { class: 'hs-study-count' }, place), el('progress', { value: done, max: pair.of, 'aria-label': 'Progress' }), this.note),
        el('h2', { class: 'hs-study-prompt' }, el('span', { class: 'hs-sr' }, 'Which picture shows this better? '), `“${pair.prompt}”`),
        el('div', { class: 'hs-study-pair', onpointermove: (event) => this.look(event), onclick: (event) => this.zoom(event) }, ...images.map((image) => el('div', { class: 'hs-study-frame' }, image))),
        this.vote,
        el('div', { class: 'hs-study-more' }, quiet('Z', 'Zoom', () => this.zoom()), ...more,
          pair.practice ? null : el('button', { type: 'button', class: 'hs-study-quiet', onclick: () => this.skip('reported') }, 'Something is broken')),
        pair.practice ? null : this.aspects(),
      );
      this.pair = pair;
      this.undoable = !pair.practice;
      this.chosen = chosen;
      Object.assign(this, { open: false, busy: false, zoomed: false, attributes: {}, answered: false });
      this.say(said, 'good');
      this.wakeWhenSeen(images, pair);
    }

    // Voting opens when both pictures are decoded and have been there for the minimum.
    async wakeWhenSeen(images, pair) {
      const seen = await Promise.all(images.map((image) => image.decode().then(() => true, () => false)));
      if (this.pair !== pair) return;
      if (seen.includes(false)) return this.say('A picture cannot be shown. Skip this pair.', 'bad');
      this.page.querySelector('.hs-study-pair').classList.add('hs-seen');
      this.since = performance.now();
      await sleep(this.study.dwell_ms);
      if (this.pair !== pair) return;
      this.open = true;
      for (const button of this.vote.children) button.removeAttribute('aria-disabled');
    }

    choose(choice) {
      if (!this.open || this.busy || this.answered) return;
      this.chosen(choice);
    }

    async send(given) {
      const { ballot } = this.pair;
      this.mark(given.choice);
      this.busy = true;
      this.say('');
      const told = await call({ ...given, ballot, attributes: this.attributes, zoomed: this.zoomed, dwell_ms: Math.round(performance.now() - this.since) });
      this.busy = false;
      if (told.next) return this.follow(told.next, told.said);
      if (this.pair?.ballot !== ballot) return;
      this.mark(null);
      if (told.kind === 'early' || told.kind === 'refused') return this.say(told.said, 'plain');
      this.say(told.said || NOT_SAVED, 'bad', () => this.send(given));
    }

    // Anything else that leads to another pair. Doing it twice does no harm.
    async other(given) {
      if (this.busy) return;
      this.busy = true;
      const told = await call(given);
      this.busy = false;
      if (told.next) return this.follow(told.next, told.said);
      this.say(told.said || 'That did not work, try again', told.kind === 'nothing' ? 'plain' : 'bad');
    }

    skip(why) {
      if (this.pair && !this.pair.practice) this.other({ do: 'skip', ballot: this.pair.ballot, ...(why && { why }) });
    }

    undo() {
      if (this.undoable) this.other({ do: 'undo' });
    }

    mark(choice) {
      for (const button of this.vote.children) button.classList.toggle('hs-chosen', button.dataset.choice === choice);
    }

    // Both pictures enlarge at the same place, under the pointer or by the arrow keys.
    zoom(event) {
      const pair = this.page.querySelector('.hs-study-pair');
      if (!pair) return;
      this.at = { x: 50, y: 50 };
      if (pair.classList.toggle('hs-zoomed')) this.zoomed = true;
      if (event) this.look(event, true);
      this.aim();
    }

    look(event, tapped) {
      const frame = event.target.closest?.('.hs-study-frame');
      if (!frame || !this.at || (event.pointerType === 'touch' && !tapped && !event.isPrimary)) return;
      const box = frame.getBoundingClientRect();
      this.at = { x: (100 * (event.clientX - box.left)) / box.width, y: (100 * (event.clientY - box.top)) / box.height };
      this.aim();
    }

    aim() {
      const pair = this.page.querySelector('.hs-study-pair');
      pair?.style.setProperty('--x', `${this.at.x}%`);
      pair?.style.setProperty('--y', `${this.at.y}%`);
    }

    aspects() {
      const { attributes } = this.study;
      if (!attributes.length) return null;
      const row = (name) => el('div', { class: 'hs-study-aspect', role: 'group', 'aria-label': ASPECTS[name] ?? name },
        el('span', {}, ASPECTS[name] ?? name.replaceAll('_', ' ')),
        el('span', { class: 'hs-study-sides' }, ...[['left', 'left'], ['tie', 'equal'], ['right', 'right']].map(([side, words]) =>
          el('button', { type: 'button', 'aria-pressed': 'false', onclick: (event) => this.aspect(name, side, event.target) }, words))));
      const open = memory.get().aspects === true;
      return el('details', { class: 'hs-study-aspects', open, ontoggle: (event) => memory.get().token && memory.set({ aspects: event.target.open }) },
        el('summary', {}, 'Say more before you choose (optional)'), ...attributes.map(row));
    }

    aspect(name, side, button) {
      if (this.attributes[name] === side) delete this.attributes[name];
      else this.attributes[name] = side;
      for (const one of button.parentNode.children) one.setAttribute('aria-pressed', String(one === button && this.attributes[name] === side));
    }

    // After the votes

    end(told) {
      const { votes, repeats, agreed, said, told: pairs } = told;
      this.receipt = told.receipt;
      this.data();
      const consistency = repeats ? `${plural(repeats, 'pair')} came twice with the sides swapped. You answered ${agreed} of them the same way.` : null;
      const rows = pairs.map((one) => el('tr', {}, el('td', {}, one.prompt), ...['left', 'right'].map((side) =>
        el('td', { class: one.choice === side ? 'hs-won' : '' }, one[side])), el('td', {}, SAID[one.choice])));
      this.card(said, el('p', {}, `You gave ${plural(votes, 'vote')}.`), consistency ? el('p', {}, consistency) : null,
        el('p', {}, 'This is your receipt. Keep it: with it you can have your votes erased, today or later.'),
        this.receiptLine(),
        rows.length ? el('details', { class: 'hs-study-told' }, el('summary', {}, 'What you compared'),
          el('div', { class: 'hs-study-scroll' }, el('table', {}, el('thead', {}, el('tr', {}, ...['Prompt', 'Left', 'Right', 'You chose'].map((head) => el('th', { scope: 'col' }, head)))), el('tbody', {}, ...rows)))) : null,
        this.button('Take back the last vote', () => this.undo(), { 'data-do': 'undo' }), this.status());
      this.undoable = true;
    }

    receiptLine() {
      const copy = this.button('Copy', async () => {
        await hypersd.copy(this.receipt);
        copy.textContent = 'Copied';
      });
      return el('p', { class: 'hs-study-receipt' }, el('code', {}, this.receipt), copy);
    }

    // Below every page: the receipt, and the way out.
    data() {
      const said = el('p', { role: 'status' });
      const code = el('input', { type: 'text', value: this.receipt ?? '', 'aria-label': 'Receipt', placeholder: 'K7QM-2XVD-R3AB-76TC-LWPF', spellcheck: 'false', autocomplete: 'off' });
      const ask = this.button('Erase these votes', () => (ask.replaceWith(sure, no), sure.focus()));
      const sure = this.button('Yes, erase them for good', async () => {
        const told = await call({ do: 'withdraw', receipt: code.value });
        said.textContent = told.said || 'Not erased, try again.';
        if (told.kind !== 'withdrawn') return;
        no.click();
        if (code.value !== this.receipt) return;
        memory.set(null);
        this.receipt = null;
        code.value = '';
        this.card('You have withdrawn', el('p', { role: 'status' }, told.said), this.button('Begin anew', () => this.begin()));
      }, { class: 'hs-study-button hs-alarm' });
      const no = this.button('No', () => (sure.replaceWith(ask), no.remove()));
      this.own.replaceChildren(el('details', { class: 'hs-study-own' }, el('summary', {}, 'Receipt and withdrawal'),
        el('p', {}, this.receipt ? 'Your receipt. Whoever has it can have your votes erased, nothing more.' : 'With a receipt from an earlier visit you can have its votes erased.'),
        el('div', { class: 'hs-study-row' }, code, ask), said));
    }

    // Sentences

    status() {
      return (this.note = el('p', { class: 'hs-study-note', role: 'status' }));
    }

    complain(told) {
      this.say(told.said || 'That did not work, try again', 'bad');
    }

    say(words, tone = 'plain', retry) {
      if (!this.note) return;
      this.note.dataset.tone = tone;
      this.note.replaceChildren(words);
      if (retry) this.note.append(this.button('Try again', retry));
    }

    once(action) {
      let going = false;
      return async () => {
        if (going) return;
        going = true;
        try {
          await action();
        } finally {
          going = false;
        }
      };
    }

    keydown(event) {
      const key = event.key.toLowerCase();
      const choice = Object.keys(CHOICES).find((name) => CHOICES[name].key === key);
      const arrows = { arrowleft: [-8, 0], arrowright: [8, 0], arrowup: [0, -8], arrowdown: [0, 8] };
      if (this.pair && choice) this.choose(choice);
      else if (this.pair && key === 's') this.skip();
      else if (key === 'u') this.undo();
      else if (this.pair && key === 'z') this.zoom();
      else if (arrows[key] && this.page.querySelector('.hs-zoomed')) {
        this.at = { x: Math.min(100, Math.max(0, this.at.x + arrows[key][0])), y: Math.min(100, Math.max(0, this.at.y + arrows[key][1])) };
        this.aim();
      } else return false;
      return true;
    }
  }

  let study = null;
  hypersd.mountStudy = (root) => {
    study = new Study(root);
    study.begin();
  };

  // Before the page's own keys, which belong to the other screens: on this one and the results they would act unseen.
  document.addEventListener('keydown', (event) => {
    const here = study?.visible;
    if (!here && !document.querySelector('#hs-results')?.offsetParent) return;
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
    const typing = event.target.closest?.('textarea, select, [contenteditable], input:not([type=checkbox], [type=radio], [type=range])');
    if (typing || ['?', 't', 'T', 'Tab', 'Enter', ' ', 'Escape'].includes(event.key)) return;
    if (event.key.length > 1 && event.target.closest?.('[role=tab], [role=radio]')) return;
    if (here && !(event.repeat && event.key.length === 1) && study.keydown(event)) event.preventDefault();
    event.stopPropagation();
  }, true);
})();
