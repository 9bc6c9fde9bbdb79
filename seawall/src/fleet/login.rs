//! `seawall login` and `seawall logout`.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{ArgGroup, Args};
use control::fleet::{Login, MadeToken, Name, NewApiToken, Scope};
use enrol::{Client, EnrolError, Fingerprint, Profile, ServerUrl};
use hyper::Method;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde_json::json;

use super::{ProfilePlace, advise, moment, say_json};
use crate::text;

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("known_by").required(true)), after_help = "Examples:
  As `seawall-config-server init` says it:
    seawall login --server https://seawall.example --user admin \\
        --fingerprint 5f0c9d1e7a3b4c2d8e6f5f0c9d1e7a3b4c2d8e6f5f0c9d1e7a3b4c2d8e6f5f0c
  With the authority's certificate at hand, for looking only, from a program that has the password:
    seawall login --server https://seawall.example --user vera --ca-file ca.pem --scope read --days 1

Asks for the password, or takes the first line of standard input. The password is not kept: a token is made with it, and kept in the
profile, which only its owner can read. Logging in again replaces the token.")]
pub(crate) struct LoginOptions {
    #[command(flatten)]
    place: ProfilePlace,
    /// Where the config server is: `https://HOST` or `https://HOST:PORT`
    #[arg(long, value_name = "URL")]
    server: ServerUrl,
    /// Who logs in
    #[arg(long, value_name = "NAME", default_value = "admin")]
    user: Name,
    /// By what the config server is known, as its `init` and `check-config` print it
    #[arg(long, value_name = "HEX", group = "known_by")]
    fingerprint: Option<Fingerprint>,
    /// The authority's certificate instead (ca.pem of the config server's authority)
    #[arg(long, value_name = "FILE", group = "known_by")]
    ca_file: Option<PathBuf>,
    /// What the token may be used for, within the user's role: read, operate, enrol, administer
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',', default_value = "read,operate,enrol")]
    scopes: Vec<Scope>,
    /// How many days it lasts
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=366))]
    days: u32,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  seawall logout

Deletes the token at the config server, then the profile.")]
pub(crate) struct LogoutOptions {
    #[command(flatten)]
    place: ProfilePlace,
}

/// Logs in. The order, and what breaks when it is reversed:
/// 1. a token is made;
/// 2. it is kept in the profile (else the profile may name a token that never was);
/// 3. the token before it goes (else a crash leaves a profile that nobody believes).
pub(crate) async fn login(options: &LoginOptions) -> anyhow::Result<()> {
    let path = options.place.find()?;
    let fingerprint = match (&options.fingerprint, &options.ca_file) {
        (Some(fingerprint), _) => *fingerprint,
        (None, Some(file)) => {
            let pem = std::fs::read_to_string(file)
                .with_context(|| format!("read the authority's certificate {}", file.display()))?;
            Fingerprint::of_pem(&pem).map_err(|reason| {
                anyhow::anyhow!("read the authority's certificate {}: {reason}", file.display())
            })?
        }
        (None, None) => {
            bail!("log in: say by what the config server is known, with --fingerprint or --ca-file")
        }
    };
    let password = ask_password(&options.user).await?;
    let client = Client::new(options.server.clone(), &fingerprint.trust(), None, None)?;
    let session = match client.login(&Login { name: options.user.clone(), password }).await {
        // Here its own mend is the one to show.
        Err(EnrolError::Problem(problem)) => return Err(EnrolError::Problem(problem).into()),
        answered => answered.map_err(advise)?,
    };
    let asked = NewApiToken { name: token_name()?, scopes: options.scopes.clone(), days: options.days };
    let made: MadeToken = client.post("/tokens", &asked).await?;
    let before = Profile::load(&path).ok().filter(|before| before.server == options.server);
    let profile = Profile {
        server: options.server.clone(),
        fingerprint,
        user: session.user.name.clone(),
        token: made.token,
        token_id: made.info.id,
        expires: made.info.expires,
    };
    if let Err(error) = profile.save(&path) {
        let _: Result<(), _> = delete_token(&client, &profile).await;
        return Err(error.into());
    }
    if let Some(before) = before.filter(|before| before.user == profile.user) {
        // It may have ended long ago.
        let _: Result<(), _> = delete_token(&client, &before).await;
    }
    // The session ends by itself when this does not arrive.
    let _: Result<(), _> = client.post("/logout", &()).await;
    if options.json {
        return say_json(&json!({
            "profile": path.display().to_string(),
            "server": profile.server,
            "user": profile.user,
            "role": session.user.role,
            "expires": profile.expires,
        }));
    }
    Ok(text::say(&format!(
        "Logged in at {} as {} ({}) until {}. The profile is {}.\n",
        profile.server,
        profile.user,
        session.user.role,
        moment(profile.expires),
        path.display()
    ))?)
}

pub(crate) async fn logout(options: &LogoutOptions) -> anyhow::Result<()> {
    let path = options.place.find()?;
    let profile = Profile::load(&path)?;
    match delete_token(&profile.client()?, &profile).await {
        Ok(()) => {}
        // It has ended already, or somebody has deleted it.
        Err(EnrolError::Problem(problem)) if matches!(problem.status, 401 | 404) => {}
        Err(error) => return Err(advise(error)),
    }
    std::fs::remove_file(&path).with_context(|| format!("remove the profile {}", path.display()))?;
    Ok(text::say(&format!("Logged out: the token is gone, and {} too.\n", path.display()))?)
}

async fn delete_token(client: &Client, profile: &Profile) -> Result<(), EnrolError> {
    client.call(Method::DELETE, &format!("/tokens/{}", profile.token_id), None::<&()>).await
}

/// By it people recognise the token in the list of theirs.
fn token_name() -> anyhow::Result<Name> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let fits = |letter: &char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-');
    let host: String = host.chars().filter(fits).take(48).collect();
    Ok(format!("seawall_{host}").parse()?)
}

pub(crate) async fn ask_password(user: &Name) -> anyhow::Result<String> {
    ask_secret(&format!("Password of {user}")).await
}

/// From the terminal, without showing it, or the next line of standard input.
pub(crate) async fn ask_secret(what: &str) -> anyhow::Result<String> {
    let silent = match std::io::stdin().is_terminal() {
        true => {
            eprint!("{what}: ");
            Some(Silent::begin().context("keep the terminal from showing the password")?)
        }
        false => None,
    };
    let (send, line) = tokio::sync::oneshot::channel();
    // Not the runtime's: it would wait for the line before the command could end.
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line);
        // Whoever waited was interrupted.
        let _ = send.send(read.map(|_| line));
    });
    let line = tokio::select! {
        line = line => line.context("read the password")?.context("read the password")?,
        _ = tokio::signal::ctrl_c() => bail!("{what}: interrupted"),
    };
    if silent.is_some() {
        eprintln!();
    }
    let password = line.trim_end_matches(['\n', '\r']);
    if password.is_empty() {
        bail!("{what}: none was given; type it, or give it as a line of standard input");
    }
    Ok(password.to_owned())
}

/// A terminal that does not show what is typed, until this is dropped.
struct Silent(Termios);

impl Silent {
    fn begin() -> rustix::io::Result<Silent> {
        let before = tcgetattr(std::io::stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &silent)?;
        Ok(Silent(before))
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // There is nothing left to try.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}
