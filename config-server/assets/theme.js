// Before anything is painted: the theme that was chosen here, if one was.
(() => {
  "use strict";
  try {
    const theme = localStorage.getItem("seawall-theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {
    // Without storage the system's theme is taken.
  }
})();
