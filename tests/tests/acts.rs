//! Every act of the API has its command, and the command does that act: a whole site is run, the commands are given to it, and
//! what they asked the config server for is held against the API's own list.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use seawall_tests::site::{PASSWORD, PATIENCE, Running, Site, free_address, text};
use serde_json::Value;

/// Acts that no command does, and why.
const WITHOUT_COMMAND: [(&str, &str); 7] = [
    (
        "POST /login",
        "`seawall login` begins with it, before there is anything to be asked as; this test begins with that",
    ),
    ("GET /openapi.json", "`seawall-config-server openapi` prints it without a server"),
    ("GET /health", "for load balancers and probes, which have no login"),
    ("POST /enrol", "a part does it with its own program"),
    ("POST /part/renew", "a part does it by itself"),
    ("POST /part/check-in", "a part does it by itself"),
    (
        "GET /events/stream",
        "asked for by `seawall events --watch`, as a stream; seen by the test of the operator",
    ),
];

/// A site with an administrator, and what was asked for.
struct Asked {
    site: Site,
    seen: BTreeSet<(String, String)>,
    _running: Running,
}

impl Asked {
    fn new() -> Asked {
        let site = Site::empty();
        let port = |address: String| address.rsplit_once(':').unwrap().1.to_owned();
        std::fs::write(site.path("password"), PASSWORD).unwrap();
        let mut command = site.command("seawall");
        command.args(["server", "small", "--password-file", "password", "--listen", &site.server]);
        command.args(["--process-server-port", &port(free_address())]);
        command.args(["--target-server-port", &port(free_address())]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(site.path("site.log")).unwrap());
        let running = Running(command.spawn().unwrap());
        let mut asked = Asked { site, seen: BTreeSet::new(), _running: running };
        let url = format!("https://{}", asked.site.server);
        let ca = asked.site.path("small/config-server/ca/ca.pem").display().to_string();
        let scopes = "read,operate,enrol,administer";
        let login = ["login", "--server", &url, "--ca-file", &ca, "--scope", scopes];
        let began = Instant::now();
        while !asked.told(&login, PASSWORD).status.success() {
            assert!(
                began.elapsed() < PATIENCE,
                "{}",
                std::fs::read_to_string(asked.site.path("site.log")).unwrap()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        asked
    }

    /// Runs a command that reads `input`, and notes what it asks for.
    fn told(&mut self, args: &[&str], input: &str) -> Output {
        let mut command = self.site.command("seawall");
        command.args(args).args(["--log", "enrol=debug", "--log-format", "json"]);
        let output = seawall_tests::site::told(&mut command, input);
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
            // Fields stand beside the message or in an object of their own.
            let fields = if entry["fields"].is_object() { &entry["fields"] } else { &entry };
            if let (Some(method), Some(path)) = (fields["method"].as_str(), fields["path"].as_str()) {
                let path = path.split('?').next().unwrap();
                self.seen.insert((method.to_owned(), path.to_owned()));
            }
        }
        output
    }

    /// What a command that succeeds says to programs.
    fn json(&mut self, args: &[&str]) -> Value {
        self.json_told(args, "")
    }

    fn json_told(&mut self, args: &[&str], input: &str) -> Value {
        let output = self.told(&[args, &["--json"]].concat(), input);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        let last = String::from_utf8_lossy(&output.stdout).lines().last().map(str::to_owned);
        serde_json::from_str(&last.unwrap_or_else(|| panic!("{args:?} says nothing"))).unwrap()
    }

    /// Whether some command asked for this act.
    fn did(&self, act: &str) -> bool {
        let (method, path) = act.split_once(' ').unwrap();
        self.seen.iter().any(|(asked, at)| {
            asked == method
                && at.split('/').count() == path.split('/').count()
                && at.split('/').zip(path.split('/')).all(|(at, path)| {
                    at == path
                        || path.starts_with('{')
                            && at.len() == 32
                            && at.bytes().all(|byte| byte.is_ascii_hexdigit())
                })
        })
    }
}

/// What a command says, as soon as it says what is waited for.
fn until_json(asked: &mut Asked, args: &[&str], holds: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let said = asked.json(args);
        if holds(&said) {
            return said;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain: {said}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn acts() -> Vec<String> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let document: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let mut acts = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.strip_prefix("/api/v1").unwrap();
        acts.extend(
            methods.as_object().unwrap().keys().map(|method| format!("{} {path}", method.to_uppercase())),
        );
    }
    assert!(acts.len() > 50);
    acts
}

/// The example of the documents, as a timer runs it: a plan is tried out, and its report is mailed, also when it fails.
fn monthly_drill(asked: &mut Asked, shop: &str) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/monthly-drill.sh");
    let mailed = asked.site.path("mailed");
    let sendmail = asked.site.path("sendmail");
    std::fs::write(&sendmail, format!("#!/bin/sh\ncat > {}\n", mailed.display())).unwrap();
    std::fs::set_permissions(&sendmail, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    // Without the step that waits for a person; and then with a script that there is none of.
    let drilled = shop.lines().filter(|line| !line.contains("manual")).collect::<Vec<_>>().join("\n");
    for (plan, succeeds) in
        [(drilled.clone(), true), (drilled.replace("command: start", "command: absent"), false)]
    {
        std::fs::write(asked.site.path("drilled.yaml"), plan).unwrap();
        asked.json(&["plan", "apply", "drilled.yaml"]);
        let command = asked.site.command("seawall");
        let seawall = command.get_program().to_owned();
        let mut drill = std::process::Command::new("sh");
        drill.arg(script).args(["shop", "ops@example.com"]);
        drill.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        drill.env("SEAWALL", seawall).env("SENDMAIL", &sendmail).current_dir(asked.site.path("."));
        let output = seawall_tests::site::told(&mut drill, "");
        assert_eq!(output.status.success(), succeeds, "{}", text(&output));
        let mail = std::fs::read_to_string(&mailed).unwrap();
        let (head, body) = mail.split_once("\n\n").unwrap();
        let outcome = if succeeds { "passed" } else { "FAILED" };
        assert!(
            head.contains("To: ops@example.com")
                && head.contains(&format!("Subject: Drill of shop {outcome}")),
            "{head}"
        );
        assert!(body.contains("<html") && body.contains("</html>"), "{body}");
    }
}

#[test]
fn every_act_has_its_command() {
    let mut asked = Asked::new();
    let agent = asked.site.enrol("agent", "web", &[]);
    let socket = asked.site.path("agent.sock").display().to_string();
    let mut file = std::fs::OpenOptions::new().append(true).open(&agent).unwrap();
    write!(file, "\n[agent]\nsource = \"scan\"\ncontrol_socket = {socket:?}\n").unwrap();
    write!(file, "[scripts]\ndirectory = {:?}\n", asked.site.path("scripts")).unwrap();
    std::fs::write(asked.site.path("disk.img"), vec![7; 4 << 20]).unwrap();
    let running = asked.site.run("seawall-agent", &agent);
    asked.site.until("the agent reports", &["machine", "list"], |said| said["machines"][0]["seen"].is_i64());
    asked.site.until("both servers report", &["server", "list"], |said| {
        said["servers"].as_array().unwrap().iter().filter(|server| server["seen"].is_i64()).count() == 2
    });
    let disk = asked.site.path("disk.img").display().to_string();
    asked.json(&["protect", "web", &disk, "--despite-warnings", "--watch"]);

    // Looking.
    assert_eq!(asked.json(&["overview"])["groups_recoverable"], 1);
    asked.json(&["machine", "list"]);
    assert_eq!(asked.json(&["machine", "show", "web"])["machine"]["name"], "web");
    assert_eq!(asked.json(&["group", "list"])["groups"][0]["name"], "web");
    asked.json(&["group", "show", "web"]);
    asked.json(&["group", "points", "web"]);
    asked.json(&["group", "samples", "web"]);
    assert_eq!(asked.json(&["server", "list"])["servers"].as_array().unwrap().len(), 2);
    asked.json(&["server", "show", "process-server"]);
    assert!(asked.json(&["server", "show", "target-server"])["capacity"]["bytes_free"].as_u64() > Some(0));
    assert_eq!(asked.json(&["user", "me"])["name"], "admin");
    asked.json(&["events"]);
    asked.json(&["alert", "list"]);
    assert!(!asked.json(&["audit"])["entries"].as_array().unwrap().is_empty());

    // Acting on the group.
    assert_eq!(asked.json(&["group", "point", "web", "--consistency", "crash", "--watch"])["state"], "done");
    // What is scanned is compared all the time anyway; the agent says so, and the exit status that the job has failed.
    let output = asked.told(&["group", "resync", "web", "--watch", "--json"], "");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let resync = String::from_utf8_lossy(&output.stdout).lines().last().map(str::to_owned).unwrap();
    let resync: Value = serde_json::from_str(&resync).unwrap();
    assert!(resync["message"].as_str().unwrap().contains("all the time"), "{resync}");
    let job = resync["id"].as_str().unwrap().to_owned();
    asked.json(&["job", "list"]);
    asked.json(&["job", "show", &job]);
    let output = asked.told(&["job", "cancel", &job], "");
    assert!(!output.status.success() && text(&output).contains("ended"), "{}", text(&output));

    let output = asked.told(&["group", "targets", "web", "--target-server", "target-server"], "");
    assert!(!output.status.success() && text(&output).contains("already"), "{}", text(&output));

    // A drill, and its end.
    let drill = asked.json(&[
        "group",
        "drill",
        "start",
        "web",
        "--point",
        "latest",
        "--for",
        "1h",
        "--target-server",
        "target-server",
        "--watch",
    ]);
    assert_eq!(drill["state"], "done", "{drill}");
    let shown = until_json(&mut asked, &["group", "show", "web"], |group| {
        group["drills"][0]["export"]["drill"] == "drill"
    });
    assert_eq!(shown["drills"][0]["export"]["writable"], true, "{shown}");
    let output = asked.told(&["group", "drill", "start", "web"], "");
    assert!(!output.status.success() && text(&output).contains("is running"), "{}", text(&output));
    assert_eq!(asked.json(&["group", "drill", "stop", "web", "--watch"])["state"], "done");
    until_json(&mut asked, &["group", "show", "web"], |group| group["drills"].is_null());
    let output = asked.told(&["group", "drill", "stop", "web"], "");
    assert!(!output.status.success() && text(&output).contains("no drill"), "{}", text(&output));

    // A disk without anything to start from; the target says so.
    let prove = [
        "group",
        "prove",
        "web",
        "--expect",
        "login:",
        "--within",
        "1m",
        "--target-server",
        "target-server",
        "--watch",
    ];
    let output = asked.told(&prove, "");
    assert!(output.status.code() == Some(3) && text(&output).contains("nor boot code"), "{}", text(&output));

    // Failing over, and back. A scanned file cannot be handed over, and there is nothing to release; the acts say so.
    let failover = |asked: &mut Asked, step: &str, more: &[&str]| {
        let job = asked.json(&[&["group", "failover", step, "web", "--watch"], more].concat());
        assert_eq!(job["state"], "done", "{step}: {job}");
    };
    failover(&mut asked, "start", &["--point", "latest", "--yes", "--target-server", "target-server"]);
    failover(&mut asked, "promote", &[]);
    assert_eq!(asked.json(&["group", "show", "web"])["failover"]["failover"]["complete"], true);
    let output = asked.told(&["group", "failover", "cancel", "web", "--yes"], "");
    assert!(!output.status.success() && text(&output).contains("Demote it first"), "{}", text(&output));
    failover(&mut asked, "demote", &[]);
    failover(&mut asked, "cancel", &["--yes"]);
    let output = asked.told(&["group", "failover", "commit", "web", "--yes"], "");
    assert!(!output.status.success() && text(&output).contains("has not failed over"), "{}", text(&output));
    let output = asked.told(&["group", "failover", "release", "web"], "");
    assert!(!output.status.success() && text(&output).contains("not handed over"), "{}", text(&output));
    let output = asked.told(&["group", "failback", "web", "--yes"], "");
    assert!(!output.status.success() && text(&output).contains("in place of web"), "{}", text(&output));
    let at_home =
        ["--disk", "disk.img=/dev/nbd0", "--home", "disk.img=/dev/vda", "--target-server", "target-server"];
    let output = asked.told(&[&["group", "reverse", "web", "--machine", "web"], &at_home[..]].concat(), "");
    assert!(!output.status.success() && text(&output).contains("protected already"), "{}", text(&output));
    let output = asked.told(&["group", "failover", "start", "web", "--planned", "--yes", "--watch"], "");
    assert!(output.status.code() == Some(3) && text(&output).contains("hand over"), "{}", text(&output));

    // Policies.
    asked.json(&["policy", "create", "gold", "--set", "epoch_interval_ms=500"]);
    assert_eq!(asked.json(&["policy", "show", "gold"])["policy"]["epoch_interval_ms"], 500);
    asked.json(&["policy", "change", "gold", "--set", "rpo_s_max=60", "--rename", "golden"]);
    let policies = asked.json(&["policy", "list"]);
    let names: Vec<&str> =
        policies["policies"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["default", "golden"]);
    asked.json(&["group", "change", "web", "--policy", "golden", "--process-server", "process-server"]);
    assert_eq!(asked.json(&["group", "show", "web"])["policy_name"], "golden");
    asked.json(&["group", "change", "web", "--policy", "default"]);

    // Recovery plans, with a script that this machine's agent runs.
    let steps = "- {id: start, script: {machine: web, command: start, arguments: [x]}}\n- {id: person, manual: {text: Look at it}}\n";
    let shop = format!("name: shop\ngoals: {{rto_s: 600}}\nsteps:\n{steps}");
    std::fs::write(asked.site.path("shop.yaml"), &shop).unwrap();
    assert_eq!(asked.json(&["plan", "check", "shop.yaml"])["steps"], 2);
    assert!(asked.json(&["plan", "list"])["plans"].as_array().unwrap().is_empty());
    let wrong = asked.told(&["plan", "check", "-"], &shop.replace("start,", "../start,"));
    assert!(!wrong.status.success() && text(&wrong).contains("line 4"), "{}", text(&wrong));
    for steps in [1, 2] {
        assert_eq!(asked.json(&["plan", "apply", "shop.yaml"])["steps"], 2, "{steps}");
    }
    let output = asked.told(&["plan", "run", "shop", "--mode", "dry-run", "--watch", "--json"], "");
    assert_eq!(output.status.code(), Some(3), "the script is not there: {}", text(&output));
    let scripts = asked.site.path("scripts");
    std::fs::create_dir(&scripts).unwrap();
    let add = |script: &str| {
        let path = scripts.join("start");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        for path in [&scripts, &path] {
            std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
    };
    add("echo \"$1 in a $SEAWALL_MODE of $SEAWALL_PLAN\"; exit 3");
    assert_eq!(asked.json(&["plan", "run", "shop", "--mode", "dry-run", "--watch"])["state"], "done");
    let output = asked.told(&["plan", "run", "shop", "--mode", "drill"], "");
    assert!(!output.status.success() && text(&output).contains("--yes"), "{}", text(&output));
    let output = asked.told(&["plan", "run", "shop", "--mode", "drill", "--yes", "--watch"], "");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let report = asked.json(&["plan", "report", "shop"]);
    assert_eq!(report["steps"][0]["output"], "x in a drill of shop\n", "{report}");
    add("echo fine");
    asked.json(&["plan", "resume", "shop"]);
    let began = Instant::now();
    while !asked.told(&["plan", "confirm", "shop", "--note", "seen"], "").status.success() {
        assert!(began.elapsed() < PATIENCE, "{:#}", asked.json(&["plan", "report", "shop"]));
        std::thread::sleep(Duration::from_millis(200));
    }
    let run = report["id"].as_str().unwrap().to_owned();
    assert_eq!(asked.json(&["job", "show", &run, "--watch"])["state"], "done");
    let report = asked.json(&["plan", "report", "shop", "--run", &run, "--html", "report.html"]);
    assert_eq!((&report["steps"][0]["output"], &report["rto_reached"]), (&"fine\n".into(), &true.into()));
    assert_eq!(report["steps"][0]["attempts"], 2);
    assert!(std::fs::read_to_string(asked.site.path("report.html")).unwrap().contains("seen"));
    assert_eq!(asked.json(&["plan", "show", "shop"])["runs"].as_array().unwrap().len(), 3);
    monthly_drill(&mut asked, &shop);
    asked.json(&["plan", "remove", "shop", "--yes"]);

    // Access.
    asked.json_told(&["user", "create", "vera", "--role", "administrator"], "a long enough one\n");
    assert_eq!(asked.json(&["user", "change", "vera", "--disabled", "false"])["disabled"], false);
    assert_eq!(asked.json(&["user", "list"])["users"].as_array().unwrap().len(), 2);
    let token =
        asked.json(&["api-token", "create", "probe", "--days", "1"])["id"].as_str().unwrap().to_owned();
    asked.json(&["api-token", "list"]);
    asked.json(&["api-token", "delete", &token]);
    let token = asked.json(&["token", "create"])["id"].as_str().unwrap().to_owned();
    asked.json(&["token", "list"]);
    asked.json(&["token", "delete", &token]);
    let settings = asked.json(&["alert", "settings"]);
    asked.json_told(&["alert", "settings", "--from", "-"], &settings.to_string());
    asked.told(&["alert", "test"], "");
    let mistaken = asked.told(&["user", "password"], "not the old one\nanother long one\n");
    assert!(!mistaken.status.success() && text(&mistaken).contains("wrong"), "{}", text(&mistaken));
    let changed = format!("another {PASSWORD}");
    asked.json_told(&["user", "password"], &format!("{PASSWORD}\n{changed}\n"));

    // A second person.
    asked.json(&["setting", "change", "--second-person", "true"]);
    assert_eq!(asked.json(&["setting", "show"])["second_person"], true);
    let output = asked.told(&["policy", "delete", "golden", "--yes", "--json"], "");
    assert_eq!(output.status.code(), Some(7), "{}", text(&output));
    let approval: Value = serde_json::from_slice(&output.stdout).unwrap();
    let id = approval["id"].as_str().unwrap().to_owned();
    assert_eq!(asked.json(&["approval", "list"])["approvals"][0]["state"], "waiting");
    // Not by whoever has asked.
    let output = asked.told(&["approval", "approve", &id], "");
    assert!(!output.status.success(), "{}", text(&output));
    let (url, mine) = (format!("https://{}", asked.site.server), asked.site.path("profile.toml"));
    let (ca, vera) = (asked.site.path("small/config-server/ca/ca.pem"), asked.site.path("vera.toml"));
    let login = [
        "login",
        "--server",
        &url,
        "--ca-file",
        ca.to_str().unwrap(),
        "--scope",
        "read,operate,administer",
        "--user",
        "vera",
        "--profile",
        vera.to_str().unwrap(),
    ];
    assert!(asked.told(&login, "a long enough one\n").status.success());
    let answered = asked.json(&["approval", "approve", &id, "--profile", vera.to_str().unwrap()]);
    assert_eq!(answered["state"], "approved");
    assert_eq!(asked.json(&["policy", "list"])["policies"].as_array().unwrap().len(), 1);
    let off = asked.told(&["setting", "change", "--second-person", "false", "--json"], "");
    if off.status.code() == Some(7) {
        let approval: Value = serde_json::from_slice(&off.stdout).unwrap();
        let id = approval["id"].as_str().unwrap().to_owned();
        asked.json(&["approval", "approve", &id, "--profile", vera.to_str().unwrap()]);
    }

    // The end.
    assert!(asked.told(&["machine", "remove", "nobody", "--yes"], "").status.code() == Some(4));
    asked.json(&["unprotect", "web", "--yes", "--watch"]);
    drop(running);
    let output = asked.told(&["group", "remove", "web"], "");
    assert!(
        !output.status.success() && text(&output).contains("--yes"),
        "nobody was asked: {}",
        text(&output)
    );
    asked.json(&["group", "remove", "web", "--yes"]);
    asked.json(&["machine", "remove", "web", "--yes"]);
    asked.json(&["server", "remove", "process-server", "--yes"]);
    asked.json(&["server", "remove", "target-server", "--yes"]);
    assert!(asked.json(&["server", "list"])["servers"].as_array().unwrap().is_empty());
    assert!(mine.exists() && asked.told(&["logout"], "").status.success() && !mine.exists());

    let mut without = Vec::new();
    for act in acts() {
        match WITHOUT_COMMAND.iter().find(|(excepted, _)| *excepted == act) {
            Some((_, why)) => assert!(!asked.did(&act), "{act} is excepted ({why}), and a command does it"),
            None if asked.did(&act) => {}
            None => without.push(act),
        }
    }
    assert!(without.is_empty(), "no command asks for {without:?}; they asked for {:#?}", asked.seen);
}
