//! The console in a browser, as tests look at it: pictures of its pages, and what must hold for every one of them. Whatever fails is a
//! failed test.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::browser::Browser;

/// A desktop's screen, and a phone's, in CSS pixels.
const SCREENS: [(&str, u32, u32, bool, &[&str]); 2] =
    [("", 1280, 900, false, &["light", "dark"]), ("-phone", 390, 844, true, &["light", "dark"])];
/// Charts are drawn anew when the theme has changed.
const DRAWN_AFTER: std::time::Duration = std::time::Duration::from_millis(150);

/// Where pictures go.
pub fn pictures() -> PathBuf {
    let dir = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")), PathBuf::from);
    let dir = dir.join("console");
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A browser for a test; if there is none, says that the test cannot run.
pub fn browser(test: &str) -> Option<Browser> {
    let installed = |program: &str| std::process::Command::new(program).arg("--version").output().is_ok();
    if !installed("chromedriver") || !installed("chromium") {
        crate::cannot_run(test, "it needs Debian's packages chromium and chromium-driver");
        return None;
    }
    Some(Browser::start().unwrap())
}

/// A console, and who looks at it.
#[derive(Debug)]
pub struct Console {
    /// Who looks.
    pub browser: Browser,
    /// Where it is, without a slash at the end.
    pub url: String,
}

impl Console {
    /// Opens one of its pages.
    pub fn open(&self, path: &str) {
        self.browser.open(&format!("{}{path}", self.url)).unwrap();
    }

    /// Which page is shown.
    pub fn path(&self) -> String {
        self.browser.run("return location.pathname").unwrap().as_str().unwrap().to_owned()
    }

    /// A picture of the page as it is, on a desktop and on a phone, light and dark; nothing may stick out at the side.
    pub fn picture(&self, name: &str) {
        let dir = pictures();
        let theme = |theme: &str| {
            let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": theme }] });
            self.browser.chromium("Emulation.setEmulatedMedia", &features).unwrap();
        };
        for (screen, width, height, phone, themes) in SCREENS {
            self.browser.screen(width, height, phone).unwrap();
            for wanted in themes {
                theme(wanted);
                std::thread::sleep(DRAWN_AFTER);
                let wide = "return document.documentElement.scrollWidth - innerWidth";
                let wide = self.browser.run(wide).unwrap().as_i64().unwrap();
                assert!(wide <= 0, "{name}{screen}, {wanted}: {wide} pixels stick out");
                self.browser.screenshot(&dir.join(format!("{name}{screen}-{wanted}.png"))).unwrap();
            }
        }
        self.browser.screen(1280, 900, false).unwrap();
        theme("light");
    }

    /// When the page was first painted, in milliseconds after it was asked for, by the browser's own clock.
    pub fn first_paint(&self) -> f64 {
        let script = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime";
        let painted = || self.browser.run(script).ok()?.as_f64();
        self.browser.until("the first paint", painted).unwrap()
    }
}
