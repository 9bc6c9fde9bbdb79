//! A browser without a window, driven over the WebDriver protocol: one small client for what the console's tests need, since
//! the crates there are bring several dozen others.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

/// How long a page may take to become what is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Two looks at a page are so far apart.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What WebDriver calls an element in JSON.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// The key that goes on to the next field.
pub const TAB: char = '\u{e004}';
/// The key that sends a form.
pub const ENTER: char = '\u{e007}';

/// Chromium, driven by chromedriver. Both end when dropped.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    profile: tempfile::TempDir,
}

/// Something on a page.
#[derive(Clone, Debug)]
pub struct Element(String);

impl Browser {
    /// Starts both, with an empty profile. Certificates of authorities that it does not know are taken.
    ///
    /// # Errors
    /// When they are not installed, or do not start.
    pub fn start() -> anyhow::Result<Browser> {
        let mut command = Command::new("chromedriver");
        // A group of its own, so that Chromium's processes end with it.
        command.arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut driver = command.spawn().context("start chromedriver (Debian's package chromium-driver)")?;
        let out = driver.stdout.take().context("read what chromedriver says")?;
        let mut browser = Browser { driver, port: 0, session: String::new(), profile: tempfile::tempdir()? };
        let mut lines = BufReader::new(out).lines();
        let port = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (_, port) = line.split_once("started successfully on port ")?;
            port.trim_end_matches('.').parse().ok()
        });
        browser.port = port.context("find chromedriver's port in what it says")?;
        // Nobody else reads on; a full pipe would stop it.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let profile = format!("--user-data-dir={}", browser.profile.path().display());
        let arguments = [
            "--headless=new",
            // Root's browsers have no sandbox, and containers little shared memory.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-first-run",
            "--window-size=1280,900",
            &profile,
        ];
        let asked = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "acceptInsecureCerts": true,
            "goog:chromeOptions": { "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let begun = browser.ask("POST", "/session", Some(&asked))?;
        browser.session = begun["sessionId"].as_str().context("read the session's id")?.to_owned();
        Ok(browser)
    }

    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let body = body.map_or_else(String::new, Value::to_string);
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).context("reach chromedriver")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.port,
            body.len()
        )?;
        let mut reader = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            ensure!(reader.read_line(&mut line)? > 0, "chromedriver's answer ends in its head");
            match line.trim_end().split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse()?
                }
                None if line.trim_end().is_empty() => break,
                _ => {}
            }
        }
        let mut text = vec![0; length];
        reader.read_exact(&mut text)?;
        let mut answer: Value = serde_json::from_slice(&text)?;
        let value = answer["value"].take();
        if let Some(error) = value["error"].as_str() {
            bail!("{method} {path}: {error}: {}", value["message"].as_str().unwrap_or_default());
        }
        Ok(value)
    }

    fn session(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = (method == "POST").then_some(body);
        self.ask(method, &format!("/session/{}{path}", self.session), body)
    }

    /// Opens a page, and waits until it is loaded.
    ///
    /// # Errors
    /// When it is not.
    pub fn open(&self, url: &str) -> anyhow::Result<()> {
        self.session("POST", "/url", &json!({ "url": url })).map(drop)
    }

    /// Runs a function's body in the page; what it returns.
    ///
    /// # Errors
    /// When it throws.
    pub fn run(&self, script: &str) -> anyhow::Result<Value> {
        self.session("POST", "/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// The first element of a selector, waited for.
    ///
    /// # Errors
    /// When it does not appear; with the page's text.
    pub fn find(&self, selector: &str) -> anyhow::Result<Element> {
        let look = || {
            let found = self
                .session("POST", "/element", &json!({ "using": "css selector", "value": selector }))
                .ok()?;
            Some(Element(found[ELEMENT].as_str()?.to_owned()))
        };
        self.until(selector, look)
    }

    /// Waits until there is something.
    ///
    /// # Errors
    /// When it does not come; with the page's text.
    pub fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
        let began = Instant::now();
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            if began.elapsed() >= PATIENCE {
                let page =
                    self.run("return location.href + '\\n' + document.body.innerText").unwrap_or_default();
                bail!("waited in vain for {what} at {}", page.as_str().unwrap_or_default());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until the page's text has this.
    ///
    /// # Errors
    /// As [`Browser::until`].
    pub fn reads(&self, text: &str) -> anyhow::Result<()> {
        let script = "return document.body.innerText";
        self.until(text, || {
            let shown = self.run(script).ok()?;
            shown.as_str()?.contains(text).then_some(())
        })
    }

    /// The text of the first element of a selector.
    ///
    /// # Errors
    /// When it does not appear.
    pub fn text(&self, selector: &str) -> anyhow::Result<String> {
        let Element(id) = self.find(selector)?;
        let text = self.session("GET", &format!("/element/{id}/text"), &Value::Null)?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Clicks the first element of a selector.
    ///
    /// # Errors
    /// When it does not appear, or something is above it.
    pub fn click(&self, selector: &str) -> anyhow::Result<()> {
        let Element(id) = self.find(selector)?;
        self.session("POST", &format!("/element/{id}/click"), &json!({})).map(drop)
    }

    /// Types into the first element of a selector.
    ///
    /// # Errors
    /// When it does not appear, or takes no text.
    pub fn fill(&self, selector: &str, text: &str) -> anyhow::Result<()> {
        let Element(id) = self.find(selector)?;
        self.session("POST", &format!("/element/{id}/value"), &json!({ "text": text })).map(drop)
    }

    /// Presses keys, wherever the focus is.
    ///
    /// # Errors
    /// When the browser does not answer.
    pub fn press(&self, keys: &str) -> anyhow::Result<()> {
        let pressed: Vec<Value> = keys
            .chars()
            .flat_map(|key| {
                [json!({ "type": "keyDown", "value": key }), json!({ "type": "keyUp", "value": key })]
            })
            .collect();
        let actions = json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": pressed }] });
        self.session("POST", "/actions", &actions).map(drop)
    }

    /// A command of Chromium's own protocol.
    ///
    /// # Errors
    /// When it does not do it.
    pub fn chromium(&self, command: &str, parameters: &Value) -> anyhow::Result<Value> {
        self.session("POST", "/goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    /// Shows pages as a screen of this size does, in CSS pixels; `phone` for one that is touched.
    ///
    /// # Errors
    /// When the browser does not answer.
    pub fn screen(&self, width: u32, height: u32, phone: bool) -> anyhow::Result<()> {
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": if phone { 2 } else { 1 }, "mobile": phone,
        });
        self.chromium("Emulation.setDeviceMetricsOverride", &metrics).map(drop)
    }

    /// Writes what the page looks like, whole, to a PNG file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn screenshot(&self, file: &Path) -> anyhow::Result<()> {
        let parameters = json!({ "format": "png", "captureBeyondViewport": true });
        let shot = self.chromium("Page.captureScreenshot", &parameters)?;
        let bytes = from_base64(shot["data"].as_str().context("read the screenshot")?)?;
        ensure!(bytes.starts_with(b"\x89PNG"), "the screenshot is no PNG");
        fs::write(file, bytes).with_context(|| format!("write {}", file.display()))
    }

    /// What the browser complained of since it was asked last: scripts that threw, what a policy refused, what did not load.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn complaints(&self) -> anyhow::Result<Vec<String>> {
        let log = self.session("POST", "/se/log", &json!({ "type": "browser" }))?;
        let entries = log.as_array().cloned().unwrap_or_default();
        let severe = entries.iter().filter(|entry| entry["level"] == "SEVERE");
        Ok(severe.map(|entry| entry["message"].as_str().unwrap_or_default().to_owned()).collect())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() {
            // It may have ended already.
            let _ = self.session("DELETE", "", &Value::Null);
        }
        if let Some(group) = i32::try_from(self.driver.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.driver.wait();
    }
}

fn from_base64(text: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut kept, mut bits) = (0u32, 0);
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => bail!("{byte:#x} is no digit of base64"),
        };
        kept = kept << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((kept >> bits) as u8);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::from_base64;

    #[test]
    fn base64_is_read() {
        for (text, bytes) in
            [("", &b""[..]), ("TQ==", b"M"), ("TWE=", b"Ma"), ("TWFu", b"Man"), ("+/8=", b"\xfb\xff")]
        {
            assert_eq!(from_base64(text).unwrap(), bytes, "{text}");
        }
        assert!(from_base64("?").is_err());
    }
}
