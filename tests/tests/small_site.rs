//! A small site: everything in one process, by one command, with nothing but its commands, as the README says it. A file is
//! scanned, so that no privileges are needed.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use seawall_tests::site::{PATIENCE, Running, Site, free_address, text, told};

/// A site that runs, and where it says what.
struct Served {
    running: Running,
    said: std::path::PathBuf,
}

fn serve(site: &Site, name: &str, more: &[&str]) -> Served {
    let said = site.path(&format!("{name}.out"));
    let log = std::fs::File::create(site.path(&format!("{name}.log"))).unwrap();
    let mut command = site.command("seawall");
    command.args(["server", "small"]).args(more).stdin(Stdio::null());
    command.stdout(std::fs::File::create(&said).unwrap()).stderr(log);
    Served { running: Running(command.spawn().unwrap()), said }
}

impl Served {
    /// What it says once it runs.
    fn welcome(&mut self) -> String {
        let began = Instant::now();
        loop {
            let said = std::fs::read_to_string(&self.said).unwrap();
            if said.contains("seawall protect") {
                return said;
            }
            let log = || std::fs::read_to_string(self.said.with_extension("log")).unwrap();
            assert!(self.running.0.try_wait().unwrap().is_none(), "it has ended: {said}{}", log());
            assert!(began.elapsed() < PATIENCE, "it does not start: {said}{}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn stop(mut self) {
        let id = self.running.0.id().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        let status = self.running.0.wait().unwrap();
        let log = std::fs::read_to_string(self.said.with_extension("log")).unwrap();
        assert!(status.success() && log.contains("stopped"), "{status}: {log}");
    }
}

/// What a site tells Prometheus.
fn scraped(at: &str) -> String {
    let mut stream = std::net::TcpStream::connect(at).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut told = String::new();
    stream.read_to_string(&mut told).unwrap();
    told
}

fn port(address: &str) -> &str {
    address.rsplit_once(':').unwrap().1
}

#[test]
fn one_command_makes_a_site_and_goes_on_with_it() {
    let site = Site::empty();
    let (process, target) = (free_address(), free_address());
    let ports = ["--process-server-port", port(&process), "--target-server-port", port(&target)];
    let metrics = free_address();
    let first = [&["--listen", &site.server, "--metrics", &metrics], &ports[..]].concat();
    let mut served = serve(&site, "first", &first);
    let said = served.welcome();
    let password = said.lines().find_map(|line| line.split_once("shown this once: ")).unwrap().1;
    let login = said.lines().find_map(|line| line.split_once("seawall login ")).unwrap().1;
    let login: Vec<&str> = std::iter::once("login").chain(login.split(' ')).collect();
    let output = told(site.command("seawall").args(&login), &format!("{password}\n"));
    assert!(output.status.success(), "{}", text(&output));

    // Nobody else runs it meanwhile, and what is no site is left alone.
    let output = site.seawall(&["server", "small"]);
    assert!(!output.status.success() && text(&output).contains("another `seawall server`"), "{output:?}");
    std::fs::create_dir(site.path("mine")).unwrap();
    std::fs::write(site.path("mine/thesis.txt"), "x").unwrap();
    let output = site.seawall(&["server", "mine"]);
    assert!(!output.status.success() && text(&output).contains("not empty"), "{output:?}");
    assert_eq!(std::fs::read_dir(site.path("mine")).unwrap().count(), 1);

    let agent = site.enrol("agent", "web", &[]);
    let socket = site.path("agent.sock").display().to_string();
    let mut file = std::fs::OpenOptions::new().append(true).open(&agent).unwrap();
    write!(file, "\n[agent]\nsource = \"scan\"\ncontrol_socket = {socket:?}\n").unwrap();
    std::fs::write(site.path("disk.img"), vec![7; 4 << 20]).unwrap();
    let _agent = site.run("seawall-agent", &agent);
    site.until("the agent reports", &["machine", "list"], |said| said["machines"][0]["seen"].is_i64());
    let disk = site.path("disk.img").display().to_string();
    let output = site.seawall(&["protect", "web", &disk, "--despite-warnings", "--watch"]);
    assert!(output.status.success(), "{}", text(&output));
    // Prometheus is told of all three servers at one place, each metric once.
    let told = scraped(&metrics);
    for part in ["config-server", "process-server", "target-server"] {
        assert!(told.contains(&format!("seawall_build_info{{part=\"{part}\"")), "{told}");
    }
    for figure in ["seawall_fleet_machines 1", "seawall_process_cache_limit_bytes", "seawall_target_points{"]
    {
        assert!(told.lines().any(|line| line.starts_with(figure)), "{figure}: {told}");
    }
    let mut kinds: Vec<&str> = told.lines().filter(|line| line.starts_with("# TYPE")).collect();
    let count = kinds.len();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds.len(), count, "{told}");
    // The commands that speak to the target server have their credentials.
    let points = site.json(&["points", "--dir", "small"]);
    assert!(!points["groups"][0]["points"].as_array().unwrap().is_empty(), "{points}");
    served.stop();

    // The second start needs no option, and has everything; another password is not made.
    let output = site.seawall(&["server", "small", "--listen", "127.0.0.1:1"]);
    assert!(!output.status.success() && text(&output).contains("was made with"), "{output:?}");
    let output = site.seawall(&["server", "small", "--process-server-port", "1"]);
    assert!(!output.status.success() && text(&output).contains("leave the options out"), "{output:?}");
    let mut served = serve(&site, "second", &[]);
    assert!(!served.welcome().contains("shown this once"));
    assert_eq!(site.json(&["machine", "list"])["machines"][0]["protected"], true);
    std::fs::write(site.path("disk.img"), vec![9; 4 << 20]).unwrap();
    let began = Instant::now();
    let out = site.path("restored.img");
    let restore = ["restore", "--dir", "small", "--volume", "disk.img", "--point", "latest", "--force"];
    loop {
        let output = site.seawall(&[&restore[..], &["--out", out.to_str().unwrap()]].concat());
        assert!(output.status.success(), "{}", text(&output));
        if std::fs::read(&out).unwrap() == vec![9; 4 << 20] {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "what is written after the second start is not replicated");
        std::thread::sleep(Duration::from_millis(500));
    }
    served.stop();
}

/// A password in a file, and one that is too short, which makes nothing.
#[test]
fn a_site_is_made_with_the_password_of_a_file() {
    let site = Site::empty();
    let (process, target) = (free_address(), free_address());
    let first = [
        "--listen",
        &site.server,
        "--process-server-port",
        port(&process),
        "--target-server-port",
        port(&target),
        "--password-file",
        "password",
    ];
    std::fs::write(site.path("password"), "short\n").unwrap();
    let output = site.seawall(&[&["server", "small"], &first[..]].concat());
    assert!(!output.status.success() && text(&output).contains("expected 12 to"), "{output:?}");
    assert!(!site.path("small/config-server").exists());
    std::fs::write(site.path("password"), "long enough for anybody\nand more\n").unwrap();
    let mut served = serve(&site, "first", &first);
    let said = served.welcome();
    assert!(!said.contains("shown this once"), "{said}");
    let login = said.lines().find_map(|line| line.split_once("seawall login ")).unwrap().1;
    let login: Vec<&str> = std::iter::once("login").chain(login.split(' ')).collect();
    let output = told(site.command("seawall").args(&login), "long enough for anybody\n");
    assert!(output.status.success(), "{}", text(&output));
    served.stop();
}

/// The demo says where its console is while it runs, keeps it up when it is told to, and leaves nothing behind.
#[test]
fn a_demo_that_is_held_keeps_its_console_up() {
    let site = Site::empty();
    std::fs::create_dir(site.path("tmp")).unwrap();
    let said = site.path("demo.out");
    let log = std::fs::File::create(site.path("demo.log")).unwrap();
    let mut command = site.command("seawall");
    command.args(["demo", "--seconds", "2", "--source", "scan", "--hold"]).env("TMPDIR", site.path("tmp"));
    command.stdin(Stdio::null()).stdout(std::fs::File::create(&said).unwrap()).stderr(log);
    let mut demo = Running(command.spawn().unwrap());
    let began = Instant::now();
    let line = loop {
        let said = std::fs::read_to_string(&said).unwrap();
        if let Some(line) = said.lines().find(|line| line.contains("until Ctrl-C")) {
            break line.to_owned();
        }
        let log = || std::fs::read_to_string(site.path("demo.log")).unwrap();
        assert!(demo.0.try_wait().unwrap().is_none() && began.elapsed() < PATIENCE, "{said}{}", log());
        std::thread::sleep(Duration::from_millis(100));
    };
    let url = line.split(' ').find(|word| word.starts_with("https://")).unwrap();
    let address = url.trim_start_matches("https://").trim_end_matches('/');
    std::net::TcpStream::connect(address).unwrap_or_else(|error| panic!("{address}: {error}: {line}"));
    let id = demo.0.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    assert!(demo.0.wait().unwrap().success());
    assert!(std::net::TcpStream::connect(address).is_err(), "it still listens");
    assert_eq!(std::fs::read_dir(site.path("tmp")).unwrap().count(), 0, "the demo left files behind");
}
