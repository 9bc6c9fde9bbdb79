//! Making a config server: an authority, a configuration, an empty state with its first user and policy.
//!
//! Crash consistency: everything is made in DIR.partial, and gets its name last.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use control::fleet::{Name, Policy, Role};
use durable::{OpenMode, RealStorage, Storage};
use wire::Authority;

use crate::api::access::{check_new_password, insert_user};
use crate::api::policy::{DEFAULT_POLICY, insert_policy};
use crate::config::Config;
use crate::secret::{hash_password, new_id};
use crate::store::Store;

/// What a new config server is told.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The directory to make.
    pub dir: PathBuf,
    /// Where to listen.
    pub listen: String,
    /// Names and addresses by which it is reached.
    pub names: Vec<String>,
    /// The first administrator.
    pub administrator: String,
    /// The administrator's password.
    pub password: String,
    /// The database; a file in the directory when left out.
    pub database: Option<String>,
}

/// Makes it.
///
/// # Errors
/// When the directory is there, a value makes no sense, or the database is in use.
pub async fn init(options: &InitOptions) -> anyhow::Result<()> {
    let dir = std::path::absolute(&options.dir).with_context(|| format!("make {}", options.dir.display()))?;
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        bail!("make {}: name a directory", dir.display());
    };
    ensure!(
        !dir.exists(),
        "make {}: it is there already, and nothing is ever overwritten; choose another directory",
        dir.display()
    );
    let administrator: Name =
        options.administrator.parse().with_context(|| format!("make the user {}", options.administrator))?;
    check_new_password(&options.password)
        .map_err(|fault| anyhow::anyhow!("make the user {administrator}: {fault}"))?;
    let database = options.database.clone().unwrap_or_else(|| "sqlite:fleet.db".to_owned());
    let text = config_text(options, &database);
    let check: Config = toml::from_str(&text).context("write the configuration")?;
    check.check()?;
    let mut partial_name = name.to_owned();
    partial_name.push(".partial");
    let partial = parent.join(partial_name);
    ensure!(
        !partial.exists(),
        "make {}: an interrupted init left {}; remove it if nobody uses it",
        dir.display(),
        partial.display()
    );
    let storage = RealStorage;
    storage.create_dir_all(&partial).with_context(|| format!("make directory {}", partial.display()))?;
    let made = fill(&partial, &text, &administrator, &options.password).await.and_then(|()| {
        storage.rename(&partial, &dir).with_context(|| format!("name {}", dir.display()))?;
        storage.sync_dir(parent).with_context(|| format!("sync {}", parent.display()))
    });
    made.inspect_err(|_| {
        // Made by this call, and nobody can have used it yet.
        let _ = std::fs::remove_dir_all(&partial);
    })
}

async fn fill(dir: &Path, text: &str, administrator: &Name, password: &str) -> anyhow::Result<()> {
    Authority::create(&dir.join("ca"))?;
    let path = dir.join("config-server.toml");
    let file =
        RealStorage.open(&path, OpenMode::CreateNew).with_context(|| format!("create {}", path.display()))?;
    file.write_all_at(text.as_bytes(), 0)?;
    file.sync_data()?;
    let config = Config::load(&path)?;
    let store = Store::open(&config.database).await?;
    crate::store::ensure_empty(&store).await?;
    let hash = hash_password(password);
    let mut act = store.act().await?;
    insert_user(&mut act, administrator, Role::Administrator, &hash).await?;
    insert_policy(&mut act, &new_id(), &DEFAULT_POLICY.parse()?, &Policy::default()).await?;
    act.commit().await?;
    store.close().await;
    RealStorage.sync_dir(dir).with_context(|| format!("sync {}", dir.display()))
}

fn config_text(options: &InitOptions, database: &str) -> String {
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let names: Vec<String> = options.names.iter().map(|name| quoted(name)).collect();
    format!(
        "# The config server: who may talk to whom, what is protected and how.\n\
         # People, programs and all parts of the fleet come here, by HTTPS.\n\
         listen = {}\n\
         # Names and addresses by which they reach it; its certificate has them all.\n\
         names = [{}]\n\
         # The authority that issues every certificate. Several config servers of one fleet need the same one.\n\
         authority = \"ca\"\n\
         # This server's own certificate, which it issues itself.\n\
         credentials = \"credentials\"\n\
         # The state: a file, or for several config servers at once postgres://USER:PASSWORD@HOST/DATABASE.\n\
         database = {}\n",
        quoted(&options.listen),
        names.join(", "),
        quoted(database)
    )
}
