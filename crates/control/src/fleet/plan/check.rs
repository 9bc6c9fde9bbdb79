use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;

/// What is wrong with a plan, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanError {
    /// In which line of the text, from 1.
    pub line: Option<u64>,
    /// In which step.
    pub step: Option<Name>,
    /// What.
    pub reason: String,
}

impl std::fmt::Display for PlanError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The reader's own messages have their place already.
        match (&self.step, self.line) {
            (Some(step), Some(line)) => write!(f, "step {step} (line {line}): {}", self.reason),
            (Some(step), None) => write!(f, "step {step}: {}", self.reason),
            (None, Some(line)) if !self.reason.contains(&format!("line {line}")) => {
                write!(f, "line {line}: {}", self.reason)
            }
            (None, _) => f.write_str(&self.reason),
        }
    }
}

impl std::error::Error for PlanError {}

/// What is wrong, and with which step.
type Wrong = (Option<usize>, String);

fn within(name: &str, value: u64, most: u64) -> Result<(), String> {
    match value {
        value if (1..=most).contains(&value) => Ok(()),
        value => Err(format!("{name} is {value}, expected 1 to {most}")),
    }
}

fn no_more(name: &str, count: usize, most: usize) -> Result<(), String> {
    match count {
        count if count <= most => Ok(()),
        count => Err(format!("{name} has {count}, at most {most} go")),
    }
}

/// A text that people read: it has lines, and no other control characters.
fn readable(name: &str, text: &str, most: usize) -> Result<(), String> {
    no_more(&format!("the count of characters of {name}"), text.chars().count(), most)?;
    match text.chars().find(|one| one.is_control() && !matches!(one, '\n' | '\t')) {
        None => Ok(()),
        Some(control) => Err(format!("{name} has the control character {control:?}")),
    }
}

impl Plan {
    /// Looks whether every value makes sense.
    pub(super) fn check(&self) -> Result<(), Wrong> {
        let all = |reason: String| (None, reason);
        readable("about", &self.about, TEXT_CHARS_MAX).map_err(all)?;
        if let Some(rpo_s) = self.goals.rpo_s {
            within("rpo_s of goals", rpo_s, 31 * 86_400).map_err(all)?;
        }
        if let Some(rto_s) = self.goals.rto_s {
            within("rto_s of goals", rto_s, 31 * 86_400).map_err(all)?;
        }
        if self.steps.is_empty() {
            return Err(all("steps is empty; a plan does at least one thing".to_owned()));
        }
        no_more("steps", self.steps.len(), PLAN_STEPS_MAX).map_err(all)?;
        let mut earlier = HashSet::new();
        for (place, step) in self.steps.iter().enumerate() {
            step.check(&earlier).map_err(|reason| (Some(place), reason))?;
            if !earlier.insert(&step.id) {
                return Err((Some(place), format!("the id {} is there twice", step.id)));
            }
        }
        Ok(())
    }
}

impl PlanStep {
    fn check(&self, earlier: &HashSet<&Name>) -> Result<(), String> {
        readable("title", &self.title, TITLE_CHARS_MAX)?;
        within("timeout_s", self.timeout_s, STEP_TIMEOUT_S_MAX)?;
        if let Some(condition) = &self.only_if
            && !earlier.contains(&condition.step)
        {
            return Err(format!("only_if names {}, which is no earlier step", condition.step));
        }
        let kinds: Vec<&str> = self.actions().map(|action| action.kind()).collect();
        match &kinds[..] {
            [_] => {}
            [] => {
                return Err(
                    "it says nothing to do; it needs one of failover, commit, point, prove, wait, script, manual, dns, webhook"
                        .to_owned(),
                );
            }
            several => return Err(format!("it says {}; a step does one thing", several.join(" and "))),
        }
        match self.action() {
            Some(
                PlanAction::Failover(PlanFailover { groups, .. }) | PlanAction::Commit(PlanCommit { groups }),
            ) => {
                if self.when == PlanWhen::Drill {
                    return Err("a drill fails nothing over; leave out when: drill".to_owned());
                }
                check_groups(groups)
            }
            Some(PlanAction::Point(point)) => point.check(),
            Some(PlanAction::Prove(prove)) => check_groups(&prove.groups),
            Some(PlanAction::Wait(wait)) => {
                within("seconds", wait.seconds, WAIT_S_MAX)?;
                match wait.seconds >= self.timeout_s {
                    true => Err(format!(
                        "it waits {} s, and fails after timeout_s, {} s",
                        wait.seconds, self.timeout_s
                    )),
                    false => Ok(()),
                }
            }
            Some(PlanAction::Script(script)) => script.check(),
            Some(PlanAction::Manual(manual)) if manual.text.trim().is_empty() => {
                Err("text is empty; say what the person is to do".to_owned())
            }
            Some(PlanAction::Manual(manual)) => readable("text", &manual.text, TEXT_CHARS_MAX),
            Some(PlanAction::Dns(dns)) => dns.check(),
            Some(PlanAction::Webhook(webhook)) => webhook.check(),
            None => Ok(()),
        }
    }
}

fn check_groups(groups: &[Name]) -> Result<(), String> {
    if groups.is_empty() {
        return Err("groups is empty; name at least one machine".to_owned());
    }
    no_more("groups", groups.len(), PLAN_GROUPS_MAX)?;
    let mut seen = HashSet::new();
    match groups.iter().find(|group| !seen.insert(*group)) {
        Some(twice) => Err(format!("the group {twice} is named twice")),
        None => Ok(()),
    }
}

impl PlanPoint {
    fn check(&self) -> Result<(), String> {
        check_groups(&self.groups)?;
        match self.consistency.is_point() {
            true => Ok(()),
            false => {
                Err("consistency is none; a recovery point is application, filesystem or crash".to_owned())
            }
        }
    }
}

impl PlanScript {
    fn check(&self) -> Result<(), String> {
        no_more("arguments", self.arguments.len(), SCRIPT_ARGUMENTS_MAX)?;
        for argument in &self.arguments {
            no_more("the count of bytes of an argument", argument.len(), SCRIPT_ARGUMENT_BYTES_MAX)?;
            if argument.contains('\0') {
                return Err("an argument has a NUL".to_owned());
            }
        }
        Ok(())
    }
}

/// Whether a text is a name of DNS: labels of letters, digits, hyphens and underscores.
fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        !label.is_empty() && label.len() <= 63 && label.bytes().all(known)
    };
    text.len() <= 253 && text.strip_suffix('.').unwrap_or(text).split('.').all(label)
}

impl PlanDns {
    fn check(&self) -> Result<(), String> {
        let (host, port) = self.address()?;
        let is_host = host.parse::<std::net::IpAddr>().is_ok() || is_domain(host);
        if !is_host || port == 0 {
            return Err(format!("server is {:?}, expected HOST or HOST:PORT", self.server));
        }
        if !is_domain(&self.zone) {
            return Err(format!("zone is {:?}, expected a name such as example.com", self.zone));
        }
        if self.records.is_empty() {
            return Err("records is empty; nothing would change".to_owned());
        }
        no_more("records", self.records.len(), PLAN_RECORDS_MAX)?;
        let mut seen = HashSet::new();
        for record in &self.records {
            record.check()?;
            if !seen.insert((record.name.to_ascii_lowercase(), record.kind)) {
                return Err(format!("the record {} is there twice with one type", record.name));
            }
        }
        Ok(())
    }

    /// Its server's host and port.
    ///
    /// # Errors
    /// When the port is no number.
    pub fn address(&self) -> Result<(&str, u16), String> {
        const PORT: u16 = 53;
        let wrong = |_| format!("server is {:?}, expected HOST or HOST:PORT", self.server);
        if let Some((host, rest)) = self.server.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            return match rest.strip_prefix(':') {
                Some(port) => Ok((host, port.parse().map_err(wrong)?)),
                None => Ok((host, PORT)),
            };
        }
        match self.server.split_once(':') {
            // More than one colon and no brackets: an IPv6 address.
            Some((_, rest)) if rest.contains(':') => Ok((&self.server, PORT)),
            Some((host, port)) => Ok((host, port.parse().map_err(wrong)?)),
            None => Ok((&self.server, PORT)),
        }
    }
}

impl PlanRecord {
    fn check(&self) -> Result<(), String> {
        if self.name != "@" && !is_domain(&self.name) {
            return Err(format!(
                "the record's name is {:?}, expected one such as www, or @ for the zone",
                self.name
            ));
        }
        if self.ttl_s > i32::MAX as u32 {
            return Err(format!("ttl_s is {}, expected at most {}", self.ttl_s, i32::MAX));
        }
        no_more(&format!("values of {}", self.name), self.values.len(), PLAN_VALUES_MAX)?;
        for value in &self.values {
            let (fits, expected) = match self.kind {
                PlanRecordType::A => (value.parse::<Ipv4Addr>().is_ok(), "an IPv4 address"),
                PlanRecordType::Aaaa => (value.parse::<Ipv6Addr>().is_ok(), "an IPv6 address"),
                PlanRecordType::Cname => (is_domain(value), "a name, whole"),
                PlanRecordType::Txt => {
                    let printable = value.bytes().all(|byte| matches!(byte, b' '..=b'~'));
                    (printable && value.len() <= 255, "at most 255 printable characters of ASCII")
                }
            };
            if !fits {
                return Err(format!("the value {value:?} of {} is not {expected}", self.name));
            }
        }
        match self.kind == PlanRecordType::Cname && self.values.len() > 1 {
            true => Err(format!("{} is another name (CNAME) for several; it may be for one", self.name)),
            false => Ok(()),
        }
    }
}

impl PlanWebhook {
    fn check(&self) -> Result<(), String> {
        let rest = self.url.strip_prefix("https://").or_else(|| self.url.strip_prefix("http://"));
        let host = rest.map(|rest| rest.split(['/', '?', '#']).next().unwrap_or_default());
        let printable = self.url.len() <= 1000 && self.url.bytes().all(|byte| byte.is_ascii_graphic());
        if !printable || host.is_none_or(str::is_empty) {
            return Err(format!("url is {:?}, expected https://HOST/... or http://HOST/...", self.url));
        }
        no_more("headers", self.headers.len(), WEBHOOK_HEADERS_MAX)?;
        for (name, value) in &self.headers {
            let token = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            if name.is_empty() || name.len() > 64 || !name.bytes().all(token) {
                return Err(format!("{name:?} is no name of a header"));
            }
            // Its length is counted, its place is known, and a second host would be another server's.
            if ["host", "content-length", "transfer-encoding", "connection"]
                .contains(&name.to_ascii_lowercase().as_str())
            {
                return Err(format!("the header {name} is made by HTTP itself"));
            }
            if value.len() > 1000 || !value.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
                return Err(format!("the header {name} is not at most 1000 printable characters of ASCII"));
            }
        }
        no_more("the count of bytes of body", self.body.len(), WEBHOOK_BODY_BYTES_MAX)?;
        match self.body.is_empty() || self.method.has_body() {
            true => Ok(()),
            false => Err(format!("body goes with POST, PUT and PATCH, not with {}", self.method.as_str())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(more: &str) -> String {
        format!("name: shop\nsteps:\n  - id: first\n    wait: {{seconds: 1}}\n  - id: second\n{more}\n")
    }

    fn wrong(more: &str) -> String {
        Plan::read(&step(more)).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (more, expected) in [
            ("    wait: {second: 1}", "line 6"),
            ("    wait: {second: 1}", "second"),
            ("    wait: {seconds: 0}", "step second (line 5): seconds is 0, expected 1 to 86400"),
            (
                "    wait: {seconds: 700}",
                "step second (line 5): it waits 700 s, and fails after timeout_s, 600 s",
            ),
            ("    title: x", "step second (line 5): it says nothing to do"),
            (
                "    wait: {seconds: 1}\n    manual: {text: x}",
                "(line 5): it says wait and manual; a step does one thing",
            ),
            ("    manual: {text: ' '}", "text is empty"),
            ("    timeout_s: 0\n    manual: {text: x}", "timeout_s is 0"),
            (
                "    only_if: {step: third, outcome: failed}\n    manual: {text: x}",
                "third, which is no earlier step",
            ),
            ("    only_if: {step: second, outcome: failed}\n    manual: {text: x}", "no earlier step"),
            ("    point: {groups: []}", "groups is empty"),
            ("    failover: {groups: [a, a]}", "the group a is named twice"),
            ("    failover: {groups: [a], point: oldest}", "oldest"),
            ("    when: drill\n    failover: {groups: [a]}", "a drill fails nothing over"),
            ("    when: drill\n    commit: {groups: [a]}", "a drill fails nothing over"),
            ("    commit: {groups: []}", "groups is empty"),
            ("    point: {groups: [a, b, a]}", "the group a is named twice"),
            ("    point: {groups: [a], consistency: none}", "consistency is none"),
            ("    script: {machine: web, command: ../x}", "is not a name"),
            ("    script: {machine: web, command: x, arguments: [\"\\0\"]}", "NUL"),
            ("    dns: {server: 'a:b', zone: example.com, records: []}", "expected HOST or HOST:PORT"),
            ("    dns: {server: ns, zone: 'a b', records: []}", "zone is \"a b\""),
            ("    dns: {server: ns, zone: x.org, records: []}", "records is empty"),
            (
                "    dns: {server: ns, zone: x.org, records: [{name: w, type: A, values: [\"::1\"]}]}",
                "not an IPv4 address",
            ),
            ("    dns: {server: ns, zone: x.org, records: [{name: w, type: MX, values: []}]}", "MX"),
            (
                "    dns: {server: ns, zone: x.org, records: [{name: w, type: CNAME, values: [a, b]}]}",
                "it may be for one",
            ),
            (
                "    dns: {server: ns, zone: x.org, records: [{name: w, type: A, values: []}, {name: W, type: A, values: []}]}",
                "twice",
            ),
            ("    webhook: {url: 'ftp://x'}", "expected https://"),
            ("    webhook: {url: 'http:///x'}", "expected https://"),
            ("    webhook: {url: 'http://x', headers: {Host: y}}", "made by HTTP itself"),
            ("    webhook: {url: 'http://x', headers: {A: \"b\\r\\nc\"}}", "printable"),
            ("    webhook: {url: 'http://x', method: GET, body: x}", "not with GET"),
        ] {
            let error = wrong(more);
            assert!(error.contains(expected), "{more}\n{error}\n{expected}");
        }
        let twice = "name: shop\nsteps:\n- {id: a, wait: {seconds: 1}}\n- {id: a, wait: {seconds: 1}}\n";
        let error = Plan::read(twice).unwrap_err();
        assert_eq!((error.line, error.reason.as_str()), (Some(4), "the id a is there twice"));
        assert!(Plan::read("name: shop\nsteps: []").unwrap_err().to_string().contains("at least one thing"));
        assert!(Plan::read("name: [").is_err());
        assert!(Plan::read("name: a\nname: b\nsteps: []").unwrap_err().to_string().contains("name"));
    }

    #[test]
    fn limits_hold() {
        let steps = |count: usize| {
            let steps: String =
                (0..count).map(|number| format!("- {{id: s{number}, wait: {{seconds: 1}}}}\n")).collect();
            format!("name: shop\nsteps:\n{steps}")
        };
        Plan::read(&steps(PLAN_STEPS_MAX)).unwrap();
        assert!(Plan::read(&steps(PLAN_STEPS_MAX + 1)).unwrap_err().reason.contains("at most 64"));
        let long = format!("{}#{}", steps(1), "x".repeat(PLAN_TEXT_BYTES_MAX));
        assert!(Plan::read(&long).unwrap_err().reason.contains("at most 65536"));
        // Aliases that stand for aliases: small as a text, and very many values.
        let mut bomb = "name: x\nabout: &a [y, y, y, y, y, y, y, y, y]\n".to_owned();
        for (next, before) in ('b'..='i').zip('a'..) {
            bomb += &format!(
                "{next}: &{next} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}]\n"
            );
        }
        Plan::read(&bomb).unwrap_err();
    }

    #[test]
    fn json_is_read_too_and_what_is_written_is_read() {
        let text = r#"{"name": "shop", "goals": {"rto_s": 900}, "steps": [
            {"id": "say", "title": "Tell", "when": "drill", "on_failure": "continue",
             "webhook": {"url": "https://x.example/y", "headers": {"X-Key": "1"}, "body": "{}"}}]}"#;
        let plan = Plan::read(text).unwrap();
        assert_eq!(plan.goals.rto_s, Some(900));
        assert_eq!(plan.steps[0].action().unwrap().kind(), "webhook");
        assert_eq!((plan.steps[0].timeout_s, plan.steps[0].shown()), (600, "Tell"));
        let written = serde_json::to_string(&plan).unwrap();
        assert_eq!(Plan::read(&written).unwrap(), plan);
        assert_eq!(serde_json::from_str::<Plan>(&written).unwrap(), plan);
    }

    /// What docs/plans.md shows is a plan.
    #[test]
    fn the_example_of_the_documents_is_read() {
        let plan = Plan::read(include_str!("../../../../../docs/plan-example.yaml")).unwrap();
        let kinds: Vec<&str> = plan.steps.iter().map(|step| step.action().unwrap().kind()).collect();
        assert_eq!(
            kinds,
            [
                "point", "prove", "failover", "script", "wait", "manual", "dns", "webhook", "manual",
                "manual", "commit"
            ]
        );
        assert_eq!((plan.goals.rpo_s, plan.goals.rto_s), (Some(60), Some(1800)));
    }

    #[test]
    fn servers_have_ports_or_the_usual_one() {
        for (server, expected) in [
            ("ns.example.com", ("ns.example.com", 53)),
            ("ns:5353", ("ns", 5353)),
            ("192.0.2.1:54", ("192.0.2.1", 54)),
            ("[2001:db8::1]:54", ("2001:db8::1", 54)),
            ("[2001:db8::1]", ("2001:db8::1", 53)),
            ("2001:db8::1", ("2001:db8::1", 53)),
        ] {
            let dns =
                PlanDns { server: server.to_owned(), zone: "x".to_owned(), key: None, records: Vec::new() };
            assert_eq!(dns.address().unwrap(), expected, "{server}");
        }
    }

    #[test]
    fn steps_are_done_in_the_runs_that_they_say() {
        use RunMode::*;
        let fits =
            |when: PlanWhen| RunMode::ALL.iter().copied().filter(|mode| when.fits(*mode)).collect::<Vec<_>>();
        assert_eq!(fits(PlanWhen::Always), [Failover, Planned, Drill, DryRun]);
        assert_eq!(fits(PlanWhen::Unplanned), [Failover, DryRun]);
        assert_eq!(fits(PlanWhen::Planned), [Planned, DryRun]);
        assert_eq!(fits(PlanWhen::Drill), [Drill, DryRun]);
    }
}
