// A classic script in the head, so that the first paint has the right colours: modules run after it.
(() => {
  const STORED = "faithdiff.theme";
  const system = matchMedia("(prefers-color-scheme: dark)");

  /** @returns {"light" | "dark"} what the person chose, else what the system asks for */
  function wanted() {
    const stored = localStorage.getItem(STORED);
    return stored === "light" || stored === "dark" ? stored : system.matches ? "dark" : "light";
  }

  function apply() {
    const theme = wanted();
    document.documentElement.dataset.theme = theme;
    document.getElementById("theme-toggle")?.setAttribute("aria-pressed", String(theme === "dark"));
  }

  function toggle() {
    const theme = wanted() === "dark" ? "light" : "dark";
    const isAsSystem = (theme === "dark") === system.matches;
    // Who goes back to what the system has follows the system again.
    if (isAsSystem) localStorage.removeItem(STORED);
    else localStorage.setItem(STORED, theme);
    apply();
  }

  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme-toggle")?.addEventListener("click", toggle);
  });
})();
