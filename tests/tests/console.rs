//! The console in a real browser, from the login to a recovery point's page, on a fleet of real programs. Pictures of its pages
//! are kept in target/console/, to be looked at.

use std::fs;
use std::path::PathBuf;

use seawall_tests::browser::{ENTER, TAB};
use seawall_tests::console::{Console, browser, pictures};
use seawall_tests::site::{PASSWORD, Running, Site, free_address, text};
use serde_json::json;

/// Enrols a part with the line that the console shows, but with the addresses and files of this place.
fn enrol(site: &Site, console: &Console, role: &str, name: &str, more: &[&str]) -> PathBuf {
    console.open("/enrol");
    console.browser.run(&format!("document.querySelector('select[name=role]').value = '{role}'")).unwrap();
    console.browser.fill("input[name=name]", name).unwrap();
    console.browser.click("form[action='/enrol'] button").unwrap();
    let line = console.browser.text("#line").unwrap();
    let words: Vec<&str> = line.split(' ').collect();
    assert_eq!(words[..2], [format!("seawall-{role}").as_str(), "enroll"], "{line}");
    let given = |option: &str| words[words.iter().position(|word| *word == option).unwrap() + 1];
    let dir = site.path(name);
    fs::create_dir(&dir).unwrap();
    let config = dir.join("part.toml");
    let mut command = site.command(words[0]);
    command.args(["enroll", "--server", given("--server"), "--token", given("--token"), "--config"]);
    let output = command.arg(&config).args(more).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    config
}

/// The three parts of a fleet, enrolled through the console and running.
fn parts(site: &Site, console: &Console) -> Vec<Running> {
    let advertised = [free_address(), free_address()];
    let target = enrol(site, console, "target-server", "dr", &["--advertise", &advertised[0]]);
    let process = enrol(site, console, "process-server", "cache", &["--advertise", &advertised[1]]);
    let agent = enrol(site, console, "agent", "web", &[]);
    // A file is scanned; a disk would be captured, and needs root.
    let socket = site.path("agent.sock");
    let more = format!("\n[agent]\nsource = \"scan\"\ncontrol_socket = {:?}\n", socket.display().to_string());
    fs::write(&agent, fs::read_to_string(&agent).unwrap() + &more).unwrap();
    fs::write(site.path("disk.img"), vec![7; 4 << 20]).unwrap();
    vec![
        site.run("seawall-target-server", &target),
        site.run("seawall-process-server", &process),
        site.run("seawall-agent", &agent),
    ]
}

#[test]
fn from_the_login_to_a_recovery_point() {
    let Some(browser) = browser("from_the_login_to_a_recovery_point") else { return };
    let site = Site::empty();
    site.init();
    let _config = site.run("seawall-config-server", std::path::Path::new("config/config-server.toml"));
    let console = Console { browser, url: format!("https://{}", site.server) };
    let browser = &console.browser;
    let zone = json!({ "timezoneId": "Asia/Kathmandu" });
    browser.chromium("Emulation.setTimezoneOverride", &zone).unwrap();
    browser.until("the console answers", || browser.open(&console.url).ok()).unwrap();

    // Somebody who has no mouse, and types the password wrong first. The page that was asked for comes after the login.
    console.open("/machines");
    assert_eq!(console.path(), "/login");
    console.picture("login");
    console.open("/machines");
    let focused = |name: &str| {
        let script =
            format!("return document.readyState === 'complete' && document.activeElement.name === '{name}'");
        browser.until(name, || browser.run(&script).ok()?.as_bool()?.then_some(())).unwrap();
    };
    focused("name");
    browser.press(&format!("admin{TAB}wrong, and long enough{ENTER}")).unwrap();
    browser.reads("The name or the password is wrong").unwrap();
    focused("password");
    browser.press(&format!("{PASSWORD}{ENTER}")).unwrap();
    browser.reads("No machine has enrolled yet").unwrap();
    assert_eq!(console.path(), "/machines");
    // That one is the browser's own line about the wrong password.
    let complaints = browser.complaints().unwrap();
    assert!(complaints.iter().all(|line| line.contains("401")), "{complaints:#?}");

    // A whole page, that changes while it is looked at: the event of the machine's first report brings it.
    let parts = parts(&site, &console);
    console.open("/machines");
    browser.run("window.stayed = true").unwrap();
    browser.reads("web").unwrap();
    browser
        .until("the agent's first report", || {
            let reported =
                browser.run("return !!document.querySelector('#live table time[data-ago]')").ok()?;
            reported.as_bool()?.then_some(())
        })
        .unwrap();
    assert_eq!(browser.run("return window.stayed").unwrap(), true, "the page was not loaded anew");
    console.open("/servers");
    browser
        .until("both servers report", || {
            let seen =
                browser.run("return document.querySelectorAll('td[data-label=Room] meter').length").ok()?;
            (seen.as_i64()? >= 1 && !browser.text("#live").ok()?.contains("not yet")).then_some(())
        })
        .unwrap();

    // What changes something is refused without the page's second secret, whoever's cookie comes with it.
    let forged = "return fetch('/enrol', { method: 'POST', body: new URLSearchParams({ role: 'agent', minutes: '5' }) })
        .then(async (answer) => `${answer.status} ${(await answer.text()).includes('csrf')}`)";
    assert_eq!(browser.run(forged).unwrap(), "403 true");
    let complaints = browser.complaints().unwrap();
    assert!(complaints.iter().all(|line| line.contains("403")), "{complaints:#?}");

    // Protect, first without looking at the warning that a file is scanned.
    console.open("/machines");
    browser.click("#live td a").unwrap();
    browser.click("#protect").unwrap();
    let disk = site.path("disk.img").display().to_string();
    browser.fill("input[name=disk]:not([type=checkbox])", &disk).unwrap();
    console.picture("protect");
    browser.click("form.fields button").unwrap();
    browser.find("#job-state[data-state=failed]").unwrap();
    console.picture("job-warned");
    browser.click("#subject").unwrap();
    browser.click("#protect").unwrap();
    browser.fill("input[name=disk]:not([type=checkbox])", &disk).unwrap();
    browser.click("input[name=despite_warnings]").unwrap();
    browser.click("form.fields button").unwrap();
    // Before that the form's page is still there.
    browser.find("#job-state").unwrap();
    browser.run("window.stayed = true").unwrap();
    let job = browser.find("#job-state[data-state=done]");
    assert!(job.is_ok(), "{:#}\n{}", job.unwrap_err(), site.logs());
    assert_eq!(browser.run("return window.stayed").unwrap(), true, "the job's page was not loaded anew");
    console.picture("job-done");

    // The first point, on the overview and on the group's page.
    console.open("/");
    browser.reads("Yes: the protected machine can be recovered").unwrap();
    console.picture("overview");
    browser.click("#live table a").unwrap();
    browser.find(".timeline a circle").unwrap();
    browser.find("#charts .u-wrap canvas").unwrap();
    let moment = browser.text(".answer time[data-moment]").unwrap();
    assert!(!moment.contains("UTC"), "{moment}");
    let shown = "const time = document.querySelector('time[data-moment]');
        return new Intl.DateTimeFormat('en', { hour: '2-digit', minute: '2-digit', timeZone: 'Asia/Kathmandu' })
            .format(new Date(time.dateTime)).split(' ')[0].slice(-2) === time.textContent.match(/:(\\d\\d):/)[1]";
    assert_eq!(browser.run(shown).unwrap(), true, "{moment} is not the viewer's time");
    console.picture("group");
    let dark = "const back = () => getComputedStyle(document.body).backgroundColor;
        const before = back(); document.getElementById('theme').click(); const after = back();
        document.getElementById('theme').click(); const again = back();
        localStorage.clear(); delete document.documentElement.dataset.theme;
        return before !== after && before === again";
    assert_eq!(browser.run(dark).unwrap(), true, "the theme's button does nothing");

    // A point that a person asks for, by its name.
    browser.run("document.querySelector('select[name=consistency]').value = 'crash'").unwrap();
    browser.fill("input[name=label]", "before <the> upgrade").unwrap();
    browser.click("form[action$='/point'] button").unwrap();
    browser.find("#job-state[data-state=done]").unwrap();
    browser.click("#subject").unwrap();
    browser.click("#live table a").unwrap();
    browser.reads("before <the> upgrade").unwrap();
    browser.run("[...document.querySelectorAll('#live td')].find((cell) => cell.textContent.includes('before <the> upgrade')).querySelector('a').click()").unwrap();
    browser.reads("Use it").unwrap();
    let page = browser.text("#content").unwrap();
    assert!(
        page.contains("before <the> upgrade") && page.contains("seawall restore --volume disk.img"),
        "{page}"
    );
    console.picture("point");

    // Failed over to that point, and back; whoever has the page open is told that its buttons are of another stage.
    browser.click("details:has(form[action$='/failover']) summary").unwrap();
    browser.click("form[action$='/failover'] input[name=promote]").unwrap();
    browser.fill("form[action$='/failover'] input[name=confirm]", &format!("web{ENTER}")).unwrap();
    browser.find("#job-state[data-state=done]").unwrap();
    console.picture("job-failover");
    browser.click("#subject").unwrap();
    browser.click("#live table a").unwrap();
    browser.find("#live [data-stage=promoted] li.here").unwrap();
    console.picture("group-promoted");
    let other = "const csrf = document.querySelector('input[name=csrf]').value;
        const action = document.querySelector(\"form[action$='/demote']\").action;
        return fetch(action, { method: 'POST', body: new URLSearchParams({ csrf }) }).then((answer) => answer.ok)";
    assert_eq!(browser.run(other).unwrap(), true);
    browser.find("[data-changed]:not([hidden]) a").unwrap();
    browser.click("[data-changed] a").unwrap();
    browser.find("#lifecycle[data-stage=failed-over]").unwrap();
    browser.click("details:has(form[action$='/cancel']) summary").unwrap();
    browser.fill("form[action$='/cancel'] input[name=confirm]", &format!("web{ENTER}")).unwrap();
    browser.find("#job-state[data-state=done]").unwrap();
    browser.click("#subject").unwrap();
    browser.click("#live table a").unwrap();
    browser.find("#lifecycle[data-stage=protected]").unwrap();

    // The protection ends only when the machine's name was typed.
    browser.click("details:has(form[action$='/unprotect']) summary").unwrap();
    let ungiven = "const form = document.querySelector(\"form[action$='/unprotect']\");
        form.confirm.value = 'wbe'; form.noValidate = true; form.requestSubmit()";
    browser.run(ungiven).unwrap();
    browser.reads("is not the name of what would be destroyed").unwrap();
    console.open("/");
    browser.click("#live table a").unwrap();
    browser.click("details:has(form[action$='/unprotect']) summary").unwrap();
    browser.fill("form[action$='/unprotect'] input[name=confirm]", &format!("web{ENTER}")).unwrap();
    browser.find("#job-state[data-state=done]").unwrap();
    console.open("/");
    browser.reads("not protected any more").unwrap();

    let mut painted = Vec::new();
    for (path, name) in [
        ("/", "overview"),
        ("/machines", "machines"),
        ("/servers", "servers"),
        ("/jobs", "jobs"),
        ("/events", "events"),
        ("/policies", "policies"),
        ("/enrol", "enrol"),
        ("/approvals", "approvals"),
        ("/users", "users"),
        ("/audit", "audit"),
        ("/settings", "settings"),
        ("/settings/alerts", "alerts"),
    ] {
        console.open(path);
        browser.find("h1").unwrap();
        painted.push(format!("{name} {:.0}", console.first_paint()));
        if name != "overview" {
            console.picture(name);
        }
    }
    eprintln!("first contentful paint on loopback, debug build, in ms: {}", painted.join(", "));
    eprintln!("pictures: {}", pictures().display());
    let complaints = browser.complaints().unwrap();
    assert!(complaints.iter().all(|line| line.contains("409")), "{complaints:#?}");
    browser.click("form[action='/logout'] button").unwrap();
    browser.reads("Log in").unwrap();
    console.open("/audit");
    assert_eq!(console.path(), "/login");
    drop(parts);
}
