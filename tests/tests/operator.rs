//! A fleet from its first command to its first recovery point, with the real programs and nothing but their commands, as the
//! README says it. A file is scanned, so that no privileges are needed.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use seawall_tests::site::{PASSWORD, PATIENCE, Site, free_address, text, told};
use serde_json::Value;

#[test]
fn from_an_empty_directory_to_the_first_point() {
    let site = Site::empty();
    let output = site.init();
    // The line that it prints is the one to type.
    let line = text(&output).lines().find_map(|line| line.trim().strip_prefix("seawall ").map(str::to_owned));
    let line = line.unwrap_or_else(|| panic!("{}", text(&output)));
    let login: Vec<&str> = line.split(' ').collect();

    assert!(site.refused(&["machine", "list"]).contains("seawall login"));
    let output = told(site.command("seawall").args(&login), PASSWORD);
    assert!(
        !output.status.success() && text(&output).contains("seawall-config-server run"),
        "{}",
        text(&output)
    );

    let config_server = site.run("seawall-config-server", Path::new("config/config-server.toml"));
    let began = Instant::now();
    loop {
        let output = told(site.command("seawall").args(&login), PASSWORD);
        if output.status.success() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{}\n{}", text(&output), site.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
    let output = told(site.command("seawall").args(&login), "wrong, and long enough\n");
    assert!(!output.status.success() && text(&output).contains("password is wrong"), "{}", text(&output));
    let mut strange = login.clone();
    let last = strange.len() - 1;
    let other = strange[last].replace(['0', '1', '2', '3', '4', '5', '6', '7'], "8");
    strange[last] = &other;
    let output = told(site.command("seawall").args(&strange), PASSWORD);
    assert!(!output.status.success() && text(&output).contains("check-config"), "{}", text(&output));

    assert!(site.shown(&["machine", "list"]).contains("seawall token create"));
    assert!(site.refused(&["protect", "web", "/dev/null"]).contains("there is none at all yet"));
    let (process_address, target_address) = (free_address(), free_address());
    let target = site.enrol("target-server", "dr", &["--advertise", &target_address]);
    let process = site.enrol("process-server", "cache", &["--advertise", &process_address]);
    let agent = site.enrol("agent", "web", &[]);
    let tokens = site.json(&["token", "list"]);
    let used: Vec<_> = tokens["tokens"].as_array().unwrap().iter().map(|token| &token["used_by"]).collect();
    assert_eq!(used, ["dr", "cache", "web"], "{tokens}");
    let unused = site.json(&["token", "create"])["id"].as_str().unwrap().to_owned();
    site.shown(&["token", "delete", &unused]);
    assert!(site.refused(&["token", "delete", &unused]).contains("There is no token"));

    // A file is scanned; a disk would be captured.
    let mut file = std::fs::OpenOptions::new().append(true).open(&agent).unwrap();
    let socket = site.path("agent.sock");
    write!(file, "\n[agent]\nsource = \"scan\"\ncontrol_socket = {:?}\n", socket.display().to_string())
        .unwrap();
    let disk = site.path("disk.img");
    std::fs::write(&disk, vec![7; 4 << 20]).unwrap();
    let _target = site.run("seawall-target-server", &target);
    let _process = site.run("seawall-process-server", &process);
    let _agent = site.run("seawall-agent", &agent);
    site.until("the agent reports", &["machine", "list"], |said| said["machines"][0]["seen"].is_i64());

    // Placement is by free space among those that report: asked again until both do.
    let disk = disk.to_str().unwrap();
    let asked = ["protect", "web", disk, "--policy", "default", "--target-server", "dr"];
    assert!(site.refused(&["protect", "web", disk, "--policy", "gold"]).contains("there are default"));
    assert!(site.refused(&["protect", "web", disk, "--target-server", "cache"]).contains("there are dr"));
    let began = Instant::now();
    let warned = loop {
        let output = site.seawall(&[&asked[..], &["--watch", "--json"]].concat());
        let job = String::from_utf8(output.stdout.clone()).unwrap();
        let job: Value = serde_json::from_str(job.lines().last().unwrap()).unwrap();
        let failed = |job: &Value| {
            job["steps"].as_array().is_some_and(|steps| steps.iter().any(|step| step["state"] == "failed"))
        };
        if job["error"].is_null() && !failed(&job) {
            assert_eq!(output.status.code(), Some(3), "a warning is not passed over: {}", text(&output));
            break job;
        }
        assert!(began.elapsed() < PATIENCE, "{job:#}\n{}", site.logs());
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(warned["state"], "failed", "{warned:#}");
    assert_eq!(site.json(&["machine", "show", "web"])["machine"]["protected"], false);
    let output = site.seawall(&[&asked[..], &["--despite-warnings", "--watch"]].concat());
    assert!(output.status.success(), "{}\n{}", text(&output), site.logs());
    for expected in ["The first recovery point", "is a recovery point", "done, 100 %: web is protected."] {
        assert!(text(&output).contains(expected), "{expected}: {}", text(&output));
    }

    let web = site.json(&["machine", "show", "web"]);
    assert!(web["machine"]["protected"] == true && web["group"]["points"].as_u64() > Some(0), "{web:#}");
    let shown = site.shown(&["machine", "show", "web"]);
    assert!(shown.contains("disk.img") && shown.contains("policy default"), "{shown}");
    // What has no command of its own is asked of the API by name.
    let overview: Value = serde_json::from_str(&site.shown(&["api", "get", "/overview"])).unwrap();
    assert!(overview["groups_recoverable"] == 1 && overview["machines"] == 1, "{overview:#}");
    let group = web["group"]["id"].as_str().unwrap();
    let compared =
        site.shown(&["api", "POST", &format!("/groups/{group}/point"), r#"{"consistency":"crash"}"#]);
    let compared: Value = serde_json::from_str(&compared).unwrap();
    let watched = site.seawall(&["job", "show", compared["id"].as_str().unwrap(), "--watch"]);
    assert!(watched.status.success(), "{}", text(&watched));
    assert!(site.refused(&["api", "POST", "/policies", r#"{"nam":"x"}"#]).contains("unknown field"));
    let jobs = site.json(&["job", "list"]);
    let job = jobs["jobs"][1]["id"].as_str().unwrap();
    assert_eq!(site.json(&["job", "show", job])["state"], "done");
    assert!(site.shown(&["job", "list"]).contains(job));
    assert!(site.refused(&["job", "cancel", job]).contains("ended"));
    // The newest ones, the oldest of them first.
    let events = site.json(&["events", "--last", "1000"]);
    let events = events["events"].as_array().unwrap();
    let messages: Vec<_> = events.iter().map(|event| event["message"].as_str().unwrap()).collect();
    let said = |what: &str| messages.iter().position(|message| message.contains(what));
    assert!(said("agent web enrolled") > said("target-server dr enrolled"), "{messages:#?}");
    let last = site.json(&["events", "--last", "1"]);
    assert!(
        last["events"].as_array().unwrap().len() == 1
            && last["events"][0]["id"].as_i64() >= events.last().unwrap()["id"].as_i64()
    );

    // A job outlives its config server.
    assert!(site.refused(&["unprotect", "web"]).contains("--yes"));
    let id = site.json(&["unprotect", "web", "--yes"])["id"].as_str().unwrap().to_owned();
    drop(config_server);
    let watching = site.command("seawall").args(["job", "show", &id, "--watch"]).output().unwrap();
    assert_eq!(
        watching.status.code(),
        Some(5),
        "what cannot be begun is not waited for: {}",
        text(&watching)
    );
    let _config_server = site.run("seawall-config-server", Path::new("config/config-server.toml"));
    site.answers();
    let output = site.seawall(&["job", "show", &id, "--watch"]);
    assert!(output.status.success() && text(&output).contains("unprotect web"), "{}", text(&output));
    assert!(site.refused(&["unprotect", "web", "--yes"]).contains("not protected"));
    assert!(site.shown(&["machine", "show", "web"]).contains("seawall protect web"));

    let profile = std::fs::read(site.path("profile.toml")).unwrap();
    assert!(site.shown(&["logout"]).contains("Logged out"));
    assert!(site.refused(&["events"]).contains("seawall login"));
    // What was copied before is worth nothing now.
    let stolen = site.path("stolen.toml");
    std::fs::write(&stolen, profile).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&stolen, mode).unwrap();
    let refused = site.refused(&["events", "--profile", stolen.to_str().unwrap()]);
    assert!(refused.contains("log in again"), "{refused}");
}
