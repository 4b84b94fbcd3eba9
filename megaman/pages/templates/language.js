// Language: a page's fixed texts are English. Those marked data-t, and attributes named by data-t-of, are looked up
// in ZH, as a whole or by pattern.
let language = /^zh\b/i.test(navigator.language) ? "zh-TW" : "en";
try {
  const stored = localStorage.getItem("megaman-language");
  if (stored === "en" || stored === "zh-TW") language = stored;
} catch { /* storage is disabled: the browser's language holds */ }

function t(text) {
  if (language === "en") return text;
  if (Object.hasOwn(ZH.texts, text)) return ZH.texts[text];
  const found = ZH.patterns.find(([pattern]) => pattern.test(text));
  return found ? text.replace(...found) : text;
}

const english = new WeakMap();
function translate(changed = () => {}) {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-t]")) {
    if (!english.has(element)) english.set(element, element.textContent.trim());
    element.textContent = t(english.get(element));
  }
  for (const element of document.querySelectorAll("[data-t-of]")) {
    const name = element.dataset.tOf;
    element.dataset.english ??= element.getAttribute(name);
    element.setAttribute(name, t(element.dataset.english));
  }
  for (const button of document.querySelectorAll(".languages button")) {
    button.setAttribute("aria-pressed", button.lang === language);
  }
  changed();
}

function offerLanguages(changed) {
  document.documentElement.classList.add("translated");
  document.querySelector(".languages").addEventListener("click", ({target}) => {
    if (!target.lang) return;
    language = target.lang;
    try {
      localStorage.setItem("megaman-language", language);
    } catch { /* as above */ }
    translate(changed);
  });
  if (language !== "en") translate(changed);
}
