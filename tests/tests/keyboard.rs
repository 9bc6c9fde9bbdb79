//! The console without a mouse: from the login to the settings with Tab and Enter alone, and on every page everything that can be
//! clicked is reached by Tab, and seen to have the focus. No page sticks out at the side, on a desktop or a phone, light or dark.

use std::collections::BTreeSet;
use std::fs;

use seawall_tests::browser::{ENTER, TAB};
use seawall_tests::console::{Console, browser};
use seawall_tests::site::{PASSWORD, Running, Site, free_address, text, told};
use serde_json::Value;

/// No page has more stops.
const STOPS_MAX: usize = 400;

/// Everything on the page that can be clicked or typed into, as far as it is shown, by what names it in a message. What is in a
/// closed `details` is not shown; of radio buttons of one name Tab comes to one.
const SHOWN: &str = "
    window.stops ||= (() => {
        const called = (element) => `${element.localName} ${element.getAttribute('href') || element.name || ''} ${
            (element.getAttribute('aria-label') || element.textContent).trim().slice(0, 40)}`;
        const shown = () => [...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]')]
            .filter((element) => !element.disabled && element.type !== 'hidden' && element.tabIndex >= 0
                && element.checkVisibility({ visibilityProperty: true, contentVisibilityAuto: true }));
        const numbered = (element) => `${called(element)} #${
            shown().filter((other) => called(other) === called(element)).indexOf(element)}`;
        return { shown, numbered };
    })();";

/// Where the focus is: its name, whether one sees it, and whether it is a stop of the page.
const FOCUS: &str = "
    const element = document.activeElement;
    if (!element || element === document.body || element === document.documentElement) return null;
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    const outlined = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
    const inView = box.width > 0 && box.height > 0 && box.bottom > 0 && box.right > 0 && box.top < innerHeight && box.left < innerWidth;
    return { name: stops.numbered(element), seen: outlined && inView, path: location.pathname };";

struct Keyboard(Console);

impl Keyboard {
    fn run(&self, script: &str) -> Value {
        self.0.browser.run(&format!("{SHOWN}{script}")).unwrap()
    }

    /// Goes on to the next stop; its name. `None` when the focus has left the page.
    fn tab(&self) -> Option<String> {
        self.0.browser.press(&TAB.to_string()).unwrap();
        let focus = self.run(FOCUS);
        if focus.is_null() {
            return None;
        }
        assert_eq!(focus["seen"], true, "nobody sees that this has the focus: {focus:#}");
        Some(focus["name"].as_str().unwrap().to_owned())
    }

    /// Goes on until something has the focus.
    fn tab_to(&self, selector: &str) {
        for _ in 0..STOPS_MAX {
            self.tab();
            let there = format!("return document.activeElement.matches({selector:?})");
            if self.run(&there) == true {
                return;
            }
        }
        panic!("{selector} is not reached by Tab at {}", self.0.path());
    }

    /// Presses Enter on it, and waits for the page that follows.
    fn enter(&self, selector: &str, awaited: &str) {
        self.tab_to(selector);
        self.0.browser.press(&ENTER.to_string()).unwrap();
        self.0.browser.find(awaited).unwrap();
    }

    /// Everything that is shown is reached, at most twice around the page: the focus may begin anywhere.
    fn everything_is_reached(&self, page: &str) {
        let shown = || -> BTreeSet<String> {
            serde_json::from_value(self.run("return stops.shown().map(stops.numbered)")).unwrap()
        };
        let presses = 2 * (shown().len() + 2);
        assert!((4..STOPS_MAX).contains(&presses), "{page} has {presses} stops to look for");
        let mut reached = BTreeSet::new();
        for _ in 0..presses {
            reached.extend(self.tab());
            if shown().is_subset(&reached) {
                return;
            }
        }
        let missed: Vec<_> = shown().difference(&reached).cloned().collect();
        panic!("{page}: Tab does not come to {missed:#?}, only to {reached:#?}");
    }
}

/// A protected machine, made with commands; its programs.
fn fleet(site: &Site) -> Vec<Running> {
    let output = site.init();
    let line = text(&output).lines().find_map(|line| line.trim().strip_prefix("seawall ").map(str::to_owned));
    let line = line.unwrap_or_else(|| panic!("{}", text(&output)));
    let login: Vec<&str> = line.split(' ').collect();
    let config = site.run("seawall-config-server", std::path::Path::new("config/config-server.toml"));
    let began = std::time::Instant::now();
    while !told(site.command("seawall").args(&login), PASSWORD).status.success() {
        assert!(began.elapsed() < seawall_tests::site::PATIENCE, "{}", site.logs());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let target = site.enrol("target-server", "dr", &["--advertise", &free_address()]);
    let process = site.enrol("process-server", "cache", &["--advertise", &free_address()]);
    let agent = site.enrol("agent", "web", &[]);
    let socket = site.path("agent.sock");
    // A file is scanned; a disk would be captured, and needs root.
    let more = format!("\n[agent]\nsource = \"scan\"\ncontrol_socket = {:?}\n", socket.display().to_string());
    fs::write(&agent, fs::read_to_string(&agent).unwrap() + &more).unwrap();
    let disk = site.path("disk.img");
    fs::write(&disk, vec![7; 4 << 20]).unwrap();
    let parts = vec![
        config,
        site.run("seawall-target-server", &target),
        site.run("seawall-process-server", &process),
        site.run("seawall-agent", &agent),
    ];
    site.until("the agent reports", &["machine", "list"], |said| said["machines"][0]["seen"].is_i64());
    let both_report = |said: &Value| {
        let seen = |server: &Value| server["seen"].is_i64();
        said["servers"].as_array().is_some_and(|all| all.len() == 2 && all.iter().all(seen))
    };
    site.until("both servers report", &["server", "list"], both_report);
    site.shown(&["protect", "web", disk.to_str().unwrap(), "--despite-warnings", "--watch"]);
    site.shown(&["group", "point", "web", "--consistency", "crash", "--label", "kept", "--watch"]);
    parts
}

#[test]
fn everything_is_reached_without_a_mouse() {
    let Some(browser) = browser("everything_is_reached_without_a_mouse") else { return };
    let site = Site::empty();
    let parts = fleet(&site);
    let keyboard = Keyboard(Console { browser, url: format!("https://{}", site.server) });
    let (console, browser) = (&keyboard.0, &keyboard.0.browser);

    // From the login to the settings.
    console.open("/login");
    keyboard.everything_is_reached("login");
    console.open("/");
    keyboard.tab_to("input[name=name]");
    browser.press(&format!("admin{TAB}{PASSWORD}{ENTER}")).unwrap();
    browser.find("#live table a[href^='/groups/']").unwrap();
    keyboard.enter("a.skip", "#content");
    keyboard.enter("#live table a[href^='/groups/']", "#charts");
    let group = console.path();
    keyboard.enter("nav a[href='/jobs']", "#live a[href^='/jobs/']");
    keyboard.enter("#live a[href^='/jobs/']", "#job-state");
    let job = console.path();
    keyboard.enter("a[href='/settings']", "form[action^='/settings']");
    assert_eq!(console.path(), "/settings");

    // What is folded away is opened by Enter, and then reached.
    console.open(&group);
    keyboard.tab_to("details.danger summary");
    browser.press(&ENTER.to_string()).unwrap();
    browser.find("details.danger[open] input[name=confirm]").unwrap();
    keyboard.tab_to("details.danger input[name=confirm]");
    // Points are told once somebody looks.
    let point = "#live td a[href*='/points/']";
    browser.find(point).unwrap();
    let href = |selector: &str| {
        let href = keyboard.run(&format!("return document.querySelector({selector:?}).getAttribute('href')"));
        href.as_str().unwrap().to_owned()
    };
    let point = href(point);
    console.open("/machines");
    browser.find("#live td a[href^='/machines/']").unwrap();
    let machine = href("#live td a[href^='/machines/']");

    for (page, path) in [
        ("overview", "/"),
        ("machines", "/machines"),
        ("machine", &machine),
        ("protect", &format!("{machine}/protect")),
        ("group", &group),
        ("point", &point),
        ("jobs", "/jobs"),
        ("job", &job),
        ("servers", "/servers"),
        ("events", "/events"),
        ("policies", "/policies"),
        ("enrol", "/enrol"),
        ("approvals", "/approvals"),
        ("users", "/users"),
        ("audit", "/audit"),
        ("settings", "/settings"),
        ("alerts", "/settings/alerts"),
    ] {
        console.open(path);
        browser.find("h1").unwrap();
        assert_eq!(console.path(), path, "{page}");
        keyboard.everything_is_reached(page);
        console.picture(&format!("keyboard-{page}"));
    }
    // However much happens, a page asks for itself once a second at most: each of these points is several events.
    console.open(&group);
    for _ in 0..3 {
        site.shown(&["group", "point", "web", "--consistency", "crash", "--watch"]);
    }
    let asked = "return performance.getEntriesByType('resource').filter((one) => one.name === location.href)
        .map((one) => one.startTime)";
    let times = || -> Vec<f64> { serde_json::from_value(keyboard.run(asked)).unwrap() };
    let times = browser.until("four refreshes", || Some(times()).filter(|times| times.len() >= 4)).unwrap();
    // Timers and the page's clock are rounded differently.
    let soonest = times.windows(2).map(|pair| pair[1] - pair[0]).fold(f64::MAX, f64::min);
    assert!(soonest >= 990.0, "the page was asked for again after {soonest} ms: {times:?}");
    let complaints = browser.complaints().unwrap();
    assert!(complaints.is_empty(), "{complaints:#?}");
    drop(parts);
}
