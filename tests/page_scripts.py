"""JavaScript that the tests of the book run inside its pages."""

SETTLED = """
const done = arguments[arguments.length - 1];
const mathjax = window.MathJax?.startup?.promise ?? Promise.resolve();
mathjax.then(() => document.fonts.ready).then(() => requestAnimationFrame(() => setTimeout(done, 0)));
"""
LAYOUT = r"""
const main = document.querySelector('article.bd-article') ?? document.querySelector('main');
const width = document.documentElement.clientWidth;
const name = e => e.tagName.toLowerCase() + (e.className.baseVal ?? e.className ? '.' + e.className : '');
const scrolls = e => {
  for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (getComputedStyle(p).overflowX !== 'visible') return true;
  return false;
};
const sticksOut = e => {
  const box = e.getBoundingClientRect();
  return box.width > 1 && box.height > 1 && box.right > width + 1 && !scrolls(e);
};
return {
  page: [document.documentElement.scrollWidth, width],
  out: [...main.querySelectorAll('*:not(mjx-container *, pre *)')].filter(sticksOut).slice(0, 3).map(name),
};
"""
FACTS = r"""
const main = document.querySelector('article.bd-article') ?? document.querySelector('main');
const name = e => e.tagName.toLowerCase() + (e.className.baseVal ?? e.className ? '.' + e.className : '');
const prose = main.cloneNode(true);
prose.querySelectorAll('pre, code, script, style, mjx-container, math').forEach(e => e.remove());
const at = s => [...document.querySelectorAll(s)].map(a => a.href.split('#')[0]);
return {
  title: main.querySelector('h1')?.innerText ?? '',
  formulas: main.querySelectorAll('mjx-container').length || main.querySelectorAll('math').length,
  unset: [...main.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container, math')).length,
  broken: main.querySelectorAll('mjx-merror, merror').length,
  raw: prose.textContent.match(/\$\$|\\\(|\\\[|\\begin\{|\{\{<|^#\||```|\| *(—|-{3}):? *\|/m)?.[0] ?? '',
  images: [...document.querySelectorAll('img')].map(
    i => ({src: i.src.slice(0, 90), alt: i.alt.trim(), loaded: i.complete && i.naturalWidth > 0})),
  sidebar: at('.bd-sidebar-primary nav a, #quarto-sidebar .sidebar-item a'),
  previous: at('a.left-prev, .nav-page-previous a'),
  next: at('a.right-next, .nav-page-next a'),
  links: [...main.querySelectorAll('a[href]')].map(a => a.href),
  unlabelled: [...main.querySelectorAll('input, button')].filter(
    e => !(e.labels?.length || e.ariaLabel || e.title || e.innerText.trim())).map(name),
};
"""
VISIBLE = """
return [...arguments[0].querySelectorAll('img, canvas')].filter(e => e.checkVisibility()).map(
  e => e.toDataURL ? e.toDataURL() : e.src + e.style.cssText).join();
"""
HURRY = "Object.assign(arguments[0].dataset, {wait: 100, hold: 0})"
COLOURS = r"""
const channels = text => text.match(/[\d.]+/g).map(Number);
const solid = e => {
  for (let p = e; p; p = p.parentElement) {
    const c = channels(getComputedStyle(p).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const light = c => {
  const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const text = document.querySelector('main p');
const [a, b] = [light(channels(getComputedStyle(text).color)), light(solid(text))];
return {
  ground: b,
  contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
  coated: [...document.querySelectorAll('main .cell_output img, main .cell-output img, main figure')].filter(e => {
    const s = getComputedStyle(e), c = channels(s.backgroundColor);
    return s.filter !== 'none' || c.length < 4 || c[3] > 0;
  }).length,
};
"""
TIMES = """
const paint = performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0;
const loaded = performance.getEntriesByType('resource').map(e => e.name).filter(a => !a.startsWith('data:'));
return {paint, loaded, unsized: [...document.querySelectorAll('main img')].filter(
  i => !(i.getAttribute('width') && i.getAttribute('height'))).map(i => i.src.slice(-60))};
"""
PLAIN_CODE = "for (const code of document.querySelectorAll('.highlight pre, pre.sourceCode')) code.textContent += ''"
AXE = """
const done = arguments[arguments.length - 1];
const told = v => `${v.id} (${v.impact}): ${v.nodes.length} times, such as ${v.nodes[0].html.slice(0, 150)}`;
axe.run({resultTypes: ['violations'], ...(arguments[0] && {runOnly: arguments[0]})}).then(
  found => done(found.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(told)));
"""
THEME = """
for (const key of ['mode', 'theme']) localStorage.setItem(key, arguments[0]);
localStorage.setItem('quarto-color-scheme', arguments[0] === 'dark' ? 'alternate' : 'default');
"""
