// feature: page outbox schedule execcmd webhook
// What a person sees of the page, for the test with a browser.
(() => {
  const rgb = s => (s.match(/[\d.]+/g) || []).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  let contrast = 21; const outside = [], small = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, e = node.parentElement;
    if (!node.data.trim() || e.closest("thead")) continue;
    const style = getComputedStyle(e), a = light(rgb(style.color)), b = light(ground(e));
    contrast = Math.min(contrast, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
    if (parseFloat(style.fontSize) < 12.5) small.push(node.data);
    const range = document.createRange(); range.selectNodeContents(node);
    const text = range.getBoundingClientRect(), box = e.closest("section, .facts > div, .trouble, .hint, header, footer").getBoundingClientRect();
    if (text.right > box.right + 1 || text.left < box.left - 1 || text.right > innerWidth + 1) outside.push(node.data.trim());
  }
  const cells = [...document.querySelectorAll("td, th")].filter(e => !e.closest("thead") && e.scrollWidth > e.clientWidth + 1);
  return {
    Title: document.title, Text: document.body.innerText, Headline: document.querySelector("h1").innerText,
    Ground: light(ground(document.body)), Contrast: contrast, Width: document.documentElement.scrollWidth,
    Titles: document.querySelectorAll("h1").length, Headers: document.querySelectorAll("thead th[scope=col], th[scope=row]").length,
    Outside: [...outside, ...cells.map(e => e.innerText)], Small: small,
    Foreign: [...document.querySelectorAll("script, img, iframe, object, embed, form, input, [style], [src], .name > b")].map(e => e.outerHTML),
  };
})()
