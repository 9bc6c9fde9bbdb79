//! `seawall user`: who may do what; and oneself.

use anyhow::bail;
use clap::{Args, Subcommand};
use control::fleet::{ChangePassword, ChangeUser, Login, Name, NewUser, Role, UserInfo};
use enrol::{EnrolError, Profile};
use hyper::Method;
use serde_json::{Value, json};

use super::change::Common;
use super::login::ask_secret;
use super::{Fleet, advise, moment, not_there, say_json};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall user list
  seawall user create vera --role operator
  seawall user change vera --disabled true
  seawall user password

Users are an administrator's affair: log in with `--scope administer` for it.")]
pub(crate) struct UserOptions {
    #[command(subcommand)]
    command: UserCommand,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// All of them
    #[command(after_help = "Example:\n  seawall user list --json")]
    List(Common),
    /// Who is logged in
    #[command(after_help = "Example:\n  seawall user me")]
    Me(Common),
    /// Make one
    #[command(after_help = "Example:\n  seawall user create vera --role operator\n\n\
        Asks for the password, or takes the first line of standard input.")]
    Create {
        /// Not taken yet
        name: Name,
        /// viewer, operator or administrator
        #[arg(long, default_value = "viewer")]
        role: Role,
        #[command(flatten)]
        common: Common,
    },
    /// Change one: its role, whether it may log in, its password
    #[command(after_help = "Examples:
  seawall user change vera --role operator
  seawall user change vera --disabled true
  seawall user change vera --password

With --password the new one is asked for, or is the first line of standard input; all sessions of the user end.")]
    Change {
        /// Which, by name or id
        user: String,
        /// viewer, operator or administrator
        #[arg(long)]
        role: Option<Role>,
        /// Whether it cannot log in
        #[arg(long, value_name = "true|false")]
        disabled: Option<bool>,
        /// Give it a new password
        #[arg(long)]
        password: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Change the own password; all own sessions end, tokens stay
    #[command(after_help = "Example:\n  seawall user password\n\n\
        Asks for the old one and the new one, or takes the first two lines of standard input.")]
    Password(Common),
}

impl UserOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            UserCommand::List(common)
            | UserCommand::Me(common)
            | UserCommand::Create { common, .. }
            | UserCommand::Change { common, .. }
            | UserCommand::Password(common) => common.json,
        }
    }
}

pub(crate) async fn run(options: &UserOptions) -> anyhow::Result<Exit> {
    match &options.command {
        UserCommand::List(common) => {
            let users: Vec<UserInfo> = Fleet::open(&common.place)?.all("/users").await?;
            match common.json {
                true => say_json(&json!({ "users": users }))?,
                false => text::say(&render(&users))?,
            }
        }
        UserCommand::Me(common) => {
            let me: UserInfo = Fleet::open(&common.place)?.get("/me").await?;
            match common.json {
                true => say_json(&me)?,
                false => text::say(&format!("{}, {}\n", me.name, me.role))?,
            }
        }
        UserCommand::Create { name, role, common } => {
            let fleet = Fleet::open(&common.place)?;
            let password = ask_secret(&format!("Password of {name}")).await?;
            let asked = NewUser { name: name.clone(), role: *role, password };
            return fleet
                .act(Method::POST, "/users", &asked)
                .await?
                .say(common, &format!("The user {name} is made."));
        }
        UserCommand::Change { user, role, disabled, password, common } => {
            if role.is_none() && disabled.is_none() && !password {
                bail!("change user {user}: say what, with --role, --disabled or --password");
            }
            let fleet = Fleet::open(&common.place)?;
            let users: Vec<UserInfo> = fleet.all("/users").await?;
            let named = users.iter().find(|one| one.name.as_str() == user || one.id.as_str() == user);
            let named =
                named.ok_or_else(|| not_there("user", user, users.iter().map(|one| one.name.as_str())))?;
            let mut asked = ChangeUser { role: *role, disabled: *disabled, password: None };
            if *password {
                asked.password = Some(ask_secret(&format!("New password of {}", named.name)).await?);
            }
            let acted = fleet.act(Method::PATCH, &format!("/users/{}", named.id), &asked).await?;
            return acted.say(common, &format!("The user {} is changed.", named.name));
        }
        UserCommand::Password(common) => return own_password(common).await,
    }
    Ok(Exit::Done)
}

/// A token cannot do it: whoever has stolen one must not keep its owner out.
async fn own_password(common: &Common) -> anyhow::Result<Exit> {
    let profile = Profile::load(&common.place.find()?)?;
    let client = enrol::Client::new(profile.server.clone(), &profile.fingerprint.trust(), None, None)?;
    let old = ask_secret(&format!("Old password of {}", profile.user)).await?;
    let new = ask_secret(&format!("New password of {}", profile.user)).await?;
    match client.login(&Login { name: profile.user.clone(), password: old.clone() }).await {
        // Here its own mend is the one to show.
        Err(EnrolError::Problem(problem)) => return Err(EnrolError::Problem(problem).into()),
        answered => drop(answered.map_err(advise)?),
    }
    let asked = ChangePassword { old, new };
    client.call::<_, Value>(Method::PUT, "/me/password", Some(&asked)).await.map_err(advise)?;
    match common.json {
        true => say_json(&json!({ "changed": profile.user }))?,
        false => text::say(&format!("The password of {} is changed.\n", profile.user))?,
    }
    Ok(Exit::Done)
}

fn render(users: &[UserInfo]) -> String {
    let mut table = text::table(&["User", "Role", "May log in", "Made"], &[]);
    for user in users {
        let may = if user.disabled { "no" } else { "yes" };
        table.add_row([user.name.to_string(), user.role.to_string(), may.to_owned(), moment(user.created)]);
    }
    format!("{table}\n")
}
