//! The system's OpenSSH client, which knows its user's keys, agents, jump hosts and known hosts.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use anyhow::{Context, bail};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::exit::{Exit, stop};

/// How long a connection may take, in seconds.
const CONNECT_TIME_MAX_S: u32 = 20;
/// ssh's own exit status when it did not come as far as the command.
const NOT_CONNECTED: i32 = 255;
/// What is written at once, so that progress can be shown.
const PIECE_BYTES: usize = 256 * 1024;

/// A machine that is reached by SSH. The first command connects; the others use that connection.
#[derive(Debug)]
pub(super) struct Ssh {
    program: PathBuf,
    destination: String,
    options: Vec<String>,
    /// Of the connection that is shared; goes with this.
    control: tempfile::TempDir,
    /// Before each command that needs root.
    sudo: &'static str,
}

impl Ssh {
    pub(super) fn new(
        destination: &str,
        port: Option<u16>,
        identity: Option<&Path>,
        more: &[String],
    ) -> anyhow::Result<Ssh> {
        let control =
            tempfile::Builder::new().prefix("sw").tempdir().context("make a temporary directory")?;
        let mut options = vec![
            format!("-oConnectTimeout={CONNECT_TIME_MAX_S}"),
            "-oControlMaster=auto".to_owned(),
            format!("-oControlPath={}", control.path().join("c").display()),
            "-oControlPersist=60".to_owned(),
            "-oServerAliveInterval=15".to_owned(),
        ];
        if !std::io::stdin().is_terminal() {
            // There is nobody to ask.
            options.push("-oBatchMode=yes".to_owned());
        }
        if let Some(port) = port {
            options.push(format!("-p{port}"));
        }
        if let Some(identity) = identity {
            options.extend(["-oIdentitiesOnly=yes".to_owned(), format!("-i{}", identity.display())]);
        }
        options.extend(more.iter().map(|option| format!("-o{option}")));
        Ok(Ssh { program: "ssh".into(), destination: destination.to_owned(), options, control, sudo: "" })
    }

    /// What follows is done through sudo.
    pub(super) fn use_sudo(&mut self) {
        self.sudo = "sudo -n ";
    }

    /// Runs a script of sh(1) with arguments, which reads `input`; how it ended, and what it said.
    pub(super) async fn run(
        &self,
        script: &str,
        arguments: &[&str],
        input: &[u8],
        mut written: impl FnMut(usize),
    ) -> anyhow::Result<Output> {
        let arguments: Vec<String> = arguments.iter().map(|word| quoted(word)).collect();
        let line = format!("{}sh -c {} seawall {}", self.sudo, quoted(script), arguments.join(" "));
        let mut command = Command::new(&self.program);
        command.args(&self.options).arg("--").arg(&self.destination).arg(&line);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!("run ssh: there is none on this machine; install OpenSSH's client (openssh-client)")
            }
            Err(error) => return Err(error).context("run ssh"),
        };
        let mut stdin = child.stdin.take().context("write to ssh")?;
        let write = async {
            for piece in input.chunks(PIECE_BYTES) {
                // A command that refuses before it has read everything closes its end, and says why.
                if stdin.write_all(piece).await.is_err() {
                    break;
                }
                written(piece.len());
            }
            drop(stdin);
        };
        let (output, ()) = tokio::join!(child.wait_with_output(), write);
        let output = output.context("wait for ssh")?;
        match output.status.code() {
            Some(NOT_CONNECTED) => Err(self.not_connected(&String::from_utf8_lossy(&output.stderr))),
            _ => Ok(output),
        }
    }

    /// The same, for a script that must succeed; what it said.
    pub(super) async fn done(
        &self,
        doing: &str,
        script: &str,
        arguments: &[&str],
        input: &[u8],
    ) -> anyhow::Result<String> {
        let output = self.run(script, arguments, input, |_| {}).await?;
        self.must(doing, output)
    }

    pub(super) fn must(&self, doing: &str, output: Output) -> anyhow::Result<String> {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if !output.status.success() {
            bail!("{doing} on {}: {}", self.destination, if said.is_empty() { "it failed" } else { &said });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Why, in ssh's words, and what to do.
    fn not_connected(&self, said: &str) -> anyhow::Error {
        let lines: Vec<&str> =
            said.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('@')).collect();
        let last = lines.last().copied().unwrap_or("it says nothing");
        let (exit, advice) = if said.contains("REMOTE HOST IDENTIFICATION HAS CHANGED") {
            (
                Exit::Refused,
                "The host's key is another one than before: find out why before anything else; `ssh-keygen -R HOST` forgets \
                 the old one",
            )
        } else if said.contains("Host key verification failed") {
            (
                Exit::Refused,
                "The host's key is not known here: run ssh to it once by hand and compare the key, or give \
                 --ssh-option StrictHostKeyChecking=accept-new",
            )
        } else if said.contains("Permission denied") {
            (Exit::Refused, "Look at the user's name and the key; --identity FILE names one")
        } else if said.contains("Could not resolve") {
            (Exit::NotFound, "Look at the host's name")
        } else {
            (Exit::Unreachable, "Look whether the host runs, its sshd too, and at --port")
        };
        stop(exit, format!("reach {} by ssh: {last}. {advice}", self.destination))
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        // The connection would stay for its minute otherwise.
        let mut end = std::process::Command::new(&self.program);
        end.args(&self.options).args(["-Oexit", "--"]).arg(&self.destination);
        let _ = end.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let _ = self.control.path();
    }
}

/// A word for a shell.
pub(super) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_through_a_shell_as_they_are() {
        for word in ["", "a b", "it's", "$(id)", "a\nb", "'", "\\"] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }

    #[test]
    fn what_ssh_says_is_told_with_what_to_do() {
        let ssh = Ssh::new("root@web", None, None, &[]).unwrap();
        for (said, exit, advice) in [
            ("Host key verification failed.\n", Exit::Refused, "by hand"),
            (
                "@@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
                Exit::Refused,
                "ssh-keygen -R",
            ),
            ("root@web: Permission denied (publickey).", Exit::Refused, "--identity"),
            ("ssh: Could not resolve hostname web: Name or service not known", Exit::NotFound, "name"),
            ("ssh: connect to host web port 22: Connection refused", Exit::Unreachable, "--port"),
            ("", Exit::Unreachable, "says nothing"),
        ] {
            let error = ssh.not_connected(said);
            assert_eq!(Exit::of(&error), exit, "{said}");
            assert!(error.to_string().contains(advice), "{error}");
        }
    }
}
