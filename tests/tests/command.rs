//! What the operator's command says of itself elsewhere: completions that a shell takes, manual pages that a reader takes.

use std::process::Command;

use seawall_tests::site::{Site, text};

/// What bash offers for a line, whose last word is being typed.
fn offered(script: &std::path::Path, words: &[&str]) -> Vec<String> {
    let last = words.len() - 1;
    let complete = format!(
        "source {}; COMP_WORDS=({}); COMP_CWORD={last}; $(complete -p seawall | sed 's/.*-F \\([^ ]*\\).*/\\1/') seawall '{}' '{}'; \
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.display(),
        words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "),
        words[last],
        words[last - 1]
    );
    let output = Command::new("bash").args(["--norc", "-c", &complete]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn bash_takes_the_completions() {
    let site = Site::empty();
    let script = site.path("seawall.bash");
    std::fs::write(&script, site.shown(&["completions", "bash"])).unwrap();
    assert_eq!(offered(&script, &["seawall", "machi"]), ["machine"]);
    let inner = offered(&script, &["seawall", "policy", ""]);
    for expected in ["list", "show", "create", "change", "delete"] {
        assert!(inner.iter().any(|word| word == expected), "{inner:?}");
    }
    assert!(offered(&script, &["seawall", "group", "point", "--cons"]).contains(&"--consistency".to_owned()));
    assert_eq!(offered(&script, &["seawall", "nonsense-"]), Vec::<String>::new());
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(site.shown(&["completions", shell]).contains("unprotect"), "{shell}");
    }
    assert_eq!(site.seawall(&["completions", "tcsh"]).status.code(), Some(2));
}

/// Without groff or man-db at hand, the pages are looked at as text: every request is one that man(7) has, and what a reader
/// looks for is there.
#[test]
fn manual_pages_are_whole() {
    let site = Site::empty();
    let said = site.shown(&["man", "pages/man1"]);
    let mut pages = 0;
    for entry in std::fs::read_dir(site.path("pages/man1")).unwrap() {
        let path = entry.unwrap().path();
        let page = std::fs::read_to_string(&path).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let known =
            [".TH", ".SH", ".SS", ".TP", ".PP", ".IP", ".RS", ".RE", ".ie", ".el", ".br", ".nf", ".fi"];
        for line in page.lines().filter(|line| line.starts_with('.')) {
            let request = line.split_whitespace().next().unwrap();
            assert!(known.contains(&request), "{name}: {line}");
        }
        assert!(
            page.contains(&format!(".TH {name} 1")),
            "{name}: {}",
            page.lines().take(4).collect::<String>()
        );
        for section in [".SH NAME", ".SH SYNOPSIS"] {
            assert!(page.contains(section), "{name} has no {section}");
        }
        pages += 1;
    }
    assert!(said.starts_with(&format!("{pages} manual pages")), "{said}");
    let page = std::fs::read_to_string(site.path("pages/man1/seawall-group-point.1")).unwrap();
    assert!(page.contains("consistency") && page.contains("seawall group point web"), "{page}");
    assert!(!site.path("pages/man1/seawall-files-inside.1").exists());
    assert!(site.refused(&["man", "/proc/nowhere"]).contains("/proc/nowhere"));
}

/// Numbers that scripts rely on; docs/cli.md has them all.
#[test]
fn exit_statuses_are_those_of_the_document() {
    let site = Site::empty();
    let code = |args: &[&str]| site.seawall(args).status.code();
    assert_eq!(code(&["--help"]), Some(0));
    assert_eq!(code(&["no-such-command"]), Some(2));
    assert_eq!(code(&["machine", "list"]), Some(6), "nobody is logged in");
    let output = site.seawall(&["machine", "list", "--json"]);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(said["exit"] == 6 && said["error"].as_str().unwrap().contains("seawall login"), "{said}");
    std::fs::create_dir(site.path("empty")).unwrap();
    assert_eq!(code(&["points", "--dir", "empty"]), Some(1), "there is no configuration");
}
